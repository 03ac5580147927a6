"""The models' base class: how weights are initialised, loaded and saved."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.checkpoints.checks import check_checkpoint, check_inside
from kimi_linear.checkpoints.experts import register_conversion, take_matrices_in_state_dicts
from kimi_linear.checkpoints.files import StoredTensor, stored_tensors
from kimi_linear.checkpoints.live_weights import write_weights
from kimi_linear.checkpoints.names import other_spellings
from kimi_linear.checkpoints.packed_config import stored_schemes
from kimi_linear.checkpoints.packed_files import element_size, read_packed
from kimi_linear.checkpoints.packed_saving import entry_of_state, stored_state
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.configuration_quantization import QUANT_METHOD
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention, KimiLinearShortConv
from kimi_linear.layers.moe import KimiLinearExperts, KimiLinearRouter
from kimi_linear.layers.norm import KimiLinearRMSNorm
from kimi_linear.ops.experts.quantized import QuantizedExperts
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.quantized import has_quantized
from kimi_linear.parallel.decay_sharding import decays_apart
from kimi_linear.parallel.router_bias import carry_router_biases
from kimi_linear.parallel.tensor import joined, register_styles
from kimi_linear.quantization.others import say_what_stays_wide
from kimi_linear.quantization.packing import (
    check_places,
    dequantize_parameters,
    pack_rest,
    packing_arrivals,
    saved_bytes,
)
from kimi_linear.training.quantized_experts import quantizing_experts
from kimi_linear.upstream.interfaces import init
from kimi_linear.upstream.models import (
    Loading,
    PreTrainedModelHooks,
    has_own_adapters,
    is_quantized,
    save_by_registered_names,
)
from kimi_linear.upstream.quantizers import given_state, quantization_name, register
from kimi_linear.upstream.stored import READ, STORED, is_described

BACKBONE = "KimiLinearBackbone"
AUTO_MAP = {
    "AutoConfig": "configuration_kimi_linear.KimiLinearConfig",
    "AutoModel": f"modeling_kimi_linear.{BACKBONE}",
    "AutoModelForCausalLM": "modeling_kimi_linear.KimiLinearForCausalLM",
    **{
        f"AutoModelFor{task}": f"modeling_kimi_linear.KimiLinearFor{task}"
        for task in ("SequenceClassification", "TokenClassification")
    },
    # The decision pipeline asks any language model for the logits of its labels. `transformers
    # serve` tries this class first, and builds Transformers' own model if it is not named here.
    "AutoModelForDecision": "modeling_kimi_linear.KimiLinearForCausalLM",
}


# The mapping must not be registered under "kimi_linear": Transformers' own class of that type would
# pick it up.
register_conversion(BACKBONE)
register_styles()
register()


class KimiLinearPreTrainedModel(PreTrainedModelHooks):
    """Weight initialisation, loading and saving."""

    config_class = KimiLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KimiLinearDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Transformers refuses assisted decoding to stateful models; our cache rolls its states back
    _is_stateful = False

    # prefixes of tensors that a checkpoint may lack when a new head is put on a trained backbone
    _new_heads: tuple[str, ...] = ()

    def __init__(self, config: KimiLinearConfig, *args: Any, **kwargs: Any) -> None:
        # fields may have been changed since it was made
        config.fit_layer_lists()
        config.check()
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Register load hooks, once, when the backbone has all its layers."""
        super().post_init()
        if self.base_model is self:
            take_matrices_in_state_dicts(self)
            carry_router_biases(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the report and FLA do; `init` skips what a checkpoint has already filled."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, KimiLinearDeltaAttention):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log())
            step = (
                torch.empty_like(module.dt_bias)
                .uniform_(math.log(1e-3), math.log(1e-1))
                .exp()
                .clamp(min=1e-4)
            )
            init.copy_(module.dt_bias, step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        elif isinstance(module, KimiLinearShortConv):
            bound = module.weight.shape[2] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, KimiLinearExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, KimiLinearRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, KimiLinearRMSNorm):
            init.ones_(module.weight)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as Transformers does: official names, all classes in `auto_map`, and beside the
        weights the code, which the configuration's `save_pretrained` writes: of the installed
        package `flat_copy.py`'s, of a model loaded with `trust_remote_code=True` its own files
        (`upstream/remote_code.py`).

        Packed weights are written as compressed-tensors' formats hold them (`packed.py`), and
        `config.json` says so; of copies, one shard's are in memory.

        Raises:
            ValueError: For a model that bitsandbytes has quantised; its adapters can be saved. For
                blocks of float8 that belong to two matrices.
        """
        if has_quantized(self, QuantizedExperts) and not has_own_adapters(self):
            raise ValueError(
                "a model with quantised experts cannot be saved: bitsandbytes' layout has no place "
                "for them; save its adapters, and merge them into the model without quantisation, "
                "or save the wide model that dequantize() makes"
            )
        self.config.auto_map = dict(AUTO_MAP)
        if not is_quantized(self) or has_quantized(self, PackedWeights):
            save_by_registered_names(self)
        given = args[2] if len(args) > 2 else kwargs.get("state_dict")
        with _named_as_written(type(self)), self._described(given):
            return super().save_pretrained(*args, **kwargs)

    @contextmanager
    def _described(self, given: dict[str, Tensor] | None) -> Iterator[None]:
        """Within, the configuration says how the weights that are saved are held.

        Args:
            given: `save_pretrained(state_dict=...)`.
        """
        state = given
        if state is None:
            state = self.state_dict() if has_quantized(self, PackedWeights) else {}
        entry, before = entry_of_state(state), vars(self.config).get("quantization_config")
        if entry is None and not is_described(before):
            yield
            return
        token = given_state.set(given)
        try:
            if entry is not None:
                self.config.quantization_config = entry
            elif before is not None:
                del self.config.quantization_config
            yield
        finally:
            given_state.reset(token)
            self.config.quantization_config = before
            if before is None:
                del self.config.quantization_config

    def stored_state(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of packed weights what files have."""
        tied = self.all_tied_weights_keys if self.config.tie_word_embeddings else {}
        return stored_state(state_dict, tied)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters and buffers; of packed weights and quantised experts, of what holds
        them."""
        return super().get_memory_footprint(return_buffers) - saved_bytes(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Make wide what is quantised, in place: packed weights, and what bitsandbytes has
        quantised, experts too; see Transformers' method. The model saves under the official names
        again."""
        is_packed = has_quantized(self, PackedWeights)
        model = super().dequantize(dtype=dtype)
        dequantize_parameters(self, dtype)
        return model if dtype is None or not is_packed else model.to(dtype)

    def half(self, *args: Any) -> Any:
        """To float16; Transformers' method refuses all quantised models."""
        return self.to(torch.float16) if has_quantized(self, PackedWeights) else super().half(*args)

    def float(self, *args: Any) -> Any:
        """To float32; Transformers' method refuses all quantised models."""
        wide = torch.float32
        return self.to(wide) if has_quantized(self, PackedWeights) else super().float(*args)

    def check_quantization(self, config: Any) -> None:
        """See `check_places`; called before a checkpoint is read."""
        check_places(self, config)

    def finish_quantization(self, config: Any) -> None:
        """Pack what no checkpoint had; see `pack_rest`."""
        pack_rest(self, config)

    def prepared_for_fsdp(self) -> AbstractContextManager[None]:
        """See `decay_sharding.py`."""
        kda = [each for each in self.modules() if isinstance(each, KimiLinearDeltaAttention)]
        return decays_apart(self, kda)

    def joined_state(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What every torch can put together."""
        return {name: joined(x) for name, x in state_dict.items()}

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, strict: bool = False
    ) -> set[str]:
        """Copy tensors under the released names, as vLLM's models take them, into the model's own:
        in place, so that optimizers, recorded decode steps and data pointers stay valid.

        Args:
            weights: Names and tensors of any floating dtype and device, in any order; of an expert
                each matrix by itself (or a layer's fused ones under the model's own names). What
                is not among them stays as it is.
            strict: Whether a tensor of the model that is not among them is an error.

        Returns:
            The names that came.

        Raises:
            ValueError: For what yields no such pairs, a name that the model has not, another shape,
                tensors that are sparse or have no data, weights of the model that are quantised,
                offloaded or divided among processes, and with `strict` for names that did not come.
                What came before is written by then.
        """
        return write_weights(self, weights, strict=strict)

    def read_checkpoint(self, loading: Loading) -> Any:
        """Check the files first, since Transformers would fill what is missing with random numbers;
        then let it read them through `stored_tensors`, which needs no more memory than the model.
        """
        if loading.is_adapter:
            return super().read_checkpoint(loading)
        state_dict, files = loading.state_dict, loading.files
        check_inside(self.name_or_path, files)
        if quantization_name(loading.quantization) == STORED:
            return self._read_packed(loading)
        packs = quantization_name(loading.quantization) == QUANT_METHOD
        if packs and loading.is_quantized_file:
            raise ValueError(
                f"{self.name_or_path}: quant_method={QUANT_METHOD!r} is not allowed in a "
                f"checkpoint: it must be one of {', '.join(READ)}, as save_pretrained writes it"
            )
        is_plain = loading.is_plain or packs
        if state_dict is None and is_plain and files and files[0].endswith(".safetensors"):
            if not loading.ignores_shapes:
                check_checkpoint(
                    files, self, optional=self._new_heads, may_lack=loading.is_reported
                )
            if not loading.is_divided:
                state_dict = stored_tensors(files, self)
        # other readers' tensors may share memory with each other, or be the caller's
        frees = isinstance(next(iter((state_dict or {}).values()), None), StoredTensor)
        with (
            quantizing_experts(self, loading.quantization, loading.is_quantized_file),
            packing_arrivals(self, loading.quantization, frees=frees),
        ):
            result = loading.read(state_dict, other_spellings())
        say_what_stays_wide(self, loading.quantization)
        return result

    def _read_packed(self, loading: Loading) -> Any:
        """Read a checkpoint that is quantised, packed as it is."""
        files = loading.files
        if loading.state_dict is not None or not all(f.endswith(".safetensors") for f in files):
            raise ValueError(
                f"{self.name_or_path}: quantised weights are read from safetensors files only"
            )
        schemes = stored_schemes(loading.quantization.stored)
        tensors, matrices = read_packed(files, self, schemes)
        if not loading.ignores_shapes:
            optional, may_lack = self._new_heads, loading.is_reported
            check_checkpoint(files, self, optional=optional, may_lack=may_lack, matrices=matrices)
        return loading.read(tensors, other_spellings())

    def stored_element_size(self, stored: dict[str, Any], name: str, parameter: Tensor) -> Any:
        """Bytes that a number of a parameter takes in a checkpoint with the entry `stored`."""
        return element_size(stored_schemes(stored), name, parameter)


@contextmanager
def _named_as_written(cls: type) -> Iterator[None]:
    """Within, the class that `fully_shard` gives a model bears the name and the module of the one
    it was made of, by which Transformers finds the code to save and its entry in `auto_map`."""
    if not cls.__name__.startswith("FSDP"):
        yield
        return
    written = next(base for base in cls.__mro__ if not base.__name__.startswith("FSDP"))
    before = cls.__name__, cls.__module__
    cls.__name__, cls.__module__ = written.__name__, written.__module__
    try:
        yield
    finally:
        cls.__name__, cls.__module__ = before
