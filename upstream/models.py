"""How `from_pretrained` loads and divides a model, and how `save_pretrained` writes it.

`PreTrainedModelHooks` overrides the undocumented methods; the model's base class fills in
`read_checkpoint`, `prepared_for_fsdp`, `joined_state` and `stored_state`.
"""

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed import DistributedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel

from kimi_linear.upstream.interfaces import ALL_PARALLEL_STYLES
from kimi_linear.upstream.quantizers import check_quantized_once
from kimi_linear.upstream.stored import wrapping_stored


def has_own_adapters(model: Any) -> bool:
    """Whether Transformers' integration of PEFT (`model.load_adapter`) has put adapters in."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_quantized(model: Any) -> bool:
    """Whether `from_pretrained` quantised the model."""
    return getattr(model, "hf_quantizer", None) is not None


def is_divided(model: Any) -> bool:
    """Whether `from_pretrained` divided the weights among processes."""
    return getattr(model, "_device_mesh", None) is not None


def divided(model: Any, num_processes: int) -> Any:
    """A model on the meta device, divided by its plan of tensor parallelism among the processes
    that torchrun started, as `from_pretrained` does before the weights come."""
    config, _, meshes = model.prepare_distribute_model(DistributedConfig(tp_size=num_processes))
    return model.maybe_distribute_model(model, config, meshes)


def mark_initialized(parameter: Tensor) -> None:
    """Keep `from_pretrained` from filling a parameter with random numbers."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def save_by_registered_names(model: Any) -> None:
    """Forget the layout that was loaded, which `save_pretrained` would repeat, official or not; it
    goes by the registered conversion then."""
    model._weight_conversions = None


@dataclass(frozen=True)
class Loading:
    """What `from_pretrained` is about to read into a model.

    Attributes:
        state_dict: Tensors by name, if the caller has them already.
        files: Paths of the checkpoint's files.
        is_adapter: Whether they are an adapter's.
        is_plain: Whether neither a quantiser nor ZeRO-3 reads them.
        is_divided: Whether each process takes its part of the tensors.
        ignores_shapes: `ignore_mismatched_sizes`.
        is_reported: `output_loading_info`: the caller is told what is missing.
        quantization: The configuration by which weights are quantised; None if they are not.
        is_quantized_file: Whether the files' weights are quantised already.
        read: Reads: takes a state dict (None: from the files) and further renamings.
    """

    state_dict: dict[str, Any] | None
    files: list[str]
    is_adapter: bool
    is_plain: bool
    is_divided: bool
    ignores_shapes: bool
    is_reported: bool
    quantization: Any
    is_quantized_file: bool
    read: Callable[[dict[str, Any] | None, list[Any]], Any]


# `from_pretrained(output_loading_info=...)`, which it does not hand on.
_is_reported: ContextVar[bool] = ContextVar("kimi_linear_is_reported", default=False)


class PreTrainedModelHooks(PreTrainedModel):
    """A model's undocumented methods; all have been there since 5.17."""

    _tp_plan: dict[str, str]
    _ep_plan: dict[str, str]

    # Transformers names the experts' implementations only to classes whose module has the
    # decorator's text in it; ours has it in another module.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    @functools.wraps(PreTrainedModel.from_pretrained.__func__)
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_quantized_once(path, kwargs)
        token = _is_reported.set(bool(kwargs.get("output_loading_info")))
        try:
            with wrapping_stored(kwargs):
                return super().from_pretrained(*args, **kwargs)
        finally:
            _is_reported.reset(token)

    # The only place between a model on the meta device and its weights.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        def read(state: dict[str, Any] | None, renamings: list[Any]) -> Any:
            mapping = [*(load_config.weight_mapping or []), *renamings]
            return PreTrainedModel._load_pretrained_model(
                model,
                state,
                checkpoint_files,
                replace(load_config, weight_mapping=mapping),
                *args,
                **kwargs,
            )

        return model.read_checkpoint(
            Loading(
                state_dict=state_dict,
                files=[str(file) for file in checkpoint_files or []],
                is_adapter=has_own_adapters(model),
                is_plain=not load_config.is_quantized and not is_deepspeed_zero3_enabled(),
                is_divided=load_config.device_mesh is not None,
                ignores_shapes=load_config.ignore_mismatched_sizes,
                is_reported=_is_reported.get(),
                quantization=getattr(load_config.hf_quantizer, "quantization_config", None),
                is_quantized_file=getattr(load_config.hf_quantizer, "pre_quantized", False),
                read=read,
            )
        )

    def read_checkpoint(self, loading: Loading) -> Any:
        """Read a checkpoint; the model's class may do it in its own way."""
        return loading.read(loading.state_dict, [])

    # With accelerate's offloading a parameter is on "meta", and drafts would be put there.
    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        found = super().device
        if found.type != "meta":
            return found
        hooks = [getattr(module, "_hf_hook", None) for module in self.modules()]
        places = [getattr(hook, "execution_device", None) for hook in hooks]
        return next((torch.device(place) for place in places if place is not None), found)

    # Transformers warns of rules for modules that this configuration has not. 5.17 has other names
    # for the styles of expert parallelism.
    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        names = {name for name, _ in chain(self.named_modules(), self.named_parameters())}
        known = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in known}
        if "ep_router" in ALL_PARALLEL_STYLES:
            for name, style in list(self._ep_plan.items()):
                if style == "ep_dispatch_experts":
                    self._ep_plan[name] = "moe_tp_experts"
                    self._ep_plan[name.removesuffix("experts") + "gate"] = "ep_router"

    # The only place before a model is divided. HSDP (5.23) makes FSDP's groups with one shard too.
    @classmethod
    def maybe_distribute_model(
        cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        sizes = {
            name: getattr(distributed_config, name, None) or 1
            for name in ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size")
        }
        divides = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        if divides and getattr(model, "is_quantized", False):
            raise ValueError(
                f"{', '.join(divides)} is not allowed with quantization_config: quantised weights "
                "cannot be divided, it must be 1; pp_size divides layers"
            )
        has_groups = sizes["fsdp_size"] * sizes["dp_replicate_size"] > 1
        with model.prepared_for_fsdp() if has_groups else nullcontext():
            return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def prepared_for_fsdp(self) -> AbstractContextManager[None]:
        """Within, FSDP makes its groups, of parameters of one dtype; the model's class may help."""
        return nullcontext()

    # `save_pretrained` gathers here what several processes have together. Tied weights come out as
    # two tensors, which safetensors would write twice.
    def gather_sharded_state_dict_for_save(
        self, model_to_save: nn.Module, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        state = self.joined_state(state_dict)
        state = super().gather_sharded_state_dict_for_save(model_to_save, state, *args, **kwargs)
        tied = {} if self._device_mesh is None else self.all_tied_weights_keys
        return self.stored_state({name: x for name, x in state.items() if name not in tied})

    def stored_state(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is written in the place of tensors; the model's class says what that is."""
        return state_dict

    def joined_state(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put together what Transformers cannot; the model's class says what that is."""
        return state_dict
