"""Packed weights of random codes, and what they are by the definition."""

import torch

from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme

SCHEMES = {
    "3 bits": Scheme(3, 64),
    "4 bits": Scheme(4, 32),
    "4 bits, zeros": Scheme(4, 128, is_symmetric=False),
    "4 bits, groups across blocks": Scheme(4, 96, is_symmetric=False),
    "8 bits a row": Scheme(8, None),
    "float8 blocks": Scheme(8, 128, is_float=True, rows=128),
}


def random_packed(scheme, shape=(3, 40, 384), dtype=torch.bfloat16, device="cpu", factor=1.0):
    """Packed weights of random codes, and the same weights by the definition."""
    *outer, rows, num_inputs = shape
    codes = torch.randint(0, 1 << scheme.bits, shape, dtype=torch.uint8)
    if scheme.is_float:
        codes = torch.where(codes & 127 == 127, 0, codes)  # no NaN
    groups = (*outer, -(-rows // scheme.rows), scheme.num_groups(num_inputs))
    scale = ((torch.rand(groups) + 0.5) * factor).to(dtype)
    zero = None
    values = codes.view(torch.float8_e4m3fn).double() if scheme.is_float else codes.double()
    size = scheme.group or num_inputs

    def spread(x):
        x = x.double().repeat_interleave(size, dim=-1).repeat_interleave(scheme.rows, dim=-2)
        return x[..., :rows, :num_inputs]

    if not scheme.is_symmetric:
        zero = torch.randint(0, 1 << scheme.bits, groups, dtype=torch.uint8)
        values = values - spread(zero)
    elif not scheme.is_float:
        values = values - (1 << (scheme.bits - 1))
    expected = (values * spread(scale)).to(dtype)
    packed = PackedWeights.of_codes(codes, scale, zero, scheme, dtype)
    return packed.to(device), expected.to(device)
