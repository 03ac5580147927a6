"""How close two computations must be, by the dtype of the less exact one: one table for all."""

import torch
from torch import Tensor

# largest error, relative to the largest value
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# for kernels that multiply in the input's dtype: root mean square of the error over
# that of the values
KERNEL_TOLERANCE = {
    torch.float32: 5e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 2e-2,
}


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "", excess: float = 1
) -> None:
    """Finite, of one shape, and within the table's tolerance of the largest value."""
    assert actual.isfinite().all(), f"{name} is not finite"
    actual, expected = actual.detach().double(), expected.detach().double()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0,
        atol=excess * TOLERANCE[dtype] * max(largest, 1e-30),
        msg=lambda text: f"{name}: {text}",
    )


def assert_kernel_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "", excess: float = 1
) -> None:
    """Finite, of one shape, and the error's root mean square within the table's ratio."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert actual.isfinite().all(), f"{name} is not finite"
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    error = (actual - expected).square().mean().sqrt().item()
    size = expected.square().mean().sqrt().item()
    allowed = excess * KERNEL_TOLERANCE[dtype] * size + 1e-7
    assert error <= allowed, f"{name}: error {error}, size {size}"
