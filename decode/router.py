"""How a decode step scores experts, and chooses a row's.

Shapes: B rows, D hidden size, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.decode.router_kernels import route_kernel, score_kernel
from kimi_linear.ops.runtime import ceil_div, power_of_two

# where experts of few rows are chosen: "launch", one of its own, or "last", the last program that
# makes scores
CHOICE = "last"
# rows up to which a packed step's scores come with the norm before them; 0: none
NORM_ROWS = 4
# programs that share the scores, and their warps: of normed rows or plain weights, and of sums of
# parts that each program norms for itself
SCORE_PROGRAMS, SCORE_WARPS = 128, 8
NORM_PROGRAMS, NORM_WARPS = 128, 8


class Router:
    """The choice of experts, and the buffers that all layers share.

    Args:
        config: The model's.
        num_rows: B.
        options: For all launches, see `linked`.

    Attributes:
        logits: float32 [B, E].
        experts: int32 [B, top], chosen, and their `weights`, float32.
    """

    def __init__(self, config: Any, num_rows: int, options: Any, device: torch.device) -> None:
        self.num_rows, self.options = num_rows, options
        self.scaling = config.routed_scaling_factor
        E, top = config.num_experts, config.num_experts_per_token
        is_sigmoid = config.moe_router_activation_func == "sigmoid"
        renormalizes = bool(config.moe_renormalize) and top > 1
        self.form = E, top, power_of_two(E), power_of_two(top), is_sigmoid, renormalizes
        self.logits = torch.empty(num_rows, E, dtype=torch.float32, device=device)
        self.experts = torch.empty(num_rows, top, dtype=torch.int32, device=device)
        self.weights = torch.empty(num_rows, top, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def choose(self, gate: Any) -> None:
        """The experts of each row, by `logits` and the bias of the layer's gate."""
        route_kernel[(self.num_rows,)](
            self.logits,
            gate.e_score_correction_bias,
            self.experts,
            self.weights,
            self.scaling,
            ROUTER=self.form,
            num_warps=1,
            **self.options,
        )

    def score(
        self,
        gate: Any,
        hidden: Tensor,
        norm: Any | None = None,
        parts: Tensor | None = None,
        written: tuple[Tensor, ...] = (),
        places: int = 0,
    ) -> None:
        """Score norm(hidden [B, D] + sum of parts [B, parts, D]) by a layer's gate, and choose.

        Args:
            norm: None: hidden is normed.
            written: The sum, its norm, and the norm in fixed point, of `places`.
        """
        E, D = gate.weight.shape
        shared = NORM_PROGRAMS, NORM_WARPS
        if not places:
            shared = SCORE_PROGRAMS, SCORE_WARPS
        block = power_of_two(ceil_div(E, shared[0]))
        chooses = CHOICE == "last"
        score_kernel[((self.num_rows if places else 0) + ceil_div(E, block),)](
            hidden,
            hidden if parts is None else parts,
            hidden if norm is None else norm.weight,
            gate.weight,
            gate.e_score_correction_bias,
            self.logits,
            self.arrived,
            self.experts,
            self.weights,
            *(written or (hidden,) * 6),
            self.scaling,
            0.0 if norm is None else norm.eps,
            D=D,
            P=places,
            PLACES=power_of_two(D),
            PARTS=0 if parts is None else parts.shape[1],
            ROWS=self.num_rows,
            BLOCK=block,
            HAS_NORM=norm is not None,
            CHOOSES=chooses,
            ROUTER=self.form,
            num_warps=shared[1],
            **self.options,
        )
        if not chooses:
            self.choose(gate)
