"""Attention masks of four dimensions, as far as they describe texts.

A KDA layer reads one text after another and cannot leave out what a mask hides. A mask by which
each token sees itself and all that one earlier token sees is a tree: its leaves are texts that
share beginnings. Such a call is read as packed texts, one for each leaf, and each token's output
is taken from one of its texts. Shared beginnings are read once for each leaf.

Shapes: B batch, T tokens, N tokens of all texts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.upstream.arguments import OUTPUT_ARGUMENTS

# Coefficients that switch on router losses.
LOSS_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef")
HIDDEN = -1e4  # largest value of an additive mask at a hidden token


def read_trees(
    model: Any, source: Tensor, attention_mask: Tensor, wanted: dict[str, Any]
) -> dict[str, Any]:
    """Run the backbone with a mask of four dimensions.

    Args:
        model: The backbone.
        source: Ids [B, T] or embeddings [B, T, D].
        attention_mask: See `tree_texts`.
        wanted: What else the call asks for, by name.

    Returns:
        `last_hidden_state` [B, T, D] and `router_losses`.

    Raises:
        ValueError: If the mask is no mask of trees, or comes with what cannot be combined with it.
    """
    config = model.config
    wanted = {**{name: getattr(config, name) for name in OUTPUT_ARGUMENTS}, **wanted}
    obstacles = [name for name, is_wanted in wanted.items() if is_wanted]
    obstacles += ["context parallelism"] * (not model.planner.has_all_tokens)
    if model.training:
        obstacles += [name for name in LOSS_COEFFICIENTS if getattr(config, name)]
    if obstacles:
        raise ValueError(
            f"attention_mask has four dimensions, which is not allowed with {obstacles[0]}"
        )
    texts = tree_texts(attention_mask, *source.shape[:2])
    x = source if source.is_floating_point() else model.embed_tokens(source)
    out = model(inputs_embeds=texts.pack(x), use_cache=False, cu_seq_lens_q=texts.ends)
    return {
        "last_hidden_state": texts.unpack(out.last_hidden_state, source.shape[0]),
        "router_losses": out.router_losses,
    }


@dataclass(frozen=True)
class TreeTexts:
    """The texts of a call's trees, end to end.

    Attributes:
        places: [N] int64, where each of their tokens stands in the flattened [B * T].
        ends: [texts + 1] int32, where each text begins and ends among them.
        found: [B * T] int64, where each place's output is found among them; -1 at padding.
    """

    places: Tensor
    ends: Tensor
    found: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [1, N, ...]."""
        return x.flatten(0, 1)[self.places].unsqueeze(0)

    def unpack(self, x: Tensor, batch_size: int) -> Tensor:
        """[1, N, ...] to [B, T, ...], zeros at padding."""
        places = self.found.view(-1, *[1] * (x.ndim - 2))
        return (x[0][self.found] * (places >= 0)).unflatten(0, (batch_size, -1))


def tree_texts(attention_mask: Tensor, batch_size: int, num_tokens: int) -> TreeTexts:
    """Take a mask of trees apart.

    Args:
        attention_mask: [B or 1, 1, T, T], boolean or integer: non-zero where the token of a row
            sees that of a column; or floating: 0 there, and at most -1e4 elsewhere.

    Raises:
        ValueError: If it has another shape or other values, or is no mask of trees.
    """
    shape = tuple(attention_mask.shape)
    if shape not in {(rows, 1, num_tokens, num_tokens) for rows in (1, batch_size)}:
        raise ValueError(
            f"attention_mask has shape {shape}, which is not allowed: with four dimensions it must "
            f"be [batch or 1, 1, tokens, tokens] = [{batch_size} or 1, 1, {num_tokens}, "
            f"{num_tokens}], without a cache"
        )
    seen = _seen(attention_mask)[:, 0].expand(batch_size, -1, -1).cpu()
    places: list[int] = []
    ends = [0]
    found = [-1] * (batch_size * num_tokens)
    for row, visible in enumerate(seen.unbind()):
        for leaf in _leaves(visible):
            text = visible[leaf].nonzero().flatten().tolist()
            for column in text:
                found[row * num_tokens + column] = len(places)
                places.append(row * num_tokens + column)
            ends.append(len(places))
    if not places:
        raise ValueError("attention_mask hides everything, which is not allowed: no token sees any")
    device: Any = attention_mask.device
    return TreeTexts(
        torch.tensor(places, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(found, device=device),
    )


def _seen(mask: Tensor) -> Tensor:
    if not mask.is_floating_point():
        return mask != 0
    if not bool(((mask == 0) | (mask <= HIDDEN)).all()):
        raise ValueError(
            "attention_mask has other values than 0 and those up to -1e4, which is not allowed in "
            "a floating mask of four dimensions: 0 is seen, the lowest number of its dtype is not"
        )
    return mask == 0


def _leaves(visible: Tensor) -> list[int]:
    """The tokens of a mask [T, T] that no other token follows; ValueError if it is no tree."""
    inner = set()
    tokens = visible.any(dim=1).nonzero().flatten().tolist()  # those of padding see nothing
    for token in tokens:
        before = visible[token].clone()
        before[token] = False
        parent = int(before.nonzero().max()) if bool(before.any()) else None
        expected = torch.zeros_like(before) if parent is None else visible[parent]
        is_later = parent is not None and parent > token
        if is_later or not bool(visible[token, token]) or not torch.equal(before, expected):
            raise ValueError(
                f"attention_mask is no mask of trees at token {token}, which is not allowed: each "
                "token must see itself and exactly what one earlier token sees, since KDA layers "
                "read texts"
            )
        inner.add(parent)
    return [token for token in tokens if token not in inner]
