"""Context parallelism: the tokens of one packed row, divided among the processes of a group.

Every process is given the whole row's ids and boundaries, and computes an equal part of its tokens.
Between the processes go, in each layer, only what its attention needs:

- short convolution: the last W - 1 hidden states of the process before;
- KDA: a process' tokens map the state that enters them to the one that leaves, S -> P S + M. Each
  process computes P and M of its own tokens, all at the same time, everyone gets everyone's, and
  composes those of the processes before its own;
- MLA: everyone gets everyone's latents, and attends to those before its own tokens.

All of it is differentiable. The loss is the whole row's on every process. The gradients of the
processes have the whole row's as their mean, which is what DDP and FSDP make of gradients.

Shapes: T tokens of the row, t of a process (T / processes), D hidden size, H heads, K key size,
V value size, R width of a latent, W convolution width, N sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist  # whose collectives of one tensor have new names since 2.13
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.cache.pieces import KDAPieces, Piece
from kimi_linear.cache.state import KDAState
from kimi_linear.inputs.checks import unless_all_real
from kimi_linear.inputs.layout import SequenceLayout, check_attention_mask, sequence_layout
from kimi_linear.inputs.sequences import TokenSequences, token_sequences
from kimi_linear.layers.plan import ForwardPlan
from kimi_linear.layers.planner import Planner
from kimi_linear.ops.kda import kda_attention
from kimi_linear.ops.runtime import compute_dtype, no_autocast
from kimi_linear.upstream.interfaces import attention_backend


class _Gather(torch.autograd.Function):
    """Every process' tensor [...] on every process, [processes, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(out.flatten(0, 1), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        scatter(own, grad.flatten(0, 1).contiguous(), group=ctx.group)
        return own, None


class _Total(torch.autograd.Function):
    """The sum of the processes' tensors, and in the backward pass of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class ContextShard:
    """A process' part of the row.

    Attributes:
        group: The process group.
        start, stop: Places in the row of its first token and behind its last one.
        begin: Place where the sequence begins that its first token belongs to.
        whole: The row's layout.
    """

    group: Any
    start: int
    stop: int
    begin: int
    whole: SequenceLayout

    @property
    def own(self) -> slice:
        return slice(self.start, self.stop)

    def gather(self, x: Tensor) -> Tensor:
        """[processes, ...]: everyone's [...]."""
        return _Gather.apply(x, self.group)

    def previous_tokens(self, x: Tensor, count: int) -> Tensor:
        """[1, count, D]: the hidden states before the own ones [1, t, D]; zeros where those are
        other sequences'."""
        rank = dist.get_rank(self.group)
        tails = self.gather(x[:, x.shape[1] - count :])
        places = torch.arange(self.start - count, self.start, device=x.device)
        return tails[rank - 1] * (places >= self.begin).to(x.dtype)[:, None]

    def entering_state(
        self,
        inputs: tuple[Tensor, ...],
        A_log: Tensor,
        dt_bias: Tensor,
        layout: SequenceLayout,
    ) -> Tensor:
        """[1, H, K, V]: KDA's state before the own tokens.

        Args:
            inputs: `kda_attention`'s q, k, v, g, beta of the own tokens [1, t, H, ...].
            A_log, dt_bias: The layer's.
            layout: The own tokens'.
        """
        ends = [0] if layout.cu_seqlens is None else layout.ends[:-1]
        q, k, v, g, beta = (x[:, ends[-1] :] for x in inputs)  # of the last sequence
        rates: Any = {"A_log": A_log, "dt_bias": dt_bias, "output_final_state": True}
        _, fresh = kda_attention(q, k, v, g, beta, **rates)
        assert fresh is not None
        H, K = q.shape[2:]
        passed = fresh.new_zeros(1, H, K, K)
        if len(ends) == 1 and self.begin < self.start:  # else what enters does not get through
            eye = torch.eye(K, dtype=compute_dtype(q), device=q.device).expand(1, H, K, K)
            nothing = q.new_zeros(*q.shape[:3], K)
            _, through = kda_attention(q, k, nothing, g, beta, initial_state=eye, **rates)
            assert through is not None
            passed = through
        maps = self.gather(torch.cat([passed, fresh], dim=-1))
        state, states = torch.zeros_like(fresh), []
        with no_autocast(q.device):
            for one in maps:  # every process composes all maps, so that backward passes match
                states.append(state)
                state = one[..., :K] @ state + one[..., K:]
        return torch.stack(states)[dist.get_rank(self.group)] * float(self.begin < self.start)


@dataclass
class ContextState(KDAState):
    """The state before a process' tokens, which the processes before it have; see `KDAState`."""

    shard: Any = None
    attention: Any = None
    layout: Any = None
    is_kept = False

    def entering(self, inputs: tuple[Tensor, ...]) -> Tensor:
        attention = self.attention
        return self.shard.entering_state(inputs, attention.A_log, attention.dt_bias, self.layout)


@dataclass(frozen=True)
class ContextSequences(TokenSequences):
    """Sequences that the processes of a group have places of; see `TokenSequences`."""

    group: Any

    def total(self, x: Tensor) -> Tensor:
        return _Total.apply(x, self.group)


