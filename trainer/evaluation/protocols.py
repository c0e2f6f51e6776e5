"""`--protocol NAME`: how a paper's release draws and measures images, all settings at once, as data.

Where a line names a file it is of the public repository, as it was read; where it names none, the value is this
project's own preset of the same method. What a protocol does not set, the run or the command's default decides: batch
sizes above all, which change last bits only. Labels are drawn as the public scripts draw them, of which RAE's and RiT's
take every class equally often.

Rounding is that of the script: REPA, REG, RAE and ADM hand 255·(x + 1)/2 to uint8, which cuts the fraction off;
LightningDiT hands over 127.5·x + 128, which is the same number rounded, and RiT rounds it itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from storage.base.choices import INCEPTION
from storage.base.errors import UserError
from storage.base.options import close_matches
from trainer.config.schema import Kind
from trainer.run.settings import DIMENSION

NULL_LABEL: Final = "null label"
WEAKER: Final = "weaker model"
ADM_256 = "VIRTUAL_imagenet256_labeled.npz"  # statistics of the training set, and 10,000 images
SD_VAE = "stabilityai/sd-vae-ft-ema"
INCEPTION_SHA256: Final = "6726825d"  # its first digits, as torch-fidelity's release has them in the file's name


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings by the names that `generate` has for them; a class token's are the image's at -1, `shift` 0 the run's.

    A scale of 1 is no guidance. `precision` is the model's and the decoder's arithmetic on a GPU. `kind` is the model's
    that the release draws from, on which `guided_calls` depend; a model of another may be drawn from like it.
    """

    name: str
    source: str
    kind: Kind
    n: int = 50_000
    resolution: int = 256
    classes: int = 1000
    ema_decay: float
    labels: Literal["balanced", "random"] = "random"
    sampler: Literal["sde", "ode", "ddpm"]
    steps: int
    heun: bool = False
    shift: float = 1.0
    dimension: int = 0  # where `shift` is 0: numbers of a latent that the release's own follows from
    end: float = 0.0
    guidance: float
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_channels: int = 0
    guidance_class: float = -1.0
    guidance_class_low: float = -1.0
    guidance_class_high: float = -1.0
    guidance_by: Literal["null label", "weaker model"] = NULL_LABEL
    class_noise: Literal["own", "mean"] = "own"  # of a class token, where there is one
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "tf32"
    rounding: Literal["round", "truncate"] = "truncate"
    decoder: str
    reference: str = ADM_256
    n_reference: int = 0  # the reference's statistics, not its 10,000 images
    extractor: str = INCEPTION
    extractor_sha256: str = INCEPTION_SHA256
    extractor_vector: str = "pool_3"
    extractor_resize: str = "TensorFlow 1 bilinear to 299, (x-128)/128"

    @property
    def published_shift(self) -> float:
        """The shift of the published figure."""
        return self.shift or math.sqrt(self.dimension / DIMENSION)

    def unguided(self, source: str) -> Protocol:
        """The same without guidance."""
        return replace(self, name=f"{self.name}-unguided", source=source, guidance=1.0, guidance_by=NULL_LABEL)


