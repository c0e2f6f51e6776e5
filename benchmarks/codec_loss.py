"""What int8 features do to a training step: the change of the REPA loss and of its gradient, beside float16's.

    python -m benchmarks.codec_loss [--steps 4] [--batch 4]

Built-in photographs go through the built-in VAE and a vision encoder; SiT takes `--steps` real steps from the float32
features, so that its gates have left zero, and then one more step is taken apart. Its alignment loss is taken against
float32, float16 and int8 targets from the same forward pass, with a backward pass for each. Printed are, for each pair,
the change of the loss relative to its size, and of the gradients 1 − cos and the relative norm of their difference: of
the REPA loss by the projector and by the transformer, and of the whole loss, velocity + λ · REPA, by all parameters.

Feature sets: `tiny-vit` (trained, at 128 px with sit-tiny-2); DINOv2-B's architecture with seeded random weights and
LayerScale 1 (sit-b-2, 256 px); the same with one channel in a thousand 15 times the others and one in fifty tokens with
an activation of 60, as trained transformers have. Pretrained weights are used instead with `--weights FILE`.

Cost: some minutes on one core and 4 GB, nearly all of it SiT-B/2.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import RESULTS, machine, table
from pipeline.decode import to_rgb
from pipeline.encoders import registry, timm_vit
from pipeline.encoders.catalogue import VISION
from pipeline.encoders.vision import VisionTransformerEncoder, preprocess
from pipeline.encoders.weights import read_weights
from pipeline.sources import open_source
from pipeline.sources.photos import write_photos
from pipeline.transforms import center_crop
from storage.base.console import progress_bar
from storage.identity import LatentsIdentity
from storage.order import Order
from storage.torch.codecs import Tokens
from storage.torch.codecs.int8 import dequantise, quantise
from trainer.alignment.cosine import alignment_loss
from trainer.config.presets import preset
from trainer.config.tree import override
from trainer.data.latent_scale import LatentScale
from trainer.data.loader import Batch
from trainer.loop.losses import losses
from trainer.loop.step import build, train_step
from trainer.models.transformer import Geometry
from trainer.ranks.world import World

CPU = torch.device("cpu")
N_CLASSES = 8
PAIRS = (("float16", "float32"), ("int8", "float32"), ("int8", "float16"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One feature set: the model it aligns, the pixels, and the encoder of the patch tokens."""

    name: str
    preset: str
    resolution: int
    encoder: VisionTransformerEncoder
    outliers: bool = False


def photographs(resolution: int, n: int, seed: int) -> np.ndarray:
    """`n` centre crops of the built-in photographs, uint8 (n, R, R, 3)."""
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        source = open_source(folder)
        locations = source.listing().index.locations
        chosen = np.random.default_rng(seed).choice(len(locations), n, replace=False)
        samples = source.read_many([locations[i] for i in chosen])
        return np.stack([center_crop(to_rgb(sample), resolution) for sample in samples])


def random_dinov2_b(resolution: int, weights: Path | None) -> VisionTransformerEncoder:
    """DINOv2-B at a crop's resolution, pretrained when weights are given, else random and seeded."""
    torch.manual_seed(0)
    known = VISION["dinov2-vitb14"]
    model = timm_vit.build(known, resolution)
    if weights is not None:
        timm_vit.load_state(model, read_weights(weights), weights)
    else:  # a new LayerScale of 1e-5 would leave the patch embedding as the only thing that acts
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                nn.init.ones_(parameter)
    return VisionTransformerEncoder(model, lambda x: preprocess(x, known.preprocessing), CPU)


def add_outliers(tokens: Tensor) -> Tensor:
    """Channel 5 of every 1,000 times 15, and an activation of 60 in every fiftieth token; (B, T, D)."""
    tokens = tokens.clone()
    tokens[..., 5::1000] *= 15
    tokens[:, ::50, 7] = 60
    return tokens


def targets(patches: Tensor) -> dict[str, Tensor]:
    """What the trainer would align with, by storage dtype: float32 (B, T, D) each."""
    return {"float32": patches, "float16": patches.half().float(), "int8": dequantise(*quantise(patches)).clone()}


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The gradient of a scalar by each trainable parameter, zeros where it has no part."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def flat(gradient: dict[str, Tensor], *, of_projector: bool | None = None) -> Tensor:
    """The gradient as one float64 vector: the projector's part, everything else's, or (None) all of it."""
    kept = [g for name, g in gradient.items() if of_projector in (None, name.startswith("projectors."))]
    return torch.cat([g.flatten().double() for g in kept])


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """1 − cos(a, b) and ‖a − b‖/‖b‖. The former as half a squared distance of unit vectors, which does not cancel."""
    unit = a / a.norm() - b / b.norm()
    return float(unit.square().sum() / 2), float((a - b).norm() / b.norm())


