"""The pipeline of an exported model: `trainer export` copies this file, and nothing of the trainer imports it.

It is DiTPipeline's work with three differences, without which stock classes do not draw the trainer's images:

- diffusers spaces the 128 frequencies of the time embedding by 1/127 of their range, DiT and SiT by 1/128;
- SiT's time is σ in [0, 1], and its scheduler steps from σ = 1 to 0 evenly;
- guidance may be limited to an interval of times and to the first latent channels.

Euler's method for SiT, ancestral sampling for DiT: no other sampler of the trainer has its like in diffusers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class ExportedPipeline(DiffusionPipeline):
    """Images of classes. Without a VAE it draws latents, `output_type="latent"`."""

    _optional_components = ["vae"]  # noqa: RUF012 — declared so by the base class
    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        decoder: str = "",
        latent_scale: float | list = 1.0,
        latent_shift: float | list = 0.0,
        steps: int = 250,
        guidance: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        guidance_channels: int = 0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            decoder=decoder,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            steps=steps,
            guidance=guidance,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            guidance_channels=guidance_channels,
        )
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images of the classes: "pil", "np", "pt" in [0, 1], or "latent", still scaled. `latents`: the noise."""
        if output_type != "latent" and self.vae is None:
            raise ValueError(
                f"this pipeline was exported without its VAE, {self.config.decoder}; load that and pass it as vae= to "
                'from_pretrained, or ask for output_type="latent"'
            )
        model = self.transformer.config
        device = self._execution_device
        labels = torch.as_tensor(class_labels, dtype=torch.long, device=device)
        if not model.num_embeds_ada_norm and (guidance_scale or 1) != 1:
            raise ValueError("this model was trained without labels, so there is no class to guide towards")
        shape = (len(labels), model.in_channels, model.sample_size, model.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        latents = latents.to(device, self.transformer.dtype)
        scale = self.config.guidance if guidance_scale is None else guidance_scale
        options = {"generator": generator} if isinstance(self.scheduler, DDPMScheduler) else {}
        for unit_time, timestep in self.progress_bar(self._times(num_inference_steps or self.config.steps, device)):
            given = unit_time if isinstance(timestep, Tensor) and timestep.is_floating_point() else timestep
            output = self._guided(latents, given, labels, scale if self._guides(unit_time) else 1.0)
            latents = self.scheduler.step(output, timestep, latents, **options).prev_sample
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _times(self, n: int, device: torch.device) -> list[tuple[float, Tensor]]:
        """(t on the scale from image, 0, to noise, 1; the scheduler's own) of each step, noise first."""
        total = self.scheduler.config.num_train_timesteps
        if isinstance(self.scheduler, DDPMScheduler):
            stride = (total - 1) / max(1, n - 1)
            visited = [round(at) for at in itertools.accumulate([stride] * (n - 1), initial=0.0)]
            self.scheduler.set_timesteps(timesteps=visited[::-1], device=device)
            return [(t.item() / total, t) for t in self.scheduler.timesteps]
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n), device=device)
        return [(s.item(), t) for s, t in zip(self.scheduler.sigmas, self.scheduler.timesteps, strict=False)]

    def _guides(self, unit_time: float) -> bool:
        return self.config.guidance_low <= unit_time <= self.config.guidance_high

    def _guided(self, x: Tensor, t: float | Tensor, labels: Tensor, scale: float) -> Tensor:
        """The model's output, guided in its first channels unless `scale` is 1."""
        if scale == 1:
            return self.transformer(x, timestep=self._spread(t, x), class_labels=labels).sample
        null = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
        pair = torch.cat([x, x])
        output = self.transformer(pair, timestep=self._spread(t, pair), class_labels=torch.cat([labels, null])).sample
        conditional, unconditional = output.chunk(2)
        n = self.config.guidance_channels or x.shape[1]
        guided = unconditional[:, :n] + scale * (conditional[:, :n] - unconditional[:, :n])
        return torch.cat([guided, conditional[:, n:]], dim=1)

    @staticmethod
    def _spread(t: float | Tensor, x: Tensor) -> Tensor:
        return torch.as_tensor(t, device=x.device).reshape(1).expand(len(x))

    @staticmethod
    def _over(latents: Tensor, numbers: float | list) -> Tensor:
        """One number, or (C, p, p) of channels and the pixels of a patch, laid over latents (B, C, h, w)."""
        of = torch.as_tensor(numbers, dtype=latents.dtype, device=latents.device)
        return of if of.ndim == 0 else of.repeat(1, latents.shape[2] // of.shape[1], latents.shape[3] // of.shape[2])

    def _decode(self, latents: Tensor, output_type: str) -> object:
        unscaled = latents / self._over(latents, self.config.latent_scale)
        unscaled = (unscaled + self._over(latents, self.config.latent_shift)).to(self.vae.dtype)
        if any(isinstance(layer, torch.nn.Conv3d) for layer in self.vae.modules()):  # of clips: an image is one frame
            decoded = self.vae.decode(unscaled.unsqueeze(2)).sample.squeeze(2)
        else:
            decoded = self.vae.decode(unscaled).sample
        pixels = (decoded / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        images = pixels.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
