"""Products of quantised rows and packed weights, in float64.

Shapes: T rows, K inputs, P rows by expert.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.packed.float8 import Float8Rows

BLOCK, RUN = 128, 32


def reference_rows(x: Tensor) -> Float8Rows:
    """Rows [T, K] quantised by torch: float8 by max |x| / 448 of each block."""
    padded = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = padded.abs().amax(dim=2).clamp(min=1e-12) / 448
    codes = (padded / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    ordered = codes.unflatten(2, (-1, RUN)).transpose(2, 3).flatten(1).contiguous()
    return Float8Rows(ordered.view(torch.float8_e4m3fn), scale.t().contiguous())


def in_full(rows: Float8Rows, num_inputs: int) -> Tensor:
    """What quantised rows stand for, float64 [T, K]."""
    blocks = rows.codes.double().unflatten(1, (-1, RUN, BLOCK // RUN)).transpose(2, 3).flatten(2)
    return (blocks * rows.scale.t().double()[..., None]).flatten(1)[:, :num_inputs]


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, by that of what is expected."""
    return float((found.double() - expected).norm() / expected.norm())


def round_as_torch(monkeypatch) -> None:
    """Let Triton's interpreter round to float8 as a GPU does; by itself it cuts off."""
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(values, given, wanted, mode):
        if str(wanted) != "fp8e4nv" or str(given) != "fp32":
            return own(values, given, wanted, mode)
        codes = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
