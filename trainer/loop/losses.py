"""What a batch costs: draw latents, times, noise and dropped labels; run the model; denoising and alignment losses.

    z = normalised(mean + std · ε')   afresh at each visit (`data/latent_scale.py`)
    L = mean over the global batch of L_denoising + Σ_k λ_k · L_alignment,k  (REPA, arXiv 2410.06940, equation 9)

The public loss has one λ and the mean over K encoders: that is λ_k = λ / K.

Every random number is keyed by (seed, purpose, step, row), so a step does not depend on ranks or on a resume.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from storage.latents import from_posterior
from storage.torch.codecs import Tokens
from trainer.alignment.cosine import alignment_loss, directed_loss
from trainer.config.schema import TrainConfig
from trainer.data.latent_scale import LatentScale
from trainer.data.loader import Batch
from trainer.loop import random_keys
from trainer.models.reg import join, split
from trainer.models.transformer import Geometry
from trainer.objectives import OBJECTIVES
from trainer.ranks.arithmetic import autocast_dtype

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What this rank's B samples cost, in float32, with K alignment targets in the configuration's order."""

    denoising: Tensor  # (B,)
    alignments: Tensor  # (B, K)
    times: Tensor  # (B,) in [0, 1], from image to noise
    cosines: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (B, K); (B, 0): minus the losses
    class_denoising: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # (B,) of class tokens; (0,): there are none

    @classmethod
    def joined(cls, parts: Sequence[Losses]) -> Losses:
        """Of several micro-batches, without what their gradients need."""
        return cls(
            denoising=torch.cat([part.denoising.detach() for part in parts]),
            alignments=torch.cat([part.alignments.detach() for part in parts]),
            times=torch.cat([part.times for part in parts]),
            cosines=torch.cat([part.cosines for part in parts]),
            class_denoising=torch.cat([part.class_denoising.detach() for part in parts]),
        )

    def of_samples(self) -> Tensor:
        """What each sample lost in all, without weights, (B,): finite where every loss of it is."""
        of_class = self.class_denoising if len(self.class_denoising) else torch.zeros_like(self.denoising)
        return self.denoising + self.alignments.sum(1) + of_class

    def total(self, config: TrainConfig) -> Tensor:
        """The scalar that is minimised."""
        weights = [target.weight for target in config.targets]
        total = self.denoising.mean() + sum(
            weight * alignment for weight, alignment in zip(weights, self.alignments.mean(0), strict=True)
        )
        return total + config.loss.class_weight * self.class_denoising.mean() if len(self.class_denoising) else total


def sample_latents(batch: Batch, scale: LatentScale, seed: int) -> Tensor:
    """Latents float32 (B, C, h, w), drawn from the stored posteriors where there are any."""
    if not scale.has_posterior:
        return scale.normalised(batch.moments.float())
    mean, std = batch.moments.float().chunk(2, dim=1)
    noise = random_keys.normal(seed, "posterior", batch.step, batch.rows, mean.shape[1:])
    return scale.normalised(from_posterior(mean, std, noise))


class Draws(NamedTuple):
    """What is drawn for a batch of B samples. The model is given x_t, t and labels."""

    x: Tensor  # (B, C, h, w), latents; (B, C·h·w + c), joined with class tokens where the model has these
    noise: Tensor  # of x's shape
    t: Tensor  # (B,), of the objective's own kind
    labels: Tensor  # (B,), some of them dropped
    x_t: Tensor  # of x's shape, perturbed by the noise


