"""Ways to hold a model's weights, by the names that scripts have for them.

    none                  as the dtype says
    24gb, 48gb, 80gb      presets of `KimiLinearQuantizationConfig`
    fp8                   experts, shared experts and attention in float8 blocks of 128 x 128, many
                          rows of activations too; fp8w: activations always in 16 bits
    PART=BITS             that part alone, others as the dtype says
    48gb+head=none        a name first: the parts behind it are held otherwise
    experts=4/32z+head=8  several parts

BITS are 3, 4, 8, fp8, fp8w or none; behind them "/32" or another group of inputs that share a
scale, "/row" for a scale per row; behind that "z" for a zero of each group. Without a group it is
64, of 8 bits 128.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from options.settings import require

from kimi_linear.configuration_quantization import PARTS, PRESETS, KimiLinearQuantizationConfig
from kimi_linear.schemes import NAMED, Scheme

NONE = "none"
# As block-scaled checkpoints have it: embeddings and head stay in 16 bits.
FLOAT8_PARTS = ("experts", "shared_experts", "attention")
BITS = re.compile(r"(?P<bits>[348])(/(?P<group>\d+|row))?(?P<zero>z)?")
ALLOWED = (
    f"{NONE}, {', '.join(PRESETS)}, {', '.join(NAMED)}, or parts such as experts=4/64+head=8 "
    f"({', '.join(PARTS)}; 3, 4, 8, {', '.join(NAMED)} or {NONE})"
)


def quantization(form: str) -> KimiLinearQuantizationConfig | None:
    """The configuration of a form; None: weights as the dtype says.

    Raises:
        ValueError: For a form that is not allowed.
    """
    first, *rest = form.split("+")
    if "=" in first:
        first, rest = NONE, [first, *rest]
    require(first in (NONE, *NAMED, *PRESETS), "quantize", form, ALLOWED)
    parts: dict[str, Any] = dict(PRESETS.get(first, {}))
    if first in NAMED:
        parts = dict.fromkeys(FLOAT8_PARTS, first)
    for text in rest:
        part, _, bits = text.partition("=")
        require(part in PARTS, "quantize", form, ALLOWED)
        parts[part] = _scheme(form, bits)
    return KimiLinearQuantizationConfig(**parts) if any(parts.values()) else None


def check_forms(forms: Sequence[str]) -> None:
    """Refuse what `--quantize` must not be.

    Raises:
        ValueError: For no form at all, or one that is not allowed.
    """
    require(len(forms) > 0, "quantize", forms, ALLOWED)
    for form in forms:
        quantization(form)


def _scheme(form: str, text: str) -> Scheme | None:
    if text in (NONE, *NAMED):
        return None if text == NONE else Scheme(**NAMED[text])
    found = BITS.fullmatch(text)
    require(found is not None, "quantize", form, ALLOWED)
    assert found is not None
    bits, group = int(found["bits"]), found["group"]
    inputs = 128 if bits == 8 else 64
    if group is not None:
        inputs = None if group == "row" else int(group)
    try:
        return Scheme(bits, inputs, is_symmetric=found["zero"] is None)
    except ValueError as error:
        raise ValueError(f"--quantize {form!r} is not allowed: {error}") from None


def bits_of(form: str, dtype: torch.dtype) -> dict[str, float]:
    """Bits of a weight of each part that is packed, scales of a dtype and zeros counted."""
    found, size = quantization(form), 8 * dtype.itemsize
    schemes = {} if found is None else found.schemes
    return {part: scheme.bits_per_weight(size) for part, scheme in schemes.items() if scheme}
