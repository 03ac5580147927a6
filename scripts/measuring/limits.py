"""What the hardware allows: the least bytes and operations of a call, over measured rates.

Symbols: B rows, T tokens of a row, S cached tokens, E experts, k of them per token, H heads.

- Weights are read once per call. Of E experts, B * T tokens that choose k each, uniformly, need
  E * (1 - (1 - k / E)^(B * T)) on average. Of the embedding table only the tokens' rows are read.
- A KDA layer reads and writes one float32 state [H, K, V] per row and call; an MLA layer reads the
  latents of S tokens (1,152 bytes each in the 48B model), and writes those of its new ones.
- A matrix product takes 2 operations per weight and token. Attention takes 2 * H * (key + value
  size) per pair of tokens, half of the pairs being causal; the KDA recurrence takes 6 * H * K * V
  per token: reading with the key, the update, reading with the query.
- A training step takes three times the operations of a forward pass over all logits, and moves its
  weights at least three times: read forward, read backward, gradients written.

Activations are left out: what is fused well need not leave the chip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from measuring.device import Rates
from measuring.packed import held_bytes, put_packed


@dataclass(frozen=True)
class Limits:
    """Limits of one model on one device.

    Attributes:
        config: The model's.
        dtype: Of latents, and of weights that are not packed.
        rates: The device's.
        expert_weights, head_weights, other_weights: Numbers in all routed experts, in the output
            head, and in everything else but the embedding table.
        expert_bytes, head_bytes, other_bytes: Bytes of these, as they are held: some in float32,
            packed ones with their scales.
        total_bytes: Bytes of all weights, the embedding table among them.
    """

    config: KimiLinearConfig
    dtype: torch.dtype
    rates: Rates
    expert_weights: int
    head_weights: int
    other_weights: int
    expert_bytes: int
    head_bytes: int
    other_bytes: int
    total_bytes: int

    @classmethod
    def of(
        cls,
        config: KimiLinearConfig,
        dtype: torch.dtype,
        rates: Rates,
        quantization: KimiLinearQuantizationConfig | None = None,
    ) -> "Limits":
        """Count the weights of a model that takes no memory."""
        with torch.device("meta"):
            model = KimiLinearForCausalLM(config).to(dtype)
        if quantization is not None:
            put_packed(model, quantization)
        head = model.get_output_embeddings().weight
        table = model.get_input_embeddings().weight
        experts = others = expert_bytes = other_bytes = total_bytes = 0
        for name, parameter in model.named_parameters():
            num_bytes = held_bytes(parameter)
            total_bytes += num_bytes
            if ".experts." in name:
                experts += parameter.numel()
                expert_bytes += num_bytes
            elif parameter is not table and parameter is not head:
                others += parameter.numel()
                other_bytes += num_bytes
        return cls(
            config,
            dtype,
            rates,
            expert_weights=experts,
            head_weights=head.numel(),
            other_weights=others,
            expert_bytes=expert_bytes,
            head_bytes=held_bytes(head),
            other_bytes=other_bytes,
            total_bytes=total_bytes,
        )

    def latent_bytes(self) -> int:
        """Bytes that one token adds to the cache."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return width * self.dtype.itemsize * self._layers("full_attention")

    def state_bytes(self) -> int:
        """Bytes of one row's KDA states, and of the inputs its convolutions keep."""
        linear = self.config.linear_attn_config
        heads, size = linear["num_heads"], linear["head_dim"]
        tail = 3 * heads * size * (linear["short_conv_kernel_size"] - 1) * self.dtype.itemsize
        return (4 * heads * size**2 + tail) * self._layers("linear_attention")

    def cache_bytes(self, context: int, batch: int = 1) -> int:
        """Bytes that a cache must hold."""
        return batch * (context * self.latent_bytes() + self.state_bytes())

    def decode(self, context: int, batch: int = 1) -> dict[str, Any]:
        """Limit of one token for each of `batch` rows behind `context` tokens."""
        numbers = self._active_weights() + self.head_weights
        pairs = batch * context
        return self._limit(
            weight_bytes=self._weight_bytes(batch),
            state_bytes=2 * batch * self.state_bytes(),
            latent_bytes=pairs * self.latent_bytes(),
            operations=2 * batch * numbers + self._mixing_operations(batch, pairs),
        )

    def step(self, context: int, num_tokens: int) -> dict[str, Any]:
        """Limit of `num_tokens` tokens of one row behind `context` tokens, with all logits."""
        numbers, pairs = self._active_weights() + self.head_weights, num_tokens * context
        return self._limit(
            weight_bytes=self._weight_bytes(num_tokens),
            state_bytes=2 * self.state_bytes(),
            latent_bytes=context * self.latent_bytes(),
            operations=2 * num_tokens * numbers + self._mixing_operations(num_tokens, pairs),
        )

    def prefill(self, context: int, batch: int = 1) -> dict[str, Any]:
        """Limit of reading `context` tokens of each row, with the logits of the last one."""
        tokens, pairs = batch * context, batch * context * (context + 1) // 2
        matrices = 2 * tokens * self._active_weights() + 2 * batch * self.head_weights
        return self._limit(
            weight_bytes=self._weight_bytes(tokens),
            state_bytes=batch * self.state_bytes(),
            latent_bytes=tokens * self.latent_bytes(),
            operations=matrices + self._mixing_operations(tokens, pairs),
        )

    def train(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Limit of forward, loss and backward over packed sequences of these lengths."""
        tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
        matrices = 2 * tokens * (self._active_weights() + self.head_weights)
        return self._limit(
            weight_bytes=3 * self._weight_bytes(tokens),
            state_bytes=0,
            latent_bytes=0,
            operations=3 * (matrices + self._mixing_operations(tokens, pairs)),
        )

    def _layers(self, kind: str) -> int:
        return self.config.layer_types.count(kind)

    def _active_weights(self) -> float:
        """Numbers that one token is multiplied with, without the head."""
        share = self.config.num_experts_per_token / self.config.num_experts
        return share * self.expert_weights + self.other_weights

    def _weight_bytes(self, tokens: int) -> float:
        """Bytes of the weights that `tokens` tokens need together, with the head."""
        untouched = (1 - self.config.num_experts_per_token / self.config.num_experts) ** tokens
        return (1 - untouched) * self.expert_bytes + self.head_bytes + self.other_bytes

    def _mixing_operations(self, tokens: int, pairs: int) -> int:
        """Operations between tokens: attention of the MLA layers, recurrence of the KDA layers."""
        config, linear = self.config, self.config.linear_attn_config
        per_pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        per_token = 6 * linear["num_heads"] * linear["head_dim"] ** 2
        attention = pairs * per_pair * self._layers("full_attention")
        return attention + tokens * per_token * self._layers("linear_attention")

    def _limit(
        self, weight_bytes: float, state_bytes: int, latent_bytes: int, operations: float
    ) -> dict[str, Any]:
        """The figures of one call; `ms` is what it takes at least."""
        total = weight_bytes + state_bytes + latent_bytes
        byte_ms = 1e3 * total / self.rates.copy_bytes_per_second
        operation_ms = 1e3 * operations / self.rates.operations_per_second
        return {
            "weight_bytes": round(weight_bytes),
            "state_bytes": state_bytes,
            "latent_bytes": latent_bytes,
            "operations": round(operations),
            "byte_ms": byte_ms,
            "operation_ms": operation_ms,
            "ms": max(byte_ms, operation_ms),
        }
