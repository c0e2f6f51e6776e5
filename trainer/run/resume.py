"""The folder of a run: held by one process, resumed by the same command, refused when something else made it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from storage.base.errors import UserError
from trainer.config.schema import TrainConfig
from trainer.config.tree import checked, field_type, flatten, free_fields, override
from trainer.data.groups import TrainingData
from trainer.loop.step import TrainingState
from trainer.ranks.world import World
from trainer.run.checkpoint import OTHER_CHECKPOINT, RunState, latest_checkpoint, read_state, restore


@contextmanager
def only_writer(run: Path, world: World, doing: str = "training") -> Iterator[None]:
    """Hold the run's lock; a second process on the same run would delete what the first is writing.

    The main rank holds it, every rank must ask, and all end where it cannot be had.
    """
    failure: UserError | OSError | None = None
    with ExitStack() as held:
        try:
            if world.is_main:
                run.mkdir(parents=True, exist_ok=True)
                fcntl.flock(held.enter_context(open(run / ".lock", "w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            failure = UserError(f"another process is {doing} in {run}; name another folder, or wait for it")
        except OSError as error:
            failure = error
        world.end_together(failure, f"the main rank could not begin in {run}, and says why")
        yield


def remember_groups(config: TrainConfig) -> TrainConfig:
    """A run that chose the only group there was keeps to it when a store has gained others."""
    checkpoint = latest_checkpoint(config.run)
    if checkpoint is None:
        return config
    before = read_state(checkpoint).config
    chosen = {
        name: checked(before.get(name, ""), field_type(config, name), f"{name} of {checkpoint}")
        for name in ("data.latents", "data.features")
        if not flatten(config)[name]
    }
    return override(config, chosen)


def resolve(config: TrainConfig, data: TrainingData, world: World) -> TrainConfig:
    """The configuration with what was chosen automatically written out, so that a resume chooses the same."""
    resolved: dict[str, Any] = {"data.latents": data.latents.path.removeprefix("latents/")}
    if not config.data.features:  # all targets share the only features there are
        resolved["data.features"] = tuple({group.path.removeprefix("features/") for group in data.features})
    if not data.class_names and not config.model.classes:
        resolved["sample.guidance"] = 1.0  # towards what, without labels?
    if config.precision == "auto":
        resolved["precision"] = "bf16" if world.device.type == "cuda" else "fp32"
    return override(config, resolved)


def resume(training: TrainingState, identities: dict[str, str], accept_changes: bool) -> RunState | None:
    """Restore the newest checkpoint and return what else it says; None when the run is new.

    Raises UserError naming the settings and stores that differ, unless changes are accepted.
    """
    config = training.config
    checkpoint = latest_checkpoint(config.run)
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    free = free_fields(config)
    now = {**flatten(config), **{f"store {path}": digest for path, digest in identities.items()}}
    then = {**state.config, **{f"store {path}": digest for path, digest in state.identities.items()}}
    changed = [
        f"{name}: was {then.get(name)}, is {now.get(name)}"
        for name in sorted({*now, *then})
        if name not in free and then.get(name) not in (now.get(name), "auto")  # auto: a run imported, at step 0
    ]
    if changed and not accept_changes:
        raise UserError(
            f"run {config.run} was made otherwise ({'; '.join(changed)}); name another --run, undo the change, or pass "
            "--resume-with-changes"
        )
    if state.step > config.steps:
        raise UserError(f"run {config.run} is at step {state.step}, beyond --steps {config.steps}; raise --steps")
    restore(checkpoint, training.model, training.ema, training.optimizer)
    if training.scaler.is_enabled() and state.scaler:
        try:
            training.scaler.load_state_dict(state.scaler)
        except (KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"the loss scale in {checkpoint} is damaged ({error!r}); {OTHER_CHECKPOINT}") from None
    return state