def measure(case: Case, n_steps: int, batch: int) -> list[list[str]]:
    """Rows of the table for one feature set."""
    config = override(preset(case.preset), {"precision": "fp32", "batch": batch})
    n_images = batch * min(8, n_steps + 1)
    images = photographs(case.resolution, n_images, seed=0)
    vae_spec = registry.resolve_latents("tiny-vae")
    vae_identity = registry.describe(vae_spec, resolution=case.resolution)
    assert isinstance(vae_identity, LatentsIdentity)
    vae = registry.load(vae_spec, resolution=case.resolution, device=CPU)
    parts = torch.from_numpy(images).tensor_split(max(1, n_images // 4))
    moments = torch.cat([vae.encode(part)["moments"] for part in parts])
    patches = torch.cat([case.encoder.encode_tokens(part)[0] for part in parts]).clone()
    if case.outliers:
        patches = add_outliers(patches)
    geometry = Geometry(
        kind=config.model.kind,
        input_size=vae_identity.latent_size[0],
        channels=vae_identity.latent_channels,
        patch=config.model.patch,
        width=config.model.width,
        depth=config.model.depth,
        heads=config.model.heads,
        n_classes=N_CLASSES,
        targets=((config.model.align_block[0], patches.shape[-1]),),
        projector_width=config.model.projector_width,
    )
    scale = LatentScale.of(vae_identity)
    trained = build(config, geometry, scale, World(rank=0, size=1, device=CPU))
    model = trained.model
    order = Order(n_images, config.seed)

    def batch_of(step: int) -> Batch:
        rows = torch.from_numpy(order.global_batch(step, batch))
        return Batch(
            step=step, rows=rows, labels=rows % N_CLASSES, moments=moments[rows], targets=(Tokens(patches[rows]),),
            stall_s=0.0,
        )  # fmt: skip

    with progress_bar(n_steps, unit="step", description=case.name) as bar:
        for step in range(n_steps):
            train_step(trained, batch_of(step))
            bar.update()

    last = batch_of(n_steps)
    projections: list[Tensor] = []
    hook = model.projectors[0].register_forward_hook(lambda *call: projections.append(call[2]))
    of_batch = losses(model, last, scale, config, geometry)
    hook.remove()
    by_velocity = flat(gradients(of_batch.denoising.mean(), model))
    found = {}
    for dtype, target in targets(last.targets[0].values).items():
        loss = alignment_loss(projections[0], target).mean()
        assert dtype != "float32" or torch.equal(loss, of_batch.alignments.mean())
        found[dtype] = (float(loss.detach().double()), gradients(loss, model))
    rows = []
    for a, b in PAIRS:
        (loss_a, gradient_a), (loss_b, gradient_b) = found[a], found[b]
        weight = config.loss.projection_weight[0]
        comparisons = [
            difference(flat(gradient_a, of_projector=True), flat(gradient_b, of_projector=True)),
            difference(flat(gradient_a, of_projector=False), flat(gradient_b, of_projector=False)),
            difference(by_velocity + weight * flat(gradient_a), by_velocity + weight * flat(gradient_b)),
        ]
        change = abs(loss_a - loss_b) / abs(loss_b)
        rows.append(
            [case.name, f"{a} − {b}", f"{loss_b:.4f}", f"{change:.1e}"]
            + [f"{value:.1e}" for pair in comparisons for value in pair]
        )
    return rows


def main() -> None:
    """Measure every feature set; print one table and write it to `results/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps before the one taken apart (default 4)")
    parser.add_argument("--batch", type=int, default=4, help="images a step (default 4)")
    parser.add_argument("--weights", type=Path, default=None, help="weight file of DINOv2-B (default: random weights)")
    args = parser.parse_args()
    tiny_spec = registry.resolve_features("tiny-vit")
    tiny = registry.load(tiny_spec, resolution=128, device=CPU)
    assert isinstance(tiny, VisionTransformerEncoder)
    large = random_dinov2_b(256, args.weights)
    kind = "random DINOv2-B" if args.weights is None else "DINOv2-B"
    cases = [
        Case(name="tiny-vit", preset="sit-tiny-2", resolution=128, encoder=tiny),
        Case(name=kind, preset="sit-b-2", resolution=256, encoder=large),
        Case(name=f"{kind}, outliers", preset="sit-b-2", resolution=256, encoder=large, outliers=True),
    ]
    rows = [row for case in cases for row in measure(case, args.steps, args.batch)]
    header = ["features", "compared", "REPA loss", "Δ loss", "projector 1−cos", "‖Δ‖", "transformer 1−cos", "‖Δ‖"]
    text = "\n".join([
        "## What int8 features change in a training step", "", machine(Path(), ("torch", "numpy")), "",
        f"{args.batch} images, step {args.steps + 1}, float32 arithmetic on the CPU; Δ relative to the second.",
        "", table([*header, "whole loss 1−cos", "‖Δ‖"], rows), "",
    ])  # fmt: skip
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "codec_loss.md").write_text(text)


if __name__ == "__main__":
    main()
