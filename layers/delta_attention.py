"""Kimi Delta Attention, section 3 of arXiv 2510.26692.

Shapes: B batch, T tokens of this call, R real tokens of a packed call (B = 1), D hidden size,
H heads, K key size, V value size, W convolution width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from kimi_linear.cache.kda import KDALayerCache, States
from kimi_linear.cache.rollback import KDAPlan
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.layers.norm import KimiLinearGatedRMSNorm
from kimi_linear.ops.joint_training import project_kda, trains_jointly
from kimi_linear.ops.kda import CHUNK_SIZE, kda_attention
from kimi_linear.ops.runtime import has_kernels, is_exporting
from kimi_linear.ops.short_conv import convolution_state, short_convolution
from kimi_linear.ops.short_conv.kernels import convolve_three
from kimi_linear.upstream.arguments import LAYER_ARGUMENTS, check_arguments
from torch import Tensor, nn
from transformers.cache_utils import Cache

# Tokens of all rows that a KDA layer reads at once where no graph is recorded: its intermediates
# take 130 KB a token at the 48B model's sizes, and longer pieces are not faster.
PIECE_TOKENS = 16384


class KimiLinearShortConv(nn.Module):
    """Causal depthwise convolution over the last W tokens, followed by SiLU."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, width))

    def forward(
        self, x: Tensor, state: Tensor | None, output_state: bool, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor | None]:
        out, after = short_convolution(
            x,
            self.weight,
            initial_state=state,
            output_final_state=output_state and layout.order is None,
            cu_seqlens=layout.cu_seqlens,
        )
        if output_state and layout.order is not None:
            after = layout.last_inputs(x, state, self.weight.shape[2] - 1)
        return out, after

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class KimiLinearDeltaAttention(nn.Module):
    """Kimi Delta Attention: a delta rule whose state decays per key channel (equation 1)."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        linear = config.linear_attn_config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = linear["num_heads"], linear["head_dim"]
        hidden, inner, width = (
            config.hidden_size,
            self.num_heads * self.head_dim,
            linear["short_conv_kernel_size"],
        )
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.q_conv1d = KimiLinearShortConv(inner, width)
        self.k_conv1d = KimiLinearShortConv(inner, width)
        self.v_conv1d = KimiLinearShortConv(inner, width)
        self.A_log = nn.Parameter(torch.empty(1, 1, self.num_heads, 1, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.f_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.f_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.o_norm = KimiLinearGatedRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        layout: SequenceLayout,
        cache: Cache | None = None,
        kda_plan: KDAPlan | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        check_arguments(self, kwargs, LAYER_ARGUMENTS)
        if cache is None or kda_plan is None:
            return self._read(hidden_states, layout)[0], None
        past: KDALayerCache = cache.layers[self.layer_idx]
        x, states = past.start(hidden_states, kda_plan)
        own = past.writable_state(hidden_states.shape[0])
        *_, last = runs = kda_plan.runs
        outputs = []
        if len(runs) == 2 and all(r.start < r.stop and r.layout.is_plain for r in runs):
            out, states, anchor = self._read(x, last.layout, states, own, last.start)
            past.keep_anchor(anchor)
            outputs.append(out)
            runs = ()
        for run in runs:
            if run.start < run.stop:
                part, state_out = x[:, run.start : run.stop], None if run.makes_anchor else own
                out, states, _ = self._read(part, run.layout, states, state_out)
                outputs.append(out)
            if run.makes_anchor:
                past.keep_anchor(states)
        past.update(states, hidden_states, kda_plan, x[:, last.start : last.stop])
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return out[:, -hidden_states.shape[1] :], None

    def _read(
        self,
        x: Tensor,  # [B, T, D]
        layout: SequenceLayout,
        states: States | None = None,
        state_out: Tensor | None = None,
        cut: int = 0,
    ) -> tuple[Tensor, States, States]:
        """`_run`, for memory's sake in pieces of tokens where plain rows are long and no graph is
        recorded."""
        B, T = x.shape[:2]
        size = max(CHUNK_SIZE, PIECE_TOKENS // B // CHUNK_SIZE * CHUNK_SIZE)
        is_whole = is_exporting() or torch.is_grad_enabled()
        if is_whole or not layout.is_plain or size >= T:
            return self._run(x, layout, states, state_out, cut)
        out, states = torch.empty_like(x), states or (None, None)
        at_cut: States = (None, None)
        for start in range(0, T, size):
            stop = min(start + size, T)
            inside = cut - start if start < cut <= stop else 0
            piece_out, states, found = self._run(
                x[:, start:stop], layout, states, state_out if stop == T else None, inside
            )
            out[:, start:stop] = piece_out
            at_cut = found if inside else at_cut
        return out, states, at_cut

    def _run(
        self,
        hidden_states: Tensor,  # [B, T, D]
        layout: SequenceLayout,
        states: States | None = None,
        state_out: Tensor | None = None,
        cut: int = 0,
    ) -> tuple[Tensor, States, States]:
        """Output [B, T, D], the states after the last token, from those before the first one, and
        if `cut` is not 0 the states after so many tokens: of plain rows only.

        No states are made if `states` is None, which is not the same as a pair of None: that stands
        for the states of nothing.
        """
        conv_state, recurrent_state = states or (None, None)
        x = layout.pack(hidden_states)  # [1, R, D], or [B, T, D] where rows are plain sequences
        inputs, gate, conv_states, is_joint = self._inputs(
            x, layout, conv_state, states is not None, cut
        )
        if layout.context is not None:
            recurrent_state = layout.context.entering_state(
                inputs, self.A_log, self.dt_bias, layout
            )
        out, state, state_at_cut = self._attend(
            inputs,
            cut,
            initial_state=layout.initial_states(recurrent_state),
            output_final_state=states is not None,
            cu_seqlens=layout.cu_seqlens,
            state_out=state_out,
            is_normalised=is_joint,
        )
        del inputs
        gate = self._heads(self.g_b_proj(self.g_a_proj(x) if gate is None else gate))
        out = self.o_proj(self.o_norm(out, gate).flatten(-2))
        out = layout.unpack(out, hidden_states.shape[0])
        return out, (conv_states[0], layout.row_states(state)), (conv_states[1], state_at_cut)

    def _inputs(
        self, x: Tensor, layout: SequenceLayout, state: Tensor | None, output_state: bool, cut: int
    ) -> tuple[tuple[Tensor, ...], Tensor | None, list[Tensor | None], bool]:
        """`kda_attention`'s q, k, v, g, beta [.., .., H, ...]; the output gate's inner product, if
        it is made already; the convolutions' states as `_project` returns them; whether q and k are
        normalised."""
        gate: Tensor | None = None
        conv_states: list[Tensor | None] = [None, None]
        if not output_state and layout.context is None:
            linears, taps = self._readers()
            is_joint = trains_jointly(x, linears, *taps)
        else:
            is_joint = False
        if is_joint:
            *flat, decay, gate, beta = project_kda(x, linears, taps, layout, self.head_dim)
            qkv = [self._heads(each) for each in flat]
        else:
            if layout.context is not None:
                state = self._entering_inputs(x, layout)
            qkv, conv_states = self._project(x, layout, state, output_state, cut)
            decay, beta = self.f_a_proj(x), self.b_proj(x)
        gates = layout.silenced(self._heads(self.f_b_proj(decay)), beta)
        return (*qkv, *gates), gate, conv_states, is_joint

    def _attend(
        self, inputs: tuple[Tensor, ...], cut: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`kda_attention` and its state after the first `cut` tokens too, if there is a cut."""
        attend = functools.partial(kda_attention, A_log=self.A_log, dt_bias=self.dt_bias, **kwargs)
        if cut in (0, inputs[0].shape[1]):
            out, state = attend(*inputs)
            return out, state, state if cut else None
        before, at_cut = attend(*(x[:, :cut] for x in inputs), state_out=None)
        after, state = attend(*(x[:, cut:] for x in inputs), initial_state=at_cut)
        return torch.cat([before, after], dim=1), state, at_cut

    def _project(
        self, x: Tensor, layout: SequenceLayout, state: Tensor | None, output_state: bool, cut: int
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """q, k, v [.., .., H, K] after convolution and SiLU; its states [B, 3, H * K, W - 1] after
        all tokens and after `cut` tokens."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        inputs, weights = [proj(x) for proj in projections], [c.weight for c in convolutions]
        is_in_rows = layout.cu_seqlens is None and layout.order is None
        if is_in_rows and has_kernels(*inputs, *weights):
            outputs, after, at_cut = convolve_three(inputs, weights, state, cut)
            return [self._heads(out) for out in outputs], [after if output_state else None, at_cut]
        states = layout.initial_states(state)
        outputs, tails, tails_at_cut = [], [], []
        for i, (y, conv) in enumerate(zip(inputs, convolutions, strict=True)):
            initial = None if states is None else states[:, i]
            out, tail = conv(y, initial, output_state, layout)
            outputs.append(self._heads(out))
            tails.append(tail)
            if cut:
                width = conv.weight.shape[2]
                tails_at_cut.append(convolution_state(y[:, :cut], initial, width - 1))
        conv_state = layout.row_states(torch.stack(tails, dim=1)) if output_state else None
        return outputs, [conv_state, torch.stack(tails_at_cut, dim=1) if cut else None]

    def _readers(self) -> tuple[tuple[nn.Linear, ...], tuple[Tensor, ...]]:
        """What multiplies the layer's input, q, k and v first, and the taps of these three."""
        q, k, v = self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight
        linears = self.q_proj, self.k_proj, self.v_proj, self.f_a_proj, self.g_a_proj, self.b_proj
        return linears, (q, k, v)

    def _entering_inputs(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """[1, 3, H * K, W - 1]: the convolutions' inputs before those of this process' tokens."""
        count = self.q_conv1d.weight.shape[2] - 1
        before = layout.context.previous_tokens(x, count)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return torch.stack([proj(before).transpose(1, 2) for proj in projections], dim=1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # in tensor parallelism, some of the heads

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "linear_attn_config['num_heads']", self.num_heads, 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Casting the model to 16 bits moves the decay parameters but leaves them in float32."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor not in decay or moved.dtype not in (torch.float16, torch.bfloat16):
                return moved
            return tensor.to(moved.device, torch.float32)

        decay = _IdentitySet(self.A_log, self.dt_bias, self.A_log.grad, self.dt_bias.grad)
        return super()._apply(keep_wide, recurse)


class _IdentitySet:
    """Membership by identity: `in` on a list of tensors would compare values."""

    def __init__(self, *items: Any) -> None:
        self._ids = {id(item) for item in items if item is not None}

    def __contains__(self, item: Any) -> bool:
        return id(item) in self._ids
