"""Kimi Linear: three Kimi Delta Attention (KDA) layers to one MLA layer without positions, and
mixture of experts.

Source: arXiv 2510.26692; the released 48B-A3B checkpoints fix every parameter's name and shape.

Shapes: B batch, T tokens of this call, S tokens of cache and call, N sequences, D hidden size,
I expert width, E experts, k experts of one token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from kimi_linear.cache.hybrid import prepare_cache
from kimi_linear.cache.static import is_static_call, static_inputs, without_room
from kimi_linear.checkpoints.pretrained import KimiLinearPreTrainedModel
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.decode.graph import DecodeBackend, try_decode
from kimi_linear.generation.mixin import KimiLinearGenerationMixin
from kimi_linear.inputs.layout import (
    SequenceLayout,
    check_attention_mask,
    last_real_columns,
    sequence_layout,
)
from kimi_linear.inputs.plan import (
    check_columns,
    check_source,
    count_elsewhere,
    note_padding,
    plan_kda,
    unless_all_real,
)
from kimi_linear.inputs.trees import tree_texts
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention
from kimi_linear.layers.latent_attention import (
    KimiLinearLatentAttention,
    attends_by_sequence,
    is_flash_attention,
)
from kimi_linear.layers.mlp import KimiLinearMLP
from kimi_linear.layers.moe import KimiLinearMoE
from kimi_linear.layers.norm import KimiLinearRMSNorm
from kimi_linear.ops.cross_entropy import (
    DeferredLogits,
    LossBackend,
    causal_lm_loss,
    uses_fused_loss,
)
from kimi_linear.ops.runtime import is_exporting
from kimi_linear.outputs_kimi_linear import (
    KimiLinearCausalLMOutput,
    KimiLinearModelOutput,
    KimiLinearSequenceClassifierOutput,
    one_cache,
)
from kimi_linear.parallel.context import (
    check_context_call,
    own_labels,
    own_tokens,
    shard_layout,
    total_over,
)
from kimi_linear.training.router import ExpertLoads, RouterNotes, add_router_losses, take_notes
from kimi_linear.upstream import (
    BACKBONE_ARGUMENTS,
    CAUSAL_LM_ARGUMENTS,
    CLASSIFIER_ARGUMENTS,
    LENGTH_ARGUMENTS,
    OUTPUT_ARGUMENTS,
    GradientCheckpointingLayer,
    attention_backend,
    can_return_tuple,
    capture_outputs,
    check_arguments,
    create_causal_mask,
    packed_sequence_mask_function,
)
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of a head's further arguments, those that the backbone reads.
PASSED_ON = {**OUTPUT_ARGUMENTS, **LENGTH_ARGUMENTS}
# What gives sequences losses of the router.
LOSS_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef")
# Longest call without a past that goes to the "sdpa" backend when no graph is recorded.
BACKEND_TOKENS = 1024


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
        self, hidden_states: Tensor, router_notes: RouterNotes | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, T, D] to [B, T, D], and with `router_notes` the router's losses [B * T, 2]."""
        hidden_states = (
            hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        )
        x = self.post_attention_layernorm(hidden_states)
        if router_notes is not None:
            out, losses = self.block_sparse_moe(x, notes=router_notes)
            return hidden_states + out, losses
        return hidden_states + (self.block_sparse_moe if self.is_moe else self.mlp)(x)


