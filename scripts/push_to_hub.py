"""Push a Kimi Linear checkpoint folder to the Hub, with a model card.

The folder is checked first: config, code, every tensor of every shard, tokenizer. These files are
pushed, with README.md and its images, a licence and results; the rest is named and stays. A
README.md that is there already, in the folder or in the repository, is kept unless
--overwrite-card is given. The token is the one of `hf auth login` or of HF_TOKEN; another server
than the public Hub is chosen with HF_ENDPOINT.

Examples:
    python scripts/push_to_hub.py runs/demo --repo-id me/kimi-linear-demo --dry-run
    python scripts/push_to_hub.py runs/demo --repo-id me/kimi-linear-demo --private \\
        --metrics runs/demo/eval_results.json --dataset roneneldan/TinyStories --license mit
    python scripts/push_to_hub.py runs/demo/checkpoint-500 --repo-id me/kimi-linear-demo \\
        --revision step-500 --message "After 500 steps"
"""

import argparse
import ast
import collections
import fnmatch
import glob
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from generating.terminal import shown
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from publishing.model_card import TASKS, Statements, model_card, read_metrics
from tqdm import tqdm

import kimi_linear
from kimi_linear import KimiLinearConfig
from kimi_linear.checkpoints.checks import check_checkpoint, check_finite, check_inside
from kimi_linear.checkpoints.files import read_header
from kimi_linear.checkpoints.pretrained import AUTO_MAP
from kimi_linear.tokenizer.snapshot import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
# What a model folder consists of beside its weights and code. Whatever else lies there, such as
# training state, sessions, drafts of a killed run, logs and secrets, stays where it is.
BELONGS = (
    CARD,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tiktoken.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "eval_results.json",
    "curves.png",
)
# Where a link of a card leads: [text](here), [label]: here, src="here".
LINK = re.compile(
    r"""(?:\]\(|\]:|\b(?:src|href)=)\s*"""
    r"""(?:<([^<>\n]+)>|"([^"\n]+)"|'([^'\n]+)'|((?:[^\s()<>"']|\([^\s()]*\))+))"""
)
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
# Weights of an earlier push that this one does not have would be loaded instead, or lie around.
STALE = ("model.safetensors", "model-?????-of-?????.safetensors", INDEX)

# A class in an `auto_map`: "module.Class", or "owner/repository--module.Class" of another one.
CLASS_NAME = re.compile(r"(?:\S+--)?[\w-]+\.\w+")

# Characters of a server's answer in a message.
MAX_ERROR = 400
# What to do about a refusal, by its status.
HINTS = {
    401: "the token is not valid: `hf auth login`, or HF_TOKEN",
    403: "the token may not write there",
    404: "there is no such repository, or the token may not see it",
    409: "something else is changing the repository: try again",
    412: "something else has changed the repository: try again",
}


class PushError(RuntimeError):
    """The server refused a push, or could not be reached; the message is one line."""


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
    fields = _read_json(folder / "config.json")
    if fields.get("model_type") != KimiLinearConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {fields.get('model_type')!r}; allowed: "
            f"{KimiLinearConfig.model_type!r}"
        )
    architecture = _check_architecture(folder, fields)
    code = check_code(folder, fields.get("auto_map") or {}, architecture)
    config = KimiLinearConfig.from_pretrained(folder)
    shapes = check_weights(folder, config, architecture)
    code |= check_tokenizer(folder, config)
    return Checkpoint(folder, config, shapes, frozenset({*code, *_weight_files(folder)}))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    return read_json(path)


def _check_architecture(folder: Path, fields: dict[str, Any]) -> str:
    """The name of the model's class."""
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in TASKS:
        raise ValueError(
            f"{folder / 'config.json'}: architectures is {names!r}; allowed: one of "
            f"{', '.join(TASKS)}, in a list"
        )
    return names[0]


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
    config_file = folder / "config.json"
    references = class_names(config_file, auto_map)
    for auto_class in ("AutoConfig", TASKS[architecture][1]):
        found, wanted = auto_map.get(auto_class), AUTO_MAP[auto_class]
        if found != wanted:
            raise ValueError(
                f"{config_file}: auto_map[{auto_class!r}] is {found!r}; allowed: {wanted!r}, which "
                "save_pretrained writes"
            )
    return _code_files(folder, references, f"auto_map of {config_file}")


