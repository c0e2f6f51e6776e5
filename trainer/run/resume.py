"""A run continues from its newest checkpoint; it is refused when its settings or its stores are others."""

from __future__ import annotations

from storage.base.errors import UserError
from trainer.config.saved import parse_config
from trainer.config.tree import LONGEST, flatten, free_fields
from trainer.loop.step import TrainingState, without_alignment
from trainer.run.checkpoint import OTHER_CHECKPOINT, RunState, latest_checkpoint, read_state, restore


def resume(
    training: TrainingState, identities: dict[str, str], accept_changes: bool
) -> tuple[TrainingState, RunState | None]:
    """Restore the newest checkpoint; returns the state and what else the checkpoint says, None when the run is new.

    Raises UserError naming the settings and stores that differ, unless changes are accepted.
    """
    config = training.config
    checkpoint = latest_checkpoint(config.run)
    if checkpoint is None:
        return training, None
    state = read_state(checkpoint)
    free = free_fields(config)
    now = {**flatten(config), **{f"store {path}": digest for path, digest in identities.items()}}
    saved = parse_config(state.config, f"checkpoint {checkpoint}").config
    then = {**flatten(saved), **{f"store {path}": digest for path, digest in state.identities.items()}}
    changed = [
        f"{name}: was {_short(then.get(name))}, is {_short(now.get(name))}"
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
    if state.alignment_stopped:
        training = without_alignment(training)
    restore(checkpoint, training.model, training.ema, training.optimizer)
    if training.scaler.is_enabled() and state.scaler:
        try:
            training.scaler.load_state_dict(state.scaler)
        except (KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"the loss scale in {checkpoint} is damaged ({error!r}); {OTHER_CHECKPOINT}") from None
    return training, state


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
