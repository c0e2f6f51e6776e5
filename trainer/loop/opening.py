"""What a run says before its first step: how it differs from its preset, on what data, how long it takes at least."""

from __future__ import annotations

import numpy as np

from storage.base.least_time import least_time
from storage.places import CLASS_TOKEN
from trainer.config.schema import TrainConfig
from trainer.data.groups import TrainingData
from trainer.evaluation.generate.decode import decoder_of
from trainer.evaluation.generate.draw import in_words
from trainer.loop.step import TrainingState
from trainer.models.flops import forward_flops_per_image
from trainer.models.transformer import Geometry
from trainer.ranks.arithmetic import product_flops
from trainer.run.averages import held_of_first
from trainer.run.latent_map import require_normalised
from trainer.run.summary import settings_line

LEAST_OF_TOKENS = 0.25  # deviation of class tokens below which noise is the larger part at four fifths of all t
LOOKED_AT = 256  # rows
STOPPED = "no features are read for it, projectors rest"


def opening_lines(training: TrainingState, data: TrainingData, first_step: int, measured: str = "") -> str:
    """A line a subject, of a run that goes on from `first_step`; `measured` is what is, of its samples."""
    config, geometry, world = training.config, training.geometry, training.world
    n_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    groups = ", ".join(f"{path} ({digest[:12]})" for path, digest in data.identities.items())
    gflop = 3 * forward_flops_per_image(geometry, config.aligns_at(first_step)) / 1e9
    share = config.batch // world.size
    ranks = f"{world.size} rank(s) of {share} images"
    if config.accumulate > 1:
        ranks += f" in {config.accumulate} micro-batches"
    if world.size > 1:
        ranks += f", {config.parallel}"
    left = (config.steps - first_step) * config.batch * gflop * 1e9
    rate = world.size * product_flops(world.device, config.precision)
    time_left = least_time(left / rate, rate, "a step")
    class_token = class_token_line(data) if data.aligns_class_tokens else ""
    averages = held_of_first(config.ema_decay, config.steps)
    lines = [
        f"settings   {settings_line(config)}",
        f"model      {n_parameters / 1e6:.1f} M parameters, {gflop:.1f} GFLOP an image (forward + backward), "
        f"{_tokens(geometry)} tokens",
        f"data       {data.n_samples} of {data.store.n_rows} samples, {len(data.class_names)} classes, {groups}",
        f"latents    {training.scale}, {require_normalised(config, data, training.scale)}",
        *([f"class      {class_token}"] if class_token else []),
        *([] if data.class_names else [f"labels     none: trains unconditionally, {_without(geometry.n_classes)}"]),
        *([f"alignment  {_stop(config, first_step)}"] if config.loss.stop_alignment_at else []),
        *([f"averages   {averages}"] if averages else []),
        f"samples    {in_words(config)}",
        *([f"pictures   {_pictures(decoder_of(data, config))}"] if data.of_features else []),
        *([f"distance   {measured}"] if measured else []),
        f"device     {world.device}, {ranks}",
        f"start      step {first_step} of {config.steps}",
        *([f"time       {time_left}"] if time_left else []),
    ]
    return "\n".join(lines)


def _tokens(geometry: Geometry) -> str:
    """How many a block has, the class token and the label's among them; blocks may differ (RiT)."""
    least, most = (of(n for n, _ in geometry.sequences) for of in (min, max))
    return f"{most}" if least == most else f"{least} to {most}"


def class_token_line(data: TrainingData) -> str:
    """How much class tokens vary that go with images as they are (REG), beside noise of 1; of rows spread evenly."""
    group, rows = data.class_tokens, data.valid_rows
    assert group is not None
    looked_at = rows.rows(np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(np.int64)))
    tokens = group.gather(looked_at, 0, [CLASS_TOKEN])[CLASS_TOKEN].astype(np.float64)
    tokens = tokens[np.isfinite(tokens).all(1)]  # the others are left out of training too, and named there
    if not len(tokens):
        return ""
    std = tokens.std(0)
    said = f"tokens of {group.path} as they are, deviation {np.median(std):.3g} "
    said += f"({std.min():.3g} to {std.max():.3g} a channel)"
    if np.median(std) < LEAST_OF_TOKENS and len(looked_at) == LOOKED_AT:
        said += ": noise of deviation 1 drowns them but for t near 0; REG's are of a final layer, about 1"
    return said


def _pictures(decoder: str) -> str:
    """What makes pictures of features as latents, for previews and `generate`."""
    return (
        f"by {decoder}" if decoder else "none: previews show the first three channels; --data.decoder names a decoder"
    )


def _stop(config: TrainConfig, step: int) -> str:
    """What --loss.stop-alignment-at means for a run that goes on from `step`."""
    stop = config.loss.stop_alignment_at
    if stop >= config.steps:
        return f"never stops in this run of {config.steps} steps (--loss.stop-alignment-at {stop})"
    if stop <= step:
        return f"has stopped, by --loss.stop-alignment-at {stop}: {STOPPED}"
    return f"stops after step {stop} of {config.steps}"


def _without(n_classes: int) -> str:
    if n_classes:
        return f"every sample under the null label of --model.classes {n_classes}"
    return "without label dropout or guidance"