def class_names(file: Path, auto_map: Any) -> list[str]:
    """The classes that an `auto_map` names.

    Args:
        file: Where it stands, for the message.
        auto_map: What stands there.

    Returns:
        "module.Class" each, or "owner/repository--module.Class" for code of another repository.

    Raises:
        ValueError: It is no object, or an entry is no such name and no list of names and nulls.
    """
    if not isinstance(auto_map, dict):
        raise ValueError(f"{file}: auto_map is {auto_map!r:.80}; allowed: an object")
    names: list[str] = []
    for key, entry in auto_map.items():
        for name in entry if isinstance(entry, list) else [entry]:
            if name is None:
                continue
            if not isinstance(name, str) or not CLASS_NAME.fullmatch(name):
                raise ValueError(
                    f"{file}: auto_map[{key!r:.80}] is {entry!r:.80}; allowed: 'module.Class', or "
                    "a list of such names and null"
                )
            names.append(name)
    return names


def _code_files(folder: Path, references: Iterable[str], needed_by: str) -> set[str]:
    """The names of the files that "module.Class" references need, directly or by import. Code of
    another repository needs none."""
    classes: dict[str, set[str]] = {}
    for reference in references:
        module, _, name = reference.rpartition(".")
        if "--" not in module:
            classes.setdefault(module, set()).add(name)
    pending = [(module, needed_by) for module in classes]
    seen: set[str] = set()
    while pending:
        module, needed_by = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        file = folder / f"{module}.py"
        if not file.is_file():
            raise ValueError(f"{file} is missing; {needed_by} needs it")
        tree = parse_python(file)
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        for name in classes.get(module, set()) - defined:
            raise ValueError(f"{file} defines no class {name}; {needed_by} needs it")
        pending += [(sibling, str(file)) for sibling in _siblings(tree)]
    return {f"{module}.py" for module in seen}


def parse_python(file: Path) -> ast.Module:
    """A file's syntax tree; ValueError if it is not Python."""
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not Python ({error})") from error


def _siblings(tree: ast.Module) -> list[str]:
    """The modules that `from .module import name` statements anywhere in the file name."""
    return [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    ]


def check_weights(
    folder: Path, config: KimiLinearConfig, architecture: str
) -> dict[str, tuple[int, ...]]:
    """Check every tensor against the index and against the model that the config describes.

    Args:
        folder: The checkpoint.
        config: Its config.
        architecture: The model's class.

    Returns:
        Shape by name, from the files' headers.

    Raises:
        ValueError: A file or tensor is missing, is not listed, is truncated or has another shape.
    """
    places = _weight_map(folder)
    names = [WEIGHTS] if places is None else sorted(set(places.values()))
    extra = {file.name for file in folder.glob("model*.safetensors")} - set(names)
    if extra:
        listed = WEIGHTS if places is None else f"the shards that {INDEX} lists"
        raise ValueError(f"{folder}: {', '.join(sorted(extra))} is left over; allowed: {listed}")
    found: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        header = read_header(str(folder / name))
        shapes |= header
        found |= dict.fromkeys(header, name)
    if places is not None:
        _check_index(folder / INDEX, places, found)
    with torch.device("meta"):
        model = getattr(kimi_linear, architecture)(config)
    check_checkpoint([str(folder / name) for name in names], model)
    return shapes


def _weight_map(folder: Path) -> dict[str, str] | None:
    """File by tensor, from the index; None where one file has all."""
    has_index = (folder / INDEX).is_file()
    if has_index == (folder / WEIGHTS).is_file():
        state = "both are there" if has_index else "both are missing"
        raise ValueError(f"{folder}: of {WEIGHTS} and {INDEX} one is needed, and {state}")
    if not has_index:
        return None
    places = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"{folder / INDEX}: weight_map must be an object with a file by tensor")
    absolute = sorted(name for name in set(places.values()) if os.path.isabs(name))
    if absolute:
        raise ValueError(f"{folder / INDEX} names {absolute[0]}; allowed: names in this folder")
    check_inside(str(folder), [str(folder / name) for name in places.values()])
    return places


def _weight_files(folder: Path) -> set[str]:
    """The names of the files that the weights consist of, the index among them."""
    places = _weight_map(folder)
    return {WEIGHTS} if places is None else {INDEX, *places.values()}


