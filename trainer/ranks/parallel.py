"""Several ranks: replicas (DDP) or shards (FSDP2, `fully_shard`) of one model; and whole tensors out of shards.

Either way a gradient is the mean over ranks, and what is trained has the names and shapes of the bare model, so that
checkpoints know nothing of it: they hold whole tensors, gathered on the main rank one at a time.

FSDP shards each transformer block, and the rest together. Half precision is the block's own arithmetic (autocast would
round the same weights), so only half the bytes are gathered; the rest, and every reduction, stays in float32, as under
DDP. Cost: a gather of each block's weights in the forward and one in the backward pass, a scatter of its gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.models.transformer import DiffusionTransformer
from trainer.ranks.world import World


def shard(model: DiffusionTransformer, world: World, autocast_dtype: torch.dtype | None) -> None:
    """Shard the parameters over all ranks, in place."""
    # What the model returns is used and never written to, which is all that the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs keep their dtype: times would lose their last digits.
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    halved = MixedPrecisionPolicy(param_dtype=autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=halved)
    fully_shard(model, mesh=mesh, mp_policy=whole)
    if world.device.type == "cpu":
        # gloo of torch 2.8 answers with the sum where FSDP asks for the mean; this asks for a sum, and divides it.
        for module in (*model.blocks, model):
            module.set_force_sum_reduction_for_comms(True)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The module to call instead of `model`: equal replicas, gradients averaged while the backward pass goes on."""
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


@contextmanager
def gradients_reduced(model: nn.Module, reduced: bool) -> Iterator[None]:
    """Forward and backward of a micro-batch; gradients stay this rank's own until the last one asks for the mean."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduced)
    waits = isinstance(model, DistributedDataParallel) and not reduced
    with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
        yield


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a parameter, or all of it; shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor cut as `parameter` is, without communication; one that is cut already as it is."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def gather_state(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory on the ranks that keep them; every rank must ask."""
    gathered = {}
    for name, tensor in state.items():
        everything = whole(tensor.detach())
        if keep:
            gathered[name] = everything.cpu().contiguous()
    return gathered


@torch.no_grad()
def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a module, sharded or not. Raises RuntimeError when names or shapes differ."""
    own = module.state_dict()
    if own.keys() != state.keys():
        raise RuntimeError(f"names differ: {', '.join(sorted(own.keys() ^ state.keys()))}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise RuntimeError(f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
        local(tensor).copy_(local(shard_like(state[name], tensor)))