def draw(batch: Batch, scale: LatentScale, config: TrainConfig, geometry: Geometry) -> Draws:
    """Latents, noise, times and dropped labels of a batch, keyed by its step and rows."""
    seed, step, rows = config.seed, batch.step, batch.rows
    objective = OBJECTIVES[config.model.kind]
    x = sample_latents(batch, scale, seed)
    noise = random_keys.normal(seed, "noise", step, rows, x.shape[1:])
    if batch.class_tokens is not None:
        x = join(x, scale.normalised_class(batch.class_tokens))
        if config.loss.class_noise == "mean":
            noise = join(noise, noise.mean((2, 3)))
        else:
            noise = join(noise, random_keys.normal(seed, "class-noise", step, rows, (geometry.class_width,)))
    t = objective.draw_times(
        random_keys.uniform(seed, "time", step, rows),
        random_keys.normal(seed, "time", step, rows, (1,))[:, 0],
        config.loss,
    )
    dropped = random_keys.uniform(seed, "label-dropout", step, rows) < config.loss.label_dropout
    labels = torch.where(dropped | (batch.labels < 0), geometry.n_classes, batch.labels)  # −1: a sample has none
    return Draws(x=x, noise=noise, t=t, labels=labels, x_t=objective.perturb(x, noise, t, config.loss))


def compare(
    output: Tensor,
    projections: Sequence[Tensor],
    targets: Sequence[Tokens],
    drawn: Draws,
    config: TrainConfig,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four kinds of numbers, a row a sample.

    Denoising losses (B,); alignment losses (B, K); cosines (B, K), or (B, 0) where the losses are minus these; the
    class tokens' denoising losses (B,), or (0,) where there are none.
    """
    denoise = OBJECTIVES[config.model.kind].denoising_loss
    output, c_output = split(output, geometry)
    (x, c), (noise, c_noise), (x_t, c_t) = (split(of, geometry) for of in (drawn.x, drawn.noise, drawn.x_t))
    denoising, class_denoising = denoise(output, x, noise, x_t, drawn.t, config.loss), output.new_empty(0)
    if geometry.class_width:
        class_denoising = denoise(c_output, c, c_noise, c_t, drawn.t, config.loss)
    kinds = geometry.kinds[: len(projections)]
    with torch.no_grad():
        prepared = [kind.prepared(target) for kind, target in zip(kinds, targets, strict=True)]
    compared = list(zip(kinds, projections, prepared, strict=True))
    aligned = [kind.loss(projection, target) for kind, projection, target in compared]
    cosines = []
    if n_cosines(geometry):
        with torch.no_grad():
            # Of exact tokens whatever a kind makes of them; others may not be normalised.
            of = [alignment_loss if target.norms is None else directed_loss for target in targets]
            cosines = [-loss(projection, target) for loss, (_, projection, target) in zip(of, compared, strict=True)]
    if not projections:  # a model that aligns no longer, or never did
        aligned = [torch.zeros_like(denoising) for _ in geometry.kinds]
        cosines = aligned if n_cosines(geometry) else []
    return denoising, _columns(aligned, denoising), _columns(cosines, denoising), class_denoising


def _columns(losses: Sequence[Tensor], like: Tensor) -> Tensor:
    """Losses (B,) side by side, (B, K); (B, 0) where there is none."""
    return torch.stack(list(losses), dim=1) if losses else like.new_empty(len(like), 0)


def n_cosines(geometry: Geometry) -> int:
    """How many cosines are logged beside the alignment losses; none where minus each loss is one."""
    return 0 if all(kind.loss_is_cosine for kind in geometry.kinds) else len(geometry.kinds)


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function)


def losses(model: nn.Module, batch: Batch, scale: LatentScale, config: TrainConfig, geometry: Geometry) -> Losses:
    """Each sample's losses; nothing is drawn that is not keyed by the batch's step and rows.

    Compiled, the draws are two or three kernels instead of some six hundred, which a small step would notice.
    """
    draw_, compare_ = (_compiled(draw), _compiled(compare)) if config.compile else (draw, compare)
    drawn = draw_(batch, scale, config, geometry)
    half = autocast_dtype(config.precision)
    with torch.autocast(drawn.x.device.type, dtype=half, enabled=half is not None):
        output, projections = model(drawn.x_t, drawn.t, drawn.labels, with_projections=len(batch.targets) > 0)
    denoising, alignments, cosines, of_class = compare_(output, projections, batch.targets, drawn, config, geometry)
    times = OBJECTIVES[config.model.kind].unit_times(drawn.t)
    return Losses(denoising=denoising, alignments=alignments, times=times, cosines=cosines, class_denoising=of_class)
