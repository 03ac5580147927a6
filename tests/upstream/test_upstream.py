"""What this package takes from Transformers outside its documented interface is as it was: each
test names one piece, so that a release that changes it is told by name."""

import ast
import dataclasses
import functools
import importlib
import inspect
from pathlib import Path

import kimi_linear
import pytest
import torch
import transformers
from builders import tiny_config, tiny_model, token_ids
from kimi_linear import upstream
from kimi_linear.upstream.remote_code import SIBLING_IMPORT, SavesCode
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, Trainer
from transformers.dynamic_module_utils import get_relative_imports

pytestmark = pytest.mark.core

PACKAGE = Path(kimi_linear.__file__).parent
MODULES = [*PACKAGE.glob("*.py"), *PACKAGE.glob("tokenizer/*.py"), *PACKAGE.glob("scripts/*.py")]
MODULES = sorted(path for path in MODULES if path.name != "upstream.py")
# Public names that no page of the documentation promises.
UNDOCUMENTED = {"callback_handler", "hf_quantizer", "layer_class_to_replicate", "pre_quantized"}
UNDOCUMENTED |= {"has_previous_state", "is_assistant", "max_cache_len", "weight_mapping"}
CHANGED = (
    f"Transformers {transformers.__version__} has changed it since {upstream.TESTED[1]}, the last "
    "release that this package was tested with; see upstream.py"
)

# What other modules may import: Transformers documents it.
DOCUMENTED = {
    "transformers": None,
    "transformers.activations": {"ACT2FN"},
    "transformers.cache_utils": {"Cache", "CacheLayerMixin", "DynamicCache", "StaticCache"},
    "transformers.configuration_utils": {"PreTrainedConfig"},
    "transformers.modeling_outputs": {"ModelOutput", "TokenClassifierOutput"},
    "transformers.utils": {"get_json_schema", "logging"},
    "transformers.generation.streamers": {"BaseStreamer"},
    "transformers.integrations": {"TensorBoardCallback"},
    "transformers.trainer_utils": {"get_last_checkpoint"},
}
# Attributes with which a model class describes itself; the guide to new models has them.
CLASS_ATTRIBUTES = {
    "_fsdp_plan",
    "_init_weights",
    "_is_stateful",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_pp_plan",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "_tied_weights_keys",
    "_tp_plan",
    "_can_record_outputs",
}

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


def find(where):
    module, _, path = where.partition(":")
    found = importlib.import_module(f"transformers.{module}")
    for name in path.split("."):
        assert hasattr(found, name), f"transformers.{where} is gone: {CHANGED}"
        found = getattr(found, name)
    return found


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
    for name in ("cache_implementation", "compile_config", "is_assistant", "max_cache_len"):
        assert hasattr(config, name), f"GenerationConfig.{name} is gone: {CHANGED}"


def test_the_loop_names_its_cache_as_this_package_thinks():
    """`CACHE_NAME` is what the loop hands over, looks for in outputs and reorders."""
    name, model = upstream.CACHE_NAME, tiny_model()
    with torch.no_grad():
        out = model(token_ids(1, 4), use_cache=True)
    kept = model._update_model_kwargs_for_generation(out, {})
    assert kept.get(name) is out.cache, f"generate() does not keep `{name}` but {kept}: {CHANGED}"
    names = find("generation.utils:ALL_CACHE_NAMES")
    assert name in names, f"ALL_CACHE_NAMES={names} has no {name!r}: {CHANGED}"


def test_the_loop_asks_late_by_a_class_that_can_be_replaced():
    assert upstream.late_sample() is not None, (
        f"GenerationMixin._sample does not find DeferredStopCheck by its name: {CHANGED}"
    )


def test_experts_interface():
    functions = upstream.ALL_EXPERTS_FUNCTIONS
    for name in ("grouped_mm", "batched_mm"):
        assert name in functions, f"there is no experts implementation {name!r}: {CHANGED}"
    interface = upstream.ExpertsInterface()
    interface["grouped_mm"] = test_experts_interface
    assert interface["grouped_mm"] is test_experts_interface, CHANGED
    assert functions["grouped_mm"] is not test_experts_interface, CHANGED


def test_attention_interface_and_its_name_in_a_configuration():
    model = tiny_model()
    assert upstream.attention_backend(model.config) == "sdpa", CHANGED
    found = upstream.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    assert callable(found), f"AttentionInterface.get_interface(): {CHANGED}"
    assert upstream.attention_backend(tiny_config()) == "", CHANGED


def test_parallel_styles():
    styles = upstream.ALL_PARALLEL_STYLES
    needed = {"embedding_rowwise", "packed_colwise", "colwise_gather_output", "grouped_gemm"}
    needed |= {"ep_router", "moe_tp_experts"} if "ep_router" in styles else {"ep_dispatch_experts"}
    missing = {name for name in needed if name not in styles}
    assert not missing, f"there are no parallel styles {missing}: {CHANGED}"
    model = tiny_model()
    for plan in (model._tp_plan, model._ep_plan):
        unknown = {style for style in plan.values() if style not in styles}
        assert plan and not unknown, f"plans have unknown styles {unknown}: {CHANGED}"


