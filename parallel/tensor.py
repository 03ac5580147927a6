"""Tensor parallelism: the styles of `TP_PLAN`, by which each process computes a part of a layer.

A region is a module whose parts work side by side: heads of attention, features of an MLP, of
experts. It takes the same hidden states on every process, multiplies them with its own part of the
split parameters, and the outputs are summed over the processes; in the backward pass the gradients
of what came in are summed. One sum each way, whatever the region holds. Inside, parameters are
plain tensors, so that every kernel and fast path takes them; outside they are DTensors, for
loading, saving and optimizers. A parameter that is not split is whole on every
process. Each computes its heads' or features' part of the gradient; the parts are summed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kimi_linear.configuration_plans import REGION, SPLIT
from kimi_linear.ops.runtime import needs_grad
from kimi_linear.upstream.interfaces import ALL_PARALLEL_STYLES, TensorParallelLayer

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


class SumGradients(torch.autograd.Function):
    """The tensor itself; its gradient is summed over the processes of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SumOutputs(torch.autograd.Function):
    """The sum of the processes' tensors; each process gets the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SplitParameter(TensorParallelLayer):
    """Parameters split evenly along one dimension over the processes."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        whole = module._parameters[param]
        if whole is not None:
            part = distribute_tensor(whole, mesh, [Shard(self.dim)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(part, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        return module  # the region sees to it


class Region(TensorParallelLayer):
    """A module whose forward runs on each process's part; see the head of this file."""

    def install_forward(self, module: Any, mesh: Any) -> nn.Module:
        field, size, unit = module.split_size()
        if size % (unit * mesh.size()):
            raise ValueError(
                f"{field}={size} is not allowed in tensor parallelism over {mesh.size()} "
                f"processes: it must be a multiple of {unit * mesh.size()}"
            )
        module.forward = _in_region(module, module.forward, mesh.get_group())
        return module


def _in_region(module: nn.Module, forward: Callable[..., Any], group: Any) -> Callable[..., Any]:
    def sum_gradients(x: Tensor) -> Tensor:
        return SumGradients.apply(x, group) if needs_grad(x) else x

    def region_forward(*args: Any, **kwargs: Any) -> Any:
        with _local_parameters(module, sum_gradients):
            out = forward(*tree_map_only(Tensor, sum_gradients, args), **kwargs)
        if isinstance(out, tuple):  # attention: the weights of the process's own heads follow
            return SumOutputs.apply(out[0], group), *out[1:]
        return SumOutputs.apply(out, group)

    return region_forward


@contextmanager
def _local_parameters(module: nn.Module, replicated: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, the parameters under `module` are the process's parts, or `replicated(parameter)`."""
    found = [
        (owner._parameters, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    try:
        for parameters, name, x in found:
            local = x.to_local() if isinstance(x, DTensor) else replicated(x)
            parameters[name] = local  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, x in found:
            parameters[name] = x


def is_of_plan(forward: Any) -> bool:
    """Whether a style of a plan, of ours or of Transformers, has made a module's forward."""
    source = getattr(forward, "__globals__", {}).get("__name__")
    return source in (__name__, TensorParallelLayer.__module__)


def is_dtensor(x: Any) -> bool:
    """Whether it is a tensor that several processes have together."""
    return dist.is_available() and isinstance(x, DTensor)


def replicated(x: Tensor, like: Any) -> Tensor:
    """A tensor that every process has, as a DTensor on the mesh of another one."""
    mesh = like.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def joined(x: Any) -> Any:
    """A DTensor whose pieces are each divided among the processes, such as the fused gate
    and up projections, as a whole tensor in the CPU's memory; anything else as it is.

    torch 2.11's `full_tensor` refuses these; newer ones put them together.
    """
    if not is_dtensor(x) or x.device_mesh.ndim != 1:
        return x
    place = x.placements[0]
    pieces = getattr(place, "split_factor", 1)
    if pieces == 1:
        return x
    own = x.detach().to_local().contiguous()
    parts = [torch.empty_like(own) for _ in range(x.device_mesh.size())]
    dist.all_gather(parts, own, group=x.device_mesh.get_group())
    dim = place.dim % own.ndim
    cut = [part.cpu().unflatten(dim, (pieces, -1)) for part in parts]
    return torch.cat(cut, dim=dim + 1).flatten(dim, dim + 1)


def register_styles() -> None:
    """Make the styles known to Transformers, under names that it has not."""
    ALL_PARALLEL_STYLES.register(REGION, Region())
    for dim in range(3):
        ALL_PARALLEL_STYLES.register(SPLIT.format(dim), SplitParameter(dim))
