"""Training of the router: what a forward pass notes about the choice of experts, the losses made of
it, and the correction bias that evens out the experts' loads.

Sources: sequence-wise balance loss and bias update of DeepSeek-V3 (arXiv 2412.19437, equations 17
to 20 and section 2.1.2; arXiv 2408.15664), router z-loss of ST-MoE (arXiv 2202.08906, equation 5).
All of them are off unless the configuration, or the caller, asks for them.

Layers run twice under gradient checkpointing; the backbone does not. So it is the backbone that
opens the notes, hands them to its layers, and closes them before a backward pass can begin.

Shapes: N = B * T places of a call, S sequences in them, E experts, k experts of one token, L layers
with experts.
"""

import math
import re
from typing import Any

import torch
import torch.distributed as dist
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.parallel.context import total_over
from torch import Tensor, nn

LAYER_NUMBER = re.compile(r"layers\.(\d+)\.")
# peft keeps the module that it trains a copy of under this name
UNUSED_MODULE = "original_module"


# ---- losses --------------------------------------------------------------------------------------


def place_losses(
    logits_NE: Tensor,
    num_chosen: int,
    *,
    sequence_N: Tensor,
    weight_N: Tensor,
    num_sequences: int,
    is_sigmoid: bool,
    group: Any = None,
) -> Tensor:
    """Balance loss (equations 17 to 20) and z-loss of one layer, each place's part of them: a
    sequence's are the sums over its places.

    Like there, the experts that count are the k with the best scores, without the correction bias
    and without groups.

    Args:
        logits_NE: The router's, float32 or float64.
        num_chosen: k.
        sequence_N: int64, the number of each place's sequence, S at padding.
        weight_N: 1 / tokens of its sequence, 0 at padding.
        num_sequences: S; empty ones may be among them.
        is_sigmoid: Whether scores are sigmoids; else they are a softmax.
        group: Processes that the sequences' tokens are divided among.

    Returns:
        [N, 2]. A sequence's balance loss is 1 where loads are even, E / k where all its tokens
        choose the same experts surely; its z-loss is its tokens' mean of (log sum exp)^2.
    """
    scores_NE = logits_NE.sigmoid() if is_sigmoid else logits_NE.softmax(dim=-1)
    chosen_Nk = scores_NE.topk(num_chosen, dim=-1, sorted=False).indices
    counts_SE = _count_by_sequence(chosen_Nk, sequence_N, num_sequences, logits_NE)
    if group is not None:
        dist.all_reduce(counts_SE, group=group)
    frequency_SE = logits_NE.shape[1] * counts_SE / counts_SE.sum(dim=1, keepdim=True).clamp(min=1)
    if is_sigmoid:  # a softmax' scores have the sum 1 already
        scores_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + 1e-20)
    balance_N = (frequency_SE[sequence_N] * scores_NE).sum(dim=-1)
    z_N = logits_NE.logsumexp(dim=-1).square()
    return weight_N.to(z_N.dtype)[:, None] * torch.stack([balance_N, z_N], dim=1)


def _count_by_sequence(
    chosen_Nk: Tensor, sequence_N: Tensor, num_sequences: int, like_NE: Tensor
) -> Tensor:
    """[S + 1, E]: how often a sequence's tokens, and last of all padding, choose each expert; whole
    numbers, so that their sum does not depend on its order."""
    num_experts = like_NE.shape[1]
    counts = like_NE.new_zeros((num_sequences + 1) * num_experts, dtype=torch.int64)
    places = (sequence_N[:, None] * num_experts + chosen_Nk).flatten()
    counts.scatter_add_(0, places, torch.ones_like(places))
    return counts.view(num_sequences + 1, num_experts).to(like_NE.dtype)