def test_checkpointing_layers_leave_the_cache_alone():
    """A cached call without gradients in training mode: the layer must not take its cache away."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    ids = token_ids(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).cache
        rest = model(ids[:, 5:], cache=cache).logits
        whole = model(ids, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(rest, whole, atol=1e-5, rtol=1e-5, msg=lambda m: f"{m} {CHANGED}")


def test_parameters_that_are_filled_stay(tmp_path):
    """`init` and `_is_hf_initialized` keep what a checkpoint has filled."""
    parameter = nn.Parameter(torch.ones(3))
    upstream.mark_initialized(parameter)
    upstream.init.zeros_(parameter)
    assert parameter.eq(1).all(), f"transformers.initialization fills what is marked: {CHANGED}"
    plain = nn.Parameter(torch.ones(3))
    upstream.init.zeros_(plain)
    assert plain.eq(0).all(), CHANGED


def test_saving_goes_by_the_registered_conversion(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert hasattr(loaded, "_weight_conversions"), (
        f"PreTrainedModel._weight_conversions is gone: {CHANGED}"
    )
    loaded._weight_conversions = []  # as of a file with other names
    upstream.save_by_registered_names(loaded)
    loaded.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(name.endswith(".experts.0.w1.weight") for name in names), f"{names}: {CHANGED}"


def test_a_dynamic_cache_takes_other_layers():
    model, cache = tiny_model(), transformers.DynamicCache()
    assert hasattr(cache, "layer_class_to_replicate"), (
        f"DynamicCache.layer_class_to_replicate is gone: {CHANGED}"
    )
    assert not upstream.holds_tokens(cache) and not upstream.is_offloading(cache)
    with torch.no_grad():
        model(token_ids(1, 5), cache=cache)
    assert len(cache.layers) == 4 and upstream.holds_tokens(cache), CHANGED
    used = transformers.DynamicCache()
    used.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    assert upstream.holds_tokens(used), f"its layers have no is_initialized: {CHANGED}"
    offloading = transformers.DynamicCache(offloading=True)
    assert upstream.is_offloading(offloading), f"DynamicCache.offloading is gone: {CHANGED}"


@pytest.mark.parametrize("name", sorted(CLASS_ATTRIBUTES))
def test_class_attribute(name):
    assert name in _names_of_transformers(), f"Transformers reads no {name}: {CHANGED}"


@functools.cache
def _names_of_transformers() -> set[str]:
    """Private names in the files that define what this package subclasses."""
    root, names = Path(transformers.__file__).parent, set()
    files = [root / name for name in ("modeling_utils.py", "trainer.py", "cache_utils.py")]
    files += [root / "generation" / "utils.py", root / "configuration_utils.py"]
    files += [*(root / "distributed").glob("*.py"), root / "utils" / "output_capturing.py"]
    files += [root / "integrations" / "peft.py", root / "core_model_loading.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)  # as getattr has them
    private = {name for name in names if name.isidentifier() and name.startswith("_")}
    return {name for name in private if name[1:2] not in ("", "_")} - set(dir(nn.Module()))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_modules_keep_to_what_is_documented(path):
    private, reads = _names_of_transformers(), {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            allowed = DOCUMENTED.get(node.module, set())
            names = {alias.name for alias in node.names}
            assert allowed is None or names <= allowed, (
                f"{path.name} imports {names} from {node.module}: that belongs in upstream.py"
            )
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith("transformers.")}
            assert not names, f"{path.name} imports {names}: that belongs in upstream.py"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "torch":
            reads[node.attr] = node.value
        elif isinstance(node, ast.FunctionDef):
            reads.setdefault(node.name, None)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    inherited = set(dir(PreTrainedModel)) | set(dir(GenerationMixin)) | set(dir(Trainer))
    of_ours = {name for name in reads if name in defined and name not in inherited}
    if path.parent.name != "scripts":  # whose functions and attributes have such names of their own
        reads = {name: x for name, x in reads.items() if name not in of_ours | CLASS_ATTRIBUTES}
        found = reads.keys() & (private | UNDOCUMENTED)
        assert not found, f"{path.name} uses {found} of Transformers: that belongs in upstream.py"


def test_the_tested_versions_are_those_of_ci():
    pins = (PACKAGE / "constraints.txt").read_text()
    assert f"transformers=={upstream.TESTED[1]}\n" in pins
    ci = (PACKAGE / ".ci" / "run").read_text()
    assert upstream.TESTED[0] in ci
    assert (
        f"transformers>={upstream.TESTED[0].removesuffix('.0')},"
        in (PACKAGE / "setup.cfg").read_text()
    )


def test_siblings_are_found_by_their_text(tmp_path):
    """In strings too, but only what begins a line and names a module."""
    text = "from .a import x\nif 1:\n    from .b import (\n        y)\n'''\nfrom .c import d\n"
    text += "import .e\n'''\nx = 1; from .f import g\nfrom . import h\n# from .i import j\n"
    (tmp_path / "module.py").write_text(text)
    found = {"".join(groups) for groups in SIBLING_IMPORT.findall(text)}
    assert found == set(get_relative_imports(tmp_path / "module.py")) == {"a", "b", "c", "e"}, (
        CHANGED
    )


def test_a_model_saves_its_configuration_after_its_code(monkeypatch, tmp_path):
    """The flat copy, which the configuration writes, is put over the file that was copied."""
    order = []

    def copied(obj, folder, config=None):
        order.append(type(obj).__name__)

    for module in (transformers.modeling_utils, transformers.configuration_utils):
        monkeypatch.setattr(module, "custom_object_save", copied)
    monkeypatch.setattr(
        SavesCode, "write_code", staticmethod(lambda folder: order.append("flat copy"))
    )
    tiny_model().save_pretrained(tmp_path)
    assert order == ["KimiLinearForCausalLM", "KimiLinearConfig", "flat copy"], CHANGED
