"""The settings of the optimiser and of its learning rate; `loop/optimiser.py` does what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from storage.base.errors import UserError
from trainer.config.declaring import at_least, flag, option


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = option(1e-4, "learning rate, after the warm-up and before the decay", often=True)
    warmup: int = option(0, "steps over which the learning rate rises linearly to --optim.lr; 0: none")
    decay: Literal["none", "linear", "cosine"] = option("none", "how the learning rate falls to --optim.final-lr")
    decay_from: int = option(0, "step at which the decay begins")
    decay_until: int = option(0, "step at which the learning rate has reached --optim.final-lr, where it stays")
    final_lr: float = option(0.0, "learning rate after the decay")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.999, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.0, "decoupled weight decay")
    clip: float = option(1.0, "largest norm of the whole gradient")

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{flag('optim', name)} must be positive and finite, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag('optim', name)} must be in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "warmup", "decay_from", "final_lr"):
            at_least(self, "optim", name, 0)
        if self.decay == "none" and (self.decay_from, self.decay_until, self.final_lr) != (0, 0, 0.0):
            raise UserError(
                "--optim.decay-from, --optim.decay-until and --optim.final-lr are of a decay; pass --optim.decay "
                "linear or cosine, or leave them out"
            )
        if self.decay != "none" and not max(self.warmup, self.decay_from) < self.decay_until:
            raise UserError(
                f"--optim.decay {self.decay} needs --optim.decay-until, a step after --optim.decay-from "
                f"({self.decay_from}) and --optim.warmup ({self.warmup}), got {self.decay_until}"
            )
        if self.final_lr > self.lr:
            raise UserError(f"--optim.final-lr {self.final_lr} is above --optim.lr {self.lr}; a decay falls")
