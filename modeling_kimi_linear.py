"""Kimi Linear: three Kimi Delta Attention (KDA) layers to one MLA layer without positions, and
mixture of experts.

Source: arXiv 2510.26692; the released 48B-A3B checkpoints fix every parameter's name and shape.

Shapes: B batch, T tokens of this call, S tokens of cache and call, N sequences, D hidden size,
I expert width, E experts, k experts of one token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import TokenClassifierOutput

from kimi_linear.checkpoints.pretrained import KimiLinearPreTrainedModel
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.decode.graph import DecodeBackend, try_decode, try_prompt
from kimi_linear.generation.mixin import KimiLinearGenerationMixin
from kimi_linear.inputs.checks import check_backbone_arguments, one_source
from kimi_linear.inputs.layout import check_attention_mask
from kimi_linear.inputs.trees import read_trees
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention
from kimi_linear.layers.latent_attention import KimiLinearLatentAttention
from kimi_linear.layers.mlp import KimiLinearMLP
from kimi_linear.layers.moe import KimiLinearMoE, KimiLinearRouter
from kimi_linear.layers.norm import KimiLinearRMSNorm
from kimi_linear.layers.plan import ForwardPlan
from kimi_linear.layers.planner import Planner
from kimi_linear.outputs_kimi_linear import (
    KimiLinearCausalLMOutput,
    KimiLinearModelOutput,
    KimiLinearSequenceClassifierOutput,
    one_cache,
)
from kimi_linear.parallel.context import ContextPlanner
from kimi_linear.training.expert_loads import ExpertLoads
from kimi_linear.training.loss import (
    LossBackend,
    loss_and_logits,
    sequence_label_loss,
    token_label_loss,
)
from kimi_linear.training.router_losses import RouterNotes, take_notes
from kimi_linear.upstream.arguments import (
    CAUSAL_LM_ARGUMENTS,
    CLASSIFIER_ARGUMENTS,
    LENGTH_ARGUMENTS,
    OUTPUT_ARGUMENTS,
    check_arguments,
)
from kimi_linear.upstream.interfaces import (
    GradientCheckpointingLayer,
    OutputRecorder,
    can_return_tuple,
    capture_outputs,
)

# Arguments that a head passes on to its backbone.
PASSED_ON = {**OUTPUT_ARGUMENTS, **LENGTH_ARGUMENTS}


class KimiLinearDecoderLayer(GradientCheckpointingLayer):
    """Attention of either kind, then a dense MLP or experts, on pre-normed residual branches."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        is_kda = config.layer_types[layer_idx] == "linear_attention"
        attention = KimiLinearDeltaAttention if is_kda else KimiLinearLatentAttention
        self.self_attn = attention(config, layer_idx)
        self.is_moe = config.is_moe_layer(layer_idx)
        if self.is_moe:
            self.block_sparse_moe = KimiLinearMoE(config)
        else:
            self.mlp = KimiLinearMLP(config, config.intermediate_size)
        self.input_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        plan: ForwardPlan,
        router_notes: RouterNotes | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, T, D] to [B, T, D], and with `router_notes` the router's losses [B * T, 2]."""
        normed = self.input_layernorm(hidden_states)
        x = hidden_states + self.self_attn(normed, plan=plan, **kwargs)[0]
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(normed)
        if router_notes is None:
            return x + self.block_sparse_moe(normed)
        out, losses = self.block_sparse_moe(normed, notes=router_notes)
        return x + out, losses


