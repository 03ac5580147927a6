"""A layer brought to few bits while it reads a text, each of its parts after those before it.

Matrices with one input share its Hessian: a layer's attention projections, gate and up of an MLP.
A routed expert's is of the tokens that chose it, and drawn towards the layer's (see
`drawn_to_shared`). For an expert's second matrix the layer's is of what the expert would make of
any of its tokens. (Weighting tokens as the router does gave a small trained model no better
answers.)

Shapes: S tokens, D hidden size, I expert width, E experts, k experts of one token.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.gptq import drawn_to_shared, gptq, second_moment
from kimi_linear.ops.packed.weights import PackedWeights
from quantizing.text import Text

# Those that read a layer's normed input; the others are no `nn.Linear` or stay as they are.
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "f_a_proj", "g_a_proj", "kv_a_proj_with_mqa")
# Experts worked on at once: each takes ten times a Hessian's memory.
EXPERTS, CPU_EXPERTS = 16, 2
# Tokens of which an expert's second matrix has the layer's Hessian.
SHARED_TOKENS = 2048
# Bytes of a layer's inputs up to which they stay on the device for the experts.
DEVICE_BYTES = 4 << 30

Found = Iterator[tuple[str, PackedWeights]]


@torch.no_grad()
def quantize_layer(
    layer: Any, name: str, text: Text, quantization: KimiLinearQuantizationConfig
) -> Found:
    """Bring a layer's weights to few bits, in place, and let it read the text.

    Args:
        layer: A decoder layer, on the text's device.
        name: Its name in the model.
        text: What the layers before it have made of the text; afterwards, what this one has.
        quantization: How each part is to be held.

    Yields:
        The names of parameters, and their packed weights.
    """
    run = _Run(text, quantization)
    attention = layer.self_attn
    stem = f"{name}.self_attn"

    def normed(hidden: Tensor, plan: Any) -> Tensor:
        return layer.input_layernorm(hidden)

    def attended(hidden: Tensor, plan: Any) -> Tensor:
        return attention(layer.input_layernorm(hidden), plan=plan)[0]

    yield from run.linear(stem, attention, ATTENTION_INPUTS, normed)
    yield from run.linear(stem, attention, ("o_proj",), _input_of(attention.o_proj, attended))
    text.change(lambda hidden, plan: hidden + attended(hidden, plan))

    def normed_again(hidden: Tensor, plan: Any) -> Tensor:
        return layer.post_attention_layernorm(hidden)

    if layer.is_moe:
        moe, stem = layer.block_sparse_moe, f"{name}.block_sparse_moe"
        if hasattr(moe, "shared_experts"):
            yield from run.mlp(f"{stem}.shared_experts", moe.shared_experts, normed_again)
        yield from run.experts(f"{stem}.experts", moe, normed_again)
        rest = moe
    else:
        yield from run.mlp(f"{name}.mlp", layer.mlp, normed_again)
        rest = layer.mlp
    text.change(lambda hidden, plan: hidden + rest(normed_again(hidden, plan)))


def _input_of(module: nn.Module, run: Any) -> Any:
    """A function that returns what a module is given while `run` is called."""

    def function(hidden: Tensor, plan: Any) -> Tensor:
        found: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            run(hidden, plan)
        finally:
            hook.remove()
        return torch.cat([each.flatten(0, -2) for each in found])

    return function


class _Run:
    """A layer's work: the text, and how parts are to be held."""

    def __init__(self, text: Text, quantization: KimiLinearQuantizationConfig) -> None:
        self.text, self.scheme_of = text, quantization.scheme_of

    def linear(self, stem: str, parent: Any, names: tuple[str, ...], inputs: Any) -> Found:
        """Linear layers of a module that have one input, which `inputs` makes of hidden states."""
        held = [
            name for name in names if hasattr(parent, name) and self.scheme_of(f"{stem}.{name}")
        ]
        if not held:
            return
        hessian = self.text.moment(inputs)
        for name in held:
            scheme, weight = self.scheme_of(f"{stem}.{name}"), getattr(parent, name).weight
            assert scheme is not None
            packed = gptq(weight, hessian, scheme, f"{stem}.{name}.weight")
            weight.copy_(packed.dequantized())
            yield f"{stem}.{name}.weight", packed

    def mlp(self, stem: str, mlp: Any, inputs: Any) -> Found:
        """A gated MLP."""

        def inner(hidden: Tensor, plan: Any) -> Tensor:
            x = inputs(hidden, plan)
            return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)

        yield from self.linear(stem, mlp, ("gate_proj", "up_proj"), inputs)
        yield from self.linear(stem, mlp, ("down_proj",), inner)

    def experts(self, stem: str, moe: Any, inputs: Any) -> Found:
        """The routed experts of a layer."""
        scheme = self.scheme_of(stem)
        if scheme is None:
            return
        experts, (tokens, index) = moe.experts, self._routed(moe, inputs)
        shared = self.text.moment(inputs)
        sample = tokens[:: max(1, len(tokens) // SHARED_TOKENS)].to(self.text.device)
        matrices = experts.gate_up_proj, experts.down_proj
        made = [PackedWeights.empty(tuple(x.shape), scheme, x.dtype, x.device) for x in matrices]
        step = CPU_EXPERTS if self.text.device.type == "cpu" else EXPERTS
        for start in range(0, experts.num_experts, step):
            some = range(start, min(start + step, experts.num_experts))
            place = slice(some.start, some.stop), slice(None)
            chosen = [self._choosers(tokens, index, i) for i in some]
            counts = torch.tensor([len(x) for x in chosen], device=self.text.device)
            own = torch.stack([second_moment(x) for x in chosen])
            hessian = drawn_to_shared(own, counts, shared)
            packed = gptq(matrices[0][place[0]], hessian, scheme, f"{stem}.gate_up_proj")
            made[0].fill(place, packed)
            matrices[0][place[0]] = packed.dequantized()
            inner = [_inner(experts, i, x) for i, x in zip(some, chosen, strict=True)]
            own = torch.stack([second_moment(x) for x in inner])
            others = [second_moment(_inner(experts, i, sample)) / len(sample) for i in some]
            hessian = drawn_to_shared(own, counts, torch.stack(others))
            packed = gptq(matrices[1][place[0]], hessian, scheme, f"{stem}.down_proj")
            made[1].fill(place, packed)
            matrices[1][place[0]] = packed.dequantized()
        yield f"{stem}.gate_up_proj", made[0]
        yield f"{stem}.down_proj", made[1]

    def _routed(self, moe: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """All tokens [S, D], and their experts [S, k] on the device."""
        hidden = self.text.hidden
        place = self.text.device if hidden.nbytes <= DEVICE_BYTES else hidden.device
        tokens, index = [], []
        for _, part, plan in self.text.calls():
            x = inputs(part, plan).flatten(0, -2)
            tokens.append(x.to(place))
            index.append(moe.gate(x)[2])
        return torch.cat(tokens), torch.cat(index)

    def _choosers(self, tokens: Tensor, index: Tensor, expert: int) -> Tensor:
        """Tokens [.., D] that chose an expert."""
        chosen = (index == expert).any(dim=-1)
        return tokens[chosen.to(tokens.device)].to(self.text.device)


def _inner(experts: Any, expert: int, x: Tensor) -> Tensor:
    """[.., I]: what an expert's second matrix reads."""
    gate, up = F.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up
