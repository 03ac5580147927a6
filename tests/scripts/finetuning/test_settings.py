"""Settings of finetune.py, from flags and files."""

import dataclasses
from pathlib import Path
from typing import Any

import finetune
import pytest
from finetuning.settings import (
    RECIPES,
    SftSettings,
    check_same,
    make_settings,
    read_yaml,
    write_yaml,
)

pytestmark = pytest.mark.finetune

NEEDED = {"model": "m", "dataset": "d", "output": "o"}


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset: d\nlearning-rate: 1e-4\nlora: [kda, mla]\npacking: false\n")
    argv = ["sft", "--config", str(file), "--output", "o", "--learning-rate", "2e-5", "--bf16"]
    values = finetune._arguments(argv)
    settings = make_settings(values.pop("recipe"), values)
    assert settings == SftSettings(
        **NEEDED, learning_rate=2e-5, bf16=True, lora=["kda", "mla"], packing=False
    )
    values = finetune._arguments([*argv, "--packing", "--lora", "experts"])
    settings = make_settings(values.pop("recipe"), values)
    assert isinstance(settings, SftSettings) and settings.packing and settings.lora == ["experts"]


def test_settings_written_are_settings_read(tmp_path: Path) -> None:
    for recipe, kind in RECIPES.items():
        settings = make_settings(recipe, {**NEEDED, "steps": 7, "learning_rate": 1e-5})
        write_yaml(tmp_path / "settings.yaml", recipe, settings)
        again = make_settings(recipe, read_yaml(tmp_path / "settings.yaml"))
        assert type(again) is kind and again == settings
        check_same(
            recipe,
            dataclasses.replace(settings, resume=True, save_every=3, output="elsewhere"),
            tmp_path / "settings.yaml",
        )
        with pytest.raises(ValueError, match="seed=1 is not allowed with resume: the run began wi"):
            check_same(recipe, dataclasses.replace(settings, seed=1), tmp_path / "settings.yaml")


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("ppo", {}, "recipe='ppo' is not allowed"),
        ("sft", {"learning_rat": 1.0}, "learning_rat=1.0 is no setting of sft; allowed: model"),
        ("sft", {"reward": ["exact"]}, "reward=.* is no setting of sft"),
        ("sft", {"model": ""}, "model is missing"),
        ("sft", {"steps": 1.5}, "steps=1.5 is not allowed: it must be a whole number"),
        ("sft", {"steps": True}, "steps=True is not allowed: it must be a whole number"),
        ("sft", {"steps": 0}, "steps=0 is not allowed: it must be at least 1"),
        ("sft", {"bf16": "yes"}, "bf16='yes' is not allowed: it must be true or false"),
        ("sft", {"seed": None}, "seed=None is not allowed"),
        ("sft", {"learning_rate": "fast"}, "learning_rate='fast' is not allowed: it must be a num"),
        ("sft", {"learning_rate": 0}, "learning_rate=0.0 is not allowed"),
        ("sft", {"lora": ["mlp"]}, "lora='mlp' is not allowed: it must be one of"),
        ("sft", {"lora": 3}, "lora=3 is not allowed: it must be a list"),
        ("sft", {"loss_on": "user"}, "loss_on='user' is not allowed"),
        ("sft", {"steps": 1, "epochs": 1}, "give one of steps=1 and epochs=1.0"),
        ("sft", {"save_every": 5, "log_every": 2}, "save_every=5 .* a multiple of log_every=2"),
        ("sft", {"lora": ["all", "experts"], "lora_dropout": 0.1}, "lora_dropout=0.1"),
        ("sft", {"lora": ["all"], "lora_dropout": 0.1}, "lora_dropout=0.1"),
        ("sft", {"quantize": "4bit"}, "quantize='4bit' is not allowed without lora"),
        ("sft", {"quantize": "24gb"}, "quantize='24gb' is not allowed without lora"),
        ("sft", {"quantize": "3bit", "lora": ["all"]}, "quantize='3bit' is not allowed"),
        ("sft", {"merge": True}, "merge=True is not allowed without lora"),
        ("dpo", {"loss": "best"}, "loss='best' is not allowed"),
        ("grpo", {"num_generations": 3}, "num_generations=3 .* batch_size \\* accumulate = 8"),
        ("grpo", {"temperature": 0}, "temperature=0.0 is not allowed"),
    ],
)
def test_wrong_settings_are_named(recipe: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(recipe, {**NEEDED, **changes})


def test_a_file_of_settings_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- model")
    with pytest.raises(ValueError, match="it must hold lines of NAME: VALUE"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_names_every_setting(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune._arguments([recipe, "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(RECIPES[recipe]):
        assert "--" + field.name.replace("_", "-") in text
