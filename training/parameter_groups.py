"""Parameter groups of optimizers: what is decayed, and what is a matrix to Muon.

| parameters | Muon or AdamW | weight decay |
|---|---|---|
| projections, MLPs, routers, experts (each expert a matrix), adapters | Muon | yes |
| embedding, output head, a classifier's head | AdamW | yes |
| taps of the short convolutions | AdamW | yes |
| norms, biases, `A_log`, `dt_bias` | AdamW | no |

That is Moonlight's division (arXiv 2502.16982, section 2.2), whose recipe Kimi Linear's report
follows. Convolutions are decayed as in Mamba, Megatron and wherever all that has two dimensions is;
embeddings as in Transformers' Trainer. The experts' correction bias is a buffer: no optimizer has
it.

What is not in the table is an error, so that nothing new is decayed, or left out, by accident.
"""

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

Kind = Literal["matrix", "end", "taps", "vector"]
# Modules by the names of their classes, since remote code and FSDP2 make classes of their own.
NORMS = ("KimiLinearRMSNorm", "RMSNorm", "LayerNorm")
HEADS = ("lm_head", "score")
OWN_PARAMETERS: dict[str, dict[str, Kind]] = {
    "KimiLinearDeltaAttention": {"A_log": "vector", "dt_bias": "vector"},
    "KimiLinearRouter": {"weight": "matrix"},
    "KimiLinearExperts": {"gate_up_proj": "matrix", "down_proj": "matrix"},
    "KimiLinearShortConv": {"weight": "taps"},
    "Embedding": {"weight": "end"},
}


def parameter_kinds(model: nn.Module) -> dict[str, Kind]:
    """The kind of each parameter that is trained, by its name; a shared one has its first name.

    Args:
        model: A Kimi Linear of any kind, also with adapters, or inside DDP or FSDP2.

    Raises:
        ValueError: For a parameter that is none of those in this module's table.
    """
    modules = dict(model.named_modules())
    kinds: dict[str, Kind] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, own_name = name.rpartition(".")
        kind = _kind(owner, modules[owner], own_name)
        if kind is None:
            shape = tuple(parameter.shape)
            raise ValueError(
                f"parameter {name} of shape {shape} is not known: freeze it, or make its group "
                "yourself"
            )
        kinds[name] = kind
    return kinds


def _kind(path: str, module: nn.Module, name: str) -> Kind | None:
    classes = [each.__name__ for each in type(module).__mro__]
    for owner, own in OWN_PARAMETERS.items():
        if owner in classes:
            return own.get(name)
    if name == "bias" or any(norm in classes for norm in NORMS):
        return "vector"
    if "Linear" in classes and name == "weight":
        return "end" if set(path.split(".")) & set(HEADS) else "matrix"
    return None


def parameter_groups(
    model: nn.Module, weight_decay: float, *, muon: bool = False
) -> list[dict[str, Any]]:
    """Groups for an optimizer; each parameter that is trained is in exactly one.

        torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-4)

    Args:
        model: See `parameter_kinds`.
        weight_decay: Of what is decayed; the others have 0.
        muon: Whether matrices have a group of their own, and each group a "muon" that says if it is
            that one.

    Returns:
        Dicts with `params` and `weight_decay`; groups without parameters are left out.

    Raises:
        ValueError: For an unknown parameter, or a negative `weight_decay`.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay!r} is not allowed: it must be at least 0")
    kinds = parameter_kinds(model)
    parameters = dict(model.named_parameters())

    def of(*wanted: Kind) -> list[nn.Parameter]:
        return [parameters[name] for name, kind in kinds.items() if kind in wanted]

    def group(params: Iterable[nn.Parameter], decay: float, is_muon: bool) -> dict[str, Any]:
        extra = {"muon": is_muon} if muon else {}
        return {"params": list(params), "weight_decay": decay, **extra}

    if muon:
        groups = [
            group(of("matrix"), weight_decay, True),
            group(of("end", "taps"), weight_decay, False),
        ]
    else:
        groups = [group(of("matrix", "end", "taps"), weight_decay, False)]
    groups.append(group(of("vector"), 0.0, False))
    return [each for each in groups if each["params"]]
