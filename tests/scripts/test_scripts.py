"""scripts/train.py and scripts/generate.py, as functions and as commands."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import generate
import pytest
import torch
import train
from builders import SMALL_FIELDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small text files."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        lines = [f"line {j} of text {i} says that {i} and {j} make {i + j}" for j in range(12)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    (folder / "ignored.log").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(SMALL_FIELDS))
    return path


def settings(texts: Path, config: Path | None, **changes: Any) -> dict[str, Any]:
    common = {
        "paths": [texts],
        "pattern_glob": "*.txt",
        "config": config,
        "vocab_size": 560,
        "sequence_length": 32,
        "batch_size": 4,
        "steps": 6,
        "log_every": 1,
    }
    return {**common, **changes}


@pytest.fixture(scope="module")
def trained(texts: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of six steps, with a checkpoint after three, and held-out texts."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main(output=folder, **settings(texts, config, save_every=3, eval_percent=10))
    return folder


# ---- train.py -----------------------------------------------------------------------------------


def test_training_leaves_a_model_that_loads_and_its_figures(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=False)
    assert isinstance(model, KimiLinearForCausalLM), type(model).__module__
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer) == model.config.vocab_size == 560
    assert model.config.eos_token_id == tokenizer.eos_token_id
    measured = json.loads((trained / "eval_results.json").read_text())
    assert set(measured) == {"train_loss", "eval_loss", "perplexity", "bits_per_byte"}
    assert 0 < measured["bits_per_byte"] < 8
    assert (trained / "ops_kda.py").exists()


@pytest.mark.parametrize("use_cache", [True, False])
def test_training_leaves_the_configuration_s_cache_as_it_was(
    use_cache: bool, texts: Path, tmp_path: Path
) -> None:
    """Trainer turns it off, and a saved model that was called with ids gave no cache."""
    config, folder = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps({**SMALL_FIELDS, "use_cache": use_cache}))
    train.main(output=folder, **settings(texts, config, steps=1, save_every=1))
    for path in (folder, folder / "checkpoint-1"):
        model = KimiLinearForCausalLM.from_pretrained(path).eval()
        assert model.config.use_cache is use_cache
        assert (model(torch.arange(4)[None]).cache is not None) is use_cache


def test_resumed_training_ends_where_the_uninterrupted_one_does(
    trained: Path, texts: Path, config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained / "checkpoint-3", folder / "checkpoint-3")
    options = settings(texts, config, save_every=3, eval_percent=10)
    train.main(output=folder, resume=True, **options)
    ours, theirs = (
        KimiLinearForCausalLM.from_pretrained(path).state_dict() for path in (folder, trained)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6


def test_fine_tuning_starts_from_the_given_weights(
    trained: Path, texts: Path, tmp_path: Path
) -> None:
    options = settings(texts, None, vocab_size=None, steps=1, learning_rate=1e-12)
    train.main(output=tmp_path / "tuned", init_from=str(trained), weight_decay=0.0, **options)
    before, after = (
        KimiLinearForCausalLM.from_pretrained(path).state_dict()
        for path in (trained, tmp_path / "tuned")
    )
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_folder_in_place_of_files(
    streaming: bool, trained: Path, config: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"body": f"story {i} " * 30, "other": i} for i in range(40)]
    (data / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = settings(Path(), config, paths=(), vocab_size=None, steps=2)
    measured = train.main(
        output=tmp_path / "run",
        dataset=str(data),
        text_column="body",
        tokenizer=str(trained),
        streaming=streaming,
        **options,
    )
    assert measured["train_loss"] > 0
    with pytest.raises(ValueError, match="text_column='text' is not allowed.*body"):
        train.main(
            output=tmp_path / "x", dataset=str(data), tokenizer=str(trained), steps=1, config=config
        )


def test_rows_hold_whole_texts_between_begin_and_end(trained: Path) -> None:
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(trained)
    found = Dataset.from_dict({"text": ["line one [EOS] here", "", "line two"]})
    rows = train.to_rows(found, "text", tokenizer, 8)
    ids = [token for row in rows for token in row["input_ids"]]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0] == begin
    # the name of a special token in a text is plain text
    assert ids.count(end) <= 2 and tokenizer.decode(ids).startswith("[BOS]line one [EOS] here")
    assert ids.index(end) > tokenizer.decode(ids[: ids.index(end)]).count("x") + 5
    with pytest.raises(ValueError, match="sequence_length=4096"):
        train.to_rows(found, "text", tokenizer, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ()}, "files and folders or a dataset"),
        ({"epochs": 1.0}, "give one of steps, epochs"),
        ({"preset": "2m"}, "give one of preset, config, init_from"),
        ({"vocab_size": None}, "give a tokenizer, or the vocab_size"),
        ({"streaming": True, "steps": None}, "streaming needs steps"),
        ({"resume": True}, "holds no checkpoint"),
        ({"eval_percent": 100}, "eval_percent=100"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"bad_step": "ignore"}, "bad_step='ignore'"),
        ({"router_z_loss_coef": -1.0}, "router_z_loss_coef=-1.0"),
        ({"steps": None, "epochs": 1e-6}, "epochs=1e-06"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], message: str, texts: Path, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train.main(output=tmp_path / "run", **settings(texts, config, **changes))


def test_experts_are_balanced_and_logged(texts: Path, config: Path, tmp_path: Path) -> None:
    flags = ["--router-bias-update-rate", "0.01", "--router-aux-loss-coef", "0.1"]
    flags += ["--router-z-loss-coef", "0.01", "--bad-step", "skip", "--save-every", "6"]
    options = train._parser().parse_args(["--output", str(tmp_path / "run"), *flags])
    train.main(**{**vars(options), **settings(texts, config)})
    model = KimiLinearForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.router_bias_update_rate == 0.01
    bias = model.model.layers[1].block_sparse_moe.gate.e_score_correction_bias
    assert 0 < bias.abs().max() <= 0.061
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    assert len(rows) == 6 and all(row["experts/layer_1/max_load"] >= 1 for row in rows)


def test_experts_are_logged_without_being_moved(
    texts: Path, config: Path, tmp_path: Path, trained: Path
) -> None:
    train.main(
        output=tmp_path / "run",
        **settings(texts, config, save_every=3, eval_percent=10, log_experts=True),
    )
    ours, theirs = (
        KimiLinearForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "run", trained)
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert "experts/dead" in state["log_history"][0]


def test_a_run_is_not_overwritten_by_another(trained: Path, texts: Path, config: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint-6: resume, or take another folder"):
        train.main(output=trained, **settings(texts, config))


# ---- generate.py --------------------------------------------------------------------------------


def test_generation_streams_prompt_and_continuation(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate.main(model=trained, prompt="line 3 of", max_new_tokens=5, seed=1)
    out, err = capsys.readouterr()
    assert text.startswith("line 3 of") and len(text) > len("line 3 of")
    assert out.rstrip("\n") == text.rstrip("\n")
    assert "tokens" in err
    again = generate.main(model=trained, prompt="line 3 of", max_new_tokens=5, seed=1, quiet=True)
    assert again == text
    assert "per second" not in capsys.readouterr().err


def test_greedy_generation_is_the_models_likeliest_path(trained: Path) -> None:
    text = generate.main(
        model=trained, prompt="line", max_new_tokens=4, greedy=True, begin_token=True
    )
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = KimiLinearForCausalLM.from_pretrained(trained)
    ids = [tokenizer.bos_token_id, *tokenizer("line")["input_ids"]]
    start = len(ids)
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert text == "line" + tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_chat_returns_the_answer_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate.main(
        model=trained, prompt="hello", chat=True, system="be brief", max_new_tokens=3, seed=0
    )
    assert "hello" not in capsys.readouterr().out
    assert not text.startswith("hello")


def test_a_session_changes_nothing_but_what_is_read(trained: Path, tmp_path: Path) -> None:
    session = tmp_path / "s.session"
    for prompt in ("line 3 of text 7", "line 3 of text 9 says"):
        settings = {"model": trained, "prompt": prompt, "max_new_tokens": 6, "seed": 1}
        expected = generate.main(**settings)
        for _ in range(2):
            assert generate.main(**settings, session=session) == expected
    assert session.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"system": "x"}, "only allowed with chat"),
        ({"chat": True, "prompt": " "}, "prompt is empty"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any], message: str, trained: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate.main(**{"model": trained, "prompt": "x", **changes})


def test_prompt_from_argument_file_or_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes("a\r\nü".encode())
    assert generate.read_prompt("x", None) == "x"
    assert generate.read_prompt(None, str(tmp_path / "p.txt")) == "a\nü"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é\n".encode())))
    assert generate.read_prompt(None, None) == "é\n"


def test_both_commands_from_a_shell(trained: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, SCRIPTS / "generate.py", trained, "--max-new-tokens", "3", "--quiet"],
        input="line 1",
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.stdout.startswith("line 1")
    failed = commands.run([SCRIPTS / "train.py", "--output", tmp_path / "run", "nowhere"])
    assert failed.returncode != 0 and "nowhere does not exist" in failed.stderr


def test_a_configuration_file_gives_the_model_its_sizes(trained: Path) -> None:
    made = KimiLinearConfig.from_pretrained(trained)
    assert (made.hidden_size, made.num_hidden_layers) == (32, 2)
    assert made.layer_types == ["linear_attention", "full_attention"]
