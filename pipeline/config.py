"""What the commands of stage one are asked to do: dataclasses that check themselves, whose fields are the options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.encoders.precision import ARITHMETIC
from pipeline.label_options import LabelOptions
from storage.base.choices import INCEPTION, Device, Token
from storage.base.errors import UserError
from storage.base.options import argument, check_ranges, option, required
from storage.codecs import CODECS, PLAIN, codec_named

DATA_HELP = "images: a folder, file, pattern or URL; `index` shows what it holds"


@dataclass(frozen=True, kw_only=True)
class _ImagesConfig:
    """Which images, and what the user decides about their labels."""

    data: str = required(DATA_HELP)
    source: str = option("auto", "kind of DATA, as `index` names it (a wrong one lists them all); auto: recognised")
    label_column: str = option(
        "",
        "what holds the labels: a column (parquet, labels.csv), a data set (hdf5), a key of .json (webdataset, "
        "dataset.json) or a member's suffix (webdataset: .NAME); empty: the usual ones",
    )
    unlabelled: bool = option(
        False, "store no label (−1 in every row), whatever DATA holds: for models without classes"
    )
    partly_labelled: bool = option(False, "keep images without a label (−1) beside labelled ones")
    renumber_labels: bool = option(
        False, "number labels anew from 0: numbers and numerals by value, then names; class names say what they were"
    )

    @property
    def labels(self) -> LabelOptions:
        """What the user decides about labels. Raises UserError for a contradiction."""
        return LabelOptions(
            column=self.label_column,
            unlabelled=self.unlabelled,
            partly_labelled=self.partly_labelled,
            renumber=self.renumber_labels,
        )


@dataclass(frozen=True, kw_only=True)
class IndexConfig(_ImagesConfig):
    """`index`: what a data set holds."""

    data: str = argument(DATA_HELP)

    def __post_init__(self) -> None:
        if not self.data.strip():
            raise UserError("DATA is empty; name a folder, file, pattern or URL of images")


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(_ImagesConfig):
    """Stage one: which images, which encoders, where to, and with what resources."""

    store: str = required("store root to make or to go on with: a directory, or an s3:// or gs:// URL")
    latents: str = option(
        "sd-vae-ft-mse",
        "VAEs: names, diffusers directories or hub ids, with commas; none: no latents. AutoencoderRAE: features",
    )
    features: str = option(
        "dinov2-vitb14",
        "vision encoders, with commas (`python -m pipeline encoders` lists them and their options); none: no features",
    )
    latents_weights: str = option("", "diffusers directory to load the named VAE from; of several, NAME=DIR,NAME=DIR")
    features_weights: str = option(
        "", "local weight file of the vision encoder, timm's or the original layout; of several, NAME=FILE,NAME=FILE"
    )
    precision: str = option(
        "fp32", "arithmetic of the encoders: fp32, tf32, fp16 or bf16 (pipeline/encoders/precision.py has the bounds)"
    )
    compile: bool = option(False, "torch.compile the encoders: minutes at the start, other roundings")
    features_dtype: str = option(
        PLAIN.spelling, f"how patch tokens are stored: {', '.join(CODECS)} (docs/codes.md has sizes and errors)"
    )
    resolution: int = option(256, "side of the ADM centre crop, pixels", at_least=1)
    flip: bool = option(False, "store the horizontally flipped view as well (V = 2)")
    shard_rows: int = option(512, "samples a shard, which is also the unit of work", at_least=1)
    batch: int = option(32, "images an encoder takes at once; float rounding depends on it", at_least=1)
    max_failures: float = option(
        0.001,
        "end the run when more than this share of the images (but at least 10) cannot be decoded",
        at_least=0,
        at_most=1,
    )
    redo_failed: bool = option(
        False,
        "try every failed image again, not only those whose files have changed; what stays the same is left alone",
    )
    ray_address: str = option("", "Ray cluster to join (auto, host:port); empty or local: start one here and stop it")
    encoders: int = option(0, "encoding actors; 0: one a GPU, or one a node when there is none", at_least=0)
    encoder_cpus: int = option(
        0, "CPU cores of an encoding actor; 0: 1 with a GPU, else half of the smallest node", at_least=0
    )
    decode_cpus: int = option(1, "CPU cores that a decode task reserves; it uses one", at_least=1)
    unit_timeout_s: float = option(
        3600.0,
        "seconds after which a unit that is being decoded or encoded is stopped and tried again",
        above=0,
        unbounded=True,
    )
    dry_run: bool = option(False, "print the plan and write nothing")
    verbose: bool = option(False, "let Ray's own log messages through")
    json: bool = option(False, "end with the outcome as JSON")

    def __post_init__(self) -> None:
        if not self.data.strip() and not str(self.store).strip():
            raise UserError("DATA is empty and STORE is empty; name both, folders or URLs")
        if not self.data.strip():
            raise UserError("DATA is empty; name a folder, file, pattern or URL of images")
        if not str(self.store).strip():
            raise UserError("STORE is empty; name a directory or an s3:// or gs:// URL")
        check_ranges(self)
        if self.latents == "none" and self.features == "none":
            raise UserError("nothing to encode: --latents and --features are both none; name at least one")
        codec_named(self.features_dtype)
        if self.precision not in ARITHMETIC:
            raise UserError(f"--precision must be one of {', '.join(ARITHMETIC)}, got {self.precision!r}")
        self.labels  # noqa: B018 - checks itself

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the stored views."""
        return ("original", "hflip") if self.flip else ("original",)


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """`status`: of which store."""

    store: str = argument("store root or URL")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """`preview`: pictures of what a store holds."""

    store: str = argument("store root or URL")
    out: Path = required("folder for the pictures")
    images: int = option(8, "how many images to show", at_least=1)
    vae: str = option("", "diffusers directory or hub id to decode latents with (default: what the store names)")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class OriginalsConfig:
    """`originals`: the images that rows were made of."""

    store: str = argument("store root or URL")
    rows: tuple[int, ...] = required("rows, from 0", spaced=True, at_least=0)
    out: Path = required("folder for the pictures")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """How images are described."""

    encoder: str = option(INCEPTION, "inception, or a vision encoder")
    weights: Path | None = option(None, "the encoder's weight file (default: its library's cache)")
    token: Token = option("cls", "a vision encoder's vector; Inception has one")
    resolution: int = option(0, "side to crop a folder's images to; 0: as they are", at_least=0)
    batch: int = option(50, "images at once", at_least=1)
    device: Device = option("auto", "auto: cuda when there is one")
    max_failures: float = option(
        0.001, "end when more than this share of the images (but at least 10) cannot be read", at_least=0, at_most=1
    )
    like: Path | None = option(None, "a feature file that the new ones are to be comparable with")
    at_least: int = option(1, "fewer images are refused", at_least=0)
    check: bool = option(False, "describe nothing, but say what of images and weights is missing or does not fit")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(FeaturesConfig):
    """`features`: which images become which files."""

    where: tuple[str, ...] = argument(
        "folder of images, an .npz with arr_0 (ADM's layout), or a store or its URL; of several, a file each",
        metavar="IMAGES",
    )
    out: tuple[Path, ...] = required("feature file to write, .npz", spaced=True)
    n: tuple[int, ...] = option((0,), "at most so many, evenly spread; 0: all", spaced=True, at_least=0)
    next: bool = option(True, "end with the command that comes next")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """`tasks`: command lines that run on Ray."""

    listed: Path = argument("JSON file of tasks")
    ray_address: str = option("", "cluster to join; empty or local: start one here and stop it")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """`demo`: both stages on digits over photographs."""

    out: Path = option(Path("runs/demo"), "folder for everything")
    steps: int | None = option(None, "training steps (default 600)", at_least=1)
    only_precompute: bool = option(False, "stop after stage one")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """`launch`: the trainer's own command on workers that Ray Train places."""

    workers: int = option(1, "ranks, a GPU each where there are any", at_least=1)
    cpus: int = option(1, "CPU cores a rank reads and decodes with", at_least=1)
    restarts: int = option(0, "new starts after a lost machine", at_least=0)
    scratch: Path = option(Path("runs/.ray"), "shared folder for Ray Train's files")
    ray_address: str = option("", "cluster to join (default RAY_ADDRESS; empty: start one)")
    arguments: tuple[str, ...] = argument("the trainer's command line", metavar="-- train …", rest=True)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """`encoders` has no options."""
