"""What the wheel and the source distribution hold, built from a copy of the tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
COPIED = ("*.py", "*.md", "*.txt", "*.toml", "*.cfg", "*.in", "LICENSE")
BUILD = (
    "import os, sys; from setuptools import build_meta as b; out = sys.argv[1]; "
    "os.makedirs(out); b.build_wheel(out); b.build_sdist(out)"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    tree = tmp_path_factory.mktemp("tree")
    for pattern in COPIED:
        for file in ROOT.glob(pattern):
            shutil.copy(file, tree)
    for folder in (*ROOMS, "scripts", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-c", BUILD, str(tree / "out")], cwd=tree, check=True, capture_output=True
    )
    return tree / "out"


def sources() -> set[str]:
    """The package's Python files, under their installed names."""
    modules = [
        *ROOT.glob("*.py"),
        *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
    ]
    return {f"kimi_linear/{path.relative_to(ROOT).as_posix()}" for path in modules}


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
    templates = {f"kimi_linear/tokenizer/{p.name}" for p in (ROOT / "tokenizer").glob("*.jinja")}
    assert names == sources() | templates
    assert "License-Expression: MIT" in metadata
    for extra in ("gpu", "train", "finetune", "qlora", "test", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_source_distribution_leaves_tests_and_scripts_out(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    python = {name for name in names if name.endswith(".py")}
    assert {f"kimi_linear/{name}" for name in python} == sources()
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= names


def test_importing_the_wheel_registers_the_model_and_does_nothing_else(
    built: Path, tmp_path: Path
) -> None:
    """The environment and devices are left alone."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    program = (
        "import os, torch, transformers.generation.utils, transformers.modeling_utils; "
        "before = dict(os.environ); import kimi_linear; "
        "assert dict(os.environ) == before; assert not torch.cuda.is_initialized(); "
        "from transformers import AutoConfig, AutoModelForCausalLM as Auto; "
        "config = AutoConfig.for_model('kimi_linear'); "
        "print(kimi_linear.__file__, type(config).__module__, "
        "Auto._model_mapping[type(config)].__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert Path(found[0]) == tmp_path / "kimi_linear" / "__init__.py"
    assert found[1:] == ["kimi_linear.configuration_kimi_linear", "KimiLinearForCausalLM"]


def test_the_package_is_imported_under_its_own_name_only() -> None:
    """Whatever the checkout's folder is called, also `kimi` or `kimi_linear`."""
    copies = [name for name in sys.modules if name.endswith("modeling_kimi_linear")]
    roots = {name.partition(".")[0] for name in copies}
    assert roots <= {"kimi_linear", "transformers", "transformers_modules"}
