"""What a forward pass notes about the choice of experts, and the losses made of it.

Sources: sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), router
z-loss of ST-MoE (arXiv 2202.08906, equation 5). Both are off unless the configuration asks for
them.

Layers run twice under gradient checkpointing; the backbone does not. So it is the backbone that
opens the notes, hands them to its layers, and closes them before a backward pass can begin.

Shapes: N = B * T places of a call, S sequences in them, E experts, k experts of one token.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.inputs.sequences import TokenSequences
from kimi_linear.training.expert_loads import ExpertLoads


def take_notes(
    backbone: Any, plan: Any, hidden_states: Tensor, output_router_logits: bool
) -> "RouterNotes | None":
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
    return RouterNotes(config, plan.sequences(hidden_states), loads, wants_losses)


class RouterNotes:
    """What one forward pass counts of the experts chosen, and its losses.

    Args:
        config: The model's.
        sequences: Those of its places.
        loads: Where the counts go; None: nothing is counted.
        wants_losses: Whether the layers compute the router's losses.
    """

    def __init__(
        self, config: Any, sequences: TokenSequences, loads: ExpertLoads | None, wants_losses: bool
    ) -> None:
        self.config, self.sequences, self.wants_losses = config, sequences, wants_losses
        self._loads = loads
        self._counts: list[Tensor] | None = [] if loads is not None else None

    def count(self, experts_Nk: Tensor) -> None:
        """Count the choice of the next layer; when layers run again, nothing."""
        if self._counts is None:
            return
        counts = torch.zeros(self.config.num_experts, dtype=torch.int64, device=experts_Nk.device)
        is_real_N = (self.sequences.weight_N > 0).to(experts_Nk.device, torch.int64)
        is_real_Nk = is_real_N[:, None].expand_as(experts_Nk)
        self._counts.append(counts.scatter_add_(0, experts_Nk.flatten(), is_real_Nk.flatten()))

    def losses(self, logits_NE: Tensor) -> Tensor:
        """[N, 2]: each place's balance loss and z-loss of a layer; zeros if they are not wanted."""
        if not self.wants_losses:
            return logits_NE.new_zeros(logits_NE.shape[0], 2)
        return place_losses(
            logits_NE,
            self.config.num_experts_per_token,
            self.sequences.to(logits_NE.device),
            is_sigmoid=self.config.moe_router_activation_func == "sigmoid",
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
        sequences = self.sequences.to(total_N2.device)
        mean = total_N2.sum(dim=0) / (sequences.lengths_S > 0).sum().clamp(min=1)
        return {
            "router_losses": sequences.total(mean),
            "router_losses_by_place": (total_N2, sequences.number_N, sequences.lengths_S),
        }


def place_losses(
    logits_NE: Tensor, num_chosen: int, sequences: TokenSequences, *, is_sigmoid: bool
) -> Tensor:
    """Balance loss (equations 17 to 20) and z-loss of one layer, each place's part of them: a
    sequence's are the sums over its places.

    Like there, the experts that count are the k with the best scores, without the correction bias
    and without groups.

    Args:
        logits_NE: The router's, float32 or float64.
        num_chosen: k.
        sequences: Those of the places, on the same device.
        is_sigmoid: Whether scores are sigmoids; else they are a softmax.

    Returns:
        [N, 2]. A sequence's balance loss is 1 where loads are even, E / k where all its tokens
        choose the same experts surely; its z-loss is its tokens' mean of (log sum exp)^2.
    """
    scores_NE = logits_NE.sigmoid() if is_sigmoid else logits_NE.softmax(dim=-1)
    chosen_Nk = scores_NE.topk(num_chosen, dim=-1, sorted=False).indices
    counts_SE = sequences.total(_count_by_sequence(chosen_Nk, sequences, logits_NE))
    frequency_SE = logits_NE.shape[1] * counts_SE / counts_SE.sum(dim=1, keepdim=True).clamp(min=1)
    if is_sigmoid:  # a softmax' scores have the sum 1 already
        scores_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + 1e-20)
    balance_N = (frequency_SE[sequences.number_N] * scores_NE).sum(dim=-1)
    z_N = logits_NE.logsumexp(dim=-1).square()
    return sequences.weight_N.to(z_N.dtype)[:, None] * torch.stack([balance_N, z_N], dim=1)


def _count_by_sequence(chosen_Nk: Tensor, sequences: TokenSequences, like_NE: Tensor) -> Tensor:
    """[S + 1, E]: how often a sequence's tokens, and last of all padding, choose each expert; whole
    numbers, so that their sum does not depend on its order."""
    num_sequences, num_experts = sequences.lengths_S.numel(), like_NE.shape[1]
    counts = like_NE.new_zeros((num_sequences + 1) * num_experts, dtype=torch.int64)
    places = (sequences.number_N[:, None] * num_experts + chosen_Nk).flatten()
    counts.scatter_add_(0, places, torch.ones_like(places))
    return counts.view(num_sequences + 1, num_experts).to(like_NE.dtype)


def add_router_losses(
    model: Any,
    loss: Tensor,
    by_place: tuple[Tensor, Tensor, Tensor] | None,
    counts: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`loss` and, in training, the router's losses times their coefficients in the configuration.

    They are the mean over the sequences, each with the weight of its labels. So the parts of a
    step's calls add up to those of one large call, as the parts of the labels' own loss do.

    Args:
        model: A model with a head; in eval mode nothing is added.
        loss: A scalar.
        by_place: The backbone's `router_losses_by_place`.
        counts: [B, T], how many labels of the loss each place has.
        num_items_in_batch: What the loss is divided by: the labels of all calls of a step, as
            Trainer counts them. None: this call's labels.
    """
    config = model.config
    coefficients = (config.router_aux_loss_coef, config.router_z_loss_coef)
    if by_place is None or not model.training or not any(coefficients):
        return loss
    losses_N2, number_N, lengths_S = by_place
    counts_N = counts.flatten().to(number_N.device, torch.int64)
    labels_S = counts_N.new_zeros(lengths_S.numel() + 1).index_add(0, number_N, counts_N)
    labels_S = model.model.planner.total(labels_S)
    if num_items_in_batch is None:
        num_items_in_batch = labels_S[:-1].sum().clamp(min=1)  # the last entry counts padding
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses_N2.device)
    losses_N = (losses_N2 * losses_N2.new_tensor(coefficients)).sum(dim=1)
    added = (losses_N * labels_S[number_N]).sum() / num_items_in_batch
    return loss + added.to(loss.device, loss.dtype)