@dataclass(frozen=True)
class ContextPlan(ForwardPlan):
    """The plan of a call whose tokens other processes read too.

    Attributes:
        shard: This process' part.
    """

    shard: Any = None

    def read_kda(self, attention: Any, hidden_states: Tensor) -> Tensor:
        """The own tokens [1, t, D], from the states that the processes before have come to."""
        shard = self.shard
        before = shard.previous_tokens(hidden_states, attention.q_conv1d.weight.shape[2] - 1)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        conv = torch.stack([proj(before).transpose(1, 2) for proj in projections], dim=1)
        state = ContextState(conv, shard=shard, attention=attention, layout=self.layout)
        return attention.attend(hidden_states, self.layout, state)[0]

    def sequences(self, hidden_states: Tensor) -> TokenSequences:
        """The whole row's sequences at the own places."""
        shard = self.shard
        num_tokens = hidden_states.shape[1] * dist.get_world_size(shard.group)
        row = token_sequences(shard.whole, 1, num_tokens, like=hidden_states)
        number, weight = row.number_N[shard.own], row.weight_N[shard.own]
        return ContextSequences(number, weight, row.lengths_S, shard.group)

    def visible(self, latent: Tensor) -> Tensor:
        """[1, n + t, R]: the own latents [1, t, R] behind the n of their first sequence that other
        processes have."""
        shard = self.shard
        return shard.gather(latent).flatten(0, 2)[None, shard.begin : shard.stop]

    @property
    def ends(self) -> list[int]:
        """Where the own packed sequences end, from 0 on."""
        shard = self.shard
        return [0, shard.stop - shard.start] if self.layout.cu_seqlens is None else self.layout.ends


class ContextPlanner(Planner):
    """Plans calls with one row whose tokens the processes of `group` divide.

    Args:
        config: The model's.
        group: The process group.
    """

    has_all_tokens = False

    def __init__(self, config: Any, group: Any) -> None:
        self.config, self.group = config, group

    def own(self, source: Tensor) -> Tensor:
        """This process' part of the row [1, T, ...]."""
        (batch_size, num_tokens), world = source.shape[:2], dist.get_world_size(self.group)
        least = self.config.linear_attn_config["short_conv_kernel_size"] - 1
        _check(batch_size == 1, f"the batch size is {batch_size}", "1: pack sequences into one row")
        _check(
            num_tokens % world == 0 and num_tokens // world >= least,
            f"the row has {num_tokens} tokens",
            f"a multiple of {world} processes with at least {least} tokens for each: add a "
            "sequence whose labels are -100",
        )
        return source[:, own_tokens(num_tokens, self.group)]

    def own_labels(
        self, labels: Tensor, loss_kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Of a row's labels [1, T], those of this process' tokens, whose losses add up to the
        row's."""
        ignored, shifted = loss_kwargs.get("ignore_index", -100), loss_kwargs.get("shift_labels")
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignored)[:, 1:]
        count = loss_kwargs.get("num_items_in_batch")
        if count is None:
            count = (shifted != ignored).sum()
        own = own_tokens(labels.shape[1], self.group)
        changed = {"shift_labels": shifted[:, own], "num_items_in_batch": count}
        return labels[:, own], {**loss_kwargs, **changed}

    def total(self, x: Tensor) -> Tensor:
        return _Total.apply(x, self.group)

    def plan(
        self,
        model: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        **boundaries: Tensor | None,
    ) -> ForwardPlan:
        num_tokens = hidden_states.shape[1] * dist.get_world_size(self.group)
        if attention_mask is not None:
            check_attention_mask(attention_mask, 1, num_tokens)
        has_padding = unless_all_real(attention_mask) is not None
        _check(not has_padding, "attention_mask has zeros", "all ones: pack sequences")
        has_cache = cache is not None or bool(use_cache)
        _check(not has_cache, "cache or use_cache is given", "left out")
        backend = attention_backend(self.config)
        _check(backend == "sdpa", f"attn_implementation={backend!r}", "'sdpa'")
        whole = sequence_layout(1, num_tokens, **boundaries, device=hidden_states.device)
        shard, layout = shard_layout(whole, num_tokens, self.group)
        pieces = KDAPieces((Piece(0, hidden_states.shape[1], layout),))
        return ContextPlan(layout, None, "sequences", pieces, shard=shard)


def _check(is_right: bool, what: str, allowed: str) -> None:
    if not is_right:
        raise ValueError(
            f"{what}, which is not allowed in context parallelism: it must be {allowed}"
        )


def shard_layout(
    whole: SequenceLayout, num_tokens: int, group: Any
) -> tuple[ContextShard, SequenceLayout]:
    """This process' part of a row of `num_tokens` without padding, and its layout."""
    own = own_tokens(num_tokens, group)
    start, stop = own.start, own.stop
    if whole.cu_seqlens is None:
        return ContextShard(group, start, stop, 0, whole), SequenceLayout()
    begin = max(end for end in whole.ends[:-1] if end <= start)
    shard = ContextShard(group, start, stop, begin, whole)
    cuts = [end - start for end in whole.ends if start < end < stop]
    if not cuts:
        return shard, SequenceLayout()
    device = whole.cu_seqlens.device
    cu_seqlens = torch.tensor([0, *cuts, stop - start], dtype=torch.int32, device=device)
    numbers = torch.arange(len(cuts) + 1, device=device)
    layout = SequenceLayout(
        cu_seqlens=cu_seqlens,
        row_first=numbers[:1],
        row_last=numbers[-1:],
        sequence_ids=numbers.repeat_interleave(cu_seqlens.diff().long())[None],
        num_places=stop - start,
    )
    return shard, layout


def own_tokens(num_tokens: int, group: Any) -> slice:
    """This process' part of a row."""
    size = num_tokens // dist.get_world_size(group)
    start = size * dist.get_rank(group)
    return slice(start, start + size)