def add_router_losses(
    model: Any,
    loss: Tensor,
    by_place: tuple[Tensor, Tensor, Tensor] | None,
    counts: Tensor,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """`loss` and, in training, the router's losses times their coefficients in the configuration.

    They are the mean over the sequences, each with the weight of its labels. So the parts of a
    step's calls add up to those of one large call, as the parts of the labels' own loss do.

    Args:
        model: A model with a head; in eval mode nothing is added.
        loss: A scalar.
        by_place: The backbone's `router_losses_by_place`.
        counts: [B, T], how many labels of the loss each place has.
        num_items: What the loss of each of a step's calls is divided by, else None.
    """
    config, group = model.config, getattr(model.model, "context_group", None)
    coefficients = (config.router_aux_loss_coef, config.router_z_loss_coef)
    if by_place is None or not model.training or not any(coefficients):
        return loss
    losses_N2, sequence_N, lengths_S = by_place
    counts_N = counts.flatten().to(sequence_N.device, torch.int64)
    labels_S = counts_N.new_zeros(lengths_S.numel() + 1).index_add(0, sequence_N, counts_N)
    if group is not None:
        dist.all_reduce(labels_S, group=group)
    if num_items is None:
        num_items = labels_S[:-1].sum().clamp(min=1)  # padding's are the last
    elif isinstance(num_items, Tensor):
        num_items = num_items.to(losses_N2.device)
    losses_N = (losses_N2 * losses_N2.new_tensor(coefficients)).sum(dim=1)
    added = (losses_N * labels_S[sequence_N]).sum() / num_items
    return loss + added.to(loss.device, loss.dtype)


# ---- what a forward pass notes -------------------------------------------------------------------


class RouterNotes:
    """One forward pass' sequences, and what it counts of the experts chosen.

    Args:
        config: The model's.
        layout: Padding and packing.
        shape: B and T.
        like: Tensors are made on its device, for losses of its dtype or float32.
        loads: Where the counts go; None: nothing is counted.
        wants_losses: Whether the layers compute the router's losses.
    """

    def __init__(
        self,
        config: Any,
        layout: SequenceLayout,
        shape: tuple[int, int],
        like: Tensor,
        *,
        loads: "ExpertLoads | None",
        wants_losses: bool,
    ) -> None:
        self.config, self.wants_losses, self._loads = config, wants_losses, loads
        self._context = layout.context
        if layout.context is None:
            self.sequence_N, self.weight_N, self.lengths_S = token_sequences(layout, *shape, like)
        else:  # sequences and weights are the whole row's
            layout, own = layout.context.whole, layout.context.own
            places = shape[1] * dist.get_world_size(self._context.group)
            sequence, weight, self.lengths_S = token_sequences(layout, 1, places, like)
            self.sequence_N, self.weight_N = sequence[own], weight[own]
        self._counts: list[Tensor] | None = [] if loads is not None else None

    def count(self, experts_Nk: Tensor) -> None:
        """Count the choice of the next layer; when layers run again, nothing."""
        if self._counts is None:
            return
        counts = torch.zeros(self.config.num_experts, dtype=torch.int64, device=experts_Nk.device)
        is_real_N = (self.weight_N > 0).to(experts_Nk.device, torch.int64)
        is_real_Nk = is_real_N[:, None].expand_as(experts_Nk)
        self._counts.append(counts.scatter_add_(0, experts_Nk.flatten(), is_real_Nk.flatten()))

    def losses(self, logits_NE: Tensor) -> Tensor:
        """[N, 2]: each place's balance loss and z-loss of a layer; zeros if they are not wanted."""
        if not self.wants_losses:
            return logits_NE.new_zeros(logits_NE.shape[0], 2)
        weight_N, sequence_N = (x.to(logits_NE.device) for x in (self.weight_N, self.sequence_N))
        return place_losses(
            logits_NE,
            self.config.num_experts_per_token,
            sequence_N=sequence_N,
            weight_N=weight_N,
            num_sequences=self.lengths_S.numel(),
            is_sigmoid=self.config.moe_router_activation_func == "sigmoid",
            group=None if self._context is None else self._context.group,
        )

    def close(self, losses: list[Tensor]) -> dict[str, Any]:
        """Hand over what was counted; the outputs with the sum of the layers' losses, if they are
        wanted."""
        if self._loads is not None and self._counts is not None:
            self._loads.add(self._counts)
        self._counts = None
        if not self.wants_losses or not losses:
            return {}
        total_N2 = torch.stack([each.to(losses[0].device) for each in losses]).sum(dim=0)
        sequence_N, lengths_S = (x.to(total_N2.device) for x in (self.sequence_N, self.lengths_S))
        mean = total_N2.sum(dim=0) / (lengths_S > 0).sum().clamp(min=1)
        return {
            "router_losses": mean
            if self._context is None
            else total_over(mean, self._context.group),
            "router_losses_by_place": (total_N2, sequence_N, lengths_S),
        }


def take_notes(
    backbone: Any, layout: SequenceLayout, hidden_states: Tensor, output_router_logits: bool
) -> RouterNotes | None:
    """Notes for a forward pass of `hidden_states` [B, T, D], if anything is to be noted.

    Loads are counted in training only, with gradients on. Losses are computed there if they have a
    coefficient, and wherever router logits are asked for.
    """
    config, is_training = backbone.config, backbone.training and torch.is_grad_enabled()
    loads = backbone.expert_loads if is_training else None
    has_coefficient = config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0
    wants_losses = output_router_logits or (is_training and has_coefficient)
    if loads is None and not wants_losses:
        return None
    shape = (hidden_states.shape[0], hidden_states.shape[1])
    return RouterNotes(config, layout, shape, hidden_states, loads=loads, wants_losses=wants_losses)


def token_sequences(
    layout: SequenceLayout, batch_size: int, num_tokens: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each place the number of its sequence [N], int64, S at padding, and its weight in a mean
    over that sequence [N], of float32 or wider, 0 at padding; of each sequence its tokens [S]."""
    places, device = batch_size * num_tokens, like.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    if layout.cu_seqlens is None:
        rows = torch.arange(batch_size, device=device)
        real = layout.unpack(
            torch.ones(batch_size, num_tokens, dtype=dtype, device=device), batch_size
        )
        lengths = real.sum(dim=1)
        sequence = torch.where(real > 0, rows[:, None], batch_size)
        weights = real / lengths.clamp(min=1)[:, None]
        return sequence.flatten(), weights.flatten(), lengths.long()
    lengths = layout.cu_seqlens.to(device).diff().long()
    index = layout.token_index
    index = torch.arange(places, device=device) if index is None else index.to(device)
    numbers = torch.arange(lengths.numel(), device=device)
    numbers = numbers.repeat_interleave(lengths, output_size=index.numel())
    sequence = torch.full((places,), lengths.numel(), device=device).index_copy(0, index, numbers)
    weights = torch.zeros(places, dtype=dtype, device=device)
    return sequence, weights.index_copy(0, index, 1 / lengths[numbers].to(dtype)), lengths


# ---- loads and the correction bias ---------------------------------------------------------------


class ExpertLoads:
    """Counts, in training, how many tokens each expert gets. Padding does not count, nor do forward
    passes in eval mode or without gradients, nor those that gradient checkpointing runs again.

    In a training loop:

        loads = ExpertLoads(model)
        for batches in steps:
            for batch in batches:
                model(**batch).loss.backward()
            optimizer.step()
            counts = loads.take()
            loads.update_biases(counts, rate=1e-3)
            print(load_statistics(counts, loads.layers))

    Args:
        model: A Kimi Linear model of any kind, also inside DDP, FSDP2 or peft. Counting begins.
        group: Process group over which counts are added up; None: all processes, if there are many.

    Attributes:
        layers: Numbers of the layers with experts, counted from 0.

    Raises:
        ValueError: If the model has no routed experts.
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        found = {
            name: module
            for name, module in model.named_modules()
            if hasattr(module, "e_score_correction_bias") and UNUSED_MODULE not in name
        }
        self._backbones: list[Any] = [
            each for each in model.modules() if hasattr(each, "expert_loads")
        ]
        if not found or not self._backbones:
            raise ValueError(
                f"model={type(model).__name__} is not allowed: it must be a Kimi Linear "
                "with experts"
            )
        self.routers: list[Any] = list(found.values())
        numbers = [LAYER_NUMBER.search(name) for name in found]
        self.layers = [i if m is None else int(m[1]) for i, m in enumerate(numbers)]
        self.group = group
        self._counts: list[Tensor] = []
        self._wide: list[Tensor | None] = [None] * len(self.routers)
        for backbone in self._backbones:
            backbone.expert_loads = self

    def stop(self) -> None:
        """Count no more."""
        for backbone in self._backbones:
            if backbone.expert_loads is self:
                backbone.expert_loads = None

    def add(self, counts: list[Tensor]) -> None:
        """Add a forward pass' counts, [E] of each layer."""
        assert len(counts) == len(self.routers)
        before = self._counts or [torch.zeros_like(each) for each in counts]
        self._counts = [a + b for a, b in zip(before, counts, strict=True)]

    def reset(self) -> None:
        """Forget what was counted."""
        self._counts = []

    def take(self) -> Tensor:
        """[L, E] int64, counts since the last call, summed over all processes; all have to call."""
        biases = [router.e_score_correction_bias for router in self.routers]
        device = biases[0].device
        counts = [each.to(device) for each in self._counts] or [
            torch.zeros(bias.shape, dtype=torch.int64, device=device) for bias in biases
        ]
        self.reset()
        total = torch.stack(counts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total, group=self.group)
        return total

    @torch.no_grad()
    def update_biases(self, counts_LE: Tensor, rate: float) -> None:
        """Raise the biases of experts with less than the mean load by `rate`, lower the others'.

        Args:
            counts_LE: Of a whole step, from `take`.
            rate: 1e-3 in DeepSeek-V3; 0 changes nothing.

        Raises:
            ValueError: If `rate` is not a finite number of at least 0.
        """
        check_rate("rate", rate)
        if rate == 0:
            return
        counts = counts_LE.double()
        signs = (counts.mean(dim=1, keepdim=True) - counts).sign()
        for i, router in enumerate(self.routers):
            bias = router.e_score_correction_bias
            wide = self._wide_bias(i, bias)
            wide += rate * signs[i].to(wide.device, wide.dtype)
            bias.copy_(wide)

    def _wide_bias(self, i: int, bias: Tensor) -> Tensor:
        """What the bias stands for in float32: in 16 bits, as the released checkpoints have it,
        steps would be lost to rounding. Begun anew where someone else has set the bias."""
        wide = self._wide[i]
        if wide is None or wide.device != bias.device or not torch.equal(wide.to(bias.dtype), bias):
            wide = self._wide[i] = bias.to(
                torch.promote_types(bias.dtype, torch.float32), copy=True
            )
        return wide


def load_statistics(counts_LE: Tensor, layers: list[int]) -> dict[str, float]:
    """How even the loads are: of each layer the largest over the mean load, and experts without a
    token; over the layers the largest and the sum. Empty if nothing was counted.

    Args:
        counts_LE: From `ExpertLoads.take`, or a sum of such.
        layers: `ExpertLoads.layers`.
    """
    largest = counts_LE.amax(dim=1).tolist()
    mean = counts_LE.double().mean(dim=1).tolist()
    dead = (counts_LE == 0).sum(dim=1).tolist()
    if not all(mean):
        return {}
    ratios = [top / average for top, average in zip(largest, mean, strict=True)]
    found: dict[str, float] = {"experts/max_load": max(ratios), "experts/dead": sum(dead)}
    for number, ratio, count in zip(layers, ratios, dead, strict=True):
        found[f"experts/layer_{number}/max_load"] = ratio
        found[f"experts/layer_{number}/dead"] = count
    return found


def check_rate(field: str, value: Any) -> None:
    """Raise ValueError unless it is a finite number of at least 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"{field}={value!r} is not allowed: it must be a finite number >= 0")


__all__ = [
    "ExpertLoads",
    "RouterNotes",
    "add_router_losses",
    "check_rate",
    "load_statistics",
    "place_losses",
    "take_notes",
]
