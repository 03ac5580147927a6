"""What `.ci/run` decides: which new releases it tests, and how it ends."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CI = Path(__file__).parent.parent / ".ci"


def load_newest():
    spec = importlib.util.spec_from_file_location("newest", CI / "newest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


newest = load_newest()
PINS = {name: newest.pins()[name] for name in newest.MARKS}


def release(folder: Path, name: str, version: str, *needs: str) -> None:
    """A wheel of nothing but what an index says of it."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines))
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr(f"{info}/RECORD", "")


def ask(folder: Path) -> subprocess.CompletedProcess[str]:
    """What the command says where a folder is the only index."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    environment |= {"PIP_FIND_LINKS": str(folder)}
    return subprocess.run(
        [sys.executable, CI / "newest.py"], env=environment, capture_output=True, text=True
    )


def test_nothing_is_new_where_the_pins_are_the_newest_that_is_allowed(tmp_path):
    for name, version in PINS.items():
        release(tmp_path, name, version)
    release(tmp_path, "transformers", "6.0.0")
    release(tmp_path, "transformers", "5.999.0rc1")
    done = ask(tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_new_release_comes_with_what_it_needs(tmp_path):
    for name, version in PINS.items():
        release(tmp_path, name, version)
    release(tmp_path, "transformers", "5.999.0", "tokenizers>=99", "numpy")
    release(tmp_path, "tokenizers", "99.1")
    done = ask(tmp_path)
    assert done.returncode == 0, done.stderr
    marks, requirements = done.stdout.splitlines()
    assert marks == "core or finetune"
    assert set(requirements.split()) == {"transformers==5.999.0", "tokenizers==99.1"}


def test_an_index_that_does_not_answer_is_an_error(tmp_path):
    done = ask(tmp_path)
    assert done.returncode != 0 and done.stdout == ""
    assert "the index does not say what is new" in done.stderr


def test_an_index_without_the_pinned_release_is_an_error():
    with pytest.raises(SystemExit, match="offers trl 1.15.0, older than 1.16.0"):
        newest.newer({"peft": "0.22", "trl": "1.15.0"}, {"peft": "0.21", "trl": "1.16.0"})
    # versions are numbers, not text
    assert newest.newer({"peft": "0.100"}, {"peft": "0.21"}) == {"peft": "0.100"}
    assert newest.newer(PINS, PINS) == {}


@pytest.mark.parametrize(
    ("names", "marks"),
    [
        (["trl"], "finetune"),
        (["peft", "trl"], "finetune"),
        (["trl", "transformers"], "core or finetune"),
    ],
)
def test_new_releases_need_the_tests_of_what_they_can_break(names, marks):
    assert newest.expression(names) == marks


def run_sections(script: str) -> subprocess.CompletedProcess[str]:
    start = f"set -euo pipefail; source {CI}/sections.sh; section first; section second one;"
    return subprocess.run(["bash", "-c", start + script], capture_output=True, text=True)


def test_a_failing_section_is_named_and_ends_the_run():
    done = run_sections("false; section third")
    assert done.returncode != 0 and "third" not in done.stdout
    assert done.stdout.splitlines()[-1].split(maxsplit=1)[1] == 'FAILED in "second one"'
    assert run_sections("exit 7").returncode == 7


def test_the_seconds_of_all_sections_are_listed():
    done = run_sections("sleep 1.1; section third")
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()[-4:]]
    assert [name for _, name in rows] == ["first", "second one", "third", "all passed"]
    seconds = [int(each) for each, _ in rows]
    assert seconds[1] >= 1 and sum(seconds[:3]) == seconds[3]
