"""An ablation: a YAML file that says which runs there are to be, read and checked before any of them starts.

    preset: sit-b-2                                  the recipe of every run
    set: {steps: 100000, sample.guidance: 1.8}       settings of every run, named as on the command line
    axes:                                            every combination is a run
      data.features: [dinov2-vitb14, mae-vitl16]
      model.align-block: [4, 6]
      loss.projection-weight: [0, 0.5]
      preset: [sit-b-2, sit-l-2]                     model size, say
    variants:                                        and of these, each a name and its settings
      repa: {}
      irepa: {loss.alignment: irepa}
    seeds: [0, 1]
    encoders: {mae-vitl16-layer12: "mae-vitl16:layer=12"}    features whose encoder is spelled otherwise
    precompute: {features-weights: /weights/mae.pth}         options for the features that the store lacks
    gpus: 1                                          ranks of a run

A run without alignment does not vary along the axes of the alignment, so it is there once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.base.boundary import read_regular
from storage.base.errors import UserError
from storage.base.options import argument, close_matches, option, required
from trainer.config.command_line import parse_setting
from trainer.config.presets import preset
from trainer.config.saved import MAX_CONFIG_BYTES
from trainer.config.schema import DEFAULT_PRESET, TrainConfig
from trainer.config.tree import (
    field_type,
    flatten,
    free_fields,
    leaves,
    override,
)
from trainer.config.yaml_file import parse_yaml
from trainer.run.checkpoint import latest_checkpoint, read_state
from trainer.run.folder import RunFolder

OF_CLASS_TOKENS = ("model.class_token", "loss.class_weight")  # which RiT has without an alignment
NOT_AXES = {"run": "the runs are named after their settings", "store": "pass --store", "seed": "write seeds: [0, 1]"}
MAX_RUNS = 10_000
AUTOMATIC: tuple[object, ...] = ("", [], "auto")  # settings that a run resolves as it starts
SHIFT = "loss.time_shift"  # so is this one where it is 0


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """What `ablate` is asked to do."""

    file: Path = argument("YAML: preset, set, axes, variants, seeds, encoders, precompute, gpus")
    store: str = required("store that every run reads")
    out: Path | None = option(None, "folder of the runs (default runs/ablations/FILE's name)")
    ray_address: str | None = option(
        None, "Ray cluster to train on: auto, host:port or local (default RAY_ADDRESS); empty: runs in turn, here"
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its whole configuration, and what the command line says of it."""

    name: str
    config: TrainConfig
    options: Mapping[str, str]  # dotted setting → text, besides preset, store and run

    @property
    def steps_done(self) -> int:
        """How far it is."""
        checkpoint = latest_checkpoint(self.config.run)
        return read_state(checkpoint).step if checkpoint is not None else 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to train."""
        return self.steps_done >= self.config.steps


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The file, checked."""

    runs: tuple[Run, ...]
    encoders: Mapping[str, str]
    precompute: Mapping[str, str]
    gpus: int

    @property
    def features(self) -> list[str]:
        """Names of the features that the runs read, each once."""
        return list(dict.fromkeys(name for run in self.runs for name in run.config.data.features))


def read_ablation(path: Path, store: str, out: Path) -> Ablation:
    """Read and check the file. Raises UserError naming the setting, the value and the fix."""
    tree = _read(path)
    try:
        known = ("preset", "set", "variants", "axes", "seeds", "encoders", "precompute", "gpus")
        for key in tree:
            if key not in known:
                raise UserError(f"unknown entry {key}{close_matches(str(key), list(known))}")
        base = {"preset": str(tree.get("preset", DEFAULT_PRESET)), **_settings(_mapping(tree, "set"))}
        variants = _variants(tree)
        axes = {name: _texts(name, values) for name, values in _flat(_mapping(tree, "axes")).items()}
        seeds = _texts("seeds", tree.get("seeds", [0]))
        n_runs = len(variants) * math.prod(map(len, axes.values())) * len(seeds)
        if n_runs > MAX_RUNS:
            raise UserError(f"variants, axes and seeds make {n_runs:,} runs, more than {MAX_RUNS:,}; leave some out")
        runs: dict[str, Run] = {}
        for variant, *chosen, seed in itertools.product(variants, *axes.values(), seeds):
            of_axes = dict(zip(axes, chosen, strict=True))
            run = _run({**base, **variants[variant]}, of_axes, seed, store, out, variant)
            if runs.setdefault(run.name, run).config != run.config:
                raise UserError(f"two runs would be named {run.name} (other signs become -); spell a value otherwise")
        encoders, precompute = (
            {str(key): str(value) for key, value in _mapping(tree, name).items()} for name in ("encoders", "precompute")
        )
        gpus = tree.get("gpus", 1)
        if type(gpus) is not int or gpus < 1:
            raise UserError(f"gpus must be a number of at least 1, got {gpus!r}")
        for run in runs.values():
            _refuse_another_run(run)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Ablation(runs=tuple(runs.values()), encoders=encoders, precompute=precompute, gpus=gpus)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        tree = parse_yaml(read_regular(path, MAX_CONFIG_BYTES), str(path))
    except FileNotFoundError:
        raise UserError(f"ablation file {path} does not exist; name a YAML file with axes, variants or seeds") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping with axes, variants or seeds")
    return tree