class KimiLinearBackbone(KimiLinearPreTrainedModel):
    """The decoder without a head."""

    _can_record_outputs = {  # in the order of the fields
        "router_logits": OutputRecorder(KimiLinearRouter, index=0),
        "hidden_states": KimiLinearDecoderLayer,
        "attentions": OutputRecorder(KimiLinearLatentAttention, index=1),
    }

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            KimiLinearDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.expert_loads: ExpertLoads | None = None  # set by `ExpertLoads`
        self.planner = Planner()
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | list[Cache] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> KimiLinearModelOutput:
        """Run the decoder.

        Args:
            input_ids: [B, T] int64; either this or `inputs_embeds`.
            attention_mask: [B, S], non-zero at real tokens, cached ones included. Padding may stand
                anywhere. Or [B or 1, 1, T, T], what each token sees, if that is a tree: texts that
                share beginnings, see `inputs/trees.py`; `position_ids` say nothing then.
            position_ids: [B or 1, T]. There are no positional encodings; only restarts matter,
                which begin a new sequence within a row (packing).
            cache: A `KimiLinearCache`, or an empty `DynamicCache`; or a list of caches, one for
                each sequence of the one row that `cu_seq_lens_q` divides, see `layers/texts.py`.
            inputs_embeds: [B, T, D].
            use_cache: Whether to return a cache. None: as the configuration says, never in training
                and never for packed rows.
            cu_seq_lens_q: [N + 1] boundaries of packed sequences in the flattened [B * T].
            seq_idx: [B or 1, T] number of the sequence that each token belongs to.
            past_key_values: Older name of `cache`.
            **kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`,
                `return_dict`, and the lengths that collators of packed rows add.

        Returns:
            See `KimiLinearModelOutput`.

        Raises:
            TypeError: For an argument that is none of these.
            ValueError: If inputs contradict each other; the message names the argument.
        """
        check_backbone_arguments(self, kwargs, cu_seq_lens_q)
        cache = one_cache(cache, past_key_values)
        source = one_source(input_ids, inputs_embeds)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
            wanted = {"a cache": cache is not None or use_cache, **kwargs}
            wanted |= {"seq_idx": seq_idx is not None, "cu_seq_lens_q": cu_seq_lens_q is not None}
            return KimiLinearModelOutput(**read_trees(self, source, attention_mask, wanted))
        source = self.planner.own(source)
        hidden_states = self.embed_tokens(source) if inputs_embeds is None else source
        boundaries = {
            "position_ids": position_ids,
            "seq_idx": seq_idx,
            "cu_seq_lens": cu_seq_lens_q,
        }
        plan = self.planner.plan(
            self, hidden_states, attention_mask, cache, use_cache, **boundaries
        )
        hidden_states = plan.without_padding(hidden_states)
        kwargs = {name: x for name, x in kwargs.items() if name in OUTPUT_ARGUMENTS}
        wants_logits = kwargs.get("output_router_logits", self.config.output_router_logits)
        notes, losses = take_notes(self, plan, hidden_states, wants_logits), []
        # `assistant_early_exit` lowers the number while the model makes its own draft
        layers = list(self.layers)[: self.config.num_hidden_layers]
        plan.begin_call()
        for layer in layers:
            if notes is None or not getattr(layer, "is_moe", False):
                hidden_states = layer(hidden_states, plan=plan, **kwargs)
            else:
                hidden_states, found = layer(hidden_states, plan=plan, router_notes=notes, **kwargs)
                losses.append(found)
        plan.end_call(layers)
        hidden_states = self.norm(hidden_states)
        router_outputs = {} if notes is None else notes.close(losses)
        return KimiLinearModelOutput(
            last_hidden_state=hidden_states, cache=plan.cache, **router_outputs
        )

    def set_context_parallel(self, group: Any) -> None:
        """Divide the tokens of each call's one row among the processes of `group`; None turns it
        off. Every process is given the whole row, and returns the hidden states of its own tokens,
        an equal part in the order of the ranks. See `parallel/context.py`.
        """
        self.planner = Planner() if group is None else ContextPlanner(self.config, group)


