"""A model in memory brought to few bits while it reads a text, as `quantize.py --calibrate` does it
with one on disk."""

from typing import Any

import torch
from quantizing.modules import quantize_layer
from quantizing.text import Text
from torch import Tensor, nn

from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.gptq import gptq
from kimi_linear.ops.packed.rounding import quantize

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@torch.no_grad()
def calibrate_model(
    model: Any, rows: tuple[Tensor, Tensor], quantization: KimiLinearQuantizationConfig
) -> None:
    """Put packed weights in the place of a model's, in place.

    Args:
        model: Of plain weights, which are lost.
        rows: Ids and positions [B, T] of the text.
        quantization: Which parts are held how.
    """
    ids, positions = rows
    device, found = model.device, {}
    schemes, table = quantization.schemes, model.get_input_embeddings()
    if schemes["embeddings"] is not None:
        found[TABLE] = quantize(table.weight, schemes["embeddings"], TABLE)
        table.weight.copy_(found[TABLE].dequantized())
    text = Text(model.model, positions, device)
    text.hidden = torch.cat([table(row[None].to(device)).cpu() for row in ids])
    for i, layer in enumerate(model.model.layers):
        found |= dict(quantize_layer(layer, f"model.layers.{i}", text, quantization))
    if schemes["head"] is not None:
        head, norm = model.get_output_embeddings(), model.model.norm
        hessian = text.moment(lambda hidden, _: norm(hidden))
        found[HEAD] = gptq(head.weight, hessian, schemes["head"], HEAD)
    for name, packed in found.items():
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, nn.Parameter(packed, requires_grad=False))
