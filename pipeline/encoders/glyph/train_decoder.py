"""Train the decoder of glyph-vit's tokens, `glyph-decoder`: `python -m pipeline.encoders.glyph.train_decoder`.

It is the decoder of diffusers' AutoencoderRAE (arXiv 2510.11690), small, and lies in a folder as such an autoencoder's
would, without an encoder: that is glyph-vit, which the configuration names by its weights' SHA-256. Its input is what
decoders of features take, tokens after the final norm without its affine part. So a run on these tokens makes pictures
without network, and the code that reads published decoders reads this one.

As glyph-vit it learns from digits in the style FOR_ENCODERS over the left part of the built-in photographs, and is
measured on the demo's fonts over the right part, of which it saw nothing. It minimises |e| + 2 e² for the error e of
pixels in [−1, 1], means over pixels, of tokens with noise of a deviation drawn from [0, NOISE] for each image, as RAE's
decoders are trained: what a model draws is not exactly what an encoder gives.

Training starts from what least squares make of each token alone, and learns with its blocks what neighbours add. It is
a function of its seed; the committed weights took 84 seconds of one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.encoders import registry
from pipeline.encoders.glyph import GLYPH_DECODER, GLYPH_VIT
from pipeline.encoders.glyph.train import CONFIGS, PATCH, digits
from pipeline.encoders.tiny.train import learning_rate, psnr_db, to_float
from pipeline.encoders.weights import file_sha256
from pipeline.sources.glyphs import DEMO, FOR_ENCODERS, RESOLUTION

ENCODER = "glyph-vit"
N_PER_CLASS, BATCH, STEPS, SEED, NOISE = 400, 32, 1200, 3, 0.05
RIDGE = 10.0  # added to the squares of the first fit, of tokens by the thousand
DECODER: dict[str, int] = {
    "decoder_hidden_size": 128,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 256,
}
PREVIEW = Path("runs/glyph-decoder.png")


def settings() -> dict[str, Any]:
    """The folder's `config.json`, under AutoencoderRAE's names, and which encoder's tokens it decodes."""
    return {
        "_class_name": "AutoencoderRAE",
        "encoder_type": "timm.VisionTransformer",
        "encoder_weights_sha256": file_sha256(GLYPH_VIT / "model.safetensors"),
        "encoder_hidden_size": CONFIGS[ENCODER]["embed_dim"],
        "encoder_patch_size": PATCH,
        "encoder_input_size": RESOLUTION,
        "patch_size": PATCH,
        "num_channels": 3,
        **DECODER,
    }


