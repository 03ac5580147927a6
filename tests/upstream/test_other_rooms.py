"""Rooms other than `upstream` keep to what Transformers documents."""

import ast
import functools
from pathlib import Path

import pytest
import transformers
from torch import nn
from touchpoints import CHANGED
from transformers import GenerationMixin, PreTrainedModel, Trainer

import kimi_linear
from kimi_linear.upstream.releases import TESTED

pytestmark = pytest.mark.core

PACKAGE = Path(kimi_linear.__file__).parent
SCRIPTS, UPSTREAM = PACKAGE / "scripts", PACKAGE / "upstream"
# beside the package's own rooms lie folders that are no part of it
ROOMS = sorted({path.parent for path in PACKAGE.glob("*/__init__.py")} - {UPSTREAM}) + [SCRIPTS]
MODULES = sorted({*PACKAGE.glob("*.py"), *(file for room in ROOMS for file in room.rglob("*.py"))})
# Public names that no page of the documentation promises.
UNDOCUMENTED = {"callback_handler", "hf_quantizer", "layer_class_to_replicate", "pre_quantized"}
UNDOCUMENTED |= {"has_previous_state", "is_assistant", "max_cache_len", "weight_mapping"}

# What other modules may import: Transformers documents it.
DOCUMENTED = {
    "transformers": None,
    "transformers.activations": {"ACT2FN"},
    "transformers.cache_utils": {"Cache", "CacheLayerMixin", "DynamicCache", "StaticCache"},
    "transformers.configuration_utils": {"PreTrainedConfig"},
    "transformers.modeling_outputs": {"ModelOutput", "TokenClassifierOutput"},
    "transformers.utils.quantization_config": {"QuantizationConfigMixin"},
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
                f"{path.name} imports {names} from {node.module}: that belongs in upstream/"
            )
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith("transformers.")}
            assert not names, f"{path.name} imports {names}: that belongs in upstream/"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "torch":
            reads[node.attr] = node.value
        elif isinstance(node, ast.FunctionDef):
            reads.setdefault(node.name, None)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    inherited = set(dir(PreTrainedModel)) | set(dir(GenerationMixin)) | set(dir(Trainer))
    of_ours = {name for name in reads if name in defined and name not in inherited}
    if SCRIPTS not in path.parents:  # whose functions and attributes have such names of their own
        reads = {name: x for name, x in reads.items() if name not in of_ours | CLASS_ATTRIBUTES}
        found = reads.keys() & (private | UNDOCUMENTED)
        assert not found, f"{path.name} uses {found} of Transformers: that belongs in upstream/"


def test_the_tested_versions_are_those_of_ci():
    pins = (PACKAGE / "constraints.txt").read_text()
    assert f"transformers=={TESTED[1]}\n" in pins
    ci = (PACKAGE / ".ci" / "run").read_text()
    assert TESTED[0] in ci
    assert f"transformers>={TESTED[0].removesuffix('.0')}," in (PACKAGE / "setup.cfg").read_text()
