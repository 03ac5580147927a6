"""The part that a process has of a model divided by `TP_PLAN`, as a model of plain tensors.

Its attention layers have some of the heads, its MLPs and experts some of the features, embedding
and head some of the vocabulary; norms, the router and the latents' projections are whole. What a
branch of it puts out, and what it embeds, is to be summed over the processes; its logits stand
side by side with theirs. It has no forwards of the plan's, which would sum by themselves.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kimi_linear.configuration_plans import SPLIT, SPLIT_GATE_UP, TP_PLAN
from kimi_linear.parallel.tensor import is_dtensor, is_of_plan
from kimi_linear.upstream.shared_memory import own_tensor

# which dimension of a parameter each style divides
DIMS = {SPLIT.format(dim): dim for dim in range(3)}
DIMS |= {SPLIT_GATE_UP: 1, "embedding_rowwise": 0, "colwise_gather_output": 0}
PLAN = {f"model.{name}": style for name, style in TP_PLAN.items()}
PLAN |= {"lm_head": "colwise_gather_output"}


def has_divided_parameters(model: nn.Module) -> bool:
    """Whether several processes have its parameters together, by whatever divided them."""
    return any(map(is_dtensor, model.parameters()))


def mesh_of(model: nn.Module) -> Any:
    """The processes of a divided model's first divided parameter."""
    parameters: Any = model.parameters()
    return next(x.device_mesh for x in parameters if is_dtensor(x))


def division_obstacle(model: nn.Module) -> str:
    """Why a divided model's parts are not those of `TP_PLAN`, in equal sizes, or ""."""
    mesh, parameters = mesh_of(model), model.named_parameters()
    for name, x in cast("Iterator[tuple[str, Any]]", parameters):
        style = PLAN.get(_general(name), PLAN.get(_general(name).rpartition(".")[0], ""))
        expected = DIMS.get(style)
        if not is_dtensor(x):
            if expected is not None:
                return f"{name} is whole, others are divided among processes"
            continue
        if x.device_mesh != mesh or mesh.ndim > 1:
            return f"{name} is divided along more than one dimension of processes"
        place = x.placements[0]
        dim = getattr(place, "dim", None)  # of either kind of shards
        if expected is None or dim is None or dim % x.ndim != expected:
            return f"{name} is not divided as in tensor parallelism ({place})"
        if x.shape[expected] % mesh.size():
            return f"{name} {[*x.shape]} is divided unequally among {mesh.size()} processes"
    return ""


def _general(name: str) -> str:
    """A parameter's name with "*" in the place of a layer's number."""
    return re.sub(r"\.\d+\.", ".*.", name)


def own_part(model: nn.Module) -> tuple[nn.Module, Any]:
    """This process' part of a model that `division_obstacle` has nothing against, in the same
    memory, and the processes that have it together."""
    mesh = mesh_of(model)
    parameters = {id(x): _own(x) for x in model.parameters()}
    part = _copied(model, parameters, mesh.size())
    part.config = _own_config(model.config, mesh.size())
    return part, mesh.get_group()


def _own(x: Tensor) -> Tensor:
    return nn.Parameter(own_tensor(x.detach()), requires_grad=False) if is_dtensor(x) else x


def _copied(module: nn.Module, parameters: dict[int, Tensor], num_parts: int) -> Any:
    """A module with these parameters, by those in whose places they are."""
    found: Any = copy.copy(module)
    fields = vars(found)
    fields["_parameters"] = {
        name: None if x is None else parameters[id(x)] for name, x in module._parameters.items()
    }
    fields["_modules"] = {
        name: None if child is None else _copied(child, parameters, num_parts)
        for name, child in module._modules.items()
    }
    if is_of_plan(fields.get("forward")):
        del fields["forward"]
    if "num_heads" in fields:
        found.num_heads //= num_parts
    return found


def _own_config(config: Any, num_parts: int) -> Any:
    """The sizes that the plan divides, as one process has them."""
    own = copy.copy(config)
    for field in ("num_attention_heads", "intermediate_size", "moe_intermediate_size"):
        setattr(own, field, getattr(config, field) // num_parts)
    linear = config.linear_attn_config
    own.linear_attn_config = {**linear, "num_heads": linear["num_heads"] // num_parts}
    return own


def agreed(reason: str, group: Any, device: torch.device) -> str:
    """A reason against something that all processes do or none, if one of them has any."""
    flag = torch.tensor([bool(reason)], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return reason or ("another process has an obstacle" if flag.item() else "")
