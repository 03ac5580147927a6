"""How far a model with packed weights is from the one that it was made of.

Shapes: B rows, T tokens, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from texts.evaluation import IGNORED, filled_batches, windows
from torch import Tensor, nn

from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.quantization.packing import quantize_model

BATCH_TOKENS = 16384


class Judge:
    """Held-out text, and a model whose opinion of it others are compared with.

    Args:
        reference: The model.
        sequences: Ids of texts, each behind its begin token.
        num_bytes: Of each text.
        num_tokens: How much of them to read: whole texts, the first that have so many tokens.
        batch_tokens: Most tokens of a call.

    Raises:
        ValueError: If there is no text.
    """

    def __init__(
        self,
        reference: Any,
        sequences: Sequence[Sequence[int]],
        num_bytes: Sequence[int],
        num_tokens: int,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.reference, self.num_bytes, self.num_tokens = reference, 0, 0
        pieces = []
        for ids, size in zip(sequences, num_bytes, strict=True):
            if self.num_tokens >= num_tokens:
                break
            pieces += windows(ids)
            self.num_bytes += size
            self.num_tokens += len(ids) - 1
        if not pieces:
            raise ValueError(f"--eval-tokens {num_tokens} is not allowed: there is no text")
        device = reference.device
        self.batches = [
            (inputs.to(device), targets.to(device))
            for inputs, targets in filled_batches(pieces, batch_tokens)
        ]

    @torch.no_grad()
    def figures(self, model: Any) -> dict[str, float]:
        """Bits per byte of the text; mean over its tokens of the KL divergence from the reference
        in nats, and of whether the likeliest token is the same."""
        total = torch.zeros(3, dtype=torch.float64, device=model.device)
        for inputs, targets in self.batches:
            is_scored = targets != IGNORED
            found = _log_probabilities(model, inputs, is_scored)
            wanted = _log_probabilities(self.reference, inputs, is_scored)
            nats = F.nll_loss(found, targets[is_scored], reduction="sum")
            apart = F.kl_div(found, wanted, reduction="sum", log_target=True)
            same = (found.argmax(-1) == wanted.argmax(-1)).sum()
            total += torch.stack([nats.double(), apart.double(), same.double()])
        nats, apart, same = total.tolist()
        return {
            "bits_per_byte": nats / math.log(2) / self.num_bytes,
            "kl": apart / self.num_tokens,
            "agreement": same / self.num_tokens,
        }


def _log_probabilities(model: Any, inputs: Tensor, is_scored: Tensor) -> Tensor:
    """[scored tokens, V] float32."""
    logits = model(input_ids=inputs, use_cache=False).logits[is_scored]
    return logits.float().log_softmax(-1)


def packed_model(model: nn.Module, quantization: KimiLinearQuantizationConfig) -> Any:
    """A model with packed weights, quantised without data; all others are the model's own."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return quantize_model(copy.deepcopy(model, shared), quantization)
