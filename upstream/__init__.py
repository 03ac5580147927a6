"""Everything of Transformers that is not its documented interface, in one place.

Other modules of this package import from Transformers only what its documentation promises, and
what stands here. Each part says what it is for and since which release it is as it is used here;
all are good for every release from `TESTED[0]` to `TESTED[1]`. `tests/test_upstream.py` asks each
of them for what is relied on, so that a release that changes one is told by its name.

Undocumented methods that a model or a Trainer has to override are overridden by the classes
`PreTrainedModelHooks`, `GenerationHooks` and `CheckpointHooks`, which call methods with names of
our own.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from kimi_linear.outputs_kimi_linear import answering_both, one_cache
from torch import Tensor, nn
from transformers import initialization as init  # skips what a checkpoint has filled
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.integrations import is_deepspeed_zero3_enabled, use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.loss.loss_utils import ForCausalLMLoss  # the default `loss_function`
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# The oldest and the newest release that all tests have run on.
TESTED = ("5.17.0", "5.24.0")


def versions() -> str:
    """The installed and the tested versions, for messages."""
    return (
        f"Transformers {transformers.__version__} is installed, this package is tested with "
        f"{TESTED[0]} to {TESTED[1]}"
    )


# ---- arguments of a forward ----------------------------------------------------------------------

# What Transformers and its trainers hand to a forward beside the arguments that ours name, and who
# reads it or why it is dropped.
OUTPUT_ARGUMENTS = {
    "output_attentions": "capture_outputs",
    "output_hidden_states": "capture_outputs",
    "output_router_logits": "capture_outputs",
}
LENGTH_ARGUMENTS = {
    "cu_seq_lens_k": "dropped: DataCollatorWithFlattening's cu_seq_lens_q says it",
    "max_length_q": "dropped: DataCollatorWithFlattening's cu_seq_lens_q says it",
    "max_length_k": "dropped: DataCollatorWithFlattening's cu_seq_lens_q says it",
}
BACKBONE_ARGUMENTS = {
    **OUTPUT_ARGUMENTS,
    **LENGTH_ARGUMENTS,
    "logits_to_keep": "dropped: TRL's DistillationTrainer takes it from the head's signature",
    "num_items_in_batch": "dropped: Trainer's compute_loss_func divides by it",
}
# What the backbone hands to all layers beside hidden states and plan.
LAYER_ARGUMENTS = OUTPUT_ARGUMENTS
SHARED_ARGUMENTS = {
    **OUTPUT_ARGUMENTS,
    **LENGTH_ARGUMENTS,
    "num_items_in_batch": "the loss: of Trainer, with gradient accumulation",
    "skip_logits": "dropped: Trainer's evaluation asks Liger's kernels for it",
}
CAUSAL_LM_ARGUMENTS = {
    **SHARED_ARGUMENTS,
    "shift_labels": "the loss: of Trainer and accelerate, under sequence parallelism",
    "ignore_index": "the loss",
}
CLASSIFIER_ARGUMENTS = {
    **SHARED_ARGUMENTS,
    "margin": "dropped: TRL's RewardTrainer reads it itself",
}
# What a loss function is given by the model itself.
LOSS_INPUTS = {"logits", "labels", "vocab_size", "pooled_logits", "config"}


def loss_arguments(function: Callable[..., Any], given: dict[str, Any]) -> set[str]:
    """Those of the given names that a loss function reads."""
    parameters = inspect.signature(function).parameters.values()
    if function is not ForCausalLMLoss and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return set(given)
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - LOSS_INPUTS


def check_arguments(
    model: Any, given: dict[str, Any], known: dict[str, str], *, for_loss: bool = False
) -> None:
    """TypeError if a forward was given arguments that it does not know.

    Args:
        model: The module whose forward it is.
        given: What arrived in its `**kwargs`. Pipeline parallelism (5.17) binds the outer call's
            arguments and hands its `**kwargs` over under that name, `return_dict` included, which
            the outer call sees to: they are put where they belong.
        known: Names that are allowed there.
        for_loss: Whether those of the model's loss function are allowed too.
    """
    if "kwargs" in given:
        given.update(given.pop("kwargs"))
        given.pop("return_dict", None)
    unknown = given.keys() - known.keys()
    if unknown and for_loss:
        unknown -= loss_arguments(model.loss_function, given)
    if unknown:
        names = [*list(inspect.signature(type(model).forward).parameters)[1:-1], *known]
        names += ["return_dict"] if isinstance(model, PreTrainedModel) else []
        raise TypeError(
            f"{type(model).__name__}.forward() does not know {', '.join(sorted(unknown))}: its "
            f"arguments are {', '.join(names)} ({versions()})"
        )


# ---- models --------------------------------------------------------------------------------------


def attention_backend(config: Any) -> str:
    """What `attn_implementation` chose; "" before a model was made. `config` has no public name."""
    return config._attn_implementation or ""


def has_own_adapters(model: Any) -> bool:
    """Whether Transformers' integration of PEFT (`model.load_adapter`) has put adapters in."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_quantized(model: Any) -> bool:
    """Whether `from_pretrained` quantised the model."""
    return getattr(model, "hf_quantizer", None) is not None