class KimiLinearForCausalLM(KimiLinearPreTrainedModel, KimiLinearGenerationMixin):
    """Kimi Linear as a language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # "auto": a few tokens per row run as one recorded graph where they can, and so do prompts of
    # one row; "graph" raises where the former cannot; "eager" runs layer by layer. See
    # `decode/graph.py`.
    decode_backend: DecodeBackend = "auto"
    # "auto": the loss of training comes without logits where possible; they are made when something
    # reads them. "fused" raises where that is not possible; "logits": always from logits. See
    # `training/loss.py`.
    loss_backend: LossBackend = "auto"

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.model = KimiLinearBackbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_context_parallel(self, group: Any) -> None:
        """As the backbone's. Labels are the whole row's too, and the loss is; logits are those of
        the process' own tokens. The gradient is the mean of the processes' gradients.
        """
        self.model.set_context_parallel(group)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | list[Cache] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> KimiLinearCausalLMOutput:
        """Run the model; see `KimiLinearBackbone.forward` for the arguments not named here.

        Args:
            labels: [B, T] token ids, -100 where there is no loss. They are shifted here: each real
                token predicts the next one of its sequence, across padding, never across packing.
            use_cache: None: as the backbone decides, but never together with labels.
            logits_to_keep: Number of last tokens to compute logits for; 0 for all; or token
                indices.
            **kwargs: The backbone's and the loss function's: `num_items_in_batch`, `shift_labels`,
                `ignore_index`, and what a `loss_function` of your own names.

        Returns:
            See `KimiLinearCausalLMOutput`. Without labels, logits at padding are those of the row's
            last real token before it: the last column's say how each row goes on. In training with
            labels the logits are `DeferredLogits`, see `loss_backend`, and the loss contains the
            router's losses that have a coefficient.

        Raises:
            TypeError, ValueError: As the backbone.
        """
        check_arguments(self, kwargs, CAUSAL_LM_ARGUMENTS, for_loss=True)
        cache = one_cache(cache, past_key_values)
        if labels is not None and use_cache is None and cache is None:
            use_cache = False
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "cu_seq_lens_q": cu_seq_lens_q,
            "seq_idx": seq_idx,
        }
        others = {"labels": labels, "logits_to_keep": logits_to_keep, **kwargs}
        logits = try_decode(self, inputs, others)
        if logits is None:
            logits = try_prompt(self, inputs, others)
        if logits is not None:
            return KimiLinearCausalLMOutput(logits=logits, cache=cache)
        kwargs.pop("skip_logits", None)
        passed = {name: x for name, x in kwargs.items() if name in PASSED_ON}
        loss_kwargs = {name: x for name, x in kwargs.items() if name not in PASSED_ON}
        outputs = self.model(**inputs, **passed)
        loss, logits = loss_and_logits(self, outputs, inputs, labels, logits_to_keep, loss_kwargs)
        return KimiLinearCausalLMOutput(
            loss=loss,
            aux_loss=None if outputs.router_losses is None else outputs.router_losses[0],
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def _read_for_classifier(
    model: Any, kwargs: dict[str, Any], **inputs: Any
) -> tuple[KimiLinearModelOutput, Tensor | int | None]:
    """The backbone's outputs for a classifier's inputs, and the number of items that its loss is
    divided by, where Trainer counts them."""
    check_arguments(model, kwargs, CLASSIFIER_ARGUMENTS)
    passed = {name: x for name, x in kwargs.items() if name in PASSED_ON}
    return model.model(**inputs, **passed), kwargs.get("num_items_in_batch")


class KimiLinearForSequenceClassification(KimiLinearPreTrainedModel):
    """Kimi Linear with a label per sequence, read at its last token that is not padding."""

    _new_heads = ("score.",)

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = KimiLinearBackbone(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> KimiLinearSequenceClassifierOutput:
        """Run the model; see `KimiLinearBackbone.forward` for the arguments not named here.

        Args:
            attention_mask: [B, S]; the last token it calls real is read. Without it, the last token
                that is not `pad_token_id` is, or the last one where only embeddings are given.
            labels: [B] class numbers, or [B] or [B, num_labels] for regression and several labels.

        Returns:
            `loss`, `logits` [B, num_labels], and the backbone's outputs.
        """
        outputs, num_items_in_batch = _read_for_classifier(
            self,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx,
            past_key_values=past_key_values,
        )
        logits = self.score(outputs.last_hidden_state)
        real = attention_mask
        if real is not None:
            check_attention_mask(real, *logits.shape[:2])
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        columns = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
        if real is not None:
            columns = columns * (real[:, -logits.shape[1] :] != 0).to(logits.device)
        read = columns.amax(dim=1)
        rows = torch.arange(logits.shape[0], device=logits.device)
        return KimiLinearSequenceClassifierOutput(
            loss=sequence_label_loss(self, outputs, logits, read, labels, num_items_in_batch),
            logits=logits[rows, read],
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class KimiLinearForTokenClassification(KimiLinearPreTrainedModel):
    """Kimi Linear with a label per token."""

    _new_heads = ("score.",)

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = KimiLinearBackbone(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Run the model; see `KimiLinearBackbone.forward` for the arguments not named here.

        Args:
            labels: [B, T] class numbers, -100 where there is no loss.

        Returns:
            `loss`, `logits` [B, T, num_labels], `hidden_states` and `attentions` on request.
        """
        outputs, num_items_in_batch = _read_for_classifier(
            self,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx,
            past_key_values=past_key_values,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        return TokenClassifierOutput(
            loss=token_label_loss(self, outputs, logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


KimiLinearConfig.register_for_auto_class()
KimiLinearBackbone.register_for_auto_class("AutoModel")
KimiLinearForCausalLM.register_for_auto_class("AutoModelForCausalLM")
KimiLinearForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
KimiLinearForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