REPA = Protocol(
    name="repa",
    source="arXiv 2410.06940, table 4 (1.42 by SiT-XL/2); README.md section 4, generate.py",
    kind="sit",
    ema_decay=0.9999,  # arXiv 2410.06940, appendix D
    labels="random",  # generate.py: torch.randint
    sampler="sde",  # README.md: --mode=sde
    steps=250,  # README.md: --num_steps=250; samplers.py: 250 levels from 1 to 0.04, then 0
    guidance=1.8,  # README.md: --cfg-scale=1.8
    guidance_high=0.7,  # README.md: --guidance_high=0.7
    precision="tf32",  # generate.py: --tf32 is its default, weights are float32
    rounding="truncate",  # generate.py: clamp(255 · (x + 1) / 2) to uint8
    decoder=SD_VAE,  # generate.py: --vae ema is its default
)
REG = Protocol(
    name="reg",
    source="arXiv 2507.01467 (1.36 by SiT-XL/2 after 4M steps); eval.sh, generate.py",
    kind="sit",
    ema_decay=0.9999,  # as REPA's
    labels="random",  # generate.py: torch.randint
    sampler="sde",  # eval.sh: --mode=sde
    steps=250,  # eval.sh: NUM_STEP=250
    guidance=2.3,  # eval.sh: CFG_SCALE=2.3
    guidance_high=0.85,  # eval.sh: GH=0.85
    guidance_class=2.3,  # eval.sh: CLS_CFG_SCALE=2.3
    precision="tf32",  # generate.py: --tf32 is its default
    rounding="truncate",  # generate.py: as REPA's
    decoder=SD_VAE,  # generate.py: --vae ema is its default
)
LIGHTNINGDIT = Protocol(
    name="lightningdit",
    source="arXiv 2501.01423 (1.35 after 800 epochs); configs/reproductions/…_800ep_cfg.yaml, inference.py",
    kind="lightningdit",
    ema_decay=0.9999,  # arXiv 2501.01423; this project's preset
    labels="random",  # inference.py: torch.randint
    sampler="ode",  # mode: ODE, sampling_method: euler
    steps=249,  # num_sampling_steps: 250, which transport/integrators.py takes for 250 levels
    shift=1 / 0.3,  # timestep_shift: 0.3, of the data's time
    guidance=6.7,  # cfg_scale: 6.7
    guidance_high=0.875,  # cfg_interval_start: 0.125, of the data's time
    guidance_channels=3,  # models/lightningdit.py: forward_with_cfg guides the first three
    precision="tf32",  # inference.py: allow_tf32; run_inference.sh asks for bf16, which never reaches the model
    rounding="round",  # tokenizer/vavae.py: clamp(127.5 · x + 128) to uint8
    decoder="hustvl/vavae-imagenet256-f16d32-dinov2",  # README.md
)
RAE = Protocol(
    name="rae",
    source="arXiv 2510.11690 (1.13 by DiT^DH-XL); README.md, src/sample_ddp.py, …/DiTDHXL-DINOv2-B_AG.yaml",
    kind="ditdh",
    ema_decay=0.9995,  # …/DiTDHXL-DINOv2-B.yaml; this project's preset
    labels="balanced",  # sample_ddp.py: --label-sampling equal is its default
    sampler="ode",  # sampler.mode: ODE, sampling_method: euler
    steps=49,  # num_steps: 50, which are 50 levels
    shift=0.0,  # misc: √(time_dist_shift_dim / time_dist_shift_base) of the latents, as in training
    dimension=768 * 16 * 16,  # of DINOv2-B at 256 px
    end=0.001,  # transport: the last level before the shift
    guidance=1.42,  # guidance.scale: 1.42
    guidance_by=WEAKER,  # guidance.method: autoguidance, by DiT^DH-S after 14 epochs
    precision="tf32",  # sample_ddp.py: --precision fp32 and --tf32 are its defaults
    rounding="truncate",  # sample_ddp.py: mul(255) to uint8
    decoder="nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",  # the release's weights as diffusers' AutoencoderRAE
)
RIT = Protocol(
    name="rit",
    source="arXiv 2605.21981 (1.14 by RiT-XL after 800 epochs); scripts/eval.sh, engine.py, denoiser.py",
    kind="rit",
    ema_decay=0.9999,  # engine.py: ema_params1
    labels="balanced",  # engine.py: every class 50 times, in order
    sampler="ode",
    steps=25,  # eval.sh: --num_sampling_steps 25, which are 26 points; the last step is Euler's, 49 calls in all
    heun=True,  # eval.sh: --sampling_method heun
    shift=0.0,  # eval.sh: --sample_schedule time_shift, √(dimension / 4096) as in training
    dimension=384 * 16 * 16,  # of DINOv2-S at 256 px
    guidance=3.7,  # eval.sh: CFG=3.7, of the class token too (denoiser.py: cfg_cls is cfg unless it is given)
    guidance_low=0.02,  # eval.sh: --interval_max 0.98, of the data's time; each slope is asked, without the ends
    guidance_high=0.9,  # eval.sh: --interval_min 0.1
    class_noise="mean",  # eval.sh: --coupled_noise
    precision="fp32",  # eval.sh: --gen_precision fp32; main.py leaves TF32 as torch has it, off but in convolutions
    rounding="round",  # engine.py: np.round(clip(255 · x))
    decoder="nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08",  # RAE's of DINOv2-S (download_assets.py), as above
    reference="imagenet256_stats.npz",  # engine.py: fid_stats/imagenet256_stats.npz
)
ADM = Protocol(
    name="adm",
    source="arXiv 2105.05233 and guided-diffusion's README.md, image_sample.py; DiT (arXiv 2212.09748) draws so too",
    kind="dit",
    ema_decay=0.9999,  # image_train.py: --ema_rate 0.9999 is its default
    labels="random",  # image_sample.py, classifier_sample.py: th.randint
    sampler="ddpm",
    steps=250,  # README.md: --timestep_respacing 250
    guidance=1.0,  # its guidance is by a classifier's gradient, which is not here
    precision="fp16",  # README.md: --use_fp16 True at 256 px
    rounding="truncate",  # image_sample.py: ((x + 1) · 127.5) to uint8
    decoder="",  # ADM draws pixels
)
PROTOCOLS = {
    each.name: each
    for each in (
        REPA,
        REPA.unguided("arXiv 2410.06940, tables 2 and 3 (5.9 by SiT-XL/2 after 4M steps)"),
        REG,
        REG.unguided("arXiv 2507.01467 (1.80 by SiT-XL/2 after 4M steps)"),
        ADM,
        LIGHTNINGDIT,
        replace(
            LIGHTNINGDIT,
            name="lightningdit-64ep",
            source="arXiv 2501.01423 (2.11 after 64 epochs); configs/reproductions/…_64ep_cfg.yaml",
            guidance=10.0,  # cfg_scale: 10.0
            guidance_high=0.9,  # cfg_interval_start: 0.10
        ),
        LIGHTNINGDIT.unguided("arXiv 2501.01423 (2.17 after 800 epochs, 5.14 after 64)"),
        RAE,
        RAE.unguided("arXiv 2510.11690 (1.51 by DiT^DH-XL after 800 epochs); …/DiTDHXL-DINOv2-B.yaml"),
        RIT,
        RIT.unguided("arXiv 2605.21981 (1.45 by RiT-XL after 800 epochs); README.md: CFG=1.0 scripts/eval.sh"),
    )
}
OF_SAMPLE = (
    "labels", "sampler", "steps", "heun", "shift", "end", "guidance", "guidance_low", "guidance_high",
    "guidance_channels", "guidance_class", "guidance_class_low", "guidance_class_high",
    "class_noise",
)  # fmt: skip


def protocol_named(name: str) -> Protocol:
    """Raises UserError for a name that is none."""
    if name not in PROTOCOLS:
        known = ", ".join(PROTOCOLS)
        raise UserError(f"--protocol {name} is not known{close_matches(name, PROTOCOLS)}; there are {known}")
    return PROTOCOLS[name]


def of_sample(protocol: Protocol) -> dict[str, Any]:
    """Its settings among those of `sample`, by dotted name."""
    return {f"sample.{name}": getattr(protocol, name) for name in OF_SAMPLE}
