"""Settings for all tests: few threads, fixed seeds, `gpu` tests only where there is CUDA."""

import importlib.util
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from measuring.autotuning import limit_autotuning

MAX_THREADS = 2
# All of them, for every size and dtype, take the better part of an hour on a fresh machine.
AUTOTUNE_CONFIGS = 2


class RootIsPlainFolder:
    """Keeps pytest from importing the root's `__init__.py` under the name of the checkout's folder.

    It would do so before the first test, and a second copy of the model's classes would take the
    first one's place in the Auto classes.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(
        self, path: Path, parent: pytest.Collector
    ) -> pytest.Collector | None:
        """Collect the root as a folder, not as a package; leave the others to pytest."""
        if path != parent.config.rootpath:
            return None
        return pytest.Dir.from_parent(parent, path=path)


def pytest_configure(config: pytest.Config) -> None:
    """Several workers of pytest-xdist share the cores, so each takes one thread."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(MAX_THREADS, os.cpu_count() or 1) // workers))
    config.pluginmanager.register(RootIsPlainFolder())
    if torch.cuda.is_available():
        limit_autotuning(AUTOTUNE_CONFIGS)
    else:
        bind_native_model_to_torch()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes whole files, in alphabetical order, and makes a file's fixtures once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def bind_native_model_to_torch() -> None:
    """Import Transformers' own Kimi Linear so that it runs on a CPU where FLA is installed too.

    It binds its operators when it is imported, to FLA's if there is such a package, and then calls
    them whatever the device: without a GPU they fail. Our own code is to see FLA, and not use it.
    """
    if importlib.util.find_spec("fla") is not None:
        from measuring.models import native_module

        native_module(torch.device("cpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on machines without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked or torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model of `memorised_chat.py`: the first worker that wants it trains it."""
    from memorised_chat import make_chat_model

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "memorised-chat"
    with FileLock(shared / "memorised-chat.lock"):
        if not folder.exists():
            unfinished = Path(tempfile.mkdtemp(dir=shared))
            make_chat_model(unfinished)
            unfinished.rename(folder)
    return folder
