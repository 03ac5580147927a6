"""How a matrix is held in few bits.

A weight is (code - zero) * scale. Codes are unsigned integers, or float8 numbers without a zero.
Inputs of a row share scale and zero in groups; in block-scaled float8, rows share them too.

Shapes: N outputs, K inputs, G groups of a row.
"""

from dataclasses import dataclass
from typing import Any

BITS = (3, 4, 8)
# Inputs whose codes lie side by side in memory (`ops/packed/codes.py`); groups are multiples of it.
RUN = 32
# Inputs that kernels read at once; rows are padded to multiples of it.
BLOCK = 256
# Inputs of a row that share a scale where activations are quantised.
FLOAT8_BLOCK = 128
ACTIVATION_SCHEMES = (None, "dynamic")
# Float8 in DeepSeek-V3's blocks, by the names that configurations have for them.
_BLOCKS: dict[str, Any] = {"bits": 8, "group": 128, "is_float": True, "rows": 128}
NAMED: dict[str, dict[str, Any]] = {
    "fp8": {**_BLOCKS, "activation_scheme": "dynamic"},
    "fp8w": _BLOCKS,
}


@dataclass(frozen=True)
class Scheme:
    """How a matrix [N, K] is held.

    Attributes:
        bits: Of a code: 3, 4 or 8.
        group: Inputs that share a scale, a multiple of 32; None: all of a row.
        is_float: Codes are float8 (e4m3), not integers.
        is_symmetric: The zero of all groups is the middle code; else each group has its own.
        rows: Outputs that share a scale.
        activation_scheme: "dynamic": many rows of activations are brought to float8 for the
            product, where the hardware multiplies such numbers; None: never. Of float8 codes only.

    Raises:
        ValueError: For a field that is not allowed.
    """

    bits: int
    group: int | None = 64
    is_float: bool = False
    is_symmetric: bool = True
    rows: int = 1
    activation_scheme: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r} is not allowed: it must be one of {BITS}")
        group = self.group
        if group is not None and (not isinstance(group, int) or group < RUN or group % RUN):
            raise ValueError(
                f"group={group!r} is not allowed: it must be a multiple of {RUN}, or None for a "
                "scale per row"
            )
        if self.is_float and (self.bits != 8 or not self.is_symmetric):
            raise ValueError(
                f"is_float with bits={self.bits}, is_symmetric={self.is_symmetric} is not allowed: "
                "float8 has 8 bits and no zero"
            )
        if not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"rows={self.rows!r} is not allowed: it must be at least 1")
        allowed = ACTIVATION_SCHEMES if self.is_float else ACTIVATION_SCHEMES[:1]
        if self.activation_scheme not in allowed:
            raise ValueError(
                f"activation_scheme={self.activation_scheme!r} is not allowed: it must be "
                f"{' or '.join(map(repr, allowed))} with is_float={self.is_float}"
            )

    @property
    def slots(self) -> int:
        """Codes that a word holds."""
        return 4 if self.bits == 8 else 8

    @property
    def has_float8_products(self) -> bool:
        """Whether many rows are multiplied in float8: of what `activation_scheme` allows, the
        groups that each block of activations lies in."""
        is_dynamic = self.activation_scheme == "dynamic"
        return is_dynamic and (self.group is None or self.group % FLOAT8_BLOCK == 0)

    @property
    def middle(self) -> int:
        """The zero of symmetric integer codes."""
        return 1 << (self.bits - 1)

    def num_words(self, num_inputs: int) -> int:
        """Words that hold a row of K inputs."""
        return -(-num_inputs // BLOCK) * BLOCK // self.slots

    def num_groups(self, num_inputs: int) -> int:
        """G for K inputs, of which the last group may be cut short by block-scaled formats."""
        return 1 if self.group is None else -(-num_inputs // self.group)

    def check_size(self, name: str, num_inputs: int) -> None:
        """Raise ValueError if groups do not divide the inputs of the tensor called `name`."""
        if self.group is not None and num_inputs % self.group and self.rows == 1:
            raise ValueError(
                f"{name}: group={self.group} is not allowed: it must divide the {num_inputs} "
                "inputs of each row"
            )

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """Of codes, scales and zeros, for long rows."""
        if self.group is None:
            return float(self.bits)
        shared = scale_bits + (0 if self.is_symmetric else 16)
        return self.bits + shared / (self.group * self.rows)