def _mapping(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    mapping = tree.get(name) or {}
    if not isinstance(mapping, dict):
        raise UserError(f"{name} must be a mapping, got {mapping!r}")
    return mapping


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names with underscores → values; sections may be nested as in a run's config.yaml."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {str(key): value}
        flat |= {name.replace("-", "_"): v for name, v in inner.items()}
    known = [name for name, _, _ in leaves(TrainConfig())]
    for name in flat:
        if name not in known:
            raise UserError(f"there is no setting {name} to vary or to set{close_matches(name, known)}")
        if name in NOT_AXES:
            raise UserError(f"{name} is not set here: {NOT_AXES[name]}")
    return flat


def _variants(tree: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Name → settings; one without a name where the file has none."""
    variants = _mapping(tree, "variants")
    for name, settings in variants.items():
        if not isinstance(settings, dict):
            raise UserError(f"variants: {name} must be a mapping of settings ({{}} for none), got {settings!r}")
    return {str(name): _settings(settings) for name, settings in variants.items()} or {"": {}}


def _settings(tree: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in _flat(tree).items()}


def _texts(name: str, values: Any) -> list[str]:
    """An axis' values as the command line takes them."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{name} must be a list of values, got {values!r}")
    texts = [_text(value) for value in values]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise UserError(f"{name} names {twice} twice")
    return texts


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _run(base: Mapping[str, str], chosen: dict[str, str], seed: str, store: str, out: Path, variant: str = "") -> Run:
    settings = {**base, **chosen, "seed": seed}
    recipe = preset(settings.pop("preset"))

    def configured() -> TrainConfig:
        parsed = {name: parse_setting(name, text, field_type(recipe, name)) for name, text in settings.items()}
        return override(recipe, {**parsed, "store": store, "run": out / name})

    weight = settings.get("loss.projection_weight")
    aligns = (
        recipe.aligns if weight is None else any(parse_setting("loss.projection_weight", weight, tuple[float, ...]))
    )
    if not aligns:
        kept = OF_CLASS_TOKENS if settings.get("model.kind", recipe.model.kind) == "rit" else ()
        of_alignment = [name for name, _, item in leaves(recipe) if item.metadata.get("of_alignment")]
        for axis in (name for name in of_alignment if name not in kept):
            settings.pop(axis, None)
            chosen.pop(axis, None)
    named = [f"{axis.rpartition('.')[2].replace('_', '-')}-{text}" for axis, text in [*chosen.items(), ("seed", seed)]]
    parts = [variant, *named] if variant else named
    name = "_".join(re.sub(r"[^\w.+-]", "-", part.replace(",", "+")) for part in parts)
    try:
        return Run(name=name, config=configured(), options=settings)
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error


def _refuse_another_run(run: Run) -> None:
    """Raises UserError when the run's folder holds a run of other settings."""
    folder = RunFolder(run.config.run)
    if not folder.is_run:
        return
    saved = folder.read_config()
    saved_settings, wanted = flatten(saved.config), flatten(saved.keep(run.config, run.options))
    differing = [
        f"{name}: was {saved_settings[name]}, is {value}"
        for name, value in wanted.items()
        if name not in free_fields(run.config)
        and value not in AUTOMATIC
        and not (name == SHIFT and value == 0)
        and saved_settings[name] != value
    ]
    if differing:
        raise UserError(
            f"{run.config.run} was made otherwise ({'; '.join(differing)}); name another --out, or remove the run"
        )
