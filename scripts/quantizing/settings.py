"""Which parts are held how: what the flags of quantize.py say."""

from collections.abc import Mapping
from typing import Any

from options.settings import require

from kimi_linear.configuration_quantization import PARTS, PRESETS, KimiLinearQuantizationConfig
from kimi_linear.schemes import NAMED

# A flag's names for the fields of a scheme.
FIELDS = {
    "bits": "bits",
    "group": "group",
    "symmetric": "is_symmetric",
    "float": "is_float",
    "rows": "rows",
    "activations": "activation_scheme",
}
WORDS = {"none": None, "true": True, "false": False, "dynamic": "dynamic"}
FORM = "none, fp8, fp8w, or fields such as bits=4,group=64 (" + ", ".join(FIELDS) + ")"


def read_quantization(
    preset: str | None, parts: Mapping[str, str | Mapping[str, Any] | None]
) -> KimiLinearQuantizationConfig:
    """A preset, and parts that are given otherwise.

    Args:
        preset: Its name; None: parts that are not given stay as they are.
        parts: By name a flag's text, such as "bits=4,group=64" or "none", or the fields of a
            scheme; None: not given.

    Raises:
        ValueError: For unknown names, values that are not allowed, and if nothing is to be done.
    """
    if preset is not None:
        require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    given = {part: _fields(part, value) for part, value in parts.items() if value is not None}
    if preset is not None:
        found = KimiLinearQuantizationConfig.from_preset(preset, **given)
    else:
        found = KimiLinearQuantizationConfig(**given)
    if not any(found.schemes.values()):
        flags = ", ".join(f"--{part.replace('_', '-')}" for part in PARTS)
        raise ValueError(f"no part is to be quantised: give --preset, or some of {flags}")
    return found


def _fields(part: str, value: str | Mapping[str, Any]) -> dict[str, Any] | None:
    if not isinstance(value, str):
        return dict(value)
    if value == "none":
        return None
    if value in NAMED:
        return dict(NAMED[value])
    fields: dict[str, Any] = {}
    for item in value.split(","):
        name, is_pair, text = item.partition("=")
        require(bool(is_pair) and name in FIELDS and name not in fields, part, value, FORM)
        fields[FIELDS[name]] = _value(part, value, text)
    return fields


def _value(part: str, whole: str, text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    try:
        return int(text)
    except ValueError:
        require(False, part, whole, FORM)
