"""What `generate`, `export`, `evaluate`, `probe`, `cknna`, `analyse` and `report` are asked to do.

Dataclasses that check themselves, whose fields are the options of the commands. The run and its store are opened by
what does the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.base.choices import INCEPTION, Device, Token
from storage.base.errors import UserError
from storage.base.options import argument, check_ranges, option, required

LabelsDrawn = Literal["balanced", "random", "uniform"]
Weights = Literal["ema", "raw"]
CHECKPOINT_HELP = "latest, or a step"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is drawn. A sampler setting that is None is the protocol's, else the run's."""

    run: Path = argument("folder of the run")
    n: int = option(50_000, "how many images", at_least=1)
    protocol: str = option(
        "",
        "draw as a paper's release did: repa, reg, adm, lightningdit, rae, rit (docs/evaluation.md has all); what is "
        "named besides goes before it, and the card says so",
    )
    out: Path | None = option(None, "folder of the images (default RUN/samples-…, named after settings)")
    checkpoint: str = option("latest", CHECKPOINT_HELP)
    labels: LabelsDrawn | None = option(
        None, "the model's classes in turn, or each drawn at random (uniform is the older word) (default: the run's)"
    )
    format: Literal["png", "npz"] = option("png", "npz: one file in ADM's layout as well")
    seed: int = option(0, "of noise and labels")
    sampler: Literal["sde", "ode", "ddpm"] | None = option(None, "(default: the run's)")
    steps: int | None = option(None, "steps of the sampler (default: the run's)", at_least=1)
    guidance: float | None = option(
        None, "guidance scale, of a class token too unless --guidance-class says (default: the run's)", at_least=1
    )
    guidance_class: float | None = option(
        None,
        "guidance scale of a class token (REG, RiT); 0: none (default: that of --guidance where that is given, else "
        "the run's)",
        at_least=0,
    )
    guidance_class_low: float | None = option(
        None, "guidance of a class token from this noise level (default: the run's)", at_least=0
    )
    guidance_class_high: float | None = option(
        None, "guidance of a class token up to this noise level (default: the run's)", at_least=0
    )
    guidance_low: float | None = option(None, "guidance from this noise level (default: the run's)", at_least=0)
    guidance_high: float | None = option(None, "guidance up to this noise level (default: the run's)", at_least=0)
    guidance_channels: int | None = option(
        None, "latent channels guided, the first ones; 0: all (default: the run's)", at_least=0
    )
    weaker: Path | None = option(
        None, "run of a weaker model on the same latents, that guidance leads away from instead of the null label"
    )
    class_noise: Literal["own", "mean"] | None = option(
        None, "what a class token starts from (RiT), draws of its own or the latents' mean (default: the run's)"
    )
    heun: bool | None = option(None, "Heun's correction of the ode sampler (default: the run's)")
    shift: float | None = option(None, "of noise levels, 0: as in training (default: the run's)", at_least=0)
    end: float | None = option(None, "noise level at which ode ends (default: the run's)", at_least=0)
    vae: str = option("", "VAE or decoder to decode with (default: as the store says)", also=("--decoder",))
    rounding: Literal["round", "truncate"] | None = option(
        None, "from pixels to uint8; the public scripts of REPA, REG, RAE and ADM truncate (default: round)"
    )
    batch: int = option(64, "images a block, computed together", at_least=1)
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "auto", "arithmetic of the model; auto: the protocol's, or tf32, on cuda, fp32 on cpu"
    )
    device: Device = option("auto", "auto: cuda when there is one")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be in [0, 2⁶³), got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run's averaged weights for other programs."""

    run: Path = argument("folder of the run")
    to: Literal["diffusers", "safetensors"] = option("diffusers", "a pipeline folder, or one file of weights")
    out: Path | None = option(None, "folder to write (default RUN/export-FORMAT)")
    checkpoint: str = option("latest", CHECKPOINT_HELP)


