"""Routed experts in 4 or 8 bits, by bitsandbytes: for adapters over a frozen base (QLoRA).

Transformers' bitsandbytes integration quantises linear layers. The routed experts, nearly all of
the parameters, are fused tensors that it leaves as they are; here they are packed when they arrive
from the checkpoint, one at a time. `PackedExperts` takes a parameter's place: any computation with
it sees the weights in full, made for that moment, and nothing can write to it.

Shapes: E experts, I expert width, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kimi_linear.upstream.models import mark_initialized
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

EXPERT_TENSORS = ("gate_up_proj", "down_proj")
BLOCK_SIZES = {4: 64, 8: 256}
aten = torch.ops.aten


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"experts cannot be quantised: bitsandbytes cannot be imported ({error})"
        ) from error
    return bitsandbytes


class PackedExperts(Tensor):
    """A frozen tensor [E, .., ..] held in 4 or 8 bits a number."""

    packed: Tensor
    state: Any
    bits: int

    @staticmethod
    def __new__(
        cls, packed: Tensor, state: Any, bits: int, shape: torch.Size, dtype: torch.dtype
    ) -> "PackedExperts":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=packed.device
        )
        made.packed, made.state, made.bits = packed, state, bits
        return made

    @classmethod
    def of(
        cls, weights: Tensor, bits: int, quant_type: str = "nf4", double_quant: bool = False
    ) -> "PackedExperts":
        """Pack weights, on their device.

        Args:
            weights: [E, .., ..], of a floating dtype, which computations will see again.
            bits: 4 or 8.
            quant_type: "nf4" or "fp4"; of 4 bits.
            double_quant: Whether the blocks' scales are quantised too; of 4 bits.

        Raises:
            ValueError: For other bits, or without bitsandbytes.
        """
        if bits not in BLOCK_SIZES:
            raise ValueError(f"bits={bits} is not allowed: it must be one of {tuple(BLOCK_SIZES)}")
        functional, plain = _bitsandbytes().functional, weights.detach().contiguous()
        if bits == 4:
            whole = plain.numel() % BLOCK_SIZES[4] == 0
            packed, state = functional.quantize_4bit(
                # its kernel for CPUs with AVX512 takes rows for whole blocks, whatever their length
                plain.reshape(-1, BLOCK_SIZES[4]) if whole else plain.reshape(1, -1),
                blocksize=BLOCK_SIZES[4],
                compress_statistics=double_quant,
                quant_type=quant_type,
            )
        else:
            packed, state = functional.quantize_blockwise(plain, blocksize=BLOCK_SIZES[8])
        return cls(packed, state, bits, weights.shape, weights.dtype)

    def unpacked(self) -> Tensor:
        """The weights [E, .., ..], a plain tensor."""
        functional = _bitsandbytes().functional
        unpack = functional.dequantize_4bit if self.bits == 4 else functional.dequantize_blockwise
        return unpack(self.packed, self.state).reshape(self.shape).to(self.dtype)

    def held_bytes(self) -> int:
        """Bytes of the packed form, its scales and tables included."""
        return self.packed.nbytes + sum(each.nbytes for each in _state_tensors(self.state))

    def _like(self, device: torch.device, dtype: torch.dtype) -> "PackedExperts":
        state = self.state if device == self.device else _moved(self.state, device)
        return PackedExperts(self.packed.to(device), state, self.bits, self.shape, dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, cls):
            if func in (aten.detach.default, aten.alias.default, aten.clone.default):
                return first._like(first.device, first.dtype)
            if func is aten._to_copy.default:
                device, dtype = kwargs.get("device"), kwargs.get("dtype")
                return first._like(torch.device(device or first.device), dtype or first.dtype)
            if func is aten.set_.source_Tensor and first is args[1]:  # torch's parametrize
                return first
            if func._schema.is_mutable:
                raise ValueError(
                    "quantised experts cannot be written to: load the model without quantisation "
                    "and merge the adapters there"
                )
        args, kwargs = tree_map_only(cls, cls.unpacked, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedExperts(shape={tuple(self.shape)}, dtype={self.dtype}, bits={self.bits})"


def _state_tensors(state: Any) -> Iterator[Tensor]:
    for value in vars(state).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, type(state)):
            yield from _state_tensors(value)


def _moved(state: Any, device: torch.device) -> Any:
    """A copy of bitsandbytes' state on another device."""
    made = object.__new__(type(state))
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            value = value.to(device)
        elif isinstance(value, type(state)):
            value = _moved(value, device)
        setattr(made, name, value)
    return made