def new_decoder() -> Any:
    """The decoder with random weights: tokens (B, T, D) → `logits` (B, T, pixels of a patch · 3), (x − ½) / ½."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    return RAEDecoder(
        hidden_size=CONFIGS[ENCODER]["embed_dim"],
        num_patches=(RESOLUTION // PATCH) ** 2,
        patch_size=PATCH,
        image_size=RESOLUTION,
        **DECODER,
    )


def tokens_of(images: np.ndarray) -> Tensor:
    """glyph-vit's tokens, float32 (N, T, D), of images uint8 (N, H, W, 3), without the final norm's affine part."""
    spec = registry.resolve_features(f"{ENCODER}:norm=plain")
    encoder = registry.load(spec, resolution=RESOLUTION, device=torch.device("cpu"))
    return torch.cat([encoder.encode(part)["patches"] for part in torch.from_numpy(images).split(BATCH)]).clone()


@torch.no_grad()
def fit_linear(decoder: Any, tokens: Tensor, images: np.ndarray) -> None:
    """Let the blocks do nothing yet, and the last layer draw each patch from its own token by least squares."""
    width = tokens.shape[-1]
    decoder.decoder_embed.weight.copy_(torch.eye(DECODER["decoder_hidden_size"], width))
    decoder.decoder_embed.bias.zero_()
    for block in decoder.decoder_layers:
        for layer in (block.attention.to_out[0], block.output.dense):
            layer.weight.zero_()
            layer.bias.zero_()
    hidden: list[Tensor] = []
    hook = decoder.decoder_norm.register_forward_hook(lambda module, given, made: hidden.append(made[:, 1:]))
    for part in tokens.split(BATCH):
        decoder(part)
    hook.remove()
    x = torch.cat(hidden).flatten(0, 1).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    side = RESOLUTION // PATCH
    patches = to_float(images).unflatten(3, (side, PATCH)).unflatten(2, (side, PATCH)).permute(0, 2, 4, 3, 5, 1)
    squares = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    solved = torch.linalg.solve(squares, x.T @ patches.reshape(len(x), -1).double())
    decoder.decoder_pred.weight.copy_(solved[:-1].T)
    decoder.decoder_pred.bias.copy_(solved[-1])


def train(steps: int) -> None:
    """Train the decoder and write its folder, float16."""
    torch.manual_seed(SEED)
    decoder = new_decoder()
    print(f"glyph-decoder: {sum(p.numel() for p in decoder.parameters()):,} parameters")
    images, _, _ = digits("train", N_PER_CLASS, SEED, FOR_ENCODERS)
    tokens = tokens_of(images)
    fit_linear(decoder, tokens, images)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, weight_decay=0.01, betas=(0.9, 0.99))
    rng = np.random.default_rng(SEED)
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(1e-3, step / steps, warmup=0.05)
        picked = rng.integers(0, len(images), BATCH)
        clean = tokens[picked]
        noisy = clean + NOISE * torch.rand(BATCH, 1, 1) * torch.randn_like(clean)
        error = decoder.unpatchify(decoder(noisy).logits) - to_float(images[picked])
        loss = error.abs().mean() + 2 * error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", mse=f"{error.square().mean().item():.5f}")
    GLYPH_DECODER.mkdir(exist_ok=True)
    state = {f"decoder.{name}": value.half().contiguous() for name, value in decoder.state_dict().items()}
    of_pixels = {name: torch.full((1, 3, 1, 1), 0.5) for name in ("encoder_mean", "encoder_std")}
    save_file(state | of_pixels, GLYPH_DECODER / "diffusion_pytorch_model.safetensors")
    (GLYPH_DECODER / "config.json").write_text(json.dumps(settings(), indent=2) + "\n")


@torch.inference_mode()
def reconstruct(images: np.ndarray) -> np.ndarray:
    """Images uint8 (N, H, W, 3) through glyph-vit and the decoder that was written, uint8."""
    from safetensors.torch import load_file

    decoder = new_decoder()
    weights = load_file(GLYPH_DECODER / "diffusion_pytorch_model.safetensors")
    decoder.load_state_dict({n.removeprefix("decoder."): w.float() for n, w in weights.items() if "decoder." in n})
    pixels = torch.cat([decoder.unpatchify(decoder(part).logits) for part in tokens_of(images).split(BATCH)])
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def measure(n_per_class: int = 24) -> float:
    """Mean PSNR (dB) of held-out digits in the demo's style; prints it, and draws originals over reconstructions."""
    images, labels, _ = digits("heldout", n_per_class, 0, DEMO)
    decoded = reconstruct(images)
    db = psnr_db(images, decoded)
    of_encoders, _, _ = digits("heldout", n_per_class // 2, SEED, FOR_ENCODERS)
    theirs = psnr_db(of_encoders, reconstruct(of_encoders))
    print(f"glyph-decoder: PSNR of held-out digits {db.mean():.2f} dB ({db.min():.2f} to {db.max():.2f}); ", end="")
    print(f"of others in its own style {theirs.mean():.2f} dB")
    shown = np.concatenate([np.flatnonzero(labels == label)[:2] for label in np.unique(labels)])
    rows = [np.concatenate(list(of[shown]), axis=1) for of in (images, decoded)]
    rows += [np.concatenate(list(of), axis=1) for of in (of_encoders[::6][:20], reconstruct(of_encoders[::6][:20]))]
    PREVIEW.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(PREVIEW)
    return float(db.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    train(parser.parse_args().steps)
    measure()
