"""Vision transformers as their authors released them: names and shapes of their files, their forward in plain torch.

Written from the papers and the public code's definitions, with nothing of timm, so that what the pipeline makes of such
a file is compared with something it did not come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def vit_shapes(
    width: int,
    depth: int,
    *,
    patch: int,
    grid: int,
    hidden: int | None = None,
    cls: bool = True,
    layer_scale: bool = False,
    swiglu: bool = False,
    registers: int = 0,
) -> Shapes:
    """Names that DINO, DINOv2, MAE, MoCo v3 and I-JEPA share; `hidden` is the MLP's width (SwiGLU's: of one half)."""
    hidden = hidden or 4 * width
    shapes: Shapes = {
        "pos_embed": (1, cls + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **_affine("norm", width),
    }
    if cls:
        shapes["cls_token"] = (1, 1, width)
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    mlp = {"w12": (2 * hidden, width), "w3": (width, hidden)} if swiglu else {}
    mlp = mlp or {"fc1": (hidden, width), "fc2": (width, hidden)}
    for i in range(depth):
        block = f"blocks.{i}."
        shapes |= {**_affine(f"{block}norm1", width), **_affine(f"{block}norm2", width)}
        shapes |= {**_linear(f"{block}attn.qkv", 3 * width, width), **_linear(f"{block}attn.proj", width, width)}
        for name, (n_out, n_in) in mlp.items():
            shapes |= _linear(f"{block}mlp.{name}", n_out, n_in)
        if layer_scale:
            shapes |= {f"{block}ls1.gamma": (width,), f"{block}ls2.gamma": (width,)}
    return shapes


def dinov2_shapes(width: int, depth: int, *, grid: int = 37, swiglu: bool = False, registers: int = 0) -> Shapes:
    """DINOv2 (arXiv 2304.07193; registers arXiv 2309.16588). The giant's SwiGLU is 8/3 wide, rounded up to eights."""
    hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8 if swiglu else None
    shapes = vit_shapes(
        width, depth, patch=14, grid=grid, hidden=hidden, layer_scale=True, swiglu=swiglu, registers=registers
    )
    return {**shapes, "mask_token": (1, width)}