def plain_experts(weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights as a plain tensor, of a dtype if one is given."""
    if isinstance(weights, PackedExperts):
        weights = weights.unpacked()
    return weights if dtype is None else weights.to(dtype)


def is_packed(model: nn.Module) -> bool:
    """Whether some of the model's experts are quantised."""
    return any(isinstance(parameter, PackedExperts) for parameter in model.parameters())


def saved_bytes(model: nn.Module) -> int:
    """How many bytes fewer the model's experts take than their numbers and dtypes say."""
    packed = [each for each in model.parameters() if isinstance(each, PackedExperts)]
    return sum(each.numel() * each.element_size() - each.held_bytes() for each in packed)


def unpack_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put plain trainable parameters in the place of quantised experts, one at a time.

    Args:
        model: Any module.
        dtype: Of the parameters; None: what computations see now.
    """
    for module in model.modules():
        for name, weights in list(module.named_parameters(recurse=False)):
            if isinstance(weights, PackedExperts):
                setattr(module, name, nn.Parameter(plain_experts(weights, dtype)))


@contextmanager
def packing_experts(
    model: nn.Module, kind: type, config: Any, is_quantized_file: bool
) -> Iterator[None]:
    """While a checkpoint is read, pack what arrives in the model's experts.

    Args:
        model: The model, on the meta device.
        kind: The experts' class.
        config: The quantisation's, or None; only bitsandbytes' counts.
        is_quantized_file: Whether the checkpoint's weights are quantised already.

    Raises:
        ValueError: For a checkpoint that is quantised already.
    """
    method = getattr(config, "quant_method", None)
    if getattr(method, "value", method) != "bitsandbytes":
        yield
        return
    if is_quantized_file:
        raise ValueError(
            "quantization_config in the checkpoint is not allowed: bitsandbytes' layout has no "
            "place for fused experts; load the released weights, and quantise them while loading"
        )
    skipped = config.llm_int8_skip_modules or []
    experts = [
        module
        for name, module in model.named_modules()
        if isinstance(module, kind) and not any(skip in name for skip in skipped)
    ]
    if config.load_in_4bit:
        _keep_linears_exact(model)
    pack = _packer(config)
    for module in experts:
        module.__dict__["pack_arriving"] = pack
    try:
        yield
    finally:
        for module in experts:
            del module.__dict__["pack_arriving"]


def _keep_linears_exact(model: nn.Module) -> None:
    """Have linear layers in 4 bits compute the same on every CPU, whatever their size.

    On a CPU with AVX512-BF16, the first evaluation repacks a layer's weights for a kernel that
    refuses sizes, computes in bfloat16 whatever was asked for, and has no gradient: training after
    it goes wrong too. On a CPU with AVX512, weights whose rows are not whole blocks come back with
    scales of other blocks: such layers stay wide, on every device.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, _bitsandbytes().nn.Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % module.weight.blocksize:
            sizes, has_bias = (module.in_features, module.out_features), module.bias is not None
            plain = nn.Linear(*sizes, has_bias, device="meta", dtype=module.weight.dtype)
            model.set_submodule(name, plain)


def _packer(config: Any) -> Callable[[Tensor], nn.Parameter]:
    def pack(weights: Tensor) -> nn.Parameter:
        if config.load_in_4bit:
            packed = PackedExperts.of(
                weights, 4, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
            )
        else:
            packed = PackedExperts.of(weights, 8)
        made = nn.Parameter(packed, requires_grad=False)
        mark_initialized(made)
        return made

    return pack


__all__ = [
    "EXPERT_TENSORS",
    "PackedExperts",
    "is_packed",
    "packing_experts",
    "plain_experts",
    "saved_bytes",
    "unpack_experts",
]
