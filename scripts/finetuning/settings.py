"""Settings of finetune.py: one dataclass per recipe, from flags and a YAML file.

A field is a flag, a key of the YAML file and a keyword of `finetune.main`, all by one name.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from learning.optimizers import OPTIMIZERS, SCHEDULES
from options.settings import setting

from kimi_linear.configuration_quantization import PRESETS
from kimi_linear.training.lora import LORA_GROUPS

# May differ between a run and the one that goes on with it: none has a part in the loss curve.
FREE_TO_CHANGE = ("output", "resume", "save_every", "keep_checkpoints", "merge")
LOSS_TOKENS = ("assistant", "all")
QUANTIZATIONS = ("4bit", "8bit", *PRESETS)  # bitsandbytes', and this package's
DPO_LOSSES = ("sigmoid", "ipo", "hinge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all recipes share."""

    model: str = setting("", "weights to start from: a folder or a repository")
    dataset: str = setting("", "repository, folder, or file of json, jsonl or parquet")
    output: str = setting("", "folder for checkpoints, curves and the finished model")
    tokenizer: str | None = setting(None, "folder or repository, else that of the model")
    dataset_config: str | None = setting(None, "configuration of the dataset")
    split: str = setting("train", "split of the dataset")
    eval_percent: float = setting(0.0, "rows to hold out, of a hundred")
    max_length: int = setting(1024, "tokens of a row; the rest of longer ones is cut off")
    steps: int | None = setting(None, "how long")
    epochs: float | None = setting(None, "instead of steps (default: 1)")
    batch_size: int = setting(8, "rows per device and call")
    accumulate: int = setting(1, "calls per step")
    learning_rate: float = setting(1e-5, "the highest one")
    weight_decay: float = setting(0.0, "of matrices")
    optimizer: str = setting("adamw", "which", OPTIMIZERS)
    schedule: str = setting("cosine", "of the learning rate", SCHEDULES)
    warmup: float = setting(0.05, "fraction of the steps")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    save_every: int | None = setting(None, "steps between checkpoints, a multiple of log_every")
    keep_checkpoints: int = setting(2, "how many of them to keep")
    eval_every: int | None = setting(None, "steps between evaluations (default: at the end)")
    log_every: int = setting(1, "steps between logged values")
    bf16: bool = setting(False, "compute in bfloat16; weights stay float32, but a LoRA's base")
    gradient_checkpointing: bool = setting(False, "less memory for more time")
    threads: int | None = setting(None, "CPU threads (default: torch's choice)")
    seed: int = setting(0, "of order, adapters and samples")
    resume: bool = setting(False, "go on from the last checkpoint, if there is one yet")
    lora: list[str] = setting([], "train adapters of these parts instead of all", LORA_GROUPS)
    lora_rank: int = setting(16, "of each adapter; of experts, of each expert's")
    lora_alpha: float = setting(32.0, "adapters are scaled by alpha / rank")
    lora_dropout: float = setting(0.0, "of the adapters' input; not with experts")
    quantize: str | None = setting(None, "how the adapters' base is held", QUANTIZATIONS)
    merge: bool = setting(False, "save the model with its adapters merged, in OUTPUT/merged, too")

    def check(self) -> None:
        """Raise ValueError for what is missing, out of range or contradictory."""
        for name in ("model", "dataset", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give --{name}, or a line in the YAML file")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give one of steps={self.steps} and epochs={self.epochs}, not both")
        for name in AT_LEAST_ONE:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed: it must be at least 1")
        for name in ("learning_rate", "lora_alpha", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not allowed: it must be above 0")
        if self.save_every and self.save_every % self.log_every:
            raise ValueError(
                f"save_every={self.save_every} is not allowed: it must be a multiple of "
                f"log_every={self.log_every}, else a resumed run would log other averages"
            )
        if self.lora_dropout and {"experts", "all"} & set(self.lora):
            raise ValueError(
                f"lora_dropout={self.lora_dropout} is not allowed with lora: experts, whose "
                "adapters are added to the weights; it must be 0"
            )
        if self.quantize and not self.lora:
            raise ValueError(
                f"quantize={self.quantize!r} is not allowed without lora: quantised weights cannot "
                "be trained"
            )
        if self.merge and not self.lora:
            raise ValueError("merge=True is not allowed without lora: there is nothing to merge")


AT_LEAST_ONE = (
    *("batch_size", "accumulate", "max_length", "steps", "save_every", "keep_checkpoints"),
    *("eval_every", "log_every", "threads", "lora_rank", "max_new_tokens"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings(Settings):
    """Supervised fine-tuning."""

    loss_on: str = setting("assistant", "which tokens of a chat are learnt", LOSS_TOKENS)
    packing: bool = setting(True, "several conversations in a row; none sees another")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoSettings(Settings):
    """Preference optimisation."""

    learning_rate: float = setting(1e-6, "the highest one")
    beta: float = setting(0.1, "how firmly the model is held to where it started")
    loss: str = setting("sigmoid", "which", DPO_LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoSettings(Settings):
    """Reinforcement learning with a reward that is computed."""

    learning_rate: float = setting(1e-6, "the highest one")
    reward: list[str] = setting(["number"], "number, exact, or FILE.py:FUNCTION; their sum counts")
    prompt_column: str = setting("prompt", "questions: text, or messages")
    answer_column: str = setting("answer", "what the reward compares with")
    system: str | None = setting(None, "system message before questions that are text")
    num_generations: int = setting(8, "answers to a question, of which the mean is the baseline")
    max_new_tokens: int = setting(256, "of an answer")
    temperature: float = setting(1.0, "of the samples")
    beta: float = setting(0.0, "weight of the divergence from the first model; 0: it is not loaded")

    def check(self) -> None:
        super().check()
        rows = self.batch_size * self.accumulate
        if self.num_generations < 2 or rows % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} is not allowed: it must be at least 2 and "
                f"divide batch_size * accumulate = {rows}"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} is not allowed: it must be above 0, since equal "
                "answers teach nothing"
            )


RECIPES: dict[str, type[Settings]] = {"sft": SftSettings, "dpo": DpoSettings, "grpo": GrpoSettings}


def make_settings(recipe: str, values: Mapping[str, Any]) -> Settings:
    """The checked settings of a recipe.

    Args:
        recipe: A key of `RECIPES`.
        values: By field; numbers may be text, as YAML reads 1e-5.

    Raises:
        ValueError: For an unknown recipe, a key that it has not, a value of another type or out of
            range; the message names it.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is not allowed: it must be one of {tuple(RECIPES)}")
    fields = {field.name: field for field in dataclasses.fields(RECIPES[recipe])}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"{name}={value!r} is no setting of {recipe}; allowed: {', '.join(fields)}"
            )
    kinds = typing.get_type_hints(RECIPES[recipe])
    made = RECIPES[recipe](
        **{name: _convert(fields[name], kinds[name], value) for name, value in values.items()}
    )
    made.check()
    return made


def _convert(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    """The value as the field's type; ValueError names both."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    plain = next(each for each in kinds if each is not type(None))
    if plain == list[str]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{field.name}={value!r} is not allowed: it must be a list of names")
        made: Any = list(items)
    else:
        try:
            made = _scalar(plain, value)
        except ValueError:
            raise ValueError(
                f"{field.name}={value!r} is not allowed: it must be {_NAMES[plain]}"
            ) from None
    choices = field.metadata["choices"]
    for item in made if isinstance(made, list) else [made]:
        if choices and item is not None and item not in choices:
            raise ValueError(f"{field.name}={item!r} is not allowed: it must be one of {choices}")
    return made


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _scalar(kind: type, value: Any) -> Any:
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise ValueError
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    made = kind(value)
    if isinstance(value, float) and made != value:  # int(1.5)
        raise ValueError
    return made


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings from a file; keys may be spelled like flags.

    Raises:
        ValueError: If the file is no mapping.
    """
    found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"config={str(path)!r} is not allowed: it must hold lines of NAME: VALUE")
    return {key.replace("-", "_"): value for key, value in found.items()}


def write_yaml(path: Path, recipe: str, settings: Settings) -> None:
    """Write the settings, whole or not at all."""
    text = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f"# finetune.py {recipe} --config THIS_FILE\n{text}", encoding="utf-8")
    temporary.replace(path)


def check_same(recipe: str, settings: Settings, path: Path) -> None:
    """Raise ValueError if a run with the settings of a file cannot go on with these."""
    before = make_settings(recipe, read_yaml(path))
    for name, value in dataclasses.asdict(settings).items():
        if name not in FREE_TO_CHANGE and getattr(before, name) != value:
            raise ValueError(
                f"{name}={value!r} is not allowed with resume: the run began with "
                f"{getattr(before, name)!r} ({path})"
            )


def add_flags(parser: argparse.ArgumentParser, recipe: str) -> None:
    """A flag for each setting of a recipe; those not given leave no trace in the result."""
    parser.add_argument("--config", metavar="YAML", help="file of settings; flags override it")
    kinds = typing.get_type_hints(RECIPES[recipe])
    for field in dataclasses.fields(RECIPES[recipe]):
        flag, options = "--" + field.name.replace("_", "-"), _flag_options(field, kinds[field.name])
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)


def _flag_options(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    default, text = field.default, field.metadata["help"]
    if kind is bool:
        note = " (default)" if default else ""
        return {"action": argparse.BooleanOptionalAction, "help": text + note}
    if default not in (None, "", dataclasses.MISSING):
        text += f" (default: {default})"
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "metavar": "VALUE"}
    if field.metadata["choices"]:
        options["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
    if kind == list[str]:
        options["nargs"] = "+"
    return options