class KimiLinearBackbone(KimiLinearPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            KimiLinearDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.expert_loads: ExpertLoads | None = None  # it sets itself here
        self.context_group: Any = None
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
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
                share beginnings, see `tree_mask.py`; `position_ids` say nothing then.
            position_ids: [B or 1, T]. There are no positional encodings; only restarts matter,
                which begin a new sequence within a row (packing).
            cache: A `KimiLinearCache`, or an empty `DynamicCache`.
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
        check_arguments(self, kwargs, BACKBONE_ARGUMENTS)
        lengths = [name for name in LENGTH_ARGUMENTS if name in kwargs]
        if lengths and cu_seq_lens_q is None:
            raise ValueError(
                f"{', '.join(lengths)} without cu_seq_lens_q is "
                "not allowed: cu_seq_lens_q says where packed sequences begin"
            )
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        source: Any = input_ids if inputs_embeds is None else inputs_embeds
        check_source(source, "input_ids" if inputs_embeds is None else "inputs_embeds")
        batch_size, num_tokens = source.shape[:2]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
            packing = {"seq_idx": seq_idx is not None, "cu_seq_lens_q": cu_seq_lens_q is not None}
            wanted = {"a cache": cache is not None or use_cache, **packing, **kwargs}
            return self._read_trees(source, attention_mask, wanted)
        if attention_mask is not None:
            check_attention_mask(attention_mask, batch_size, num_tokens)
        if torch.compiler.is_compiling() and is_static_call(cache):
            assert cache is not None
            x = self.embed_tokens(source) if inputs_embeds is None else source
            return self._run_layers(static_inputs(cache, attention_mask, x), kwargs)
        attention_mask = without_room(cache, attention_mask, num_tokens)
        mask = unless_all_real(attention_mask)
        if self.context_group is not None:
            shape, has_cache = (batch_size, num_tokens), cache is not None or use_cache
            check_context_call(self.config, self.context_group, shape, mask, bool(has_cache))
            source, use_cache = source[:, own_tokens(num_tokens, self.context_group)], False
        hidden_states = self.embed_tokens(source) if inputs_embeds is None else source
        layout = sequence_layout(
            batch_size,
            num_tokens,
            attention_mask=mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens_q,
            device=hidden_states.device,
        )
        if mask is not None and not layout.is_plain:  # 0 * NaN is NaN, in every product
            padding = mask[:, -num_tokens:, None].to(hidden_states.device) == 0
            hidden_states = hidden_states.masked_fill(padding, 0)
        if self.context_group is not None:
            layout = shard_layout(layout, num_tokens, self.context_group)
        cache = self._cache_for(layout, cache, use_cache, batch_size)
        past = 0 if cache is None else cache.layers[0].num_tokens
        check_columns(attention_mask, past, num_tokens)
        if cache is not None and is_static_call(cache):
            note_padding(cache, attention_mask, mask, past)
            return self._run_layers(static_inputs(cache, mask, hidden_states), kwargs)
        by_blocks = self._attends_by_blocks(layout, past, num_tokens)
        inputs = {
            "hidden_states": hidden_states,
            "layout": layout,
            "cache": cache,
            "attention_mask": None
            if by_blocks
            else self._causal_mask(hidden_states, mask, cache, layout),
            "real_tokens": None if mask is None else mask.to(hidden_states.device) != 0,
            "by_blocks": by_blocks,
            "kda_plan": plan_kda(hidden_states, mask, cache, layout),
        }
        if cache is not None:
            note_padding(cache, attention_mask, mask, past)
        del hidden_states  # the layers need its memory
        return self._run_layers(inputs, kwargs)

    def _read_trees(
        self, source: Tensor, attention_mask: Tensor, wanted: dict[str, Any]
    ) -> KimiLinearModelOutput:
        """A call with a mask of four dimensions, see `tree_mask.py`."""
        wanted = {**{name: getattr(self.config, name) for name in OUTPUT_ARGUMENTS}, **wanted}
        obstacles = [name for name, is_wanted in wanted.items() if is_wanted]
        obstacles += ["context parallelism"] * (self.context_group is not None)
        if self.training:
            obstacles += [name for name in LOSS_COEFFICIENTS if getattr(self.config, name)]
        if obstacles:
            raise ValueError(
                f"attention_mask has four dimensions, which is not allowed with {obstacles[0]}"
            )
        texts = tree_texts(attention_mask, *source.shape[:2])
        x = source if source.is_floating_point() else self.embed_tokens(source)
        out = self(inputs_embeds=texts.pack(x), use_cache=False, cu_seq_lens_q=texts.ends)
        return KimiLinearModelOutput(
            last_hidden_state=texts.unpack(out.last_hidden_state, source.shape[0]),
            router_losses=out.router_losses,
        )

    def _run_layers(self, inputs: dict[str, Any], kwargs: dict[str, Any]) -> KimiLinearModelOutput:
        """All layers, on the embeddings [B, T, D] and what else the call's plan says."""
        hidden_states, cache = inputs.pop("hidden_states"), inputs["cache"]
        kwargs = {name: x for name, x in kwargs.items() if name in OUTPUT_ARGUMENTS}
        wants_logits = kwargs.get("output_router_logits", self.config.output_router_logits)
        notes = take_notes(self, inputs["layout"], hidden_states, wants_logits)
        losses = []
        # `assistant_early_exit` lowers the number while the model makes its own draft
        layers = list(self.layers)[: self.config.num_hidden_layers]
        if cache is not None:
            cache.is_torn = True  # until all layers have counted the call's tokens
        for layer in layers:
            if notes is None or not getattr(layer, "is_moe", False):
                hidden_states = layer(hidden_states, **inputs, **kwargs)
            else:
                hidden_states, found = layer(hidden_states, router_notes=notes, **inputs, **kwargs)
                losses.append(found)
        count_elsewhere(layers, cache)
        if cache is not None:
            cache.is_torn = False
        return KimiLinearModelOutput(
            last_hidden_state=self.norm(hidden_states),
            cache=cache,
            **({} if notes is None else notes.close(losses)),
        )

    def _cache_for(
        self,
        layout: SequenceLayout,
        cache: Cache | None,
        use_cache: bool | None,
        batch_size: int,
    ) -> Cache | None:
        """The cache to read and write, or None."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "cache is not allowed under gradient checkpointing: it must be None"
                )
            if use_cache:
                logger.warning_once("use_cache=True has no effect under gradient checkpointing")
            return None
        if layout.is_packed:
            if use_cache or cache is not None:
                raise ValueError(
                    "packed sequences cannot be combined with a cache: pass use_cache=False and no "
                    "cache"
                )
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache and cache is None:
            return None
        # a given cache counts whatever use_cache says: the tokens it holds are part of the text
        cache = prepare_cache(cache, self.config)
        rows = next((layer.num_rows for layer in cache.layers if layer.num_rows is not None), None)
        if rows not in (None, batch_size):
            raise ValueError(
                f"cache holds {rows} rows, which is not allowed: it must be the input's "
                f"{batch_size}"
            )
        return cache

    def _attends_by_blocks(self, layout: SequenceLayout, past: int, num_tokens: int) -> bool:
        """Whether MLA layers attend to latents themselves, block by block, instead of handing
        expanded keys and values to the attention backend: with a cached past, always; else where
        "sdpa" would need memory that grows with the square of the context."""
        if past:
            return True
        if is_exporting():
            return False
        is_long = num_tokens > BACKEND_TOKENS and not layout.is_packed
        is_sdpa = attention_backend(self.config) == "sdpa"
        return is_long and is_sdpa and not torch.is_grad_enabled()

    def _causal_mask(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        layout: SequenceLayout,
    ) -> Any:
        """The mask that the attention backend of the MLA layers wants; None if it needs none."""
        if "full_attention" not in self.config.layer_types or layout.context is not None:
            return None
        if is_flash_attention(self.config) and cache is None and layout.order is None:
            return None  # the layout's boundaries say it all
        if attends_by_sequence(self.config, layout):
            return None
        inside = packed_sequence_mask_function(layout.sequence_ids) if layout.is_packed else None
        # the cache by its place: Transformers renamed it
        return create_causal_mask(
            self.config, hidden_states, attention_mask, cache, and_mask_function=inside
        )

    def set_context_parallel(self, group: Any) -> None:
        """Divide the tokens of each call's one row among the processes of `group`; None: not any
        more. Every process is given the whole row, and returns the hidden states of its own
        tokens, an equal part in the order of the ranks. See `context_parallel.py`.
        """
        self.context_group = group

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value


class KimiLinearForCausalLM(KimiLinearPreTrainedModel, KimiLinearGenerationMixin):
    """Kimi Linear as a language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # "auto": one token per row runs as one recorded graph where it can; "graph": or is an error;
    # "eager": it runs layer by layer. See `decode/graph.py`.
    decode_backend: DecodeBackend = "auto"
    # "auto": the loss of training is computed without the logits where it can be, which then are
    # made when something asks for them; "fused": or is an error; "logits": always from logits.
    # See `loss_kimi_linear.py`.
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
        cache: Cache | None = None,
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
            logits_to_keep: Logits of only the last so many tokens; 0 for all; or the token indices
                wanted.
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
        given = {
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "logits_to_keep": logits_to_keep,
            "cu_seq_lens_q": cu_seq_lens_q,
            "seq_idx": seq_idx,
            **kwargs,
        }
        logits = try_decode(self, input_ids, attention_mask, cache, given)
        if logits is not None:
            return KimiLinearCausalLMOutput(logits=logits, cache=cache)
        kwargs.pop("skip_logits", None)
        inner = {name: x for name, x in kwargs.items() if name in PASSED_ON}
        loss_kwargs = {name: x for name, x in kwargs.items() if name not in PASSED_ON}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx,
            **inner,
        )
        x, loss = outputs.last_hidden_state, None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is not None:
            keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
            if keeps_all and self.model.context_group is None:
                _check_labels(labels, x.shape[:2])
            labels, loss_kwargs = _shift_labels(
                labels,
                loss_kwargs,
                self.model.context_group,
                attention_mask=attention_mask,
                position_ids=position_ids,
                seq_idx=seq_idx,
                cu_seq_lens=cu_seq_lens_q,
            )
        is_fused = uses_fused_loss(self, x, labels, logits_to_keep)
        if is_fused:
            logits = DeferredLogits.of(self.lm_head, x)
        else:
            has_columns = attention_mask is not None and attention_mask.ndim == 2
            mask = attention_mask if has_columns and labels is None and x.shape[1] > 1 else None
            logits = self.lm_head(_kept_states(x, kept, unless_all_real(mask)))
        if labels is not None:
            if logits.shape[:2] != labels.shape:
                raise ValueError(
                    f"logits_to_keep={logits_to_keep!r} is not allowed with labels: it must be 0"
                )
            if is_fused:
                loss = causal_lm_loss(x, self.lm_head.weight, labels, **loss_kwargs)
            else:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs
                )
            ignored = loss_kwargs.get("ignore_index", -100)
            shifted = loss_kwargs.get("shift_labels")
            if shifted is None:
                shifted = F.pad(labels[:, 1:], (0, 1), value=ignored)
            loss = add_router_losses(
                self,
                loss,
                outputs.router_losses_by_place,
                shifted != ignored,
                loss_kwargs.get("num_items_in_batch"),
            )
            if self.model.context_group is not None:
                loss = total_over(loss, self.model.context_group)
        return KimiLinearCausalLMOutput(
            loss=loss,
            aux_loss=None if outputs.router_losses is None else outputs.router_losses[0],
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def _kept_states(x: Tensor, kept: slice | Tensor, mask: Tensor | None) -> Tensor:
    """Of the hidden states [B, T, D] those whose logits are wanted; at padding (`mask` [B, S]) that
    of the row's last real token before it, which says how the row goes on."""
    if mask is None:
        return x[:, kept, :]
    columns = last_real_columns(mask[:, -x.shape[1] :].to(x.device) != 0)[:, kept]
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _check_labels(labels: Tensor, needed: torch.Size) -> None:
    """ValueError unless there is a label for each token."""
    if labels.shape != needed:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, which is not allowed: it must be "
            f"[batch, tokens] = {list(needed)}"
        )


