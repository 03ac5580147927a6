"""Whether a folder holds a whole model: config, code, weights, tokenizer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import kimi_linear
from kimi_linear import KimiLinearConfig
from kimi_linear.checkpoints.checks import check_finite
from kimi_linear.checkpoints.code_in_folder import check_classes, class_names, code_files
from kimi_linear.checkpoints.folders import INDEX, check_weights, read_object, weight_files
from kimi_linear.checkpoints.pretrained import AUTO_MAP
from kimi_linear.tokenizer.snapshot import read_json
from publishing.model_card import TASKS

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was found complete: its config, shape by name of its tensors, and the names of
    its files of weights and code."""

    folder: Path
    config: KimiLinearConfig
    shapes: dict[str, tuple[int, ...]]
    files: frozenset[str]


def check_folder(path: str | os.PathLike[str]) -> Checkpoint:
    """Check that a folder holds a whole model: config, code, weights, tokenizer.

    Args:
        path: The folder that `save_pretrained` wrote.

    Returns:
        The checkpoint. No weight is loaded.

    Raises:
        ValueError: Something is missing, truncated or contradictory; the message names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path: {folder} is no folder; allowed: a folder with a saved model")
    fields = read_config(folder)
    architecture = read_architecture(folder, fields)
    code = check_code(folder, fields.get("auto_map") or {}, architecture)
    model = empty_model(fields, architecture)
    shapes = check_weights(folder, model)
    code |= check_tokenizer(folder, model.config)
    return Checkpoint(folder, model.config, shapes, frozenset({*code, *weight_files(folder)}))


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`, in its order.

    Raises:
        ValueError: It is missing, is not JSON, or describes another kind of model.
    """
    fields = read_object(folder / CONFIG)
    if fields.get("model_type") != KimiLinearConfig.model_type:
        raise ValueError(
            f"{folder / CONFIG}: model_type is {fields.get('model_type')!r}; allowed: "
            f"{KimiLinearConfig.model_type!r}"
        )
    return fields


def read_architecture(folder: Path, fields: dict[str, Any]) -> str:
    """The name of the model's class; ValueError if that is none of ours."""
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in TASKS:
        raise ValueError(
            f"{folder / CONFIG}: architectures is {names!r}; allowed: one of "
            f"{', '.join(TASKS)}, in a list"
        )
    return names[0]


def make_config(fields: dict[str, Any]) -> KimiLinearConfig:
    """The configuration of a file's fields, whoever's code they name; ValueError as its class."""
    own = {key: value for key, value in fields.items() if key != "auto_map"}
    return KimiLinearConfig.from_dict(own)


def empty_model(fields: dict[str, Any], architecture: str) -> PreTrainedModel:
    """The model of a `config.json`, on the meta device."""
    with torch.device("meta"):
        return getattr(kimi_linear, architecture)(make_config(fields))


def check_code(folder: Path, auto_map: dict[str, str], architecture: str) -> set[str]:
    """Check that `auto_map` names this package's classes and that their files are all there.

    Args:
        folder: The checkpoint.
        auto_map: The config's `auto_map`.
        architecture: The model's class.

    Returns:
        The names of these files.

    Raises:
        ValueError: An entry or a file that an entry needs, directly or by import, is missing.
    """
    config_file = folder / CONFIG
    references = class_names(config_file, auto_map)
    for auto_class in ("AutoConfig", TASKS[architecture][1]):
        found, wanted = auto_map.get(auto_class), AUTO_MAP[auto_class]
        if found != wanted:
            raise ValueError(
                f"{config_file}: auto_map[{auto_class!r}] is {found!r}; allowed: {wanted!r}, which "
                "save_pretrained writes"
            )
    return _check_references(folder, references, f"auto_map of {config_file}")


def _check_references(folder: Path, references: list[str], needed_by: str) -> set[str]:
    files = code_files(folder, references, needed_by)
    check_classes(folder, references, needed_by)
    return files


def check_weight_values(folder: Path) -> None:
    """Read all weights of a folder.

    Raises:
        ValueError: A tensor holds NaN or Inf.
    """
    files = [str(folder / name) for name in weight_files(folder) if name != INDEX]
    check_finite(tqdm(files, "reading weights", unit="file"))


def check_tokenizer(folder: Path, config: KimiLinearConfig) -> set[str]:
    """Check that there is a tokenizer that fits the vocabulary.

    Args:
        folder: The checkpoint.
        config: Its config.

    Returns:
        The names of the files of code that it needs.

    Raises:
        ValueError: A file is missing or malformed, or an id is not below the config's `vocab_size`.
    """
    settings = folder / "tokenizer_config.json"
    references = class_names(settings, read_object(settings).get("auto_map") or {})
    code = _check_references(folder, references, "auto_map of tokenizer_config.json")
    vocabulary = folder / "tokenizer.json"
    if not vocabulary.is_file():
        if (folder / "tiktoken.model").is_file() and references:
            return code
        raise ValueError(f"{vocabulary} is missing")
    ids = _token_ids(vocabulary)
    if max(ids, default=0) >= config.vocab_size:
        raise ValueError(
            f"{vocabulary}: token id {max(ids)} is too large; allowed: below vocab_size "
            f"{config.vocab_size} of config.json"
        )
    return code


def tokenizer_code(snapshot: Path) -> set[str]:
    """Python files that the `auto_map` of a snapshot's tokenizer names, and what they import."""
    path = snapshot / "tokenizer_config.json"
    names = class_names(path, read_json(path).get("auto_map") or {})
    return code_files(snapshot, names, f"auto_map of {path}")


def check_output(output: Path) -> None:
    """Check that `output` can be written.

    Raises:
        ValueError: It is a file, or a folder with something in it.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={output} is a file; allowed: a new or an empty folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output={output} is not empty; allowed: a new or an empty folder")


def _token_ids(file: Path) -> list[int]:
    """All ids of a tokenizer.json; a vocabulary that is a list counts its tokens from 0."""
    content = read_object(file)
    model, added = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    for name, value, kinds in (("model.vocab", vocab, (dict, list)), ("added_tokens", added, list)):
        if not isinstance(value, kinds):
            raise ValueError(
                f"{file}: {name} is of type {type(value).__name__}; allowed: the tokens"
            )
    if isinstance(vocab, list):
        vocab = {index: index for index in range(len(vocab))}
    ids = [(f"model.vocab[{token!r:.80}]", token_id) for token, token_id in vocab.items()]
    for index, token in enumerate(added):
        token_id = token.get("id") if isinstance(token, dict) else None
        ids.append((f"id of added_tokens[{index}]", token_id))
    for name, token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise ValueError(
                f"{file}: {name} is {token_id!r:.80}; allowed: a whole number, 0 or larger"
            )
    return [token_id for _, token_id in ids]
