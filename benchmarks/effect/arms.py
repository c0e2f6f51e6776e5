"""Which runs are compared: what they share, and what each arm changes, as options of `python -m trainer train`.

Options are strings, as typed. A new arm is one line of `arms`, a new variant one of `variants`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# 3.5 M parameters and 0.6 M of a projector. Aligned after two of five blocks, where SiT-B/2 and SiT-XL/2 are after a
# third; the projector is narrower than REPA's, whose 2048 channels would cost twice what this transformer does.
COMMON: dict[str, str] = {
    "preset": "sit-tiny-2",
    "model.depth": "5",
    "model.width": "192",
    "model.heads": "3",
    "model.align-block": "2",
    "model.projector-width": "512",
    "batch": "32",
    "optim.lr": "1e-3",
    "ema-decay": "0.999",
    "precision": "fp32",
    "log.every": "50",
    "log.samples-every": "0",
    "log.tensorboard": "false",
}
# SiT-B/2, for a GPU: 16 × 16 tokens at 256 px; averaged over fewer steps than in the preset, for runs of thousands.
BASE: dict[str, str] = {
    "preset": "sit-b-2",
    "batch": "256",
    "ema-decay": "0.995",
    "precision": "bf16",
    "log.every": "50",
    "log.samples-every": "0",
    "log.tensorboard": "false",
}
SCALES = {"small": COMMON, "base": BASE}
SAMPLING: dict[str, str] = {"sampler": "ode", "steps": "25", "guidance": "1", "precision": "fp32"}
VANILLA, REPA = "vanilla", "repa"
STOPPED_AT = 4000
VARIANTS_UNTIL = 4000
LARGER = {"model.width": "288", "model.depth": "6", "model.heads": "6"}  # 9 M parameters without the projector


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A kind of run. `title` stands in tables; `options` are what differs from those of all runs.

    `begins_as`: up to a step it is, bit for bit, another arm's run of the same seed, which need not be trained again.
    A variant asks why the gain is as large as it is: it ends at `until`, no images are drawn of it, and it stands in a
    table of its own, compared with the arm `beside` it, seed by seed.
    """

    title: str
    seeds: tuple[int, ...]
    options: Mapping[str, str]
    begins_as: tuple[str, int] | None = None
    until: int | None = None
    variant: bool = False
    beside: str = ""


def arms(features: str, final: str, control: str) -> dict[str, Arm]:
    """Every arm by its folder's name, from the names of features in the store: a middle block's, the final norm's, and
    the middle block's of another photograph of the same class."""
    repa = {"data.features": features}
    return {
        VANILLA: Arm(title="vanilla", seeds=(0, 1, 2), options={"loss.projection-weight": "0"}),
        REPA: Arm(title="REPA", seeds=(0, 1, 2), options=repa),
        "repa-stopped": Arm(
            title="REPA, stopped half-way",
            seeds=(0,),
            options={**repa, "loss.stop-alignment-at": str(STOPPED_AT)},
            begins_as=(REPA, STOPPED_AT),
        ),
        "repa-final": Arm(title="REPA, final layer", seeds=(0,), options={"data.features": final}),
        "repa-other": Arm(title="REPA, another photograph", seeds=(0,), options={"data.features": control}),
        "irepa": Arm(
            title="iREPA", seeds=(0,), options={**repa, "loss.alignment": "irepa", "loss.projection-weight": "1"}
        ),
        "reg": Arm(title="REG, block 8", seeds=(0,), options={**repa, "model.class-token": "true"}),
        "reg-final": Arm(
            title="REG, final layer", seeds=(0,), options={"data.features": final, "model.class-token": "true"}
        ),
    }


def variants(features: str) -> dict[str, Arm]:
    """Arms that ask why alignment gains what it does here: its weight, its block, what reads it, the model's size."""
    vanilla, repa = {"loss.projection-weight": "0"}, {"data.features": features}
    of_them = (
        ("repa-weight-2", "REPA, weight 2, not 0.5", VANILLA, {**repa, "loss.projection-weight": "2"}),
        ("repa-block-4", "REPA after block 4 of 5, not 2", VANILLA, {**repa, "model.align-block": "4"}),
        ("repa-wide", "REPA, projector of 2,048, not 512", VANILLA, {**repa, "model.projector-width": "2048"}),
        ("vanilla-larger", "vanilla of 9 M parameters", "", {**LARGER, **vanilla}),
        ("repa-larger", "REPA of 9 M parameters, not 3.5", "vanilla-larger", {**LARGER, **repa}),
    )
    return {
        name: Arm(title=title, seeds=(0,), options=options, until=VARIANTS_UNTIL, variant=True, beside=beside)
        for name, title, beside, options in of_them
    }


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-seed{self.seed}"


def interleaved(of_arms: Mapping[str, Arm], milestones: tuple[int, ...]) -> list[tuple[int, Run]]:
    """(step, run) in the order of work: all runs to a milestone before any goes on, first seeds of all arms first.

    Whenever the work is stopped, what is there compares.
    """
    runs = sorted((seed, place, name) for place, (name, arm) in enumerate(of_arms.items()) for seed in arm.seeds)
    return [
        (step, Run(arm=name, seed=seed))
        for step in sorted(milestones)
        for seed, _, name in runs
        if step <= (of_arms[name].until or step)
    ]
