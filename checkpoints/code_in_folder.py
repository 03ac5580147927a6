"""The code beside weights, as an `auto_map` names it; this module is not part of it."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# "module.Class", or "owner/repository--module.Class" for code of another repository.
CLASS_NAME = re.compile(r"(?:\S+--)?[\w-]+\.\w+")


def class_names(file: Path, auto_map: Any) -> list[str]:
    """The classes that an `auto_map` names.

    Args:
        file: The file that holds it, for the message.
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


def code_files(folder: Path, classes: Iterable[str], needed_by: str) -> set[str]:
    """The files of a folder that classes need, directly or by import.

    Args:
        folder: The folder.
        classes: As `class_names` returns them. Code of another repository needs no file.
        needed_by: What names the classes, for the message.

    Returns:
        Names of files.

    Raises:
        ValueError: A file is missing or is not Python; the message says which one needs it.
    """
    pending = [(module, needed_by) for module, _ in _own(classes)]
    seen: set[str] = set()
    while pending:
        module, needed_by = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        file = folder / f"{module}.py"
        if not file.is_file():
            raise ValueError(f"{file} is missing; {needed_by} needs it")
        for node in ast.walk(_parsed(file)):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                pending.append((node.module, str(file)))
    return {f"{module}.py" for module in seen}


def check_classes(folder: Path, classes: Iterable[str], needed_by: str) -> None:
    """Check that files define the classes that they should, which are there.

    Raises:
        ValueError: One does not.
    """
    for module, name in _own(classes):
        file = folder / f"{module}.py"
        nodes = _parsed(file).body
        if not any(isinstance(node, ast.ClassDef) and node.name == name for node in nodes):
            raise ValueError(f"{file} defines no class {name}; {needed_by} needs it")


def _own(classes: Iterable[str]) -> list[tuple[str, str]]:
    """Module and class of those that are not in another repository."""
    parts = [each.rpartition(".") for each in classes if "--" not in each]
    return [(module, name) for module, _, name in parts]


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not Python ({error})") from error
