"""The loss's kernel beside its reference: on a GPU, or by Triton's interpreter."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, draw, with_kernels
from tolerance import assert_close

from kimi_linear.ops.cross_entropy.kernels import loss_and_gradient, reference_loss_and_gradient

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 97, 8192, 20000])
def test_loss_and_gradient(vocab_size, dtype):
    logits, scale = 4 * draw(5, vocab_size), torch.tensor(0.3, device=DEVICE)
    labels = torch.randint(0, vocab_size, (5,), device=DEVICE)
    labels[0], labels[2], labels[3] = vocab_size - 1, -100, 0
    logits[2] = float("nan")  # what does not count is not read
    expected = reference_loss_and_gradient(logits.clone(), labels, scale, -100, torch.float32)
    losses, grad = loss_and_gradient(logits, labels, scale, -100, dtype)
    assert losses.dtype == torch.float32 and grad.dtype == dtype
    assert losses[2] == 0 and not grad[2].any()
    assert_close(losses, expected[0], torch.float32)
    assert_close(grad, expected[1], dtype)


@with_kernels
def test_label_outside_the_vocabulary_is_seen():
    logits, scale = draw(3, 97), torch.ones((), device=DEVICE)
    labels = torch.tensor([97, 5, -1], device=DEVICE)
    losses, _ = loss_and_gradient(logits, labels, scale, -100, torch.float32)
    assert losses.isnan().tolist() == [True, False, True]
