"""AdamW (arXiv 1711.05101) over all parameters in one fused kernel; and its state as named tensors.

The fused kernel looks at `found_inf` on the device and leaves everything as it is where that is 1, so a step can be
skipped without the host waiting for its gradient.

The state is keyed by parameter name, `<parameter>.<moment>`, so that a checkpoint does not depend on the order in which
parameters are registered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.optim import OptimConfig
from trainer.ranks.parallel import shard_like, whole


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient, in one group."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of the step that is number `step`, from 0: linear warm-up, then constant, then a linear or cosine decay.

    It does not depend on how many steps a run has, so a run may be prolonged.
    """
    warmed = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay == "none" or step < config.decay_from:
        return config.lr * warmed
    gone = min(1.0, (step - config.decay_from) / (config.decay_until - config.decay_from))
    left = 1 - gone if config.decay == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return (config.final_lr + (config.lr - config.final_lr) * left) * warmed


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> None:
    """Before the optimiser takes a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients so that their common norm is `largest` at most; returns the norm before, float32 ()."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm([parameter.grad for parameter in parameters], foreach=True))  # type: ignore[misc]
    nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


def step_where_finite(optimizer: torch.optim.AdamW, is_finite: Tensor) -> None:
    """Take the optimiser's step if `is_finite` bool () holds, which is decided on the device."""
    attributes: Any = optimizer  # where the fused kernel looks; GradScaler sets the same one
    attributes.found_inf = (~is_finite).float()
    optimizer.step()
    del attributes.found_inf


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, in the optimiser's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>.<moment>` → tensor, sharded where the parameter is."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}.{moment}": tensor
        for index, name in enumerate(_trained(model))
        for moment, tensor in state.get(index, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back whole tensors of `optimizer_tensors`; hyper-parameters stay the optimiser's own. Raises KeyError."""
    trained = _trained(model)
    indices = {name: index for index, name in enumerate(trained)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        mine = tensor if moment == "step" else shard_like(tensor, trained[name])
        state.setdefault(indices[name], {})[moment] = mine
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