def dinov3_shapes(width: int, depth: int, *, heads: int, swiglu_hidden: int = 0) -> Shapes:
    """DINOv3 (arXiv 2508.10104): rotary positions, whose periods are in the file; 4 storage tokens; biases masked."""
    shapes = vit_shapes(width, depth, patch=16, grid=1, layer_scale=True)
    del shapes["pos_embed"]
    for i in range(depth):
        shapes[f"blocks.{i}.attn.qkv.bias_mask"] = (3 * width,)
        if swiglu_hidden:
            for name in ("fc1", "fc2"):
                del shapes[f"blocks.{i}.mlp.{name}.weight"], shapes[f"blocks.{i}.mlp.{name}.bias"]
            for name, n_out, n_in in (
                ("w1", swiglu_hidden, width),
                ("w2", swiglu_hidden, width),
                ("w3", width, swiglu_hidden),
            ):
                shapes |= _linear(f"blocks.{i}.mlp.{name}", n_out, n_in)
    return {
        **shapes,
        "mask_token": (1, width),
        "storage_tokens": (1, 4, width),
        "rope_embed.periods": (width // heads // 4,),
    }


def clip_shapes(width: int, depth: int, *, patch: int, grid: int, output: int) -> Shapes:
    """The image half of OpenAI's CLIP (arXiv 2103.00020), below `visual.`, and one tensor of the other half."""
    shapes: Shapes = {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": (1 + grid**2, width),
        "proj": (width, output),
        **_affine("ln_pre", width),
        **_affine("ln_post", width),
    }
    for i in range(depth):
        block = f"transformer.resblocks.{i}."
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= {**_affine(f"{block}ln_1", width), **_affine(f"{block}ln_2", width)}
        shapes |= _linear(f"{block}attn.out_proj", width, width)
        shapes |= {**_linear(f"{block}mlp.c_fc", 4 * width, width), **_linear(f"{block}mlp.c_proj", width, 4 * width)}
    return {**{f"visual.{name}": shape for name, shape in shapes.items()}, "text_projection": (output, output)}


def siglip_shapes(width: int, depth: int, *, grid: int, hidden: int | None = None) -> Shapes:
    """SigLIP's image half as OpenCLIP saves it: no class token, and a pooling head that features do not pass."""
    hidden = hidden or 4 * width
    pool = {"latent": (1, 1, width), **_affine("norm", width)}
    for name, n_out, n_in in (
        ("q", width, width),
        ("kv", 2 * width, width),
        ("proj", width, width),
        ("mlp.fc1", hidden, width),
        ("mlp.fc2", width, hidden),
    ):
        pool |= _linear(name, n_out, n_in)
    shapes = vit_shapes(width, depth, patch=16, grid=grid, cls=False, hidden=hidden)
    shapes |= {f"attn_pool.{name}": shape for name, shape in pool.items()}
    return {**{f"visual.trunk.{name}": shape for name, shape in shapes.items()}, "logit_scale": (1,)}


def _affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, n_out: int, n_in: int) -> Shapes:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def random_state(shapes: Shapes, *, size: float = 0.3, device: str = "cpu") -> State:
    """Seeded numbers of a magnitude that lets every tensor matter; what DINOv3 fixes has its fixed values."""
    generator = torch.Generator(device="cpu").manual_seed(len(shapes))
    state = {}
    for name, shape in shapes.items():
        if device == "meta":
            state[name] = torch.empty(shape, device="meta")
        elif name.endswith("bias_mask"):
            state[name] = torch.cat([torch.ones(shape[0] // 3), torch.zeros(shape[0] // 3), torch.ones(shape[0] // 3)])
        elif name == "rope_embed.periods":
            state[name] = 100.0 ** (torch.arange(shape[0]) / shape[0])
        else:
            state[name] = torch.randn(shape, generator=generator) * size
    return state


def forward(
    state: State,
    x: Tensor,
    heads: int,
    *,
    eps: float = 1e-6,
    act: Callable[[Tensor], Tensor] = F.gelu,
    norm: bool = True,
    depth: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Patch tokens (B, T, D) and first prefix token (B, D) of x (B, 3, H, W), from the names of `vit_shapes`.

    `norm` is the final one. Positions are resampled from the file's grid to x's, bicubic with antialiasing.
    """
    weight = state["patch_embed.proj.weight"]
    tokens = F.conv2d(x, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    side, width = tokens.shape[-1], weight.shape[0]
    tokens = tokens.flatten(2).transpose(1, 2)
    n_cls = int("cls_token" in state)
    if n_cls:
        tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens], dim=1)
    if "pos_embed" in state:
        tokens = tokens + resample(state["pos_embed"], side, n_cls)
    registers = state.get("register_tokens", state.get("storage_tokens", torch.empty(1, 0, width)))
    tokens = torch.cat([tokens[:, :n_cls], registers.expand(len(x), -1, -1), tokens[:, n_cls:]], dim=1)
    rope = rotary(state["rope_embed.periods"], side) if "rope_embed.periods" in state else None
    in_file = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth or in_file):
        tokens = block(
            {n.removeprefix(f"blocks.{i}."): v for n, v in state.items() if n.startswith(f"blocks.{i}.")},
            tokens,
            heads,
            eps,
            act,
            rope,
        )
    if norm:
        tokens = F.layer_norm(tokens, (width,), state["norm.weight"], state["norm.bias"], eps)
    return tokens[:, n_cls + registers.shape[1] :], tokens[:, 0]


def block(p: State, tokens: Tensor, heads: int, eps: float, act: Any, rope: Any) -> Tensor:
    width = tokens.shape[-1]
    one = torch.ones(width)
    y = F.layer_norm(tokens, (width,), p["norm1.weight"], p["norm1.bias"], eps)
    bias = p["attn.qkv.bias"] * p.get("attn.qkv.bias_mask", torch.ones(3 * width))
    q, k, v = F.linear(y, p["attn.qkv.weight"], bias).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    y = ((q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    tokens = tokens + p.get("ls1.gamma", one) * F.linear(y, p["attn.proj.weight"], p["attn.proj.bias"])
    y = F.layer_norm(tokens, (width,), p["norm2.weight"], p["norm2.bias"], eps)
    if "mlp.w12.weight" in p:  # SwiGLU (arXiv 2002.05202, eq. 6): the gate is the first half
        gate, value = F.linear(y, p["mlp.w12.weight"], p["mlp.w12.bias"]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * value, p["mlp.w3.weight"], p["mlp.w3.bias"])
    elif "mlp.w1.weight" in p:
        gate, value = (F.linear(y, p[f"mlp.{n}.weight"], p[f"mlp.{n}.bias"]) for n in ("w1", "w2"))
        y = F.linear(F.silu(gate) * value, p["mlp.w3.weight"], p["mlp.w3.bias"])
    else:
        y = act(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
        y = F.linear(y, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
    return tokens + p.get("ls2.gamma", one) * y


def resample(positions: Tensor, side: int, n_prefix: int) -> Tensor:
    """Position embeddings (1, prefix + g², D) on a grid of side², those of the prefix as they are."""
    prefix, grid = positions[:, :n_prefix], positions[:, n_prefix:]
    old = math.isqrt(grid.shape[1])
    if old != side:
        grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
        grid = grid.flatten(2).transpose(1, 2)
    return torch.cat([prefix, grid], dim=1)


def rotary(periods: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine (T, D of a head) of DINOv3's angles 2π · coordinate / period, coordinates in (−1, 1)."""
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    rows, columns = centres.repeat_interleave(side), centres.repeat(side)
    angles = 2 * math.pi * torch.cat([rows[:, None] / periods, columns[:, None] / periods], dim=1)
    angles = angles.repeat(1, 2)
    return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the patch tokens of x (B, heads, N, D), which are the last T of N."""
    prefix, x = x[:, :, : -len(sin)], x[:, :, -len(sin) :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([prefix, x * cos + torch.cat([-second, first], dim=-1) * sin], dim=2)


def clip_forward(state: State, x: Tensor, heads: int, *, norm: bool = False) -> tuple[Tensor, Tensor]:
    """As `forward`, from CLIP's names: torch's own multi-head attention, QuickGELU, norms with torch's ε of 1e-5."""
    s = {name.removeprefix("visual."): value for name, value in state.items()}
    width = s["class_embedding"].shape[0]
    patches = F.conv2d(x, s["conv1.weight"], stride=s["conv1.weight"].shape[-1])
    side = patches.shape[-1]
    tokens = torch.cat([s["class_embedding"].expand(len(x), 1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + resample(s["positional_embedding"][None], side, 1)
    tokens = F.layer_norm(tokens, (width,), s["ln_pre.weight"], s["ln_pre.bias"])
    depth = 1 + max(int(name.split(".")[2]) for name in s if name.startswith("transformer."))
    for i in range(depth):
        start = f"transformer.resblocks.{i}."
        p = {n.removeprefix(start): v for n, v in s.items() if n.startswith(start)}
        attention = nn.MultiheadAttention(width, heads, batch_first=True).eval()
        attention.load_state_dict({n.removeprefix("attn."): v for n, v in p.items() if n.startswith("attn.")})
        y = F.layer_norm(tokens, (width,), p["ln_1.weight"], p["ln_1.bias"])
        with torch.inference_mode():
            tokens = tokens + attention(y, y, y, need_weights=False)[0]
        y = F.layer_norm(tokens, (width,), p["ln_2.weight"], p["ln_2.bias"])
        y = F.linear(y, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])
        tokens = tokens + F.linear(y * torch.sigmoid(1.702 * y), p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])
    if norm:
        tokens = F.layer_norm(tokens, (width,), s["ln_post.weight"], s["ln_post.bias"])
    return tokens[:, 1:], tokens[:, 0]


class Tree(nn.Module):
    """Parameters under dotted names, so that TorchScript can save them as OpenAI saved CLIP."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name in dict.fromkeys(key.split(".")[0] for key in state):
            below = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            if below:
                self.add_module(name, Tree(below))
            else:
                self.register_parameter(name, nn.Parameter(state[name], requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_torchscript(state: State, path: Any) -> None:
    """The file format of CLIP's release: a TorchScript archive of float16 parameters."""
    torch.jit.script(Tree({name: value.half() for name, value in state.items()})).save(str(path))
