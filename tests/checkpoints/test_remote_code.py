"""Saved folders as strangers use them: `trust_remote_code=True`, nothing of ours installed."""

import json
from pathlib import Path

import official
import pytest
import torch
from builders import tiny_config, tiny_model, token_ids
from remote_code import LOGITS, code_in, run_stranger

import kimi_linear
from kimi_linear.checkpoints.flat_copy import package_code
from kimi_linear.checkpoints.pretrained import AUTO_MAP

pytestmark = [pytest.mark.core, pytest.mark.kernels]

PACKAGE = Path(kimi_linear.__file__).parent
CODE = set(package_code())

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

    model.train()(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(f"{out}/trained-{number}")
    trained, info = load(AutoModelForCausalLM, f"{out}/trained-{number}")
    with torch.no_grad():
        torch.testing.assert_close(trained(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        assert (trained(ids).logits - results["logits"]).abs().max() > 1e-3
"""

FROM_CONFIG = """
config = AutoConfig.from_pretrained(folders[0], trust_remote_code=True)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
save_file({"logits": model(ids).logits}, f"{out}/results-0.safetensors")
"""

SAVE = """
model.save_pretrained(f"{out}/again")
model.config.save_pretrained(f"{out}/config")
"""


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
    trained = [tmp_path / "first" / f"trained-{number}" for number in range(2)]
    for ours, theirs in zip(folders * 2, [*again, *trained], strict=True):
        assert code_in(theirs) == package_code()
        assert read_config(theirs) == read_config(ours)
    for results in run_stranger(LOGITS, again, tmp_path / "second"):
        torch.testing.assert_close(results["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_saved_folder_has_a_flat_copy_of_the_code(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert code_in(tmp_path) == package_code()
    assert {"configuration_kimi_linear.py", "checkpoints_experts.py", "ops_kda.py"} <= set(CODE)


def test_a_configuration_alone_brings_all_code(tmp_path):
    """`from_config` builds a model from such a folder, without weights."""
    tiny_config().save_pretrained(tmp_path / "empty")
    assert code_in(tmp_path / "empty") == package_code()
    assert read_config(tmp_path / "empty")["auto_map"] == AUTO_MAP
    assert run_stranger(FROM_CONFIG, [tmp_path / "empty"], tmp_path / "out")


def test_code_of_an_earlier_version_stays_beside(model, expected, tmp_path):
    """Nothing imports it; whether a file that is none of ours may go, nobody knows."""
    (tmp_path / "kda.py").write_text("raise ImportError\n")
    model.save_pretrained(tmp_path)
    assert code_in(tmp_path) == {**package_code(), "kda.py": "raise ImportError\n"}
    (results,) = run_stranger(LOGITS, [tmp_path], tmp_path / "out")
    torch.testing.assert_close(results["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.fixture
def repository(model, tmp_path) -> Path:
    """The package's own folder with a model in it: the entry files import the installed package."""
    folder = tmp_path / "repository"
    model.save_pretrained(folder)
    for name in CODE:
        (folder / name).unlink()
    for name in ("configuration_kimi_linear.py", "modeling_kimi_linear.py"):
        (folder / name).symlink_to(PACKAGE / name)
    return folder


def test_the_repository_is_a_model_folder_where_the_package_is_installed(
    repository, expected, tmp_path
):
    (results,) = run_stranger(LOGITS + SAVE, [repository], tmp_path / "out", installed=True)
    torch.testing.assert_close(results["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    for name in ("again", "config"):
        assert code_in(tmp_path / "out" / name) == package_code()
        assert read_config(tmp_path / "out" / name)["auto_map"] == AUTO_MAP


def test_elsewhere_the_repository_names_the_package(repository, tmp_path):
    with pytest.raises(AssertionError, match="were not found in your environment: kimi_linear"):
        run_stranger(LOGITS, [repository], tmp_path / "out")


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
