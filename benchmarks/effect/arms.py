"""Which runs are compared: what all of them share, and what each arm changes, as options of `python -m trainer train`.

Options are strings, as typed. A new arm is one line of `arms`.
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
SAMPLING: dict[str, str] = {"sampler": "ode", "steps": "25", "guidance": "1", "precision": "fp32"}
VANILLA, REPA = "vanilla", "repa"
STOPPED_AT = 4000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A kind of run. `title` stands in tables; `options` are what differs from COMMON.

    `begins_as`: up to a step it is, bit for bit, another arm's run of the same seed, which need not be trained again.
    """

    title: str
    seeds: tuple[int, ...]
    options: Mapping[str, str]
    begins_as: tuple[str, int] | None = None


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
        "reg": Arm(title="REG", seeds=(0,), options={**repa, "model.class-token": "true"}),
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
    return [(step, Run(arm=name, seed=seed)) for step in sorted(milestones) for seed, _, name in runs]
