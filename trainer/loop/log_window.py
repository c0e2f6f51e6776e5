"""What happened since the last log line: sums over the steps taken, and where the time went.

The sums are part of a checkpoint, so that a line that spans a resume says what an unbroken run's would have said. Time
is this process's own. MFU is counted FLOPs (three times the forward pass, projectors where a step has an alignment)
over the device's dense bf16 peak.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import TrainConfig
from trainer.loop.optimiser import learning_rate
from trainer.loop.step import StepNumbers, sizes_of_numbers
from trainer.models.flops import forward_flops_per_image
from trainer.models.transformer import Geometry
from trainer.ranks.arithmetic import peak_flops
from trainer.ranks.world import World


@dataclass
class LogWindow:
    """Sums of `StepNumbers.packed` over `count` steps, skipped ones left out."""

    sums: Tensor  # float64, on the host
    count: int = 0
    n_aligned: int = 0  # of these, the steps that had an alignment
    n_timed: int = 0  # steps of this process, which a resume begins anew
    n_timed_aligned: int = 0  # of these, the steps that had an alignment
    stall_s: float = 0.0
    start_s: float = field(default_factory=time.perf_counter)

    @classmethod
    def empty(cls, geometry: Geometry) -> LogWindow:
        """The beginning of an interval."""
        return cls(sums=torch.zeros(sum(sizes_of_numbers(geometry)), dtype=torch.float64))

    def add(self, numbers: StepNumbers, *, aligned: bool) -> None:
        """Count a step's numbers, which are on the host."""
        self.sums += numbers.packed()
        self.count += 1
        self.n_aligned += aligned

    def time(self, stall_s: float, *, aligned: bool) -> None:
        """Count a step that was taken, and how long it waited for its batch."""
        self.stall_s += stall_s
        self.n_timed += 1
        self.n_timed_aligned += aligned

    def leave_out(self, seconds: float) -> None:
        """Time that went into no step: it counts in no rate."""
        self.start_s += seconds

    def line(self, step: int, config: TrainConfig, geometry: Geometry, world: World, skipped: int) -> dict[str, Any]:
        """The log line of the interval that ends with `step`; every rank must ask, for the longest stall counts.

        Losses are None when every step of the interval was skipped.
        """
        seconds = time.perf_counter() - self.start_s
        images_per_s = self.n_timed * config.batch / seconds
        stall_s = world.max(self.stall_s)
        line: dict[str, Any] = {
            "step": step,
            **self._losses(config, geometry),
            "images_per_s": images_per_s,
            "stall_share": stall_s / seconds,
            "stall_ms_a_step": stall_s / max(1, self.n_timed) * 1e3,
            "skipped_steps": skipped,
            "learning_rate": learning_rate(config.optim, step - 1),
            "ranks": world.size,
        }
        peak = peak_flops(world.device)
        if peak is not None:
            line["mfu"] = self._flops_per_image(geometry) * images_per_s / (peak * world.size)
        return line

    def _flops_per_image(self, geometry: Geometry) -> float:
        """Forward and backward pass, the mean over the steps timed."""
        aligned, plain = (3 * forward_flops_per_image(geometry, with_projections) for with_projections in (True, False))
        return plain + (aligned - plain) * self.n_timed_aligned / max(1, self.n_timed)

    @property
    def _share_aligned(self) -> float:
        return self.n_aligned / self.count

    def _losses(self, config: TrainConfig, geometry: Geometry) -> dict[str, Any]:
        numbers = StepNumbers.unpack(self.sums, geometry)
        if self.count == 0:
            return dict.fromkeys(("loss", "denoising_loss", "alignment_loss", "gradient_norm", "loss_by_time"))
        denoising, norm = (numbers.losses[:2] / self.count).tolist()
        alignments = (numbers.losses[2:] / max(1, self.n_aligned)).tolist()
        cosines = (numbers.cosines / max(1, self.n_aligned)).tolist() or [-a for a in alignments]
        targets = config.targets if self.n_aligned else ()
        aligned: dict[str, float] = {}
        loss = denoising
        if len(numbers.class_denoising):
            aligned["class_denoising_loss"] = (numbers.class_denoising / self.count).item()
            loss += config.loss.class_weight * aligned["class_denoising_loss"]
        if targets:
            aligned["alignment_cosine"] = sum(cosines) / len(cosines)
        if len(targets) > 1:
            for target, of_target, cosine in zip(targets, alignments, cosines, strict=True):
                aligned[f"alignment_loss/{target.features}@{target.block}"] = of_target
                aligned[f"alignment_cosine/{target.features}@{target.block}"] = cosine
        by_time = [total / n if n else None for total, n in numbers.by_time.T.tolist()]
        return {
            # Of a window across the end of the alignment: its steps with one, by their share.
            "loss": loss + sum(t.weight * a for t, a in zip(targets, alignments, strict=False)) * self._share_aligned,
            "denoising_loss": denoising,
            "alignment_loss": None if config.aligns and not targets else sum(alignments) / max(1, len(alignments)),
            **aligned,
            "gradient_norm": norm,
            "loss_by_time": by_time,  # of tenths of t, from image to noise
        }


def progress_text(line: dict[str, Any]) -> str:
    """The line as the progress bar shows it."""
    parts = []
    if line["loss"] is not None:
        parts.append(f"denoising {line['denoising_loss']:.4f}")
    if line["alignment_loss"] is not None:
        parts.append(f"align {line['alignment_loss']:.4f}")
    parts.append(f"{line['images_per_s']:.0f} img/s")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.0%}")
    parts.append(f"stall {line['stall_share']:.0%}")
    if line["skipped_steps"]:
        parts.append(f"skipped {line['skipped_steps']}")
    return "  ".join(parts)
