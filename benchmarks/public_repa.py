"""REPA's public training step, run from a clone beside this repository: `git clone` it and pass `--public DIR`.

Nothing of it is copied here. Its model, loss, preprocessing, posterior sampling, average and optimiser settings are
imported from the clone, and called in the order and precision of its train.py: accelerate in fp16 with TF32 matrix
products where a GPU is used, torch's default AdamW, DINOv2 in every step, three numbers read back to the host after
each. Latents are stored moments, as there. What is not there: its reading of millions of files (images and moments are
on the device already), wandb, and torch.hub; DINOv2 is timm's, with the same layers and fused attention.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.online import make_vision, random_images
from storage.base.errors import UserError
from trainer.config.schema import ModelConfig

LATENT_SCALE = 0.18215
# What its train.py imports at the top and the step never calls, made up where it is not installed.
# wandb comes last: the other packages look for it, and must not find what is made up.
UNUSED = {"diffusers": (), "diffusers.models": ("AutoencoderKL",), "wandb": ()}


class PublicStep:
    """The public model and everything its step needs, on a device; `batch` images a step in `micro_batches` parts."""

    def __init__(self, clone: Path, model: ModelConfig, encoder: str, n_classes: int, device: torch.device) -> None:
        modules = _import_from(clone)
        from accelerate import Accelerator

        self.train, self.device = modules["train"], device
        self.settings = settings = self.train.parse_args(["--exp-name", "benchmark"])
        on_gpu = device.type == "cuda"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on_gpu  # its README's --allow-tf32
        self.accelerator = Accelerator(mixed_precision=settings.mixed_precision if on_gpu else "no", cpu=not on_gpu)
        self.encoder = make_vision(encoder).to(device)
        model_of_clone = modules["models.sit"].SiT(
            input_size=32, patch_size=model.patch, hidden_size=model.width, decoder_hidden_size=model.width,
            encoder_depth=model.align_block[0], depth=model.depth, num_heads=model.heads, num_classes=n_classes,
            use_cfg=settings.cfg_prob > 0, z_dims=[self.encoder.embed_dim], projector_dim=model.projector_width,
            fused_attn=settings.fused_attn, qk_norm=settings.qk_norm,
        ).to(device)  # fmt: skip
        self.ema = copy.deepcopy(model_of_clone).eval().requires_grad_(False)
        self.scale = torch.full((1, 4, 1, 1), LATENT_SCALE, device=device)
        self.loss = modules["loss"].SILoss(
            prediction=settings.prediction, path_type=settings.path_type, encoders=[self.encoder],
            accelerator=self.accelerator, latents_scale=self.scale, latents_bias=torch.zeros_like(self.scale),
            weighting=settings.weighting,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(
            model_of_clone.parameters(), lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_epsilon,
            weight_decay=settings.adam_weight_decay,
        )  # fmt: skip
        self.model, self.optimizer = self.accelerator.prepare(model_of_clone, optimizer)
        self.model.train()

    def batches(self, n: int, n_classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same images, moments and labels for ever, on the device."""
        generator = torch.Generator().manual_seed(0)
        moments = torch.randn((n, 8, 32, 32), generator=generator).to(self.device)
        labels = torch.randint(0, n_classes, (n,), generator=generator).to(self.device)
        images = random_images(n, self.device)
        while True:
            yield images, moments, labels

    def step(self, batch: tuple[Tensor, Tensor, Tensor], micro_batches: int) -> list[float]:
        """One update; what its progress bar shows."""
        self.accelerator.gradient_accumulation_steps = micro_batches
        self.accelerator.step = 0  # a step that ran out of memory may have left it anywhere
        logs: list[float] = []
        for images, moments, labels in zip(*(part.chunk(micro_batches) for part in batch), strict=True):
            latents = self.train.sample_posterior(moments, latents_scale=self.scale, latents_bias=0.0)
            with torch.no_grad(), self.accelerator.autocast():
                tokens = self.encoder.forward_features(self.train.preprocess_raw_image(images, "dinov2"))[:, 1:]
            with self.accelerator.accumulate(self.model):
                denoising, alignment = self.loss(self.model, latents, {"y": labels}, zs=[tokens])
                means = denoising.mean(), alignment.mean()
                self.accelerator.backward(means[0] + means[1] * self.settings.proj_coeff)
                updates = self.accelerator.sync_gradients
                if updates:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if updates:
                    self.train.update_ema(self.ema, self.model)
                    logs = [self.accelerator.gather(value).mean().item() for value in (*means, norm)]
        return logs


def _import_from(clone: Path) -> dict[str, Any]:
    """The clone's modules. Raises UserError when it is no clone, or a package it needs is missing."""
    if not (clone / "train.py").is_file() or not (clone / "models" / "sit.py").is_file():
        raise UserError(f"--public {clone} holds no train.py and models/sit.py; clone REPA's repository and name that")
    sys.path.insert(0, str(clone))
    try:
        importlib.import_module("accelerate")
        for name, attributes in UNUSED.items():
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                sys.modules[name] = types.ModuleType(name)
                for attribute in attributes:
                    setattr(sys.modules[name], attribute, None)
        return {name: importlib.import_module(name) for name in ("train", "loss", "models.sit")}
    except ModuleNotFoundError as error:
        raise UserError(f"REPA's code needs the package {error.name}; pip install {error.name}") from None
