"""What a precompute run is asked to do. The configuration checks itself; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.encoders.precision import ARITHMETIC
from pipeline.sources.labels import LabelOptions
from storage.base.errors import UserError


def option(help_text: str, default: object) -> Any:
    """A dataclass field with its help text, which `--help` prints; Any, as dataclasses.field itself is typed."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Stage one: which images, which encoders, where to, and with what resources."""

    data: str = field(metadata={"help": "images: a folder, file, pattern or URL; `index` shows what it holds"})
    store: str = field(metadata={"help": "store root to make or to go on with: a directory, or an s3:// or gs:// URL"})
    source: str = option("kind of DATA, as `index` names it (a wrong one lists them all); auto: recognised", "auto")
    label_column: str = option(
        "what holds the labels: a column (parquet, labels.csv), a data set (hdf5), a key of .json (webdataset, "
        "dataset.json) or a member's suffix (webdataset: .NAME); empty: the usual ones",
        "",
    )
    unlabelled: bool = option(
        "store no label (−1 in every row), whatever DATA holds: for models without classes", False
    )
    partly_labelled: bool = option("keep images without a label (−1) beside labelled ones", False)
    renumber_labels: bool = option(
        "number labels anew from 0: numbers and numerals by value, then names; class names say what they were", False
    )
    latents: str = option(
        "VAEs: names, diffusers directories or hub ids, with commas; none: no latents", "sd-vae-ft-mse"
    )
    features: str = option(
        "vision encoders, with commas (`python -m pipeline encoders` lists them and their options); none: no features",
        "dinov2-vitb14",
    )
    latents_weights: str = option("diffusers directory to load the named VAE from; of several, NAME=DIR,NAME=DIR", "")
    features_weights: str = option(
        "local weight file of the vision encoder, timm's or the original layout; of several, NAME=FILE,NAME=FILE", ""
    )
    precision: str = option(
        "arithmetic of the encoders: fp32, tf32, fp16 or bf16 (pipeline/encoders/precision.py has the bounds)", "fp32"
    )
    compile: bool = option("torch.compile the encoders: minutes at the start, other roundings", False)
    features_dtype: str = option(
        "patch tokens as float16, or as int8 with a float16 factor for 128 channels", "float16"
    )
    resolution: int = option("side of the ADM centre crop, pixels", 256)
    flip: bool = option("store the horizontally flipped view as well (V = 2)", False)
    shard_rows: int = option("samples a shard, which is also the unit of work", 512)
    batch: int = option("images an encoder takes at once; float rounding depends on it", 32)
    max_failures: float = option(
        "end the run when more than this share of the images (but at least 10) cannot be decoded", 0.001
    )
    redo_failed: bool = option(
        "try every failed image again, not only those whose files have changed; what stays the same is left alone",
        False,
    )
    ray_address: str = option("Ray cluster to join (auto, host:port); empty or local: start one here and stop it", "")
    encoders: int = option("encoding actors; 0: one a GPU, or one a node when there is none", 0)
    encoder_cpus: int = option("CPU cores of an encoding actor; 0: 1 with a GPU, else half of the smallest node", 0)
    decode_cpus: int = option("CPU cores that a decode task reserves; it uses one", 1)
    unit_timeout_s: float = option(
        "seconds after which a unit that is being decoded or encoded is stopped and tried again", 3600.0
    )
    dry_run: bool = option("print the plan and write nothing", False)
    verbose: bool = option("let Ray's own log messages through", False)

    def __post_init__(self) -> None:
        if not self.data.strip() and not str(self.store).strip():
            raise UserError("DATA is empty and STORE is empty; name both, folders or URLs")
        if not self.data.strip():
            raise UserError("DATA is empty; name a folder, file, pattern or URL of images")
        if not str(self.store).strip():
            raise UserError("STORE is empty; name a directory or an s3:// or gs:// URL")
        for name in ("shard_rows", "batch", "decode_cpus"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("encoders", "encoder_cpus"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if self.latents == "none" and self.features == "none":
            raise UserError("nothing to encode: --latents and --features are both none; name at least one")
        if self.features_dtype not in ("float16", "int8"):
            raise UserError(f"--features-dtype must be float16 or int8, got {self.features_dtype!r}")
        if self.features == "none" and self.features_dtype != "float16":
            raise UserError("--features-dtype int8 has nothing to quantise with --features none; leave one of them out")
        if self.precision not in ARITHMETIC:
            raise UserError(f"--precision must be one of {', '.join(ARITHMETIC)}, got {self.precision!r}")
        if not 0 <= self.max_failures <= 1:
            raise UserError(f"--max-failures is a share in [0, 1], got {self.max_failures}")
        if not self.unit_timeout_s > 0:  # NaN is no limit either
            raise UserError(f"--unit-timeout-s must be positive, got {self.unit_timeout_s}")
        self.labels  # noqa: B018 - checks itself

    @property
    def labels(self) -> LabelOptions:
        """What the user decides about labels. Raises UserError for a contradiction."""
        return LabelOptions(
            column=self.label_column,
            unlabelled=self.unlabelled,
            partly_labelled=self.partly_labelled,
            renumber=self.renumber_labels,
        )

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the stored views."""
        return ("original", "hflip") if self.flip else ("original",)