def _check_index(index: Path, places: dict[str, str], found: dict[str, str]) -> None:
    """Each tensor is in the shard that the index says, and each tensor in a shard is listed."""
    for tensor in sorted(set(places) | set(found)):
        if places.get(tensor) != found.get(tensor):
            raise ValueError(
                f"{index}: tensor {tensor} is listed in {places.get(tensor, 'no shard')} and found "
                f"in {found.get(tensor, 'no shard')}"
            )


def check_weight_values(folder: Path) -> None:
    """Read all weights of a folder.

    Raises:
        ValueError: A tensor holds NaN or Inf.
    """
    files = sorted(str(folder / name) for name in _weight_files(folder) - {INDEX})
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
    references = class_names(settings, _read_json(settings).get("auto_map") or {})
    code = _code_files(folder, references, "auto_map of tokenizer_config.json")
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


def _token_ids(file: Path) -> list[int]:
    """All ids of a tokenizer.json; a vocabulary that is a list counts its tokens from 0."""
    content = _read_json(file)
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


def files_to_push(
    checkpoint: Checkpoint, include: Sequence[str] = (), *, keeps_card: bool = True
) -> list[str]:
    """The files that are pushed, as paths in the repository: what a model folder consists of, the
    images of its card if `keeps_card`, and what matches `include`. Prints what else is there.

    Raises:
        ValueError: A pattern of `include` matches nothing.
    """
    folder = checkpoint.folder
    found = _found(folder, include)
    own = checkpoint.files | (_card_images(folder / CARD) if keeps_card else set())
    wanted = (*BELONGS, *include)
    names = [name for name in found if name in own or any(_matches(name, each) for each in wanted)]
    rest = collections.Counter(
        top + "/" * bool(inner)
        for top, _, inner in (name.partition("/") for name in found if name not in set(names))
    )
    listed = [f"{n} ({c} files)" if n[-1] == "/" else n for n, c in rest.items()]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.is_file():
            kind = "a folder" if path.is_dir() else "nothing"
            listed.append(f"{path.relative_to(folder).as_posix()} (link to {kind})")
    if listed:
        text = f"not pushed, no part of a model: {', '.join(listed)} (--include takes files in)"
        print(shown(text), flush=True)
    return names


def _found(folder: Path, include: Sequence[str]) -> list[str]:
    """All files of a folder; ValueError if a pattern of `include` matches none."""
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for pattern in include:
        if not any(_matches(name, pattern) for name in found):
            raise ValueError(
                f"include: {pattern!r} is no file of {folder}; allowed: patterns, whose * stays in "
                "one folder and takes no name that begins with a dot"
            )
    return found


def _matches(name: str, pattern: str) -> bool:
    """As in a shell: `*` stays in one folder, and takes no name that begins with a dot."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(
        fnmatch.fnmatchcase(part, each) and part.startswith(".") <= each.startswith(".")
        for part, each in zip(parts, wanted, strict=True)
    )


def _card_images(card: Path) -> set[str]:
    """Where a card's links to images lead, as paths from its folder; {} without a card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    targets = ("".join(groups) for groups in LINK.findall(text))
    paths = {posixpath.normpath(unquote(re.split("[?#]", each)[0])) for each in targets}
    return {path for path in paths if path.lower().endswith(IMAGES)}


