"""Tells `.ci/run` which releases newer than the pinned ones it has to test, and by which tests.

    .venv/bin/python .ci/newest.py

Prints nothing where constraints.txt pins the newest releases that setup.cfg allows. Otherwise it
prints two lines: pytest's expression of marks, and the requirements that `.venv` lacks. Fails where
the index cannot be asked.
"""

import configparser
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
MARKS = {"transformers": ["core", "finetune"], "peft": ["finetune"], "trl": ["finetune"]}


def ranges() -> list[str]:
    """What setup.cfg allows of the packages in `MARKS`."""
    config = configparser.ConfigParser(comment_prefixes="#")
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["finetune"]
    wanted = [line for line in lines.splitlines() if line and Requirement(line).name in MARKS]
    assert len(wanted) == len(MARKS), wanted
    return wanted


def pins() -> dict[str, str]:
    """Versions by name, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def resolve(requirements: Iterable[str], *flags: str) -> dict[str, str]:
    """Versions of what pip would install, by name."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-"]
    run = subprocess.run([*command, *flags, *requirements], stdout=subprocess.PIPE)
    if run.returncode:
        raise SystemExit(f"the index does not say what is new: pip ended with {run.returncode}")
    found = [item["metadata"] for item in json.loads(run.stdout)["install"]]
    return {each["name"].lower(): each["version"] for each in found}


def newer(found: dict[str, str], pinned: dict[str, str]) -> dict[str, str]:
    """Those of `found` that are newer than the pinned ones.

    An index that does not have the pinned ones either is broken, or only part of it was reached.
    """
    for name, version in found.items():
        if Version(version) < Version(pinned[name]):
            raise SystemExit(f"the index offers {name} {version}, older than {pinned[name]}")
    return {name: version for name, version in found.items() if version != pinned[name]}


def expression(names: Iterable[str]) -> str:
    """The tests that new releases of these packages need, as pytest's `-m` takes them."""
    return " or ".join(sorted({mark for name in names for mark in MARKS[name]}))


def main() -> None:
    new = newer(resolve(ranges(), "--no-deps", "--ignore-installed"), pins())
    if not new:
        return
    exact = [f"{name}=={version}" for name, version in new.items()]
    lacking = resolve(exact)  # some of what a new release needs may have to be newer too
    print(expression(new))
    print(*[f"{name}=={version}" for name, version in lacking.items()])


if __name__ == "__main__":
    main()
