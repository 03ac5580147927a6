"""What all layers are told about one call, worked out once, before the first of them.

Shapes: B batch, T tokens of this call, S tokens of cache and call, R real tokens of this call,
D hidden size, L + P width of a latent.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kimi_linear.cache.pieces import KDAPieces, read_pieces
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.inputs.sequences import TokenSequences, token_sequences


@dataclass(frozen=True)
class ForwardPlan:
    """One call.

    Attributes:
        layout: Padding and packing of its tokens.
        cache: What it reads and writes, or None.
        route: How MLA layers attend.
            "backend": to the call's own keys and values, by the configured backend and `mask`;
            "flash": as "backend", within sequences that lie end to end, by flash attention;
            "sequences": within packed sequences, one after another;
            "latents": to cached and own latents, by `ops/latent_attention`;
            "texts": as "latents", each sequence to those of a cache of its own.
        pieces: How KDA layers read it.
        mask: The backend's, in "backend"; None if it needs none.
        real_tokens: [B, S] bool, False at padding; None if all are real.
        own_real: [B, T] bool, its part of the call's own tokens; None if there is no padding.
        seen: [B, T, S] bool, what each token attends to in "latents"; None: causal order.
    """

    layout: SequenceLayout
    cache: Any
    route: Literal["backend", "flash", "sequences", "latents", "texts"]
    pieces: KDAPieces
    mask: Any = None
    real_tokens: Tensor | None = None
    own_real: Tensor | None = None
    seen: Tensor | None = None

    def to(self, device: torch.device, **kwargs: Any) -> "ForwardPlan":
        """A copy on another device; accelerate moves inputs to the next layers' with this."""
        names = ("mask", "real_tokens", "own_real", "seen")
        found = {name: x for name in names if isinstance(x := getattr(self, name), Tensor)}
        moved: dict[str, Any] = {name: x.to(device, **kwargs) for name, x in found.items()}
        moved |= {name: getattr(self, name).to(device, **kwargs) for name in ("layout", "pieces")}
        if self.mask is not None and "mask" not in moved:  # flex attention's takes no more
            moved["mask"] = self.mask.to(device)
        return replace(self, **moved)

    def without_padding(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] with zeros at padding: NaN there would spread, since 0 * NaN is NaN."""
        if self.own_real is None:
            return hidden_states
        return hidden_states.masked_fill(~self.own_real.unsqueeze(-1), 0)

    def begin_call(self) -> None:
        """Until `end_call`, the cache's layers may hold different numbers of tokens."""
        if self.cache is not None:
            self.cache.begin_call()

    def end_call(self, modules: list[nn.Module]) -> None:
        """All layers have read the call."""
        if self.cache is not None:
            self.cache.end_call(modules)

    def read_kda(self, attention: Any, hidden_states: Tensor) -> Tensor:
        """Have a KDA layer read [B, T, D]: piece by piece, its cache taking the states in."""
        if self.cache is None:
            return read_pieces(attention, hidden_states, self.pieces.parts)[0]
        cache: Any = self.cache.layers[attention.layer_idx]
        return cache.read(attention, hidden_states, self.pieces)

    def keep_latents(self, layer_idx: int, latent: Tensor) -> list[Any]:
        """Cache the call's latents [B, T, L + P]; return all up to its last token, in segments; in
        "texts" the segments of each sequence."""
        if self.cache is None:
            return [latent]
        cache: Any = self.cache.layers[layer_idx]
        return cache.update(latent)

    def sequences(self, hidden_states: Tensor) -> TokenSequences:
        """The sequences of its places [B, T, ...]."""
        batch_size, num_tokens = hidden_states.shape[:2]
        return token_sequences(self.layout, batch_size, num_tokens, like=hidden_states)

    def visible(self, latent: Tensor) -> Tensor:
        """The latents that this call's packed sequences attend to: their own (in
        `parallel/context.py` other processes' too)."""
        return latent

    @property
    def ends(self) -> list[int]:
        """Where packed sequences end, from 0 on."""
        return self.layout.ends

    @property
    def lengths(self) -> dict[str, Any]:
        """What Transformers' flash attention takes for sequences that lie end to end."""
        return self.layout.flash_lengths

    @property
    def is_in_line(self) -> bool:
        """Whether MLA layers read sequences end to end."""
        return self.route in ("flash", "sequences")

    def in_line(self, x: Tensor) -> Tensor:
        """[B, T, D] to [1, R, D] in the routes that read sequences end to end."""
        return self.layout.pack(x) if self.is_in_line else x

    def in_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """The inverse of `in_line`, zeros at padding."""
        return self.layout.unpack(x, num_rows) if self.is_in_line else x
