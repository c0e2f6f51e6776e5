"""`python -m trainer export`: a run's averaged weights for other programs, whole or absent.

    --to safetensors   OUT/ema.safetensors, the public checkpoints' parameter names; the file's metadata say of what
    --to diffusers     OUT/model_index.json, transformer/, scheduler/, pipeline.py, README.md (a model card's stub), and
                       vae/ when the store's VAE is a directory, else its hub id in model_index.json

The model becomes diffusers' `DiTTransformer2DModel`, SiT's too. `pipeline.py` is `diffusers_pipeline.py`, which says
why a stock pipeline would draw other images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from storage.base.errors import UserError
from storage.base.files import follow_umask, make_directories, partial_name, publish
from storage.base.options import spelled
from trainer.config.tree import flatten
from trainer.evaluation.generate.decode import decoder_of, load_decoder, location
from trainer.models.blocks import sincos_position_embedding
from trainer.models.transformer import Geometry
from trainer.objectives.dit import BETA_FIRST, BETA_LAST, N_STEPS
from trainer.run.checkpoint import load_ema_weights
from trainer.run.folder import RunFolder
from trainer.run.latent_map import packed, statistics_of_run
from trainer.run.opened import OpenRun, checkpoints_of, open_run, step_of

PIPELINE_SOURCE = Path(__file__).with_name("diffusers_pipeline.py")
POSITION_TOLERANCE = 1e-5


def export(run: Path, to: str, out: Path | None, checkpoint: str) -> list[Path]:
    """Write the export and return its path. Raises UserError."""
    opened = open_run(run)
    opened.data.close()
    *others, chosen = checkpoints_of(run, checkpoint)
    if others:
        raise UserError(f"--checkpoint {checkpoint} names {len(others) + 1} checkpoints; an export is of one")
    folder = out or RunFolder(run).exported(to)
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or name another --out")
    weights = load_ema_weights(chosen)
    aside = partial_name(folder.absolute(), "export")
    make_directories(aside)
    try:
        if to == "safetensors":
            described = {name: spelled(value) for name, value in flatten(opened.config).items()}
            if opened.data.of_features:  # a number a channel and place: a file beside the weights
                statistics = statistics_of_run(opened.config, opened.data, run)
                (aside / RunFolder(run).latent_statistics.name).write_bytes(packed(statistics, opened.data))
            else:
                described |= {
                    "latent_scale": json.dumps(_plain(opened.scale.scale)),
                    "latent_shift": json.dumps(_plain(opened.scale.shift)),
                }
            save_file(weights, aside / "ema.safetensors", metadata={"step": str(step_of(chosen)), **described})
        else:
            write_diffusers(opened, weights, step_of(chosen), aside)
        follow_umask(aside)  # safetensors' own are private
        publish(aside, folder.absolute())
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [folder]


def write_diffusers(run: OpenRun, weights: Mapping[str, Tensor], step: int, out: Path) -> None:
    """The pipeline's folder. Raises UserError for a model that diffusers' class cannot be."""
    import diffusers

    if run.data.of_features:
        raise UserError(
            f"{run.path} has features as latents, for which diffusers has no pipeline; export it with --to safetensors"
        )
    if run.geometry.class_width or run.geometry.kind not in ("sit", "dit"):
        what = "a class token" if run.geometry.class_width else "RMS norms and rotary positions"
        raise UserError(
            f"{run.path} has a model with {what}, for which diffusers has no class; export it with --to safetensors"
        )
    transformer = diffusers.DiTTransformer2DModel(**transformer_settings(run.geometry))
    transformer.load_state_dict(renamed(weights, run.geometry))
    transformer.save_pretrained(out / "transformer")
    scheduler: Any
    if run.geometry.kind == "dit":
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=N_STEPS,
            beta_start=BETA_FIRST,
            beta_end=BETA_LAST,
            beta_schedule="linear",
            variance_type="learned_range",
            clip_sample=False,
        )
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(out / "scheduler")
    decoder = decoder_of(run.data, run.config)
    vae: list[str | None] = [None, None]
    if decoder and Path(decoder).is_dir():
        model: Any = load_decoder(decoder, torch.device("cpu"))
        model.save_pretrained(out / "vae")
        vae, decoder = ["diffusers", type(model).__name__], "vae"
    sample = run.config.sample
    index = {
        "_class_name": ["pipeline", "ExportedPipeline"],
        "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": vae,
        "decoder": decoder,
        "latent_scale": _plain(run.scale.scale),
        "latent_shift": _plain(run.scale.shift),
        "steps": sample.steps,
        "guidance": sample.guidance,
        "guidance_low": sample.guidance_low,
        "guidance_high": sample.guidance_high,
        "guidance_channels": sample.guidance_channels,
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(PIPELINE_SOURCE, out / "pipeline.py")
    (out / "README.md").write_text(model_card(run, step, decoder), encoding="utf-8")


def _plain(of: float | Tensor) -> Any:
    """A number, or lists of numbers (C, p, p), as JSON has them: z = (x − latent_shift) · latent_scale."""
    return of[0].tolist() if isinstance(of, Tensor) else of


def transformer_settings(geometry: Geometry) -> dict[str, Any]:
    """Arguments of `DiTTransformer2DModel`. Raises UserError where it has none for a setting of the run."""
    if geometry.qk_norm:
        raise UserError("diffusers' DiTTransformer2DModel has no query and key norm; export it --to safetensors")
    return {
        "num_attention_heads": geometry.heads,
        "attention_head_dim": geometry.width // geometry.heads,
        "in_channels": geometry.channels,
        "out_channels": geometry.out_channels,
        "num_layers": geometry.depth,
        "sample_size": geometry.input_size,
        "patch_size": geometry.patch,
        "num_embeds_ada_norm": geometry.n_classes,
        "norm_eps": 1e-6,
    }


def renamed(weights: Mapping[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """The weights under `DiTTransformer2DModel`'s names; projectors, which sampling does without, are left out.

    Every block of diffusers embeds time and class itself, so that those weights are there once a block.
    """
    position = sincos_position_embedding(geometry.width, geometry.grid)
    if (weights["pos_embed"] - position).abs().max() > POSITION_TOLERANCE:
        raise UserError("these weights have a position embedding of their own, which diffusers computes; no export")
    state = {
        "pos_embed.proj.weight": weights["x_embedder.proj.weight"],
        "pos_embed.proj.bias": weights["x_embedder.proj.bias"],
    }
    conditions = {
        "timestep_embedder.linear_1": "t_embedder.mlp.0",
        "timestep_embedder.linear_2": "t_embedder.mlp.2",
        "class_embedder.embedding_table": "y_embedder.embedding_table",
    }
    layers = {
        "norm1.linear": "adaLN_modulation.1",
        "attn1.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    names = {"proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear"}
    for i in range(geometry.depth):
        block = f"transformer_blocks.{i}"
        names |= {f"{block}.norm1.emb.{theirs}": ours for theirs, ours in conditions.items()}
        names |= {f"{block}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in layers.items()}
        for kind in ("weight", "bias"):
            parts = weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            state |= {f"{block}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    for theirs, ours in names.items():
        state |= {f"{theirs}.{k}": weights[f"{ours}.{k}"] for k in ("weight", "bias") if f"{ours}.{k}" in weights}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def model_card(run: OpenRun, step: int, decoder: str) -> str:
    """README.md: what the model is, how it is used, and what its author has yet to write."""
    config, sample = run.config, run.config.sample
    targets = ", ".join(f"{t.features} after block {t.block}, λ = {t.weight:g}" for t in config.targets) or "none"
    vae = ""
    if decoder != "vae":
        repository, folder = location(decoder)
        where = f'"{repository}"' + (f', subfolder="{folder}"' if folder else "")
        vae = f", vae=AutoModel.from_pretrained({where})" if decoder else ", vae=…"
    imports = "AutoModel, DiffusionPipeline" if "AutoModel" in vae else "DiffusionPipeline"
    ours = "ddpm" if config.model.kind == "dit" else "ode"
    kind = "A class-conditional" if run.geometry.n_classes else "An unconditional"
    alignment = "representation alignment (REPA, arXiv 2410.06940)"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {run.path.absolute().name}

{kind} {"SiT" if config.model.kind == "sit" else "DiT"} trained {"with" if config.aligns else "without"}
{alignment}.

```python
from diffusers import {imports}

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True{vae})
images = pipeline(class_labels={"[0, 1]" if run.geometry.n_classes else "[0, 0]"}).images
```

`pipeline.py` in this folder is the code that `trust_remote_code` is about; read it first.
It draws the images of `python -m trainer generate --sampler {ours}`, given the same noise.

| | |
|---|---|
| preset | {config.preset} |
| steps of training | {step:,} |
| weights | exponential moving average, decay {config.ema_decay:g} |
| alignment | {targets} |
| classes | {run.geometry.n_classes} |
| sampler while training | {sample.sampler}, {sample.steps} steps, guidance {sample.guidance:g} |
| VAE | {decoder or "not recorded"} |

To be written by whoever publishes this: licence, training data, intended use, limitations, evaluation.
"""
