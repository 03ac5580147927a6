"""Saved folders as strangers use them: `trust_remote_code=True`, nothing of ours installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import kimi_linear
import official
import pytest
import torch
from builders import tiny_model, token_ids
from kimi_linear.checkpoints.pretrained import AUTO_MAP
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.core, pytest.mark.kernels]

# Even an installed copy cannot be imported.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kimi_linear":
            raise ModuleNotFoundError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
"""

STRANGER = """
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
*folders, out = sys.argv[1:]
ids = load_file(f"{out}/ids.safetensors")["ids"]
torch.set_num_threads(1)
def load(auto, path, **kwargs):
    loaded, info = auto.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True, **kwargs)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    assert not info["mismatched_keys"], info
    return loaded.eval(), info
"""

EVERYTHING = """
for number, folder in enumerate(folders):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    model, info = load(AutoModelForCausalLM, folder)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    backbone, info = load(AutoModel, folder)
    assert not info["missing_keys"], info
    scores = {}
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        classifier, info = load(auto, folder, num_labels=3)
        assert {name.split(".")[0] for name in info["missing_keys"]} == {"score"}, info
        scores[auto.__name__] = classifier(ids).logits
    assert scores["AutoModelForSequenceClassification"].shape == (2, 3)
    assert scores["AutoModelForTokenClassification"].shape == (2, ids.shape[1], 3)
    with torch.no_grad():
        results = {
            "logits": model(ids).logits,
            "hidden": backbone(ids).last_hidden_state,
            "text": model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None),
        }
    model.save_pretrained(f"{out}/again-{number}")
    save_file(results, f"{out}/results-{number}.safetensors")
"""

LOGITS = """
for number, folder in enumerate(folders):
    model, info = load(AutoModelForCausalLM, folder)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, f"{out}/results-{number}.safetensors")
"""


def run_stranger(script: str, folders: list[Path], out: Path) -> list[dict[str, torch.Tensor]]:
    """Run `script` where the package cannot be imported; the tensors that it saves by folder.

    `-I` leaves out the working directory and PYTHONPATH, `HIDE` an installed copy.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_file({"ids": token_ids(2, 13)}, out / "ids.safetensors")
    environment = {key: os.environ[key] for key in ("PATH", "TMPDIR", "HOME") if key in os.environ}
    environment |= {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", HIDE + STRANGER + script, *map(str, folders), str(out)],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [load_file(out / f"results-{number}.safetensors") for number in range(len(folders))]


def siblings(file: Path) -> set[str]:
    """Names of all files that `file` imports relatively, directly or not."""
    found: set[str] = set()
    pending = [file]
    while pending:
        for node in ast.walk(ast.parse(pending.pop().read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                name = f"{node.module}.py"
                if name not in found:
                    found.add(name)
                    pending.append(file.parent / name)
    return found


PACKAGE = Path(kimi_linear.__file__).parent
CODE = siblings(PACKAGE / "modeling_kimi_linear.py") | {"modeling_kimi_linear.py"}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def expected(model) -> dict[str, torch.Tensor]:
    ids = token_ids(2, 13)
    with torch.no_grad():
        return {
            "logits": model(ids).logits,
            "hidden": model.model(ids).last_hidden_state,
            "text": model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None),
        }


def test_saved_folders_work_for_strangers(model, expected, tmp_path):
    folders = [tmp_path / name for name in ("checkpoint", "Kimi-Linear-0.1b.v2-a_3")]
    for folder in folders:
        model.save_pretrained(folder, max_shard_size="60KB")
    for results in run_stranger(EVERYTHING, folders, tmp_path / "first"):
        for key, value in expected.items():
            torch.testing.assert_close(results[key], value, rtol=1e-5, atol=1e-5)
    # what the stranger saved is as good as what we saved
    again = [tmp_path / "first" / f"again-{number}" for number in range(2)]
    for ours, theirs in zip(folders, again, strict=True):
        assert {path.name for path in theirs.glob("*.py")} == CODE
        assert read_config(theirs) == read_config(ours)
    for results in run_stranger(LOGITS, again, tmp_path / "second"):
        torch.testing.assert_close(results["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_every_sibling_is_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert {"configuration_kimi_linear.py", "weight_conversion.py", "kda.py"} <= CODE
    for name in CODE:
        assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()


def test_config_has_every_official_key_and_all_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.keys() >= official.CONFIG.keys()
    assert config["auto_map"] == AUTO_MAP
    assert set(AUTO_MAP) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForDecision",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    for name in AUTO_MAP.values():
        module, _, cls = name.rpartition(".")
        assert f"class {cls}(" in (tmp_path / f"{module}.py").read_text()


def test_auto_map_is_complete_after_saving_another_head(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == [AUTO_MAP["AutoModel"].rpartition(".")[2]]


def test_modules_import_only_as_remote_code_can():
    """Sub-packages and `from . import name` do not survive the Hub."""
    for name in CODE:
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, (
                    name,
                    node.module,
                )
