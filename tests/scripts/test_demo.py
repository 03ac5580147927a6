"""The demo, whole and tiny: tokenizer, training, evaluation, saving, a new process, generation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
from learning.budget import Budget, BudgetCallback
from safetensors import safe_open
from transformers import AutoTokenizer, TrainerControl, TrainerState

from kimi_linear import KimiLinearForCausalLM

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
}
SOURCE = '''"""Module {i} of the package."""


class Item{i}:
    """An item with number {i} and a value."""

    def __init__(self, value: int = {i}) -> None:
        self.value = value
        self.number = {i}

    def add(self, other: "Item{i}") -> int:
        return self.value + other.value * {i} % {j}


def make_item_{i}(value: int) -> Item{i}:
    return Item{i}(value + {j})
'''


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred small modules."""
    folder = tmp_path_factory.mktemp("library")
    for i in range(100):
        (folder / f"module_{i}.py").write_text(SOURCE.format(i=i, j=i * i + 7))
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Output folder and results of one run."""
    folder = tmp_path_factory.mktemp("demo")
    results = demo.main(
        output=folder / "model",
        steps=30,
        vocab_size=640,
        sequence_length=64,
        batch_size=8,
        config_overrides=TINY,
        corpus=corpus,
        prompt="class Item",
        max_new_tokens=12,
        record=folder / "record.jsonl",
    )
    return folder, results


def test_results_are_complete_and_written(run: tuple[Path, dict[str, Any]]) -> None:
    folder, results = run
    assert set(results["bits_per_byte"]) == {"kimi_linear", "trigram", "lzma", "zlib -9"}
    sizes = results["corpus"]
    assert sizes["training_files"] + sizes["held_out_files"] == 100
    assert results["training"]["steps"] == 30
    assert results["training"]["tokens"] == 30 * 8 * 64
    written = json.loads((folder / "model" / "results.json").read_text())
    assert written["bits_per_byte"] == results["bits_per_byte"]
    assert len(written["points"]) == 10 and written["points"][-1][0] == 30
    assert json.loads((folder / "record.jsonl").read_text()) == results
    assert (folder / "model" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_training_learns_what_compressors_cannot_know(run: tuple[Path, dict[str, Any]]) -> None:
    bits = run[1]["bits_per_byte"]
    # modules that are alike: a model that has seen others beats what sees one file at a time
    assert bits["kimi_linear"] < 0.8 * bits["zlib -9"]
    losses = json.loads((run[0] / "model" / "results.json").read_text())["losses"]
    assert losses[-1][1] < 0.6 * losses[0][1]


def test_saved_folder_has_code_weights_and_tokenizer(run: tuple[Path, dict[str, Any]]) -> None:
    folder = run[0] / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_kimi_linear.")
    assert config["use_cache"]  # Trainer would turn it off
    assert {"modeling_kimi_linear.py", "ops_kda.py", "tokenizer.json", "tiktoken.model"} <= {
        path.name for path in folder.iterdir()
    }
    assert not (folder / "trainer").exists()
    with safe_open(folder / "model.safetensors", "pt") as file:
        name = next(key for key in file.keys() if key.endswith("A_log"))  # noqa: SIM118
        assert file.get_slice(name).get_dtype() == "F32"


def test_a_new_process_writes_code(run: tuple[Path, dict[str, Any]]) -> None:
    _, results = run
    assert results["generated"].startswith("class Item")
    assert len(results["generated"].strip()) > len("class Item")


def test_the_new_process_cannot_import_the_package_and_gets_the_same_logits(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = run[0] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("class Item7:\n    def", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        here = KimiLinearForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    program = (
        "import importlib.util, sys; sys.modules['kimi_linear'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules.'), type(model)\n"
        "ids = torch.tensor([[int(i) for i in sys.argv[2].split(',')]])\n"
        "with torch.no_grad(): torch.save(model(input_ids=ids).logits, sys.argv[3])\n"
    )
    saved = tmp_path / "logits.pt"
    listed = ",".join(str(i) for i in ids[0].tolist())
    subprocess.run(
        [sys.executable, "-I", "-c", program, str(folder), listed, str(saved)],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    torch.testing.assert_close(torch.load(saved), here, atol=1e-5, rtol=1e-5)


def test_the_default_is_a_number_of_steps_and_repeats_itself(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock decided where training ended: other figures on every machine."""
    monkeypatch.setattr(demo, "STEPS", 6)
    monkeypatch.setattr(demo, "generate_elsewhere", lambda *args: "")  # the other tests wait for it
    runs = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(runs))
        results = demo.main(
            output=folder,
            seed=seed,
            vocab_size=640,
            sequence_length=64,
            config_overrides=TINY,
            corpus=corpus,
        )
        assert results["training"]["steps"] == 6
        losses = json.loads((folder / "results.json").read_text())["losses"]
        runs.append([*(loss for _, loss in losses), results["bits_per_byte"]["kimi_linear"]])
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_the_bar_says_how_long_it_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    callback = BudgetCallback(Budget(4, None), 8, lambda step, seconds: "")
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(None, state, control)
    for state.global_step in range(1, 5):
        callback._bar.start_t -= 60  # a minute a step
        callback.on_step_end(None, state, control)
        callback._bar.refresh()
    callback.on_train_end(None, state, control)
    assert control.should_training_stop
    bar = capsys.readouterr().err
    for percent, left in ((25, "03:00"), (50, "02:00"), (75, "01:00"), (100, "00:00")):
        assert re.search(rf"{percent}%.*, {left} to go, step {percent // 25},", bar), bar


def test_a_failing_process_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in a new process failed"):
        demo.generate_elsewhere(tmp_path, "x", 1)


def test_a_folder_with_other_files_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        demo.main(output=tmp_path, steps=1)
    assert (tmp_path / "thesis.tex").exists()


def test_too_little_text_is_named(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=4096"):
        demo.main(
            output=tmp_path / "out",
            steps=1,
            vocab_size=640,
            batch_size=4096,
            corpus=corpus,
            config_overrides=TINY,
        )
