"""Put this package's code beside weights that are already on disk, without rewriting them.

OUTPUT becomes a folder that loads with `trust_remote_code=True`: links to the snapshot's files, a
flat copy of this package's modelling code, and the snapshot's `config.json` with this package's
`auto_map`. Modelling code of another implementation is left out; code that the tokenizer names
stays. The weights are checked by their headers first, every tensor of them. SNAPSHOT itself, for
instance a folder of the Hugging Face cache, is not changed, and must stay where it is: the links
lead there. OUTPUT takes its name when all of it is there: after a kill, the same command begins
anew. Small files that saving would write in place are copies, so that no later
`save_pretrained` into OUTPUT reaches the snapshot.

With --preset or --config instead of SNAPSHOT, OUTPUT has a `config.json` and code but no weights,
for `AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(output, trust_remote_code=True),
trust_remote_code=True)`.

Examples:
    hf download moonshotai/Kimi-Linear-48B-A3B-Instruct --local-dir official
    python scripts/add_code.py official --output kimi-linear-48b
    python scripts/add_code.py ~/models/snapshots/main --output ~/models/ours --copy
    python scripts/add_code.py --preset 20m --output empty-20m
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from publishing.folder import (
    CONFIG,
    check_output,
    check_weight_values,
    empty_model,
    make_config,
    read_architecture,
    read_config,
    tokenizer_code,
)

from kimi_linear import PRESETS, KimiLinearConfig
from kimi_linear.checkpoints.atomic import atomic_folder
from kimi_linear.checkpoints.flat_copy import package_code, write_flat_copy
from kimi_linear.checkpoints.folders import check_weights
from kimi_linear.checkpoints.pretrained import AUTO_MAP

# Written in place, through a link, by save_pretrained and push_to_hub: always copied.
REWRITTEN = (".json", ".jinja", ".md")
# Never copied, whatever --copy says. Saving replaces a link to weights by a file.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def main(
    *,
    output: str | os.PathLike[str],
    snapshot: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    config: str | os.PathLike[str] | None = None,
    copy: bool = False,
    check_values: bool = False,
) -> Path:
    """Make `output` a folder that loads with this package's code.

    Args:
        output: Folder to make; it may exist if it is empty.
        snapshot: Folder with `config.json` and safetensors weights in the released layout, to which
            `output` gets links. Either this or one of the next two.
        preset: A key of `PRESETS`, for a folder without weights.
        config: Folder with a `config.json`, for a folder without weights.
        copy: Copy all files that are no weights instead of linking them.
        check_values: Read all weights and refuse NaN and Inf.

    Returns:
        The absolute path of `output`.

    Raises:
        ValueError: The snapshot is no Kimi Linear model, is incomplete or does not fit its config,
            or `output` is in use; the message names the file, and the tensor if there is one.
    """
    if sum(given is not None for given in (snapshot, preset, config)) != 1:
        raise ValueError("give exactly one of snapshot, --preset and --config")
    target = Path(output).expanduser().absolute()
    if snapshot is None:
        return _without_weights(target, _read_model(preset, config))
    return _beside(Path(snapshot).expanduser().absolute(), target, copy, check_values)


def _beside(source: Path, target: Path, copy: bool, check_values: bool) -> Path:
    """Make the folder of links to a snapshot, once that is found complete."""
    fields = read_config(source)
    check_weights(source, empty_model(fields, read_architecture(source, fields)))
    if check_values:
        check_weight_values(source)
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(
            f"output={target} is in the snapshot, which must not change: choose another"
        )
    check_output(target)
    kept = [path for path in sorted(source.iterdir()) if _is_kept(path, source)]
    for path in kept:
        if not path.exists():
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which is missing")
    text = json.dumps({**fields, "auto_map": AUTO_MAP}, indent=2, ensure_ascii=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as draft:
        for path in kept:
            _place(path, draft / path.name, copy=copy)
        write_flat_copy(draft)
        (draft / CONFIG).write_text(text + "\n", encoding="utf-8")
    print(f"{target}: {len(kept)} files of {source}, {len(package_code())} files of code")
    return target


def _read_model(preset: str | None, config: str | os.PathLike[str] | None) -> KimiLinearConfig:
    """The configuration of a model without weights."""
    if config is None:
        return KimiLinearConfig.from_preset(str(preset))
    return make_config(read_config(Path(config).expanduser().absolute()))


def _without_weights(target: Path, config: KimiLinearConfig) -> Path:
    check_output(target)
    if not config.architectures:
        config.architectures = [AUTO_MAP["AutoModelForCausalLM"].rpartition(".")[2]]
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as draft:
        config.save_pretrained(draft)
    print(f"{target}: {CONFIG} and {len(package_code())} files of code, no weights")
    return target


def _is_kept(path: Path, snapshot: Path) -> bool:
    """Whether a file or folder of the snapshot belongs into the output."""
    if path.name in (CONFIG, ".git", ".cache", "__pycache__") or path.name in package_code():
        return False
    return path.suffix != ".py" or path.name in tokenizer_code(snapshot)


def _place(path: Path, target: Path, *, copy: bool) -> None:
    """Link or copy one file of the snapshot, or all files of a folder of it."""
    if path.is_dir():  # never a link: what lists a folder's files does not follow links to folders
        target.mkdir()
        for inner in sorted(path.iterdir()):
            _place(inner, target / inner.name, copy=copy)
    elif path.suffix not in WEIGHTS and (copy or path.suffix in REWRITTEN):
        shutil.copyfile(path, target)
    else:
        target.symlink_to(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "snapshot", nargs="?", help="folder with config.json and safetensors weights"
    )
    parser.add_argument("--preset", choices=PRESETS, help="instead of SNAPSHOT: without weights")
    parser.add_argument("--config", help="instead of SNAPSHOT: config.json's folder, no weights")
    parser.add_argument("--output", required=True, help="folder to make: a new or an empty one")
    parser.add_argument(
        "--copy", action="store_true", help="copy all files that are no weights, don't link them"
    )
    parser.add_argument(
        "--check-values", action="store_true", help="read all weights, refuse NaN and Inf"
    )
    return parser


if __name__ == "__main__":
    try:
        main(**vars(_parser().parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
