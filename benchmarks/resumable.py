"""A training that goes on where it was stopped: of the autoencoders that the studies need, not of what they study."""

from __future__ import annotations

import json
import signal
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn

from benchmarks.muon import Muon
from storage.base.console import progress_bar, stop_on_signals
from storage.base.errors import UserError

STATE_FILE = "training.pt"
WARMUP_STEPS = 100
FALLING = 0.25  # the last share of the steps, while the learning rate falls to zero


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up, constant, then linear to zero: a run that is given other --steps before it falls only goes on."""
    left = (steps - step) / (steps * FALLING)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS, left)


class Resumable(ABC):
    """A model, its optimisers and the steps done, in one file that is whole or absent.

    Weights of two or more dimensions are moved by Muon, the others by AdamW, at one learning rate.
    What a step sees must be a function of its number, so that a training in parts is the training in one. Raises
    UserError where the file holds other things than these.
    """

    def __init__(self, model: nn.Module, out: Path, device: torch.device) -> None:
        self.model, self.device = model, device
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=0.0),
            torch.optim.AdamW(others, lr=0.0, weight_decay=0.0, betas=(0.9, 0.99), fused=True),
        ]
        self.file = out / STATE_FILE
        self.step = 0
        if self.file.is_file():
            saved = torch.load(self.file, map_location=device, weights_only=True)
            if saved.keys() != {"model", "optimizers", "step"}:
                raise UserError(f"{self.file} is of another version of this training; name another --out, or remove it")
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step = saved["step"]

    def save(self) -> None:
        """Write all of it aside, then rename."""
        aside = self.file.with_suffix(".partial")
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "step": self.step}
        torch.save(state, aside)
        aside.rename(self.file)

    @abstractmethod
    def take(self, steps: int) -> float:
        """Step number `self.step` of `steps`, by `follow`; returns the PSNR of its batch, dB."""

    def follow(self, loss: torch.Tensor, rate: float) -> None:
        """Move against a loss's gradient, its norm at most one."""
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1


def train(training: Resumable, steps: int, save_every: int, description: str) -> bool:
    """Take the steps that are missing, saving every so often and when told to end; returns whether all are done."""
    shown = 0.0
    out = training.file.parent
    with (
        stop_on_signals(signal.SIGINT, signal.SIGTERM) as stop,
        progress_bar(steps, unit="step", done=training.step, description=description) as bar,
    ):
        while training.step < steps and stop.signal is None:
            db = training.take(steps)
            shown = db if shown == 0.0 else 0.99 * shown + 0.01 * db
            bar.update()
            bar.set_postfix_str(f"{shown:.2f} dB")
            if training.step % save_every == 0:
                training.save()
                with open(out / "training.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps({"step": training.step, "psnr_db": round(shown, 3)}) + "\n")
        training.save()
    return training.step >= steps