def _shift_labels(
    labels: Tensor, kwargs: dict[str, Any], group: Any, **boundaries: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Labels [B, T] and the loss' arguments: `shift_labels` too where rows are packed or padded; in
    context parallelism, both of the process' own tokens."""
    layout = sequence_layout(*labels.shape, **boundaries, device=labels.device)
    if not layout.is_plain:
        kwargs = {"shift_labels": _next_labels(labels, layout), **kwargs}
    return (labels, kwargs) if group is None else own_labels(labels, kwargs, group)


def _next_labels(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """[B, T]: at each real token the label of the next one of its sequence, -100 where none is."""
    if layout.order is not None:
        following = F.pad(layout.pack(labels)[:, 1:], (0, 1), value=-100)
        following = following.masked_fill(layout.is_behind(labels).roll(-1, 1), -100)
        return torch.full_like(labels, -100).scatter(1, layout.order, following)
    places = torch.arange(labels.numel(), device=labels.device)
    places = places if layout.token_index is None else layout.token_index
    following = F.pad(labels.flatten()[places], (0, 1), value=-100)[1:]
    assert layout.cu_seqlens is not None
    ends = layout.cu_seqlens[1:].long()
    following[ends[ends > 0] - 1] = -100
    return torch.full_like(labels, -100).flatten().index_copy(0, places, following).view_as(labels)


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
        outputs, num_items = _read_for_classifier(
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
        rows = torch.arange(logits.shape[0], device=logits.device)
        read = columns.amax(dim=1)
        pooled = logits[rows, read]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                pooled_logits=pooled,
                config=self.config,
                num_items_in_batch=num_items,
            )
            if num_items is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / num_items  # a mean, whatever Trainer counted
            counts = torch.zeros_like(columns, dtype=torch.int64)
            counts[rows, read] = (labels != -100).view(len(rows), -1).sum(1).to(logits.device)
            loss = add_router_losses(self, loss, outputs.router_losses_by_place, counts, num_items)
        return KimiLinearSequenceClassifierOutput(
            loss=loss,
            logits=pooled,
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
        outputs, num_items = _read_for_classifier(
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
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items)
            losses, counts = outputs.router_losses_by_place, labels != -100
            loss = add_router_losses(self, loss, losses, counts, num_items)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


KimiLinearConfig.register_for_auto_class()
KimiLinearBackbone.register_for_auto_class("AutoModel")
KimiLinearForCausalLM.register_for_auto_class("AutoModelForCausalLM")
KimiLinearForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
KimiLinearForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "KimiLinearBackbone",
    "KimiLinearForCausalLM",
    "KimiLinearForSequenceClassification",
    "KimiLinearForTokenClassification",
    "KimiLinearPreTrainedModel",
]
