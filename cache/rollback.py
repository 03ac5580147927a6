"""How a KDA layer reads one call's tokens so that its cache can take the last ones back.

A KDA state is a running sum and has no inverse. A cache that can be cropped therefore keeps an
anchor, the states as they were some tokens ago, and a log of the layer's inputs since then. `crop`
shortens the log and declares the states stale; the next call reads what is left of the log again,
from the anchor, in front of its own tokens. At least the last `rollback_tokens` tokens can be taken
back, at most twice as many are logged.

The cost, per KDA layer and row: one more copy of the states and 2 * `rollback_tokens` inputs of the
layer in memory; one more run of the layer's attention over the log every `rollback_tokens` steps of
decoding, and over what is left of it after a crop. Steps by the decode graph keep a second copy of
the states instead of running over the log (`KDALayerCache.move_anchor`).

Shapes: B batch, T tokens of this call, S tokens of cache and call, W rollback tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from kimi_linear.inputs.layout import SequenceLayout, sequence_layout
from torch import Tensor


@dataclass(frozen=True)
class KDARun:
    """Tokens that a KDA layer reads at once.

    Attributes:
        start, stop: Their columns; may be none.
        layout: Their padding.
        makes_anchor: Whether the states after them become the anchor.
    """

    start: int
    stop: int
    layout: SequenceLayout
    makes_anchor: bool = False


@dataclass(frozen=True)
class KDAPlan:
    """The runs of one call, the same for all KDA layers of a model.

    Attributes:
        runs: In order. Their columns count from the log's first token if `replays`, else from the
            call's.
        replays: Whether the log is read again in front of the call's tokens, from the anchor.
    """

    runs: tuple[KDARun, ...]
    replays: bool = False

    def to(self, device: torch.device, **kwargs: Any) -> "KDAPlan":
        """A copy on another device; accelerate moves inputs to the next layers' with this."""
        runs = (replace(run, layout=run.layout.to(device, **kwargs)) for run in self.runs)
        return replace(self, runs=tuple(runs))


def plan_call(
    num_tokens: int,
    layout: SequenceLayout,
    *,
    rollback_tokens: int,
    num_logged: int | None,
    is_stale: bool,
    batch_size: int,
    attention_mask: Tensor | None,
    device: torch.device,
) -> KDAPlan:
    """Decide what a call of `num_tokens` reads, and where the anchor moves.

    Args:
        num_tokens: T.
        layout: Padding of the call's tokens.
        rollback_tokens: W; 0 keeps nothing.
        num_logged: Tokens in the log; None if there is no anchor.
        is_stale: Whether the states are those of tokens that were taken back.
        batch_size: B.
        attention_mask: [B, S], non-zero at real tokens; None if all are real.
        device: Where the layouts' tensors live.
    """
    logged = num_logged or 0
    moves = rollback_tokens > 0 and (
        num_logged is None or logged + num_tokens > 2 * rollback_tokens
    )
    replays = is_stale or (moves and num_logged is not None and num_tokens < rollback_tokens)
    length = num_tokens + (logged if replays else 0)
    if not moves and not replays:
        return KDAPlan((KDARun(0, length, layout),))
    cut = max(length - rollback_tokens, 0) if moves else 0

    def run(start: int, stop: int, makes_anchor: bool) -> KDARun:
        mask = attention_mask
        if mask is not None:
            first = mask.shape[1] - length
            mask = mask[:, first + start : first + stop]
        if start == stop:
            return KDARun(start, stop, SequenceLayout(), makes_anchor)
        inner = sequence_layout(batch_size, stop - start, attention_mask=mask, device=device)
        return KDARun(start, stop, inner, makes_anchor)

    first = (run(0, cut, True),) if moves else ()
    return KDAPlan((*first, run(cut, length, False)), replays)


__all__ = ["KDAPlan", "KDARun", "plan_call"]
