"""What tests with other engines share: where these are, and a file with what came out.

KIMI_LLAMA_CPP names a checkout of llama.cpp with its programs built; KIMI_ENGINE_RESULTS a file to
write. `make test-engines` sets both.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("kimi-linear", "torch", "transformers", "mlx-lm", "mlx", "vllm", "sglang")
LINES: list[str] = []


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The checkout."""
    folder = os.environ.get("KIMI_LLAMA_CPP", "")
    if not (Path(folder) / "build" / "bin" / "llama-perplexity").is_file():
        pytest.skip("KIMI_LLAMA_CPP names no checkout of llama.cpp that is built")
    return Path(folder)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes down what a test measured."""
    return lambda text: request.node.user_properties.append(("measured", text))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    found = (yield).get_result()
    if item.get_closest_marker("engines") and (found.when == "call" or found.skipped):
        measured = "".join(f": {text}" for key, text in item.user_properties if key == "measured")
        LINES.append(f"{found.outcome} {item.path.stem} {item.name}{measured}")


def pytest_sessionfinish() -> None:
    file = os.environ.get("KIMI_ENGINE_RESULTS")
    if file and LINES:
        Path(file).write_text("\n".join([*_versions(), "", *LINES]) + "\n", encoding="utf-8")


def _versions() -> list[str]:
    found = [f"python {platform.python_version()}, {platform.machine()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    program = Path(os.environ.get("KIMI_LLAMA_CPP", "")) / "build" / "bin" / "llama-perplexity"
    if program.is_file():
        done = subprocess.run([program, "--version"], capture_output=True, text=True)
        found.append(f"llama.cpp {(done.stderr + done.stdout).splitlines()[0]}")
    return found
