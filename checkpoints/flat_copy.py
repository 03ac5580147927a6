"""A flat copy of the package's code, as a folder with weights needs it.

Hub remote code is a flat folder: Transformers looks for a file's siblings in the file's own folder,
and finds them by the text `from .name import`. So `ops/kda/chunked.py` becomes
`ops_kda_chunked.py`, and `from kimi_linear.ops.kda.chunked import x` becomes
`from .ops_kda_chunked import x`; nothing else changes. Only what the two entry files import,
directly or not, is copied. The installed package writes the copy; a model that was loaded from a
copy saves its own files on. This module is not part of the copy.
"""

import ast
import functools
from pathlib import Path

import kimi_linear
from kimi_linear.upstream.remote_code import SIBLING_IMPORT

ENTRIES = ("configuration_kimi_linear", "modeling_kimi_linear")


def write_flat_copy(folder: Path) -> None:
    """Write this package's code into `folder`.

    Raises:
        ValueError: As `flat_copy`.
    """
    for name, text in package_code().items():
        (folder / name).write_bytes(text.encode())


@functools.cache
def package_code() -> dict[str, str]:
    """The flat copy of this package; do not change it."""
    return flat_copy(Path(kimi_linear.__file__).parent, "kimi_linear", kimi_linear.__version__)


def flat_copy(root: Path, package: str, version: str) -> dict[str, str]:
    """Make the flat copy of a package, the same every time.

    Args:
        root: The package's folder.
        package: The name under which its files import each other.
        version: Named in each file's first line.

    Returns:
        Text by file name, sorted by name.

    Raises:
        ValueError: A file imports in a way that a flat folder cannot have, or two files get one
            name; the message says which file and line.
    """
    modules: dict[str, Path] = {}  # by flat name
    copies: dict[str, str] = {}
    pending = [(root / f"{name}.py") for name in ENTRIES]
    while pending:
        file = pending.pop()
        name = _flat_name(file, root)
        if modules.setdefault(name, file) != file:
            raise ValueError(f"{file} and {modules[name]} would both be {name}.py")
        if f"{name}.py" in copies:
            continue
        text, needed = _flattened(file, root, package)
        source = f"{package}/{file.relative_to(root).as_posix()}"
        first = f"# Made from {source} of {package.replace('_', '-')} {version}: change it there.\n"
        copies[f"{name}.py"] = first + text
        pending += needed
    return dict(sorted(copies.items()))


def _flat_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return "_".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _flattened(file: Path, root: Path, package: str) -> tuple[str, list[Path]]:
    """The file's text with imports of siblings, and the files that these are in."""
    lines = file.read_bytes().splitlines(keepends=True)  # the syntax tree counts bytes
    needed = []
    for node in _imports(file, package):
        where = f"{file}:{node.lineno}"
        module = _module_file(node, where, root, package)
        needed.append(module)
        line, start = lines[node.lineno - 1], node.col_offset
        old = f"from {node.module} import".encode()
        if line[start : start + len(old)] != old:
            raise ValueError(f"{where}: write 'from {node.module} import' on one line")
        new = f"from .{_flat_name(module, root)} import".encode()
        lines[node.lineno - 1] = line[:start] + new + line[start + len(old) :]
    text = b"".join(lines).decode()
    found = {"".join(groups) for groups in SIBLING_IMPORT.findall(text)}
    for name in sorted(found ^ {_flat_name(module, root) for module in needed}):
        raise ValueError(
            f"{file}: 'from .{name} import' must be a statement on lines of its own, for "
            "Transformers finds it by its text"
        )
    return text, needed


def _imports(file: Path, package: str) -> list[ast.ImportFrom]:
    """Statements that import from the package, wherever they stand, the last one first."""
    found = []
    for node in ast.walk(ast.parse(file.read_bytes(), filename=str(file))):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names):
                if name.partition(".")[0] == package:
                    raise ValueError(f"{where}: 'import {name}' must be 'from {name} import ...'")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{where}: a relative import must be 'from {package}... import'")
            if node.module and node.module.partition(".")[0] == package:
                found.append(node)
    return sorted(found, key=lambda node: (node.lineno, node.col_offset), reverse=True)


def _module_file(node: ast.ImportFrom, where: str, root: Path, package: str) -> Path:
    """The file of the module that a statement imports from."""
    assert node.module
    folder = root.joinpath(*node.module.split(".")[1:])
    for name in [alias.name for alias in node.names]:
        # Transformers would not see `from . import module`
        if _is_module(folder / name) or name == "*":
            raise ValueError(
                f"{where}: 'from {node.module} import {name}' must import names of one module"
            )
    file = folder / "__init__.py"
    file = file if file.is_file() else folder.with_suffix(".py")
    if folder == root or not file.is_file():
        raise ValueError(f"{where}: {node.module} is no module below {package}")
    return file


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
