"""A decoder that makes pictures of an encoder's tokens: train it, measure it on other images, look at it.

    python -m benchmarks.photo_decoder --data TRAIN --store TRAIN_STORE --heldout HELDOUT \
        --heldout-store HELDOUT_STORE --features features/NAME --out FOLDER [--steps 4000]

The stores are those of the images, with flips or without. FOLDER becomes what `python -m trainer generate --vae FOLDER`
takes for a run whose latents are these features: the decoder of diffusers' AutoencoderRAE (arXiv 2510.11690), a
transformer from tokens to the pixels of their patches, without the encoder. `psnr.json` and `contact-sheet.png` are of
the held-out images.

What is minimised is the mean over images of log MSE, −PSNR up to a factor. Tokens are learnt under noise of a deviation
drawn from [0, NOISE] for each image, in deviations of a channel, as RAE's decoders are: what a model draws is not
exactly what an encoder gives. Normalisation by channel is folded into the first layer when the folder is written. What
a step sees is a function of (SEED, step), and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.photo_vae import read_images, write_measures
from benchmarks.resumable import Resumable, learning_rate, train
from pipeline.encoders.tiny.train import to_float
from storage import GroupReader, open_store
from storage.base.errors import UserError
from storage.base.files import write_atomic
from trainer.evaluation.generate.built_in import ENCODER_LAYER, ENCODER_SHA256
from trainer.evaluation.generate.feature_decoder import CONFIG_FILE, WEIGHT_FILES, load_feature_decoder
from trainer.ranks.arithmetic import autocast_dtype
from trainer.ranks.world import device_named

SEED = 0
PEAK_LR = 1e-3
NOISE = 0.3
DECODER: dict[str, int] = {
    "decoder_hidden_size": 256,
    "decoder_num_hidden_layers": 4,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 1024,
}


class Tokens:
    """A group's tokens in memory, float16 (V, N, T, D), with mean and deviation by channel, and images to match."""

    def __init__(self, group: GroupReader[Any], images: np.ndarray, n_views: int) -> None:
        rows = np.arange(len(images), dtype=np.int64)
        self.identity, self.images = group.identity, images
        self.stored = np.stack([group.tokens(rows, view).astype(np.float16) for view in range(n_views)])
        sample = self.stored[0].astype(np.float64)
        self.mean = torch.from_numpy(sample.mean((0, 1))).float()
        self.std = torch.from_numpy(sample.std((0, 1))).float().clamp(min=1e-6)

    def batch(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        """Normalised tokens under noise float32 (n, T, D), images float32 (n, 3, side, side) in [−1, 1]."""
        rng = np.random.default_rng([SEED, step])
        picked, views = rng.integers(0, len(self.images), n), rng.integers(0, len(self.stored), n)
        images = self.images[picked]
        images[views == 1] = images[views == 1, :, ::-1]
        tokens = (torch.from_numpy(self.stored[views, picked]).float() - self.mean) / self.std
        noise = rng.standard_normal(tokens.shape, dtype=np.float32) * (NOISE * rng.random((n, 1, 1), dtype=np.float32))
        return tokens + torch.from_numpy(noise), to_float(images)


class Training(Resumable):
    """A decoder that learns `tokens`, `batch` images a step; its passes are in `precision`, its weights float32."""

    def __init__(self, out: Path, tokens: Tokens, batch: int, device: torch.device, precision: str = "fp32") -> None:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

        self.tokens, self.batch, self.half = tokens, batch, autocast_dtype(precision)
        side = tokens.images.shape[1]
        n_tokens = math.prod(tokens.identity.token_grid)
        patch = side // math.isqrt(n_tokens)
        if patch**2 * n_tokens != side**2:
            raise UserError(
                f"{n_tokens} tokens do not tile images of {side} px; choose a square grid that divides them"
            )
        self.settings = {"patch_size": patch, "num_channels": 3, **DECODER}
        torch.manual_seed(SEED)
        self.decoder: Any = RAEDecoder(
            hidden_size=tokens.identity.width, num_patches=n_tokens, image_size=side, **self.settings
        ).to(device)
        super().__init__(self.decoder, out, device)

    def take(self, steps: int) -> float:
        """One step; returns the mean PSNR of the batch, dB."""
        tokens, images = (part.to(self.device) for part in self.tokens.batch(self.step, self.batch))
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            patches = self.decoder(tokens).logits
        decoded = self.decoder.unpatchify(patches.float())
        log_mse = (decoded - images).square().mean((1, 2, 3)).clamp(min=1e-8).log().mean()
        self.follow(log_mse, learning_rate(PEAK_LR, self.step, steps))
        return 10 * (np.log10(4.0) - log_mse.item() / np.log(10))

    def write(self, out: Path) -> None:
        """The folder, float16: of tokens as they are stored, which the first layer normalises."""
        state = {name: value.float().cpu() for name, value in self.decoder.state_dict().items()}
        weight = state["decoder_embed.weight"] / self.tokens.std
        state["decoder_embed.bias"] = state["decoder_embed.bias"] - weight @ self.tokens.mean
        state["decoder_embed.weight"] = weight
        whole = {f"decoder.{name}": value.half().contiguous() for name, value in state.items()}
        # Of pixels: the decoder's are in [−1, 1] already.
        whole |= {name: torch.full((1, 3, 1, 1), 0.5) for name in ("encoder_mean", "encoder_std")}
        save_file(whole, out / WEIGHT_FILES[0])
        identity = self.tokens.identity
        settings = {
            "_class_name": "AutoencoderRAE",
            "encoder_type": identity.encoder,
            ENCODER_SHA256: identity.weights_sha256,
            ENCODER_LAYER: identity.layer,
            "encoder_hidden_size": identity.width,
            "encoder_patch_size": self.settings["patch_size"],
            "encoder_input_size": self.tokens.images.shape[1],
            **self.settings,
        }
        write_atomic(out / CONFIG_FILE, json.dumps(settings, indent=1).encode(), "photo_decoder")


@torch.inference_mode()
def measure(out: Path, group: GroupReader[Any], images: np.ndarray, device: torch.device) -> dict[str, float]:
    """PSNR of images whose tokens a group has, through the decoder that the trainer loads from `out`."""
    decoder = load_feature_decoder(str(out), group, device)
    grid, decoded = group.identity.token_grid, []
    for rows in np.array_split(np.arange(len(images)), max(1, len(images) // 32)):
        tokens = torch.from_numpy(group.tokens(rows)).float().to(device)
        pixels = decoder.decode(tokens.transpose(1, 2).unflatten(2, grid))
        decoded.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return write_measures(out, images, np.concatenate(decoded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "store", "heldout", "heldout-store", "features"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of its passes in training")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = device_named(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    store = open_store(args.store)
    group = store.group(args.features, expect=None)
    tokens = Tokens(group, read_images(args.data, store.resolution), store.n_views)
    training = Training(args.out, tokens, args.batch, device, args.precision)
    if train(training, args.steps, args.save_every, "photo-decoder"):
        training.write(args.out)
        heldout = open_store(args.heldout_store)
        images = read_images(args.heldout, heldout.resolution)
        print(json.dumps(measure(args.out, heldout.group(args.features, expect=None), images, device)))


if __name__ == "__main__":
    main()
