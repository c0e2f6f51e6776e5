"""The equations of models and losses in float64, term by term: no module, no fused operation, nothing of the trainer.

Written from the papers (DiT 2212.09748, SiT 2401.08740, REPA 2410.06940, DDPM 2006.11239, improved DDPM 2102.09672).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.alignment.irepa import IREPA
from trainer.alignment.kind import Alignment
from trainer.models.transformer import Geometry


def assert_gradients_agree(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """The model's gradients are those of the float64 weights, after a backward pass of each."""
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        if expected is None:
            assert name in ("pos_embed", "t_embedder.W")
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        # The key bias moves every score of a query alike, so its gradient is zero but for rounding: compare by the
        # largest gradient of the whole tensor, with a floor for tensors whose gradient is all small.
        error = (parameter.grad.double() - expected).abs().max().item()
        assert error < 2e-4 * expected.abs().max().item() + 1e-7, (name, error)


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def transformer(p: dict[str, Tensor], config: Geometry, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model: explicit patches, explicit softmax; output and projections."""
    image, _, projections = reg(p, config, x, None, t, y)
    return image, projections


def reg(
    p: dict[str, Tensor], config: Geometry, x: Tensor, class_token: Tensor | None, t: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same with a class token (B, c), if there is one, before the patches (REG, 2507.01467); its output second."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    batch, grid, patch, heads = len(x), config.grid, config.patch, config.heads
    patches = x.reshape(batch, config.channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    kernel = p["x_embedder.proj.weight"].reshape(config.width, -1)
    h = patches.reshape(batch, grid * grid, -1) @ kernel.T + p["x_embedder.proj.bias"]
    if class_token is not None:
        first = norm(linear("cls_projectors2", class_token)) * p["wg_norm.weight"] + p["wg_norm.bias"]
        h = torch.cat([first[:, None], h], 1)
    h = h + p["pos_embed"]
    frequencies = torch.tensor([10_000.0 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    angles = t[:, None] * frequencies
    time = linear("t_embedder.mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], 1))
    c = linear("t_embedder.mlp.2", silu(time)) + p["y_embedder.embedding_table.weight"][y]
    projections: dict[int, Tensor] = {}
    for i in range(config.depth):
        name = f"blocks.{i}"
        modulation = linear(f"{name}.adaLN_modulation.1", silu(c))[:, None, :]
        shift1, scale1, gate1, shift2, scale2, gate2 = torch.split(modulation, config.width, dim=-1)
        qkv = linear(f"{name}.attn.qkv", norm(h) * (1 + scale1) + shift1)
        q, k, v = (part.reshape(batch, h.shape[1], heads, -1) for part in qkv.split(config.width, dim=-1))
        if config.qk_norm:
            q = norm(q, 1e-5) * p[f"{name}.attn.q_norm.weight"] + p[f"{name}.attn.q_norm.bias"]
            k = norm(k, 1e-5) * p[f"{name}.attn.k_norm.weight"] + p[f"{name}.attn.k_norm.bias"]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(config.width // heads)
        attended = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(h.shape)
        h = h + gate1 * linear(f"{name}.attn.proj", attended)
        hidden = gelu(linear(f"{name}.mlp.fc1", norm(h) * (1 + scale2) + shift2))
        h = h + gate2 * linear(f"{name}.mlp.fc2", hidden)
        for target, (block, _) in enumerate(config.targets):
            if block != i + 1:
                continue
            if isinstance(config.kinds[target], IREPA):
                projections[target] = convolved(h, p, f"projectors.{target}.projection_layer")
            else:
                inner = silu(linear(f"projectors.{target}.0", h))
                projections[target] = linear(f"projectors.{target}.4", silu(linear(f"projectors.{target}.2", inner)))
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None, :].split(config.width, dim=-1)
    modulated = norm(h) * (1 + scale) + shift
    of_class = x.new_zeros(batch, 0)
    if class_token is not None:
        of_class, modulated = linear("final_layer.linear_cls", modulated[:, 0]), modulated[:, 1:]
    pixels = linear("final_layer.linear", modulated)
    image = pixels.reshape(batch, grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    ordered = [projections[target] for target in range(len(config.targets))]
    return image.reshape(batch, -1, *x.shape[2:]), of_class, ordered


def root_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, n_before: int) -> Tensor:
    """Queries or keys (B, T, heads, d), pair by pair; the first half by the row, the second by the column."""
    out, side, d = x.clone(), math.isqrt(x.shape[1] - n_before), x.shape[-1]
    for place in range(side * side):
        for axis, at in enumerate(divmod(place, side)):
            for k in range(d // 4):
                first = axis * (d // 2) + 2 * k
                angle = at * 10_000.0 ** (-4 * k / d)
                a, b = x[:, n_before + place, :, first], x[:, n_before + place, :, first + 1]
                out[:, n_before + place, :, first] = a * math.cos(angle) - b * math.sin(angle)
                out[:, n_before + place, :, first + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def rotary_block(p: dict[str, Tensor], name: str, h: Tensor, c: Tensor, heads: int, n_before: int) -> Tensor:
    """LightningDiT's block (arXiv 2501.01423) under SiLU of a condition (B, 1 or T, D)."""

    def linear(layer: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.{layer}.weight"].T + p[f"{name}.{layer}.bias"]

    width = h.shape[-1]
    shift1, scale1, gate1, shift2, scale2, gate2 = linear("adaLN_modulation.1", silu(c)).split(width, dim=-1)
    qkv = linear("attn.qkv", root_mean_square(h, p[f"{name}.norm1.weight"]) * (1 + scale1) + shift1)
    q, k, v = (part.reshape(len(h), h.shape[1], heads, -1) for part in qkv.split(width, dim=-1))
    if f"{name}.attn.q_norm.weight" in p:
        q, k = (root_mean_square(x, p[f"{name}.attn.{n}_norm.weight"]) for x, n in ((q, "q"), (k, "k")))
    scores = torch.einsum("bihd,bjhd->bhij", turned(q, n_before), turned(k, n_before)) / math.sqrt(width // heads)
    attended = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(h.shape)
    h = h + gate1 * linear("attn.proj", attended)
    inner = linear("mlp.w12", root_mean_square(h, p[f"{name}.norm2.weight"]) * (1 + scale2) + shift2)
    gate, value = inner.split(inner.shape[-1] // 2, dim=-1)
    return h + gate2 * linear("mlp.w3", silu(gate) * value)


def rit(
    p: dict[str, Tensor], config: Geometry, z: Tensor, class_token: Tensor, tau: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """RiT's x̂ of the patches (patch 1) and of the class token."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    angles = tau[:, None] * torch.tensor([10_000.0 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    time = linear("t_embedder.mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], 1))
    label = p["y_embedder.embedding_table.weight"][y]
    c = (linear("t_embedder.mlp.2", silu(time)) + label)[:, None]
    h = torch.cat([linear("cls_projectors", class_token)[:, None], embedded(p, "x_embedder", z)], 1) + p["pos_embed"]
    for i in range(config.depth):
        if i + 1 == config.context_block:
            h = torch.cat([label[:, None] + p["in_context_posemb"], h], 1)
        h = rotary_block(p, f"blocks.{i}", h, c, config.heads, h.shape[1] - config.grid**2)
    h = root_mean_square(h[:, config.context :], p["final_layer.norm_final.weight"])
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).split(config.width, dim=-1)
    h = h * (1 + scale) + shift
    image = linear("final_layer.linear", h[:, 1:]).transpose(1, 2).reshape(z.shape)
    return image, linear("final_layer.linear_cls", h[:, 0])


def ditdh(p: dict[str, Tensor], config: Geometry, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The velocity of RAE's DiT^DH (patch 1)."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    angles = 2 * math.pi * t[:, None] * p["t_embedder.W"]
    e = linear("t_embedder.mlp.0", torch.cat([torch.sin(angles), torch.cos(angles)], 1))
    e = linear("t_embedder.mlp.2", silu(e))[:, None]
    c = silu(e + p["y_embedder.embedding_table.weight"][y][:, None])
    h = embedded(p, "s_embedder", x) + p["pos_embed"]
    for i in range(config.depth):
        h = rotary_block(p, f"blocks.{i}", h, c, config.heads, 0)
    c, h = linear("s_projector", silu(e + h)), embedded(p, "x_embedder", x)
    for i in range(config.depth, config.depth + config.head_depth):
        h = rotary_block(p, f"blocks.{i}", h, c, config.head_heads, 0)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).split(config.head_width, dim=-1)
    h = root_mean_square(h, p["final_layer.norm_final.weight"]) * (1 + scale) + shift
    return linear("final_layer.linear", h).transpose(1, 2).reshape(x.shape)


def embedded(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Patches of one pixel (B, T, D)."""
    return x.flatten(2).transpose(1, 2) @ p[f"{name}.proj.weight"].flatten(1).T + p[f"{name}.proj.bias"]


def convolved(h: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    """A convolution of tokens on their grid, kernel entry by kernel entry; zeros around."""
    kernel, side = p[f"{name}.weight"], math.isqrt(h.shape[1])
    reach = kernel.shape[-1] // 2
    padded = h.new_zeros(len(h), side + 2 * reach, side + 2 * reach, h.shape[2])
    padded[:, reach : reach + side, reach : reach + side] = h.reshape(len(h), side, side, -1)
    out = p[f"{name}.bias"].expand(len(h), side, side, -1)
    for row in range(kernel.shape[2]):
        for column in range(kernel.shape[3]):
            out = out + padded[:, row : row + side, column : column + side] @ kernel[:, :, row, column].T
    return out.reshape(len(h), side * side, -1)


def prepared(target: Tensor, kind: Alignment) -> Tensor:
    """What a projection is compared with (iREPA, arXiv 2512.10794)."""
    if not isinstance(kind, IREPA):
        return target
    centred = target - target.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (target.shape[1] - 1)).sqrt()
    return (target - kind.gamma * target.mean(1, keepdim=True)) / (deviation + 1e-6)


def velocity_losses(predicted: Tensor, x: Tensor, noise: Tensor, t: Tensor, path: str) -> Tensor:
    """‖v̂ − dx_t/dt‖² of each sample."""
    time = t[:, None, None, None]
    if path == "linear":
        velocity = noise - x
    else:
        velocity = math.pi / 2 * (torch.cos(time * math.pi / 2) * noise - torch.sin(time * math.pi / 2) * x)
    return (predicted - velocity).square().mean((1, 2, 3))


def interpolant(x: Tensor, noise: Tensor, t: Tensor, path: str) -> Tensor:
    """x_t between image and noise."""
    time = t[:, None, None, None]
    if path == "linear":
        return (1 - time) * x + time * noise
    return torch.cos(time * math.pi / 2) * x + torch.sin(time * math.pi / 2) * noise


BETAS = [1e-4 + (0.02 - 1e-4) * s / 999 for s in range(1000)]


def alpha_bar(t: int) -> float:
    """∏ (1 − β_s) over s ≤ t; 1 before the first step."""
    return math.prod(1 - beta for beta in BETAS[: t + 1])


def diffused(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of the diffusion in 1,000 steps."""
    at = torch.tensor([alpha_bar(step) for step in t.tolist()], dtype=torch.float64)[:, None, None, None]
    return at.sqrt() * x + (1 - at).sqrt() * noise


def cdf(x: Tensor) -> Tensor:
    """Of the standard normal, by the approximation 2102.09672's code uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def diffusion_losses(output: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean square of the noise plus the bound's term in bits a dimension, sample by sample."""
    losses = []
    channels = x.shape[1]
    for i, step in enumerate(t.tolist()):
        at, before, beta = alpha_bar(step), alpha_bar(step - 1), BETAS[step]
        smallest = beta * (1 - before) / (1 - at) if step else BETAS[1] * (1 - alpha_bar(0)) / (1 - alpha_bar(1))
        x_t = math.sqrt(at) * x[i] + math.sqrt(1 - at) * noise[i]
        guess, share = output[i, :channels], (output[i, channels:] + 1) / 2
        square = (guess - noise[i]).square().mean()
        variance = torch.exp(share * math.log(beta) + (1 - share) * math.log(smallest))
        clean = (x_t - math.sqrt(1 - at) * guess.detach()) / math.sqrt(at)

        def mean(of: Tensor, x_t: Tensor = x_t, at: float = at, before: float = before, beta: float = beta) -> Tensor:
            return (math.sqrt(before) * beta * of + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - at)

        if step == 0:
            deviation, centre = variance.sqrt(), x[i] - mean(clean)
            above, below = cdf((centre + 1 / 255) / deviation), cdf((centre - 1 / 255) / deviation)
            bin_ = torch.where(x[i] < -0.999, above, torch.where(x[i] > 0.999, 1 - below, above - below))
            nats = -torch.log(bin_.clamp(min=1e-12))
        else:
            distance = (mean(x[i]) - mean(clean)).square()
            nats = 0.5 * (torch.log(variance / smallest) + (smallest + distance) / variance - 1)
        losses.append(square + nats.mean() / math.log(2))
    return torch.stack(losses)


def alignment(projection: Tensor, target: Tensor) -> Tensor:
    """Negative cosine, mean over tokens, of each sample."""
    lengths = projection.square().sum(-1).sqrt() * target.square().sum(-1).sqrt()
    return -((projection * target).sum(-1) / lengths).mean(-1)
