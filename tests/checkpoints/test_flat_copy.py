"""The flat copy of the package's code: names, imports, and what a flat folder cannot have."""

import ast
import re
from pathlib import Path

import pytest

import kimi_linear
from kimi_linear.checkpoints.flat_copy import flat_copy, package_code

FILES = {
    "__init__.py": "raise ImportError\n",
    "configuration_kimi_linear.py": "from house.presets import SIZES\n",
    "presets.py": "SIZES = {}\n",
    "modeling_kimi_linear.py": """\
'''A model; see `from house.ops.kda import kda` in "house.ops".'''
import torch
from house.configuration_kimi_linear import (
    SIZES,  # größe
)
def f():
    try: ...
    finally: pass
    ä = 1; b = "from house.presets import nothing"
    from house.ops.kda import kda  # house.ops.kda
try:
    from house.ops.kda.chunked import (a,
        b)
except ImportError:
    a = None
""",
    "ops/__init__.py": '"""Operations."""\n',
    "ops/kda/__init__.py": "from house.ops.kda.chunked import a\nimport housekeeping\n",
    "ops/kda/chunked.py": "a = b = 1\n",
    "scripts/unused.py": "import house\n",
}


def made(root: Path, files: dict[str, str]) -> dict[str, str]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return flat_copy(root, "house", "1.2")


def test_only_imports_change(tmp_path):
    copy = made(tmp_path, FILES)
    assert list(copy) == [
        "configuration_kimi_linear.py",
        "modeling_kimi_linear.py",
        "ops_kda.py",
        "ops_kda_chunked.py",
        "presets.py",
    ]
    first = "# Made from house/{} of house 1.2: change it there.\n"
    assert copy["ops_kda.py"] == first.format("ops/kda/__init__.py") + (
        "from .ops_kda_chunked import a\nimport housekeeping\n"
    )
    text = FILES["modeling_kimi_linear.py"]
    for old, new in {
        "\nfrom house.configuration_kimi_linear import": "\nfrom .configuration_kimi_linear import",
        "\n    from house.ops.kda import": "\n    from .ops_kda import",
        "\n    from house.ops.kda.chunked import": "\n    from .ops_kda_chunked import",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert copy["modeling_kimi_linear.py"] == first.format("modeling_kimi_linear.py") + text


@pytest.mark.parametrize(
    ("files", "message"),
    {
        "module": ({"presets.py": "\nimport house.ops\n"}, "presets.py:2: 'import house.ops' must"),
        "package": ({"presets.py": "import house as h\n"}, "presets.py:1: 'import house' must"),
        "relative": ({"presets.py": "from .ops import x\n"}, "presets.py:1: a relative import"),
        "root": ({"presets.py": "from house import x\n"}, "presets.py:1: house is no module below"),
        "unknown": ({"presets.py": "from house.op import x\n"}, "presets.py:1: house.op is no mod"),
        "submodule": (
            {"presets.py": "from house.ops import kda\n"},
            "presets.py:1: 'from house.ops import kda' must import names of one module",
        ),
        "star": ({"presets.py": "from house.ops.kda import *\n"}, "import \\*' must import names"),
        "docstring": (
            {"presets.py": "'''Use it so:\n    from .ops import x\n'''\n"},
            "presets.py: 'from .ops import' must be a statement on lines of its own",
        ),
        "one line": (
            {"presets.py": "x = 1; from house.ops.kda import a\n"},
            "presets.py: 'from .ops_kda import' must be a statement on lines of its own",
        ),
        "torn": (
            {"presets.py": "from \\\n    house.ops.kda import a\n"},
            "presets.py:1: write 'from house.ops.kda import' on one line",
        ),
        "clash": (
            {"presets.py": "from house.ops_kda import a\n", "ops_kda.py": ""},
            "would both be ops_kda.py",
        ),
    }.values(),
)
def test_what_a_flat_folder_cannot_have_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        made(tmp_path, FILES | files)


def test_the_package_imports_only_as_a_flat_folder_can():
    root = Path(kimi_linear.__file__).parent
    copy = package_code()
    assert copy == flat_copy(root, "kimi_linear", kimi_linear.__version__)
    assert "checkpoints_flat_copy.py" not in copy and "layers.py" not in copy
    for name, text in copy.items():
        first = re.match(
            r"# Made from kimi_linear/(\S+) of kimi-linear \S+: change it there\.\n", text
        )
        assert first and (root / first[1]).is_file(), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in copy
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] != "kimi_linear"