def main(
    *,
    path: str | os.PathLike[str],
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload Kimi Linear model",
    metrics: str | os.PathLike[str] | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    languages: Sequence[str] = (),
    base_model: str | None = None,
    overwrite_card: bool = False,
    include: Sequence[str] = (),
    check_values: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str | None:
    """Check a checkpoint folder, write its card and push it.

    Args:
        path: The folder.
        repo_id: Where to: `user/name`, or `name` for one's own namespace.
        private: Make the repository private if it does not exist yet.
        revision: Branch, made if need be; None for main.
        message: First line of the commit.
        metrics: JSON file with measured values, see `read_metrics`.
        datasets: Training data: Hub ids, or words.
        license: The weights' licence.
        languages: Language codes.
        base_model: Hub id of the model that this one was trained from.
        overwrite_card: Replace a README.md that is there already.
        include: Patterns of files to push that are no part of a model.
        check_values: Read all weights and refuse NaN and Inf.
        dry_run: Only check, and print what would be pushed; write nothing, ask no server.
        endpoint: Server; None for HF_ENDPOINT or the public Hub.
        token: Access token; None for the one of the login or of HF_TOKEN.

    Returns:
        The address of what was pushed; None after a dry run.

    Raises:
        ValueError: The folder is not complete, or an argument is wrong.
        PushError: The server refused, or could not be reached.
    """
    validate_repo_id(repo_id)
    measured = read_metrics(metrics) if metrics is not None else []
    statements = Statements(measured, datasets, license, languages, base_model)
    checkpoint = check_folder(path)
    if check_values:
        check_weight_values(checkpoint.folder)
    print(f"{checkpoint.folder}: {len(checkpoint.shapes)} tensors, complete", flush=True)
    if dry_run:
        _print_plan(checkpoint, repo_id, statements, overwrite_card, include)
        return None
    if token is None and get_token() is None:
        raise ValueError("token is None; allowed: a write token, from `hf auth login` or HF_TOKEN")
    _found(checkpoint.folder, include)  # before anything is made on the server
    api = HfApi(endpoint=endpoint, token=token)
    with _one_line_errors(repo_id):
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        _put_card(api, checkpoint, url.repo_id, revision, statements, overwrite_card)
        names = files_to_push(checkpoint, include)
        size = sum((checkpoint.folder / name).stat().st_size for name in names)
        print(f"pushing {len(names)} files, {size / 1e6:,.1f} MB", flush=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=checkpoint.folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=list(STALE),
        )
    address = str(url) if revision is None else f"{url}/tree/{revision}"
    print(address)
    return address


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """PushError for what requests end with: refusals, broken connections, uploads that failed."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # uploads raise RuntimeError from the cause
        cause = error if isinstance(error, HTTPError) else error.__cause__ or error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        hint = f"{HINTS[status]}. " if status in HINTS else ""
        text = shown(" ".join(f"{type(cause).__name__}: {cause}".split()))[:MAX_ERROR]
        raise PushError(f"{repo_id} was not pushed: {hint}{text}") from error


def _print_plan(
    checkpoint: Checkpoint,
    repo_id: str,
    statements: Statements,
    overwrite_card: bool,
    include: Sequence[str],
) -> None:
    """Say what a push would do."""
    names = files_to_push(checkpoint, include, keeps_card=not overwrite_card)
    kept = CARD in names and not overwrite_card
    print(f"to {repo_id}:")
    for name in names:
        print(f"  {shown(name)}  {(checkpoint.folder / name).stat().st_size:,} bytes")
    if kept:
        print(f"{CARD} stays as it is")
    else:
        card = model_card(repo_id, checkpoint.config, checkpoint.shapes, statements)
        print(f"{CARD} would be:\n\n{card}")


def _put_card(
    api: HfApi,
    checkpoint: Checkpoint,
    repo_id: str,
    revision: str | None,
    statements: Statements,
    overwrite_card: bool,
) -> None:
    """Write the card into the folder, unless there is one here or in the repository."""
    file = checkpoint.folder / CARD
    if not overwrite_card:
        place = str(file) if file.exists() else None
        if place is None and api.file_exists(repo_id, CARD, revision=revision):
            place = f"the one of {repo_id}"
        if place is not None:
            print(f"{CARD}: kept {place} (--overwrite-card replaces it)", flush=True)
            return
    card = model_card(repo_id, checkpoint.config, checkpoint.shapes, statements)
    file.write_text(card, encoding="utf-8")
    print(f"{CARD}: written to {file}", flush=True)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's flags, as `main` wants them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="folder with the saved model and tokenizer")
    parser.add_argument("--repo-id", required=True, help="user/name")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--revision", help="branch, made if need be (default: main)")
    parser.add_argument("--message", default="Upload Kimi Linear model", help="of the commit")
    parser.add_argument("--metrics", help="JSON file with measured values for the card")
    parser.add_argument(
        "--dataset",
        dest="datasets",
        action="append",
        default=[],
        help="training data, a Hub id or words; may be repeated",
    )
    parser.add_argument("--license", help="the weights' licence, such as mit")
    parser.add_argument(
        "--language", dest="languages", action="append", default=[], help="such as en"
    )
    parser.add_argument("--base-model", help="Hub id of the model this one was trained from")
    parser.add_argument("--overwrite-card", action="store_true", help="replace README.md")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        help="files to push too, such as 'figures/*.png'; * stays in one folder, without dot files",
    )
    parser.add_argument(
        "--check-values", action="store_true", help="read all weights, refuse NaN and Inf"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(**vars(parse_args()))
    except (ValueError, PushError) as error:
        raise SystemExit(f"error: {error}") from error
