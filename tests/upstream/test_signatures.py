"""The functions and classes of Transformers that `upstream` calls or overrides have the parameters
and fields that it relies on: a release that changes one is told by its name."""

import dataclasses
import inspect

import pytest
from touchpoints import CHANGED, find
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, Trainer

from kimi_linear.upstream.lookup_call import OUTPUTS

pytestmark = pytest.mark.core

# Where it is, and the parameters that calls or overrides of ours rely on, in this order.
FUNCTIONS = {
    "conversion_mapping:register_checkpoint_conversion_mapping": [
        "model_type_or_class_name",
        "mapping",
        "overwrite",
    ],
    "core_model_loading:Concatenate.__init__": ["self", "dim"],
    "core_model_loading:MergeModulelist.__init__": ["self", "dim"],
    "core_model_loading:WeightConverter.__init__": [
        "self",
        "source_patterns",
        "target_patterns",
        "operations",
    ],
    "core_model_loading:WeightRenaming.__init__": ["self", "source_patterns", "target_patterns"],
    "distributed.mixin:DistributedMixin.init_parallel_plans": ["self"],
    "distributed.mixin:DistributedMixin.prepare_distribute_model": ["distributed_config"],
    "distributed.mixin:DistributedMixin.maybe_distribute_model": ["model", "distributed_config"],
    "distributed.mixin:DistributedMixin.gather_sharded_state_dict_for_save": [
        "self",
        "model_to_save",
        "state_dict",
    ],
    "distributed.tensor_parallel:TensorParallelLayer.shard_param": [
        "self",
        "module",
        ("param", "param_name"),
        "mesh",
    ],
    "distributed.tensor_parallel:TensorParallelLayer.install_forward": ["self", "module", "mesh"],
    "generation.utils:GenerationMixin.generate": ["self", "inputs", "generation_config"],
    "generation.utils:GenerationMixin.prepare_inputs_for_generation": [
        "self",
        "input_ids",
        "next_sequence_length",
        ("cache", "past_key_values"),
        "attention_mask",
        "inputs_embeds",
        "is_first_iteration",
    ],
    "generation.utils:GenerationMixin._prepare_cache_for_generation": [
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ],
    "generation.utils:GenerationMixin._sample": ["self", "input_ids"],
    "generation.utils:GenerationMixin._assisted_decoding": [
        "self",
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
    ],
    "generation.utils:GenerationMixin._get_candidate_generator": [
        "self",
        "generation_config",
        "input_ids",
        "inputs_tensor",
        "logits_processor",
        "model_kwargs",
    ],
    "generation.utils:GenerationMixin._prefill": [
        "self",
        "input_ids",
        "generation_config",
        "model_kwargs",
    ],
    "generation.utils:GenerationMixin._optimize_model_for_decode": ["self"],
    "generation.continuous_batching.continuous_api:ContinuousBatchingManager.__init__": [
        "self",
        "model",
        "generation_config",
        "continuous_batching_config",
        "workload_hints",
    ],
    "generation.continuous_batching.continuous_api:ContinuousBatchingManager.start": ["self"],
    "generation.continuous_batching.continuous_api:BackgroundThreadStatus.update_with_tp_status": [
        "self",
        "tp_status",
    ],
    "generation.continuous_batching.continuous_api:OutputRouter.deliver_batch": ["self", "outputs"],
    "generation.continuous_batching.continuous_api:OutputRouter.fail_and_deliver": [
        "self",
        "state",
        "error",
    ],
    "generation.continuous_batching.requests:RequestState.update_and_check_completion": [
        "self",
        "token_id",
        "logprob",
    ],
    "generation.continuous_batching.requests:RequestState.create_equivalent_initial_request": [
        "self"
    ],
    "generation.continuous_batching.requests:RequestState.to_generation_output": ["self"],
    "generation.continuous_batching.requests:RequestState.fork": ["self", "new_request_id"],
    "generation:PromptLookupCandidateGenerator.__init__": [
        "self",
        "eos_token_id",
        "num_output_tokens",
        "max_matching_ngram_size",
        "max_length",
    ],
    "generation:PromptLookupCandidateGenerator.get_candidates": ["self", "input_ids"],
    "generation.utils:DeferredStopCheck.__init__": [
        "self",
        "input_ids",
        "max_length",
        "cache",
        "cache_is_returned",
        "streamer",
    ],
    "generation.utils:DeferredStopCheck.is_supported": [
        "device",
        "cache",
        "cache_is_returned",
        "is_assistant",
    ],
    "generation.utils:DeferredStopCheck.finish": ["self"],
    "integrations:is_deepspeed_zero3_enabled": [],
    "integrations:use_experts_implementation": ["experts_class", "experts_interface"],
    "loss.loss_utils:ForCausalLMLoss": [
        "logits",
        "labels",
        "vocab_size",
        "num_items_in_batch",
        "ignore_index",
        "shift_labels",
    ],
    "masking_utils:create_causal_mask": [
        "config",
        "inputs_embeds",
        "attention_mask",
        ("cache", "past_key_values"),
        "position_ids",
        "or_mask_function",
        "and_mask_function",
    ],
    "masking_utils:packed_sequence_mask_function": ["packed_sequence_mask"],
    "modeling_utils:PreTrainedModel._can_set_experts_implementation": [],
    "modeling_utils:PreTrainedModel._load_pretrained_model": [
        "model",
        "state_dict",
        "checkpoint_files",
        "load_config",
    ],
    "trainer:Trainer._save_checkpoint": ["self", "model", "trial"],
    "trainer:Trainer._get_output_dir": ["self", "trial"],
    "trainer:Trainer._prepare_for_training": [
        "self",
        "max_steps",
        "train_dataloader",
        "resume_from_checkpoint",
    ],
    "trainer:Trainer._run_epoch": ["self"],
    "trainer:Trainer._load_rng_state": ["self", "checkpoint"],
    "trainer:Trainer._push_from_checkpoint": ["self", "checkpoint_folder"],
    "trainer:Trainer.save_model": ["self", "output_dir", "_internal_call"],
    "trainer_utils:rotate_checkpoints": [
        "output_dir",
        "save_total_limit",
        "best_model_checkpoint",
        "use_mtime",
    ],
    "utils:can_return_tuple": ["func"],
    "utils.output_capturing:OutputRecorder.__init__": ["self", "target_class", "index"],
    "utils.output_capturing:capture_outputs": ["func"],
}


