"""What a training run is asked to do: frozen dataclasses, nested by topic, that check themselves.

Each field carries its help text; the command line's dotted options (`--loss.projection-weight`) are made from these
classes, so an option exists once. A field marked *free* may change when a run is resumed; every other one determines
the numbers, and changing it on resume must be asked for. The settings of AdamW and of sampling have files of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.base.errors import UserError
from storage.base.options import spelled
from trainer.alignment import COSINE, spelled_out
from trainer.config.data import DataConfig
from trainer.config.declaring import at_least, flag, in_unit_interval, option, section
from trainer.config.optim import OptimConfig
from trainer.config.sample import SampleConfig

Kind = Literal["sit", "dit", "lightningdit", "rit", "ditdh"]
ROTARY = ("lightningdit", "rit", "ditdh")  # kinds whose heads turn pairs of channels, half of these by row
DEFAULT_PRESET = "sit-xl-2"
PRESET_NAMES = (  # in words, of `presets.py`
    "{sit,dit}-{s,b,l,xl}-{2,4,8}[-512][-vanilla], {sit,dit}-{b,l,xl}-1[-vanilla], sit-{b,l,xl}-2-reg, "
    "lightningdit-{b,xl}-1, rit-xl-1, ditdh-{s,xl}-1, sit-tiny-2, dit-tiny-2"
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The diffusion transformer."""

    kind: Kind = option(
        "sit",
        "sit: velocity on an interpolant; dit: noise and variance of a diffusion in 1,000 steps; lightningdit: "
        "velocity, with RMS norms, rotary positions and SwiGLU; rit: the latents themselves, with the label's tokens "
        "in the sequence; ditdh: velocity, by a wide shallow head",
    )
    depth: int = option(28, "transformer blocks")
    width: int = option(1152, "channels of a token")
    heads: int = option(16, "attention heads; must divide the width")
    patch: int = option(2, "latent pixels a side of a token")
    qk_norm: bool = option(False, "normalise queries and keys")
    class_token: bool = option(
        False,
        "sit: the features' class token joins the sequence, is noised, predicted and aligned (REG); rit: so does that "
        "of the features that are the latents, without alignment",
        of_alignment=True,
    )
    head_width: int = option(0, "ditdh: channels of a token in the head")
    head_depth: int = option(0, "ditdh: blocks of the head")
    head_heads: int = option(0, "ditdh: attention heads of the head; must divide its width")
    context: int = option(0, "rit: tokens of the label that join the sequence; 0: none")
    context_block: int = option(1, "rit: block before which they join, counted from 1")
    classes: int = option(0, "classes of the label embedding; 0: as many as the store's index names, if any")
    align_block: tuple[int, ...] = option(
        (8,),
        "block after which hidden states are aligned with the features, counted from 1; one, or one a target",
        of_alignment=True,
        often=True,
    )
    projector_width: int = option(2048, "hidden width of the projectors", of_alignment=True)

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch", "projector_width"):
            at_least(self, "model", name, 1)
        at_least(self, "model", "classes", 0)
        if self.width % self.heads:
            raise UserError(f"--model.heads must divide --model.width, got {self.heads} and {self.width}")
        if self.width % 4:
            raise UserError(f"--model.width must be a multiple of 4 for the position embedding, got {self.width}")
        if not self.align_block:
            raise UserError("--model.align-block must name a block; a vanilla run is --loss.projection-weight 0")
        at_least(self, "model", "context", 0)
        if self.context:
            self.require_block("context-block", self.context_block)
        for name in ("head_width", "head_depth", "head_heads"):
            at_least(self, "model", name, 1 if self.kind == "ditdh" else 0)
            if self.kind != "ditdh" and getattr(self, name):
                raise UserError(f"{flag('model', name)} is of --model.kind ditdh; leave it at 0 with {self.kind}")
        if self.kind == "ditdh" and self.head_width % self.head_heads:
            raise UserError(
                f"--model.head-heads must divide --model.head-width, got {self.head_heads} and {self.head_width}"
            )
        if self.kind in ROTARY:
            self._check_heads("width", self.width, self.heads)
        if self.kind == "ditdh":
            self._check_heads("head_width", self.head_width, self.head_heads)
        if self.context and self.kind != "rit":
            raise UserError(f"--model.context is of --model.kind rit; leave it at 0 with {self.kind}")

    def _check_heads(self, name: str, width: int, heads: int) -> None:
        if width // heads % 4:
            raise UserError(
                f"{flag('model', name)} over its heads must be a multiple of 4 for rotary positions of "
                f"--model.kind {self.kind}, got {width} over {heads} = {width // heads}; change either"
            )

    def require_block(self, name: str, block: int) -> None:
        """Raises UserError for what is no block of this model."""
        if not 1 <= block <= self.depth:
            raise UserError(f"--model.{name} must be a block, 1 to {self.depth} (--model.depth), got {block}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective: denoising loss + Σ projection weight × alignment loss, over the alignment targets."""

    path: Literal["linear", "cosine"] = option("linear", "SiT: interpolant between image (t = 0) and noise (t = 1)")
    time_sampling: Literal["uniform", "logit-normal", "lognormal"] = option(
        "uniform", "distribution of a flow's times t (lognormal is the older word for logit-normal)"
    )
    time_shift: float = option(
        1.0,
        "s of the noise levels s·t / (1 + (s − 1)·t) that a flow is trained at; above 1 more of them near noise; "
        "1: t as it is drawn; 0: √(C·h·w / 4096) for latents of C·h·w numbers, as RAE and RiT",
    )
    alignment: tuple[str, ...] = option(
        (COSINE,),
        "how projections are compared with features, one or one a target: NAME, or NAME:option=value; "
        "`python -m trainer alignments` lists them",
        of_alignment=True,
        often=True,
    )
    label_dropout: float = option(0.1, "share of labels replaced by the null class, for guidance")
    direction_weight: float = option(
        0.0, "weight of one minus the cosine, over channels, between the velocity and the predicted one"
    )
    stop_alignment_at: int = option(
        0,
        "step from which on there is no alignment, at once: no features are read for it, projectors rest (HASTE); 0: "
        "never",
        of_alignment=True,
    )
    class_weight: float = option(
        0.03, "weight of the class token's denoising loss, where the model has one (RiT's is 0.2)", of_alignment=True
    )
    class_noise: Literal["own", "mean"] = option(
        "own", "rit: noise of the class token, drawn for itself or the mean of the latents' noise over their places"
    )
    projection_weight: tuple[float, ...] = option(
        (0.5,),
        "λ of the alignment loss, one or one a target, which add up; 0: vanilla, no features are read",
        often=True,
    )

    def __post_init__(self) -> None:
        in_unit_interval(self, "loss", "label_dropout")
        if not 0 <= self.time_shift < math.inf:
            raise UserError(f"--loss.time-shift must be positive and finite, or 0, got {self.time_shift}")
        at_least(self, "loss", "class_weight", 0)
        at_least(self, "loss", "direction_weight", 0)
        at_least(self, "loss", "stop_alignment_at", 0)
        if self.time_sampling == "lognormal":
            object.__setattr__(self, "time_sampling", "logit-normal")
        object.__setattr__(self, "alignment", tuple(spelled_out(spelling) for spelling in self.alignment))
        if not self.alignment:
            raise UserError("--loss.alignment must name a kind; a vanilla run is --loss.projection-weight 0")
        if not self.projection_weight or not all(0 <= weight < math.inf for weight in self.projection_weight):
            raise UserError(f"--loss.projection-weight must be at least 0, got {spelled(self.projection_weight)}")
        if len(self.projection_weight) > 1 and 0 in self.projection_weight:
            raise UserError(
                f"--loss.projection-weight {spelled(self.projection_weight)} gives a target no weight; leave it out of "
                "the lists, or pass 0 alone for a vanilla run"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and how much of it stays on disk."""

    every: int = option(10_000, "steps between checkpoints; the last step is always saved", free=True, often=True)
    keep: int = option(2, "newest checkpoints kept", free=True)
    milestone_every: int = option(0, "checkpoints of multiples of so many steps are kept for good; 0: none", free=True)

    def __post_init__(self) -> None:
        at_least(self, "checkpoint", "every", 1)
        at_least(self, "checkpoint", "keep", 1)
        at_least(self, "checkpoint", "milestone_every", 0)
        if self.milestone_every % self.every:
            raise UserError(
                f"--checkpoint.milestone-every must be a multiple of --checkpoint.every ({self.every}), "
                f"got {self.milestone_every}"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every: int = option(50, "steps between lines of metrics.jsonl and TensorBoard points", free=True)
    tensorboard: bool = option(True, "write TensorBoard events below RUN/tensorboard", free=True)
    wandb: str = option("", "Weights & Biases project to log to as well; empty: none", free=True, often=True)
    samples_every: int = option(10_000, "steps between grids of samples in RUN/samples; 0: none", free=True)
    samples: int = option(16, "images in a grid of samples", free=True)
    distance_every: int = option(
        0,
        "steps between Fréchet distances of samples, a curve to watch a training by; 0: none",
        free=True,
    )
    distance_images: int = option(2048, "images that such a distance is of", free=True)
    distance_reference: str = option(
        "",
        "feature file that they are compared with, whose encoder describes them: `python -m pipeline features IMAGES "
        "--encoder NAME --out FILE`",
        free=True,
    )

    def __post_init__(self) -> None:
        at_least(self, "log", "every", 1)
        at_least(self, "log", "samples_every", 0)
        at_least(self, "log", "samples", 1)
        at_least(self, "log", "distance_every", 0)
        at_least(self, "log", "distance_images", 2)
        if self.distance_every and not self.distance_reference:
            raise UserError(
                f"--log.distance-every {self.distance_every} has nothing to compare with; pass "
                "--log.distance-reference FILE, of `python -m pipeline features IMAGES --encoder NAME --out FILE`"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    store: str = option("", "store with latents/ and, to align, features/; a path or URL", free=True, often=True)
    run: Path = option(Path(), "folder of the run, which is resumed if it is there", free=True, often=True)
    preset: str = option(
        "",
        f"recipe that the other defaults come from: {PRESET_NAMES} (default {DEFAULT_PRESET})",
        free=True,
        often=True,
    )
    steps: int = option(400_000, "optimiser steps in all, resumed ones included", free=True, often=True)
    batch: int = option(256, "samples a step over all ranks and micro-batches (global batch)", often=True)
    seed: int = option(0, "of weights, order, noise, times and label dropout", often=True)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda when there is one", free=True, often=True)
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = option(
        "auto",
        "of the model's arithmetic, weights are float32: bf16 and fp16 by autocast, tf32 in matrix products; auto: "
        "bf16 on cuda, fp32 on cpu",
        often=True,
    )
    deterministic: bool = option(False, "only kernels that repeat bit for bit; slower on cuda")
    compile: bool = option(False, "compile the transformer blocks, the draws and the losses", free=True, often=True)
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "on several ranks: weights and optimiser on each (ddp), or sharded over them (fsdp)", free=True
    )
    accumulate: int = option(1, "micro-batches that a rank's part of a batch is computed in, to save memory", free=True)
    max_skipped: int = option(10, "steps with a non-finite loss or gradient left out before the run stops", free=True)
    ema_decay: float = option(0.9999, "decay of the averaged weights, which samples are drawn from")
    model: ModelConfig = section(ModelConfig)
    loss: LossConfig = section(LossConfig)
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    sample: SampleConfig = section(SampleConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            at_least(self, "", name, 1)
        at_least(self, "", "max_skipped", 0)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be in [0, 2⁶³), got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay must be in [0, 1), got {self.ema_decay}")
        if (self.model.kind == "dit") != (self.sample.sampler == "ddpm"):
            fitting = "ddpm" if self.model.kind == "dit" else "sde or ode"
            raise UserError(
                f"--sample.sampler {self.sample.sampler} cannot draw from --model.kind {self.model.kind}; "
                f"choose {fitting}"
            )
        if self.model.kind in ("lightningdit", "rit", "ditdh") and self.loss.path != "linear":
            raise UserError(
                f"--model.kind {self.model.kind} has a linear path; leave --loss.path at it, not {self.loss.path}"
            )
        if self.model.kind in ("dit", "rit") and self.loss.direction_weight:
            raise UserError(
                f"--loss.direction-weight is of a velocity, which --model.kind {self.model.kind} does not predict; "
                "leave it at 0"
            )
        if "mean" in (self.loss.class_noise, self.sample.class_noise):
            if self.model.kind != "rit":
                raise UserError(
                    "--loss.class-noise mean and --sample.class-noise mean are of --model.kind rit, not "
                    f"{self.model.kind}"
                )
            if not self.model.class_token:
                raise UserError(
                    "--loss.class-noise mean and --sample.class-noise mean are of a class token; leave them at own "
                    "with --model.class-token false"
                )
        for name, shift in (("--sample.shift", self.sample.shift), ("--loss.time-shift", self.loss.time_shift)):
            if self.model.kind == "dit" and shift != 1:
                raise UserError(f"{name} {shift} is of flows; leave it at 1 with --model.kind dit")
        if self.model.kind == "dit" and (self.loss.path, self.loss.time_sampling) != ("linear", "uniform"):
            raise UserError(
                f"--loss.path {self.loss.path} and --loss.time-sampling {self.loss.time_sampling} are settings of "
                "--model.kind sit; leave them at linear and uniform for dit, whose diffusion is fixed"
            )
        for block in self.model.align_block if self.aligns else ():  # a preset's, where a run has no use for it
            self.model.require_block("align-block", block)
        if self.model.class_token:
            self._check_class_token()
        if self.loss.stop_alignment_at and not self.aligns:
            raise UserError(
                f"--loss.stop-alignment-at {self.loss.stop_alignment_at} has nothing to stop with "
                "--loss.projection-weight 0; give a weight, or leave it out"
            )
        if self.data.features and not self.aligns:
            raise UserError(
                f"--data.features {spelled(self.data.features)} would not be read with --loss.projection-weight 0; "
                "give a weight, or leave the features empty"
            )
        lists = (self.data.features, self.model.align_block, self.loss.projection_weight, self.loss.alignment)
        lengths = {len(values) for values in lists if len(values) > 1}
        if len(lengths) > 1 and self.aligns:
            given = " ".join(
                f"{name} {spelled(values)}" for name, values in zip(TARGET_OPTIONS, lists, strict=True) if values
            )
            raise UserError(f"{given} do not agree on the number of alignment targets; give one value, or one a target")

    def _check_class_token(self) -> None:
        if self.model.kind not in ("sit", "rit"):
            raise UserError(
                f"--model.class-token true goes with --model.kind sit or rit; it has no published form in "
                f"{self.model.kind}"
            )
        if self.model.kind == "sit" and not self.aligns:
            raise UserError(
                "--model.class-token true needs features, whose class token it is, and an alignment with them; give "
                "--loss.projection-weight"
            )
        if self.sample.guidance_channels:
            raise UserError(
                "--sample.guidance-channels is for models without class token; leave it at 0 with --model.class-token"
            )

    def require_store(self) -> str:
        """The store. Raises UserError where none was named."""
        if not self.store:
            raise UserError("no store was named; pass --store ROOT (make train STORE=ROOT)")
        return self.store

    @property
    def aligns(self) -> bool:
        """Whether the alignment loss is part of the objective; without it no features are read."""
        return any(self.loss.projection_weight)

    def aligns_at(self, step: int) -> bool:
        """Whether the step that is number `step`, from 0, has an alignment."""
        return self.aligns and not 0 < self.loss.stop_alignment_at <= step

    @property
    def class_guidance(self) -> float:
        """The class token's guidance scale, 0 of a model without class token."""
        return self.sample.class_guidance if self.model.class_token else 0.0

    @property
    def targets(self) -> tuple[AlignmentTarget, ...]:
        """What hidden states are aligned with, none in a vanilla run; a setting given once applies to all."""
        lists = (
            self.data.features or ("",),
            self.model.align_block,
            self.loss.projection_weight,
            self.loss.alignment,
        )
        n = max(len(values) for values in lists) if self.aligns else 0
        features, blocks, weights, alignments = (values * n if len(values) == 1 else values for values in lists)
        return tuple(
            AlignmentTarget(features=f, block=b, weight=w, alignment=a)  # type: ignore[arg-type]
            for f, b, w, a in zip(features, blocks, weights, alignments, strict=n > 0)
        )


TARGET_OPTIONS = ("--data.features", "--model.align-block", "--loss.projection-weight", "--loss.alignment")


@dataclass(frozen=True, kw_only=True)
class AlignmentTarget:
    """One target of the alignment loss: features (empty: the only ones there are), block counted from 1, λ, kind."""

    features: str
    block: int
    weight: float
    alignment: str = COSINE
