"""One update of the weights: micro-batches, the mean gradient over ranks, clipping, AdamW, the average.

The host never waits for the device here. Whether loss and gradient are finite is decided on the device, from numbers
that are the same on every rank, and the fused optimiser leaves weights and moments as they are where they are not. The
numbers come to the host a step later (`readback.py`), when the device is busy with the next: a wait at the end of each
step would leave it idle while the host launches the first kernels of the next. After such a step the average moves on
towards the weights, which stayed.

    K micro-batches    gradient = Σ_k ∇ L_k / K, the same as that of the whole batch but for the order of sums

fp16 needs a loss scale (Micikevicius et al., arXiv 1710.03740, section 3.2): it halves after an overflow, and doubles
after 2,000 steps without one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.config.schema import TrainConfig
from trainer.data.latent_scale import LatentScale
from trainer.data.loader import Batch
from trainer.loop.ema import EMA
from trainer.loop.losses import Losses, losses, n_cosines
from trainer.loop.optimiser import (
    clip_gradients,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
    step_where_finite,
)
from trainer.models.make import make_model
from trainer.models.transformer import DiffusionTransformer, Geometry
from trainer.ranks.arithmetic import autocast_dtype
from trainer.ranks.parallel import gradients_reduced, replicate, shard
from trainer.ranks.world import World

DECILES = 10


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a step works on. `model` holds the parameters; `wrapped` is what runs: the model, or DDP around it."""

    config: TrainConfig
    geometry: Geometry
    world: World
    scale: LatentScale
    model: DiffusionTransformer
    wrapped: nn.Module
    ema: EMA[DiffusionTransformer]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """Means over the global batch, float64 and still on the device, with K alignment targets."""

    losses: Tensor  # (2 + K,): denoising loss, gradient norm, alignment losses
    by_time: Tensor  # (2, DECILES): sum of the denoising losses, and number of samples, by tenths of t; a rank's mean
    wants_to_stop: Tensor  # (1,): share of the ranks that were told to stop
    cosines: Tensor = field(default_factory=lambda: torch.empty(0))  # (K,), or none where the losses are minus these
    class_denoising: Tensor = field(default_factory=lambda: torch.empty(0))  # (1,) of class tokens, or none

    def packed(self) -> Tensor:
        """One vector, to be read by `unpack`."""
        return torch.cat([self.losses, self.cosines, self.class_denoising, self.by_time.flatten(), self.wants_to_stop])

    def are_finite(self) -> Tensor:
        """Whether every loss and the gradient's norm are, bool ()."""
        return self.losses.isfinite().all() & self.class_denoising.isfinite().all()

    @classmethod
    def unpack(cls, vector: Tensor, geometry: Geometry) -> StepNumbers:
        """The parts of a vector, sharing its memory."""
        sizes = sizes_of_numbers(geometry)
        losses, cosines, class_denoising, by_time, wants_to_stop = vector.split(sizes)
        return cls(
            losses=losses,
            cosines=cosines,
            class_denoising=class_denoising,
            by_time=by_time.view(2, DECILES),
            wants_to_stop=wants_to_stop,
        )


def sizes_of_numbers(geometry: Geometry) -> list[int]:
    """Lengths of the parts of `StepNumbers.packed`."""
    return [2 + len(geometry.targets), n_cosines(geometry), int(geometry.class_width > 0), 2 * DECILES, 1]


def build(config: TrainConfig, geometry: Geometry, scale: LatentScale, world: World) -> TrainingState:
    """A model with seeded weights and all that trains it, spread over the ranks as the configuration says."""
    torch.manual_seed(config.seed)
    model = make_model(geometry).to(world.device)
    ema = EMA(model, config.ema_decay)
    if config.compile:
        compile_blocks(model)
    sharded = config.parallel == "fsdp" and world.size > 1
    if sharded:
        shard(model, world, autocast_dtype(config.precision))
        shard(ema.model, world, autocast_dtype(config.precision))
    optimizer = make_optimizer(model, config.optim)
    return TrainingState(
        config=config,
        geometry=geometry,
        world=world,
        scale=scale.on(world.device),
        model=model,
        wrapped=replicate(model, world) if world.size > 1 and not sharded else model,
        ema=ema,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16"),
    )


def without_alignment(training: TrainingState) -> TrainingState:
    """The same state, whose projectors rest: they keep their weights and have no state in the optimiser."""
    config, model = training.config, training.model
    kept = {
        name: tensor
        for name, tensor in optimizer_tensors(model, training.optimizer).items()
        if not name.startswith("projectors.")
    }
    model.projectors.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    optimizer = make_optimizer(model, config.optim)
    load_optimizer_tensors(model, optimizer, kept)
    wrapped = replicate(model, training.world) if training.wrapped is not model else model
    return dataclasses.replace(training, optimizer=optimizer, wrapped=wrapped)


def compile_blocks(model: DiffusionTransformer) -> None:
    """Compile each block's forward, in place: one compilation serves all, since they differ in weights only."""
    # A block is the unit of overlap with DDP's reductions already; cutting it up by bucket would undo its fusions.
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def train_step(training: TrainingState, batch: Batch, *, stop: bool = False) -> tuple[StepNumbers, Losses]:
    """Take one step. Returns the global batch's numbers and this rank's losses, sample by sample; does not wait."""
    config = training.config
    training.optimizer.zero_grad(set_to_none=True)
    of_parts = []
    micro_batches = batch.split(config.accumulate)
    for i, micro_batch in enumerate(micro_batches, start=1):
        with gradients_reduced(training.wrapped, i == len(micro_batches)):
            of_part = losses(training.wrapped, micro_batch, training.scale, config, training.geometry)
            training.scaler.scale(of_part.total(config) / len(micro_batches)).backward()
        of_parts.append(of_part)
    of_batch = Losses.joined(of_parts)
    training.scaler.unscale_(training.optimizer)
    norm = clip_gradients(training.model, config.optim.clip)
    numbers = _reduced(of_batch, norm, stop, training)
    set_learning_rate(training.optimizer, config.optim, batch.step)
    step_where_finite(training.optimizer, numbers.are_finite())
    training.scaler.update()
    training.ema.update(training.model)
    return numbers, of_batch


@torch.no_grad()
def _reduced(of_batch: Losses, norm: Tensor, stop: bool, training: TrainingState) -> StepNumbers:
    """This rank's losses to the global batch's numbers: one small collective a step."""
    denoising = of_batch.denoising.double()
    # A one-hot product: scattering into deciles would be summed in no fixed order on a GPU.
    decile = (of_batch.times * DECILES).long().clamp(max=DECILES - 1)
    one_hot = (decile[:, None] == torch.arange(DECILES, device=decile.device)).double()
    mine = StepNumbers(
        losses=torch.cat([torch.stack([denoising.mean(), norm.double()]), of_batch.alignments.double().mean(0)]),
        by_time=torch.stack([(one_hot * denoising[:, None]).sum(0), one_hot.sum(0)]),
        wants_to_stop=denoising.new_full((1,), float(stop)),
        cosines=of_batch.cosines.double().mean(0),
        class_denoising=of_batch.class_denoising.double().reshape(len(denoising), -1).mean(0),
    )
    return StepNumbers.unpack(training.world.mean(mine.packed()), training.geometry)