@pytest.mark.parametrize("where", FUNCTIONS)
def test_function(where):
    """It is there and has the parameters, those that calls pass by place in their place."""
    names = list(inspect.signature(find(where)).parameters)
    expected = FUNCTIONS[where]
    found = names[: len(expected)]
    by_name = where.startswith(("trainer_utils", "utils:", "utils.output"))
    for i, wanted in enumerate(expected):
        either = (wanted,) if isinstance(wanted, str) else wanted
        there = names if by_name else found[i : i + 1]
        assert set(either) & set(there), (
            f"transformers.{where} has the parameters {names}, {expected} were expected: {CHANGED}"
        )


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        (
            "modeling_utils:LoadStateDictConfig",
            {"weight_mapping", "device_mesh", "ignore_mismatched_sizes", "hf_quantizer"},
        ),
    ],
)
def test_dataclass(where, fields):
    kind = find(where)
    missing = fields - {field.name for field in dataclasses.fields(kind)}
    assert not missing, f"transformers.{where} has no {missing}: {CHANGED}"
    assert hasattr(kind, "is_quantized"), f"transformers.{where}.is_quantized is gone: {CHANGED}"


def test_trainer_sums_its_losses():
    names = Trainer._finalize_training.__code__.co_names
    assert "_total_loss_scalar" in names, f"Trainer has {names} at its end: {CHANGED}"


def test_generation_configuration():
    config = GenerationConfig()
    names = ("cache_implementation", "compile_config", "is_assistant", "max_cache_len")
    for name in (*names, "prompt_lookup_num_tokens", "assistant_early_exit", *OUTPUTS):
        assert hasattr(config, name), f"GenerationConfig.{name} is gone: {CHANGED}"


def test_stopping_criteria():
    """What a loop of ours reads of them, in the place of asking them."""
    ends, limit = EosTokenCriteria([3, 5]), MaxLengthCriteria(7)
    assert ends.eos_token_id.tolist() == [3, 5] and limit.max_length == 7, CHANGED
