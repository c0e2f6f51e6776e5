"""AdamW (arXiv 1711.05101) over all parameters, fused on CUDA and foreach elsewhere; and its state as named tensors.

The state is keyed by parameter name, `<parameter>.<moment>`, so that a checkpoint does not depend on the order in which
parameters are registered.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient, in one group."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
        foreach=not fused,
    )


def _trained_names(model: nn.Module) -> list[str]:
    """Names in the order of the optimiser's parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>.<moment>` → tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}.{moment}": tensor
        for index, name in enumerate(_trained_names(model))
        for moment, tensor in state.get(index, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned; hyper-parameters stay the optimiser's own. Raises KeyError."""
    indices = {name: index for index, name in enumerate(_trained_names(model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        state.setdefault(indices[name], {})[moment] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