def require_fdr6(held_out: Path | None, encoder: str) -> None:
    """Raise UserError for images to divide by where nothing is divided."""
    if held_out is not None and encoder != "fdr6":
        raise UserError(f"--held-out goes with --encoder fdr6, not {encoder}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is compared with what, and how images are described.

    A reference that is no path is the URL of a store. `cache` is where its features are kept.
    """

    images: Path = argument("folder of images, an .npz with arr_0, or a feature file")
    reference: Path | str = required("ADM reference .npz, folder of images, store (or its URL), or feature file")
    encoder: str = option(INCEPTION, "inception, cmmd-clip, fdr6 (six spaces and their mean), or a vision encoder")
    weights: Path | None = option(None, "the encoder's weight file", also=("--inception-weights",))
    token: Token = option("cls", "a vision encoder's vector: class token, or mean of patches")
    resolution: int = option(0, "side to crop folders' images to; 0: do not", at_least=0)
    n_reference: int = option(0, "at most so many reference images, evenly spread; 0: all", at_least=0)
    out: Path | None = option(None, "folder of the result (default IMAGES-evaluation)")
    cache: Path | None = option(
        None, "folder that keeps a reference's features (default reference-features, by the runs)"
    )
    max_failures: float = option(
        0.001, "end when more than this share of the images (but at least 10) cannot be read", at_least=0, at_most=1
    )
    run: Path | None = option(None, "record the result in this run, for analyse and the report")
    step: int | None = option(None, "step that the images are of (default: what generate noted)", at_least=0)
    held_out: Path | None = option(
        None, "fdr6: real images that are not of the reference, to divide by (default: the published divisors)"
    )
    protocol: str = option("", "published protocol to hold the card against (default: that of generate)")
    resamples: int = option(1000, "draws that an interval is of; 0: no intervals and no FID_inf", at_least=0)
    device: Device = option("auto", "auto: cuda when there is one")
    json: bool = option(False, "end with the result as JSON, as its file has it")

    def __post_init__(self) -> None:
        check_ranges(self)
        require_fdr6(self.held_out, self.encoder)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(GenerateConfig):
    """`generate` and `evaluate` in one: what is drawn, and what it is compared with."""

    reference: Path | str = option("", "as of evaluate (default: the originals of the run's store)")
    encoder: str = option(INCEPTION, "inception, cmmd-clip, fdr6 (six spaces and their mean), or a vision encoder")
    weights: Path | None = option(None, "the encoder's weight file", also=("--inception-weights",))
    token: Token = option("cls", "a vision encoder's vector: class token, or mean of patches")
    n_reference: int = option(0, "at most so many reference images, evenly spread; 0: all", at_least=0)
    cache: Path | None = option(
        None, "folder that keeps a reference's features (default reference-features, by the runs)"
    )
    resamples: int = option(1000, "draws that an interval is of; 0: no intervals and no FID_inf", at_least=0)
    held_out: Path | None = option(
        None, "fdr6: real images that are not of the reference, to divide by (default: the published divisors)"
    )
    report: bool = option(True, "write the run's page, RUN/report.html, again")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fdr6(self.held_out, self.encoder)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two results."""

    a: Path = argument("result of evaluate (JSON, or its folder), or a run, whose newest counts")
    b: Path = argument("another one")
    encoder: str = option("", "of several, the result of this extractor")
    json: bool = option(False, "print JSON")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is measured where, of hidden states. `store` and `features` are the run's unless named."""

    blocks: str = option("all", "all, or numbers from 1: 4,8")
    times: tuple[float, ...] = option((0.5,), "0 the image, 1 noise", spaced=True, at_least=0, at_most=1)
    checkpoints: str = "latest"
    weights: Weights = option("ema", "averaged weights, or the last ones")
    n: int = option(10_000, "at most so many samples, chosen by seed", at_least=1)
    k: int = option(10, "CKNNA's neighbours", at_least=2)
    c: float = option(1.0, "the probe's C, 1 / weight penalty", above=0)
    store: str = option("", "another store of the same VAE (default: the run's)")
    features: str = option("", "features below the store (default: the run's, or the only ones)")
    seed: int = option(0, "of the choice of samples and of the noise", at_least=0)
    batch: int = option(64, "images at once", at_least=1)
    device: Device = option("auto", "auto: cuda when there is one")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.times:
            raise UserError("--times is empty; name times in [0, 1], 0 the image and 1 noise")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(SweepConfig):
    """`probe` and `cknna`: one run."""

    run: Path = argument("folder of the run")
    checkpoints: str = option("latest", "latest, all, or steps: 1000,2000")
    out: Path | None = option(None, "SVG and JSON to write (default RUN/analysis/ and the command's name)")


@dataclass(frozen=True, kw_only=True)
class AnalyseConfig(SweepConfig):
    """`analyse`: the paper's figures for several runs."""

    runs: tuple[Path, ...] = argument("folders of runs")
    times: tuple[float, ...] = option((0.25, 0.5, 0.75), "0 the image, 1 noise", spaced=True, at_least=0, at_most=1)
    out: Path = option(Path("analysis"), "folder to write")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One page about runs."""

    runs: tuple[Path, ...] = argument("folders of runs, or folders of such folders")
    out: Path = option(Path("report.html"), "file to write")
    title: str = option("", "heading of the page")


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """`alignments` has no options."""