def is_divided(model: Any) -> bool:
    """Whether `from_pretrained` divided the weights among processes."""
    return getattr(model, "_device_mesh", None) is not None


def mark_initialized(parameter: Tensor) -> None:
    """Keep `from_pretrained` from filling a parameter with random numbers."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def save_by_registered_names(model: Any) -> None:
    """Forget the layout that was loaded, which `save_pretrained` would repeat, official or not; it
    goes by the registered conversion then."""
    model._weight_conversions = None


def put_layers(cache: Cache, layers: list[Any]) -> None:
    """Replace the layers of an empty `DynamicCache`, and keep it from adding some of its own."""
    cache.layers = layers
    cache.layer_class_to_replicate = None


def holds_tokens(cache: Cache) -> bool:
    """Whether a cache of Transformers has been written to."""

    def has_state(layer: Any) -> bool:  # of linear attention; 5.24: one for each of its states
        flags = getattr(layer, "has_previous_state", False)
        return any(flags.values()) if isinstance(flags, dict) else bool(flags)

    layers = getattr(cache, "layers", [])
    return any(getattr(each, "is_initialized", False) or has_state(each) for each in layers)


def is_offloading(cache: Cache) -> bool:
    """Whether a `DynamicCache` was made with `offloading=True`."""
    return bool(getattr(cache, "offloading", False))


@dataclass(frozen=True)
class Loading:
    """What `from_pretrained` is about to read into a model.

    Attributes:
        state_dict: Tensors by name, if the caller has them already.
        files: Paths of the checkpoint's files.
        is_adapter: Whether they are an adapter's.
        is_plain: Whether neither a quantiser nor ZeRO-3 reads them.
        is_divided: Whether each process takes its part of the tensors.
        ignores_shapes: `ignore_mismatched_sizes`.
        is_reported: `output_loading_info`: the caller is told what is missing.
        quantization: The configuration by which weights are quantised; None: not at all.
        is_quantized_file: Whether the files' weights are quantised already.
        read: Reads: takes a state dict (None: from the files) and further renamings.
    """

    state_dict: dict[str, Any] | None
    files: list[str]
    is_adapter: bool
    is_plain: bool
    is_divided: bool
    ignores_shapes: bool
    is_reported: bool
    quantization: Any
    is_quantized_file: bool
    read: Callable[[dict[str, Any] | None, list[Any]], Any]


# `from_pretrained(output_loading_info=...)`, which it does not hand on.
_is_reported: ContextVar[bool] = ContextVar("kimi_linear_is_reported", default=False)


class PreTrainedModelHooks(PreTrainedModel):
    """A model's undocumented methods; all have been there since 5.17."""

    _tp_plan: dict[str, str]
    _ep_plan: dict[str, str]

    # Transformers names the experts' implementations only to classes whose module has the
    # decorator's text in it; ours has it in another module.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    @functools.wraps(PreTrainedModel.from_pretrained.__func__)
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        token = _is_reported.set(bool(kwargs.get("output_loading_info")))
        try:
            return super().from_pretrained(*args, **kwargs)
        finally:
            _is_reported.reset(token)

    # The only place between a model on the meta device and its weights.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        def read(state: dict[str, Any] | None, renamings: list[Any]) -> Any:
            mapping = [*(load_config.weight_mapping or []), *renamings]
            return PreTrainedModel._load_pretrained_model(
                model,
                state,
                checkpoint_files,
                replace(load_config, weight_mapping=mapping),
                *args,
                **kwargs,
            )

        return model.read_checkpoint(
            Loading(
                state_dict=state_dict,
                files=[str(file) for file in checkpoint_files or []],
                is_adapter=has_own_adapters(model),
                is_plain=not load_config.is_quantized and not is_deepspeed_zero3_enabled(),
                is_divided=load_config.device_mesh is not None,
                ignores_shapes=load_config.ignore_mismatched_sizes,
                is_reported=_is_reported.get(),
                quantization=getattr(load_config.hf_quantizer, "quantization_config", None),
                is_quantized_file=getattr(load_config.hf_quantizer, "pre_quantized", False),
                read=read,
            )
        )

    def read_checkpoint(self, loading: Loading) -> Any:
        """Read a checkpoint; the model's class may do it in its own way."""
        return loading.read(loading.state_dict, [])

    # With accelerate's offloading a parameter is on "meta", and drafts would be put there.
    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        found = super().device
        if found.type != "meta":
            return found
        hooks = [getattr(module, "_hf_hook", None) for module in self.modules()]
        places = [getattr(hook, "execution_device", None) for hook in hooks]
        return next((torch.device(place) for place in places if place is not None), found)

    # Transformers warns of rules for modules that this configuration has not. 5.17 has other names
    # for the styles of expert parallelism.
    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        names = {name for name, _ in chain(self.named_modules(), self.named_parameters())}
        known = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in known}
        if "ep_router" in ALL_PARALLEL_STYLES:
            for name, style in list(self._ep_plan.items()):
                if style == "ep_dispatch_experts":
                    self._ep_plan[name] = "moe_tp_experts"
                    self._ep_plan[name.removesuffix("experts") + "gate"] = "ep_router"

    # The only place before a model is divided. HSDP (5.23) makes FSDP's groups with one shard too.
    @classmethod
    def maybe_distribute_model(
        cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        sizes = {
            name: getattr(distributed_config, name, None) or 1
            for name in ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size")
        }
        divides = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        if divides and getattr(model, "is_quantized", False):
            raise ValueError(
                f"{', '.join(divides)} is not allowed with quantization_config: quantised weights "
                "cannot be divided, it must be 1; pp_size divides layers"
            )
        has_groups = sizes["fsdp_size"] * sizes["dp_replicate_size"] > 1
        with model.prepared_for_fsdp() if has_groups else nullcontext():
            return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def prepared_for_fsdp(self) -> AbstractContextManager[None]:
        """Within, FSDP makes its groups, of parameters of one dtype; the model's class may help."""
        return nullcontext()

    # `save_pretrained` gathers here what several processes have together. Tied weights come out as
    # two tensors, which safetensors would write twice.
    def gather_sharded_state_dict_for_save(
        self, model_to_save: nn.Module, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        state = self.joined_state(state_dict)
        state = super().gather_sharded_state_dict_for_save(model_to_save, state, *args, **kwargs)
        tied = {} if self._device_mesh is None else self.all_tied_weights_keys
        return {name: x for name, x in state.items() if name not in tied}

    def joined_state(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put together what Transformers cannot; the model's class says what that is."""
        return state_dict


# ---- generate() ----------------------------------------------------------------------------------

# What the loop calls the cache that it hands from step to step: renamed by 5.24.
CACHE_NAME = (
    "past_key_values"
    if "past_key_values"
    in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "cache"
)


class LoopWatch:
    """Follows one `generate()` from step to step: each has to read all of the text that its cache
    has not, no more and no less, and to go on with the same cache; in beam search, with its rows
    in the beams' order.

    A loop that renames what it hands on would lose the cache without a word, and each step would
    be a text of one token.

    Args:
        model: Whose `generate()` it is.
        is_own_loop: Whether the loop is one that the caller has brought along, which may go on with
            any cache that has read its text.
    """

    def __init__(self, model: Any = None, is_own_loop: bool = False) -> None:
        self.model, self.is_own_loop = model, is_own_loop
        self.cache: Any = None
        self.steps = self.total = self.width = self.reorders = 0
        self.has_beams = self.has_drafts = False
        self.offset: int | None = None  # tokens of the text that its ids do not show
        self.drafted_from: int | None = None  # the text's tokens, where drafts begin behind it

    def step(self, cache: Any, width: int, new: int, *, uses_cache: bool) -> None:
        """Check what one step is about to read.

        Args:
            cache: What it was handed, or None.
            width: Columns of the ids that the loop has: the text's, or a piece of the prompt's.
            new: Tokens that the step reads.
            uses_cache: Whether the loop keeps a cache.

        Raises:
            RuntimeError: If the step would read the wrong tokens.
        """
        past = 0 if cache is None else cache.get_seq_length()
        is_piece = self.steps > 0 and new == width <= self.width
        if self.steps:
            if cache is None and uses_cache:
                self._refuse("without the cache that the first one returned")
            if self.is_own_loop:
                return
            if self.cache is not None and cache is not self.cache:
                self._refuse("with another cache than the first one")
            known = self.offset is not None and not is_piece
            expected = width + (self.offset or 0) - new if known else self.total
            # PEFT's prompt tuning puts tokens of its own before the prompt, unseen by the loop
            has_prefix = self.steps == 1 and past > expected and new == width - self.width
            # a process whose rows have ended repeats its last step while others go on
            repeats = width == self.width and not is_piece
            if past != expected and not has_prefix and not repeats:
                self._refuse(f"with {past} tokens in its cache, where {expected} come before it")
        reorders = getattr(cache, "num_reorders", 0)
        if self.has_beams and self.cache is not None and not is_piece:
            if reorders == self.reorders:
                self._refuse("with the rows of its cache in the order of the step before")
        self.reorders = reorders
        # pieces of a prompt do not say how the loop counts
        self.offset = None if is_piece else past + new - width
        self.cache, self.total, self.width = cache, past + new, width
        self.steps += 1

    def _refuse(self, how: str) -> None:
        raise RuntimeError(
            f"generate() made step {self.steps + 1} {how}: its text would be wrong. {versions()}. "
            "Another version, or use_cache=False, helps"
        )


_watch: ContextVar[LoopWatch | None] = ContextVar("kimi_linear_loop_watch", default=None)


@contextmanager
def _watching(watch: LoopWatch) -> Iterator[None]:
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


# What the loop hands to each step though no forward reads it: `generate(stop_strings=...)`.
LOOP_ARGUMENTS = ("tokenizer", "assistant_tokenizer")


# The arguments of `generate()` that can hold the prompt.
PROMPTS = ("inputs", "input_ids", "inputs_embeds")


class GenerationHooks(GenerationMixin):
    """`generate()` under both names of the cache, watched, with methods of our own for what it
    does inside."""

    @functools.wraps(GenerationMixin.generate)
    def generate(
        self, *args: Any, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        cache = one_cache(cache, past_key_values)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        given = {"inputs": args[0] if args else None, **kwargs}
        # 5.17: assisted decoding marks the settings of its drafts
        is_draft = bool(getattr(kwargs.get("generation_config"), "is_assistant", False))
        prompts = {name: given.get(name) for name in PROMPTS}
        self.check_prompt(prompts, given.get("attention_mask"), is_draft=is_draft)
        watch = LoopWatch(self, callable(kwargs.get("custom_generate")))
        try:
            with _watching(watch):
                return answering_both(super().generate(*args, **kwargs))
        except BaseException:
            if watch.has_drafts and watch.steps and hasattr(cache, "is_torn"):
                cache.is_torn = True  # drafted tokens are in it that nobody has accepted
            raise

    # 5.17: the only place where a model can give the loop a cache of its own.
    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        self.check_generation(generation_config, model_kwargs)
        watch = _watch.get()
        if watch is not None:
            watch.has_beams = "beam" in generation_mode
            watch.has_drafts = "assisted" in generation_mode
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache:
            longest = max(max_cache_length, getattr(generation_config, "max_cache_len", 0) or 0)
            model_kwargs[CACHE_NAME] = self.new_cache(
                generation_config.cache_implementation,
                longest,
                is_returned=generation_config.return_dict_in_generate,
                is_draft=generation_config.is_assistant,
                is_compiled=generation_config.compile_config is not None,
            )
            return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def step_inputs(self, input_ids: Tensor, cache: Any, **kwargs: Any) -> dict[str, Any]:
        """Transformers' `prepare_inputs_for_generation`, which names the cache by its version."""
        return super().prepare_inputs_for_generation(input_ids, **{CACHE_NAME: cache}, **kwargs)

    def watch_step(self, inputs: dict[str, Any], width: int) -> dict[str, Any]:
        """A step's inputs, checked if `generate()` is what asks for them; see `LoopWatch`. PEFT's
        prompt tuning (0.21) looks for the cache by its older name in them."""
        cache = one_cache(inputs.pop("cache", None), inputs.pop("past_key_values", None))
        watch = _watch.get()
        if watch is not None and watch.model is self:
            ids = inputs.get("input_ids")
            read = inputs["inputs_embeds"] if ids is None else ids
            uses_cache = bool(inputs.get("use_cache", True))
            watch.step(cache, width, read.shape[1], uses_cache=uses_cache)
        return inputs if cache is None else {**inputs, "past_key_values": cache}

    # 5.17: the loop whose first step reads the text and a draft at once.
    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch = _watch.get()
        if watch is not None:
            watch.drafted_from = input_ids.shape[1]
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def drafted_from(self) -> int | None:
        """Tokens of the text that assisted decoding began with; None in other loops."""
        watch = _watch.get()
        return watch.drafted_from if watch is not None and watch.model is self else None

    # 5.17: the loop of greedy search and sampling, run with a check of our own, see `late_sample`.
    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        late = None if kwargs.get("synced_gpus") else late_sample()
        return super()._sample(*args, **kwargs) if late is None else late(self, *args, **kwargs)

    def check_prompt(self, prompts: dict[str, Any], attention_mask: Any, *, is_draft: bool) -> None:
        """Raise ValueError for what the model cannot go on with, by the argument's name."""
        raise NotImplementedError

    def check_generation(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Refuse what cannot be done; the model's class knows."""
        raise NotImplementedError

    def new_cache(
        self,
        kind: str | None,
        max_tokens: int,
        *,
        is_returned: bool,
        is_draft: bool,
        is_compiled: bool,
    ) -> Cache:
        """A cache for a call of `generate()` that was given none; the model's class makes it.

        Args:
            kind: `cache_implementation`.
            max_tokens: The most that it will hold.
            is_returned: Whether the caller gets it.
            is_draft: Whether the model drafts for another one, which takes tokens back.
            is_compiled: Whether `compile_config` is given.
        """
        raise NotImplementedError


# After each token the host asks the device whether all rows have ended, and waits for the answer;
# until then it queues nothing, and the device idles while the host prepares the next step.
# Transformers knows the remedy, `DeferredStopCheck` (5.17), which reads the answer behind the next
# step and takes that step back at the end; it uses it on "mps" only. Here it is used on CUDA too,
# where that step can be taken back, or its cache is dropped anyway.
LATE_DEVICE_TYPES = ("cuda",)
STOP_CHECK = "DeferredStopCheck"
_Deferred: Any = getattr(generation_utils, STOP_CHECK, object)


class LateStopCheck(_Deferred):
    """`DeferredStopCheck` for caches of ours, which record what a crop needs by themselves."""

    def __init__(
        self,
        input_ids: Tensor,
        max_length: int,
        cache: Cache | None,
        cache_is_returned: bool,
        streamer: Any = None,
    ) -> None:
        super().__init__(input_ids, max_length, None, False, streamer)
        self.cache = cache if cache_is_returned else None

    @staticmethod
    def is_supported(
        device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool
    ) -> bool:
        """Whether a step can be taken back, or nobody will see that it was made."""
        if device.type not in LATE_DEVICE_TYPES or cache is None or is_assistant:
            return False
        return cache.is_croppable or not cache_is_returned


@functools.cache
def late_sample() -> Callable[..., Any] | None:
    """Transformers' `_sample` with this check; None if it asks in a way that is not known here.

    The check's class has no other way in than the name by which the function finds it.
    """
    sample: Any = GenerationMixin._sample
    names, code = getattr(sample, "__globals__", {}), getattr(sample, "__code__", None)
    if STOP_CHECK not in names or code is None or STOP_CHECK not in code.co_names:
        return None
    if code.co_freevars:
        return None
    late = types.FunctionType(
        code, {**names, STOP_CHECK: LateStopCheck}, sample.__name__, sample.__defaults__
    )
    late.__kwdefaults__ = sample.__kwdefaults__
    return late


# ---- Trainer -------------------------------------------------------------------------------------


def put_callback_first(trainer: Any, callback: Any) -> None:
    """Add a callback to a Trainer before those that it has, its reporters among them."""
    trainer.callback_handler.callbacks.insert(0, callback)


class CheckpointHooks:
    """How Trainer writes a checkpoint and goes on from one, for a class that stands before Trainer
    (5.17)."""

    first_step = 0  # the steps that were done when `train()` began

    # A run whose checkpoint is of its last step has nothing left to train; Trainer would train one
    # more step. What follows, such as sampling in an evaluation, goes on with the same numbers.
    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(  # type: ignore[misc]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self.first_step = self.state.global_step  # type: ignore[attr-defined]
        if resume_from_checkpoint is not None and self.first_step >= max_steps:
            self._load_rng_state(resume_from_checkpoint)  # type: ignore[attr-defined]
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # type: ignore[attr-defined]
            self.control.should_training_stop = True  # type: ignore[attr-defined]
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = super()._get_output_dir(trial)  # type: ignore[misc]
        write = functools.partial(super()._save_checkpoint, model, trial)  # type: ignore[misc]
        self.save_checkpoint(Path(folder), write)

    def _get_output_dir(self, trial: Any) -> str:
        return self.output_folder(super()._get_output_dir(trial))  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.may_push():
            self.push_written_checkpoint(checkpoint_folder)

    def loss_since_begin(self) -> float:
        """The sum of the losses of all steps since `train()` began, when it is about to end."""
        return self._total_loss_scalar  # type: ignore[attr-defined]

    def push_written_checkpoint(self, folder: str) -> None:
        """Push a checkpoint's folder, as Trainer does behind each save."""
        super()._push_from_checkpoint(folder)  # type: ignore[misc]

    def save_checkpoint(self, folder: Path, write: Callable[[], None]) -> None:
        """Write a checkpoint of this step under `folder`; `write` is Trainer's way."""
        write()

    def output_folder(self, folder: str) -> str:
        """Where `write` puts it; `folder` is Trainer's choice."""
        return folder

    def may_push(self) -> bool:
        """Whether `write` may push what it wrote."""
        return True


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "ALL_PARALLEL_STYLES",
    "BACKBONE_ARGUMENTS",
    "CACHE_NAME",
    "CAUSAL_LM_ARGUMENTS",
    "CLASSIFIER_ARGUMENTS",
    "LATE_DEVICE_TYPES",
    "LENGTH_ARGUMENTS",
    "LOOP_ARGUMENTS",
    "OUTPUT_ARGUMENTS",
    "LAYER_ARGUMENTS",
    "TESTED",
    "CheckpointHooks",
    "Concatenate",
    "ExpertsInterface",
    "ForCausalLMLoss",
    "GenerationHooks",
    "GradientCheckpointingLayer",
    "LateStopCheck",
    "Loading",
    "LoopWatch",
    "MergeModulelist",
    "OutputRecorder",
    "PreTrainedModelHooks",
    "TensorParallelLayer",
    "WeightConverter",
    "WeightRenaming",
    "attention_backend",
    "can_return_tuple",
    "capture_outputs",
    "check_arguments",
    "create_causal_mask",
    "has_own_adapters",
    "holds_tokens",
    "init",
    "is_divided",
    "is_offloading",
    "is_quantized",
    "late_sample",
    "mark_initialized",
    "packed_sequence_mask_function",
    "put_callback_first",
    "put_layers",
    "register_checkpoint_conversion_mapping",
    "rotate_checkpoints",
    "save_by_registered_names",
    "use_experts_implementation",
    "versions",
]
