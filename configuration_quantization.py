"""Which parts of a model are held in few bits, and how: what `quantization_config=` takes.

    quantization_config = KimiLinearQuantizationConfig.from_preset("24gb")
    model = KimiLinearForCausalLM.from_pretrained(folder, quantization_config=quantization_config)

Router, norms, convolutions, decay parameters, and the small inner matrices of KDA's gates and MLA's
latents stay as they are.
"""

from dataclasses import asdict
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from kimi_linear.configuration_rules import require
from kimi_linear.schemes import NAMED, Scheme

QUANT_METHOD = "kimi_linear"
# The parts by the names of modules in them, without the layer's.
PARTS = {
    "experts": ("experts",),
    "shared_experts": ("gate_proj", "up_proj", "down_proj"),
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("f_a_proj", "g_a_proj", "kv_a_proj_with_mqa"),
    ),
    "embeddings": ("embed_tokens",),
    "head": ("lm_head",),
}
EIGHT_BITS = {"bits": 8, "group": 128}
_DENSE = dict.fromkeys(("shared_experts", "attention", "embeddings", "head"), EIGHT_BITS)
# By the memory of the GPU that the 48B model is meant for, with room for 128k tokens. Where there
# is more than enough, the embedding stays wide: vLLM's Kimi Linear reads no packed one.
PRESETS: dict[str, dict[str, Any]] = {
    "24gb": {"experts": {"bits": 3, "group": 64}, **_DENSE},
    "48gb": {"experts": {"bits": 4, "group": 64}, **_DENSE, "embeddings": None},
    "80gb": {"experts": EIGHT_BITS, **_DENSE, "embeddings": None},
}


class KimiLinearQuantizationConfig(QuantizationConfigMixin):
    """How each part of a model is held; None leaves a part in 16 bits.

    Args:
        experts: The routed experts.
        shared_experts: The experts that every token uses, and dense MLPs.
        attention: The large projections of KDA and MLA.
        embeddings: The embedding.
        head: The language model's head.
        Each is None, "fp8" or "fp8w" (float8 in blocks of 128 x 128; many rows are multiplied in
        float8, or always by 16-bit activations), or a dict with `bits` (3, 4 or 8) and, if wanted,
        `group` (inputs that share a scale, a multiple of 32; None: a row; default 64),
        `is_symmetric` (default True; False: each group has a zero of its own), `is_float` (default
        False; True: float8 codes), `rows` (outputs that share a scale; default 1), and
        `activation_scheme` (default None; "dynamic": many rows of activations are quantised where
        the hardware multiplies float8 numbers).

    Raises:
        ValueError: For an unknown part or field, and values that are not allowed.
    """

    def __init__(
        self,
        experts: str | dict[str, Any] | Scheme | None = None,
        shared_experts: str | dict[str, Any] | Scheme | None = None,
        attention: str | dict[str, Any] | Scheme | None = None,
        embeddings: str | dict[str, Any] | Scheme | None = None,
        head: str | dict[str, Any] | Scheme | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        for name, value in unknown.items():
            require(False, name, value, f"left out: the parts are {', '.join(PARTS)}")
        require(quant_method == QUANT_METHOD, "quant_method", quant_method, repr(QUANT_METHOD))
        self.quant_method = quant_method  # type: ignore[assignment]
        given = {
            "experts": experts,
            "shared_experts": shared_experts,
            "attention": attention,
            "embeddings": embeddings,
            "head": head,
        }
        self.schemes = {part: _scheme(part, value) for part, value in given.items()}

    @classmethod
    def from_preset(cls, name: str, **parts: Any) -> "KimiLinearQuantizationConfig":
        """A preset by name, with some parts given otherwise.

        Args:
            name: "24gb", "48gb" or "80gb".
            **parts: As the class takes them.
        """
        require(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **parts})

    def scheme_of(self, name: str) -> Scheme | None:
        """How the weight of a module, by its name in the model, is held; None: as it is."""
        last = name.rpartition(".")[2]
        part = next((part for part, names in PARTS.items() if last in names), None)
        return None if part is None else self.schemes[part]

    def to_dict(self) -> dict[str, Any]:
        parts = {part: scheme and asdict(scheme) for part, scheme in self.schemes.items()}
        return {"quant_method": self.quant_method, **parts}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


def _scheme(part: str, value: Any) -> Scheme | None:
    if value is None or isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        require(value in NAMED, part, value, f"{' or '.join(map(repr, NAMED))}, or a dict")
        return Scheme(**NAMED[value])
    fields = Scheme.__dataclass_fields__
    require(isinstance(value, dict), part, value, f"None or a dict of {', '.join(fields)}")
    for name in value:
        require(name in fields, f"{part}.{name}", value[name], f"left out: {', '.join(fields)} are")
    require("bits" in value, f"{part}.bits", None, "one of (3, 4, 8)")
    try:
        return Scheme(**value)
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from None
