"""What a training run is asked to do: frozen dataclasses, nested by topic, that check themselves.

Each field carries its help text; the command line's dotted options (`--loss.projection-weight`) are made from these
classes, so an option exists once. A field marked *free* may change when a run is resumed; every other one determines
the numbers, and changing it on resume must be asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.base.errors import UserError
from storage.base.options import spelled
from trainer.alignment import COSINE, spelled_out
from trainer.config.declaring import at_least, flag, in_unit_interval, option, section

Kind = Literal["sit", "dit", "lightningdit", "rit", "ditdh"]
DEFAULT_PRESET = "sit-xl-2"
AS_IMAGE = -1.0  # of a class token's guidance scale and interval
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
        for name, block in (
            *(("align-block", block) for block in self.align_block),
            ("context-block", self.context_block),
        ):
            if not 1 <= block <= self.depth:
                raise UserError(f"--model.{name} must be a block, 1 to {self.depth} (--model.depth), got {block}")
        for name in ("head_width", "head_depth", "head_heads"):
            at_least(self, "model", name, 1 if self.kind == "ditdh" else 0)
            if self.kind != "ditdh" and getattr(self, name):
                raise UserError(f"{flag('model', name)} is of --model.kind ditdh; leave it at 0 with {self.kind}")
        if self.kind == "ditdh" and self.head_width % self.head_heads:
            raise UserError(
                f"--model.head-heads must divide --model.head-width, got {self.head_heads} and {self.head_width}"
            )
        at_least(self, "model", "context", 0)
        if self.context and self.kind != "rit":
            raise UserError(f"--model.context is of --model.kind rit; leave it at 0 with {self.kind}")


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
    )
    label_dropout: float = option(0.1, "share of labels replaced by the null class, for guidance")
    direction_weight: float = option(
        0.0, "weight of one minus the cosine, over channels, between the velocity and the predicted one"
    )
    stop_alignment_at: int = option(
        0,
        "step from which on there is no alignment, at once: no features are read, projectors rest (HASTE); 0: never",
        of_alignment=True,
    )
    class_weight: float = option(
        0.03, "weight of the class token's denoising loss, where the model has one", of_alignment=True
    )
    class_noise: Literal["own", "mean"] = option(
        "own", "rit: noise of the class token, drawn for itself or the mean of the latents' noise over their places"
    )
    projection_weight: tuple[float, ...] = option(
        (0.5,), "λ of the alignment loss, one or one a target, which add up; 0: vanilla, no features are read"
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
class DataConfig:
    """What is read from the store."""

    latents: str = option(
        "",
        "latents to train on, a name below latents/, or features/NAME for an encoder's features as latents; empty: the "
        "only latents there are",
    )
    latent_statistics: Path = option(
        Path(),
        "features as latents: a published file of mean and var of each place (and mean_cls_token, var_cls_token); "
        "empty: those that `python -m storage statistics --places` counted",
        free=True,
    )
    latent_statistics_sha256: str = option("", "of the numbers of these statistics, which the run keeps a copy of")
    features: tuple[str, ...] = option(
        (),
        "features to align with, names below features/, one a target; empty: the only ones there are",
        of_alignment=True,
    )
    latent_normalisation: Literal["auto", "scale", "channel"] = option(
        "auto",
        "auto: by the statistics of the latents' identity, if it has some, else by its factor; scale: by its factor; "
        "channel: by mean and deviation of every channel, over all latents",
    )
    decoder: str = option(
        "",
        "features as latents: what makes pictures of them, a folder or hub id of diffusers' AutoencoderRAE; empty: "
        "nothing does",
        free=True,
    )
    latent_mean: tuple[float, ...] = option(
        (), "means of --data.latent-normalisation channel; empty: those of all latents, measured once and kept"
    )
    latent_std: tuple[float, ...] = option((), "deviations that go with --data.latent-mean")
    latent_deviation: Literal["refuse", "accept"] = option(
        "refuse",
        "what to do when the latents' deviation is far from 1 after they are normalised",
        free=True,
        before="accept",
    )
    resolution: int = option(0, "pixels a side that the store must have been made at; 0: any")
    failed_rows: Literal["leave-out", "refuse"] = option(
        "leave-out", "what to do when samples of a group used could not be decoded"
    )
    prefetch: int = option(3, "batches read ahead, each in its own (pinned) buffer", free=True)
    threads: int = option(0, "threads that gather rows of one array; 0: as the kind of store needs", free=True)
    resident: Literal["stream", "ram", "gpu"] = option(
        "stream",
        "stream: rows are read when they are visited; ram: all of them once, into one copy a machine, which its ranks "
        "share; gpu: into the memory of each rank's device. The batches are the same",
        free=True,
    )
    cache: Path = option(Path(), "folder on a local disk that keeps a part of a remote store", free=True)
    cache_gb: float = option(0.0, "most gigabytes that the cache takes, over all arrays", free=True)

    def __post_init__(self) -> None:
        at_least(self, "data", "prefetch", 1)
        at_least(self, "data", "threads", 0)
        at_least(self, "data", "resolution", 0)
        at_least(self, "data", "cache_gb", 0)
        if (self.cache != Path()) != (self.cache_gb > 0):
            raise UserError(
                "a cache needs a folder and a size; pass --data.cache DIR and --data.cache-gb N, or neither"
            )
        if "" in self.features:
            raise UserError(f"--data.features {spelled(self.features)} has an empty name; separate names by one comma")
        if len(self.latent_mean) != len(self.latent_std):
            raise UserError(
                f"--data.latent-mean has {len(self.latent_mean)} numbers and --data.latent-std {len(self.latent_std)}; "
                "give both a number a channel, or neither"
            )
        if self.latent_mean and self.latent_normalisation != "channel":
            raise UserError(
                "--data.latent-mean and --data.latent-std go with --data.latent-normalisation channel, not "
                f"{self.latent_normalisation}"
            )
        for value in self.latent_mean:
            if not math.isfinite(value):
                raise UserError(f"--data.latent-mean must be finite, got {value}")
        for value in self.latent_std:
            if not 0 < value < math.inf:
                raise UserError(f"--data.latent-std must be positive and finite, got {value}")
        if self.latents.startswith("features/") and self.latent_normalisation != "auto":
            raise UserError(
                f"--data.latents {self.latents} is normalised by channel and place; leave --data.latent-normalisation "
                f"at auto, not {self.latent_normalisation}"
            )
        if self.latent_statistics != Path() and not self.latents.startswith("features/"):
            raise UserError(
                "--data.latent-statistics is of features as latents; pass --data.latents features/NAME, or leave it out"
            )
        object.__setattr__(self, "latents", self.latents.removeprefix("latents/"))
        object.__setattr__(self, "features", tuple(name.removeprefix("features/") for name in self.features))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = option(1e-4, "learning rate, after the warm-up and before the decay")
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


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and how much of it stays on disk."""

    every: int = option(10_000, "steps between checkpoints; the last step is always saved", free=True)
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
    wandb: str = option("", "Weights & Biases project to log to as well; empty: none", free=True)
    samples_every: int = option(10_000, "steps between grids of samples in RUN/samples; 0: none", free=True)
    samples: int = option(16, "images in a grid of samples", free=True)

    def __post_init__(self) -> None:
        at_least(self, "log", "every", 1)
        at_least(self, "log", "samples_every", 0)
        at_least(self, "log", "samples", 1)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How `trainer generate` draws images from this run; saved with it, and may be overridden there."""

    sampler: Literal["sde", "ode", "ddpm"] = option(
        "sde", "SiT: Euler–Maruyama (sde) or Euler (ode); DiT: ancestral sampling (ddpm)", free=True
    )
    steps: int = option(250, "steps of the sampler", free=True)
    heun: bool = option(False, "Heun's correction of the ode sampler, which calls the model twice a step", free=True)
    shift: float = option(
        1.0,
        "s of the noise levels s·t / (1 + (s − 1)·t) that a sampler visits; above 1 more of them near noise; 0: as "
        "--loss.time-shift",
        free=True,
    )
    end: float = option(
        0.0, "noise level, before the shift, at which the ode sampler ends and leaves what noise there is", free=True
    )
    guidance: float = option(
        1.0,
        "classifier-free guidance scale, of a class token too unless --sample.guidance-class says; 1: none",
        free=True,
    )
    guidance_low: float = option(0.0, "guidance applies from this t, 0 (image) to 1 (noise)", free=True)
    guidance_high: float = option(1.0, "guidance applies up to this t", free=True)
    guidance_channels: int = option(0, "latent channels that guidance applies to, the first ones; 0: all", free=True)
    labels: Literal["balanced", "random", "uniform"] = option(
        "balanced",
        "classes of generated images: each in turn, or drawn at random (uniform is the older word)",
        free=True,
    )
    guidance_class: float = option(
        AS_IMAGE,
        "guidance scale of the class token where guidance applies; 0: none, -1: that of --sample.guidance, as "
        "published",
        free=True,
        before=0.0,
    )
    guidance_class_low: float = option(AS_IMAGE, "the class token's own --sample.guidance-low; -1: the same", free=True)
    guidance_class_high: float = option(
        AS_IMAGE, "the class token's own --sample.guidance-high; -1: the same", free=True
    )
    class_noise: Literal["own", "mean"] = option(
        "own",
        "rit: what the class token starts from, draws of its own or the mean of the latents' over their places",
        free=True,
    )

    def __post_init__(self) -> None:
        at_least(self, "sample", "steps", 2 if self.sampler == "sde" else 1)
        at_least(self, "sample", "guidance", 1)
        at_least(self, "sample", "guidance_channels", 0)
        if self.guidance_class != AS_IMAGE and not 0 <= self.guidance_class < math.inf:
            raise UserError(
                "--sample.guidance-class must be at least 0, or -1 for that of --sample.guidance, got "
                f"{self.guidance_class}"
            )
        if self.sampler == "ddpm" and self.steps > 1000:
            raise UserError(f"--sample.steps is at most 1000 with --sample.sampler ddpm, got {self.steps}")
        if self.heun and self.sampler != "ode":
            raise UserError(f"--sample.heun true goes with --sample.sampler ode, not {self.sampler}")
        if not 0 <= self.shift < math.inf:
            raise UserError(f"--sample.shift must be positive and finite, or 0, got {self.shift}")
        if not 0 <= self.end < 1 or (self.end and self.sampler != "ode"):
            raise UserError(
                "--sample.end must be in [0, 1), and 0 but for --sample.sampler ode, "
                f"got {self.end} with {self.sampler}"
            )
        for of, (low, high) in (("", (self.guidance_low, self.guidance_high)), ("class-", self.class_interval)):
            if not 0 <= low <= high <= 1:
                raise UserError(
                    f"--sample.guidance-{of}low and --sample.guidance-{of}high must be an interval inside [0, 1], "
                    f"got {low} and {high}"
                )

    @property
    def class_interval(self) -> tuple[float, float]:
        """The noise levels at which the class token is guided."""
        low, high = self.guidance_class_low, self.guidance_class_high
        return (self.guidance_low if low == AS_IMAGE else low, self.guidance_high if high == AS_IMAGE else high)

    @property
    def class_guidance(self) -> float:
        """The class token's guidance scale where guidance applies; 0 or 1: none."""
        return self.guidance if self.guidance_class == AS_IMAGE else self.guidance_class


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    store: str = option("", "store with latents/ and, for the alignment, features/: a directory or a URL", free=True)
    run: Path = option(
        Path(), "folder of the run: config, metrics, checkpoints; a run that is there is resumed", free=True
    )
    preset: str = option(
        "", f"recipe that the other defaults come from: {PRESET_NAMES} (default {DEFAULT_PRESET})", free=True
    )
    steps: int = option(400_000, "optimiser steps in all, resumed ones included", free=True)
    batch: int = option(256, "samples a step over all ranks and micro-batches (global batch)")
    seed: int = option(0, "seed of weights, order, noise, times and label dropout")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda when there is one", free=True)
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = option(
        "auto",
        "arithmetic of the model, whose weights are float32: bf16 and fp16 (with a loss scale) by autocast, tf32 in "
        "matrix products only; auto: bf16 on cuda, fp32 on cpu",
    )
    deterministic: bool = option(False, "only kernels that repeat bit for bit; slower on cuda")
    compile: bool = option(False, "compile the transformer blocks, the draws and the losses", free=True)
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
        if "mean" in (self.loss.class_noise, self.sample.class_noise) and self.model.kind != "rit":
            raise UserError(
                f"--loss.class-noise mean and --sample.class-noise mean are of --model.kind rit, not {self.model.kind}"
            )
        for name, shift in (("--sample.shift", self.sample.shift), ("--loss.time-shift", self.loss.time_shift)):
            if self.model.kind == "dit" and shift != 1:
                raise UserError(f"{name} {shift} is of flows; leave it at 1 with --model.kind dit")
        if self.model.kind == "dit" and (self.loss.path, self.loss.time_sampling) != ("linear", "uniform"):
            raise UserError(
                f"--loss.path {self.loss.path} and --loss.time-sampling {self.loss.time_sampling} are settings of "
                "--model.kind sit; leave them at linear and uniform for dit, whose diffusion is fixed"
            )
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
