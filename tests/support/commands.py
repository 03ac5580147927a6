"""Programs as users start them, in processes of their own, without the seconds of their imports.

They are forked from a server that has imported torch, Transformers and the package and has done
nothing else. What reads its environment at import, or must not find the package, needs a process of
`subprocess` instead.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from processes import context

PATIENCE = 300  # seconds, on a machine that has other things to do


def run(command: Sequence[Any], text: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([sys.executable, *command], input=text)` returns."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(text, encoding="utf-8")
        for file in files[1:]:
            file.touch()
        process = start(command, *files, **more)
        process.join(PATIENCE)
        process.kill()
        process.join()
        out, err = (file.read_bytes().decode() for file in files[1:])
    return subprocess.CompletedProcess(list(command), process.exitcode, out, err)


def start(
    command: Sequence[Any],
    stdin: Any = os.devnull,
    stdout: Any = os.devnull,
    stderr: Any = os.devnull,
    env: dict[str, str] | None = None,
) -> BaseProcess:
    """Run a script, or `-c` and a program, with its arguments; a terminal becomes its own."""
    arguments = [str(part) for part in command]
    files = [str(file) for file in (stdin, stdout, stderr)]
    process = context().Process(target=_become, args=(arguments, files, env or dict(os.environ)))
    process.start()
    return process


def _become(command: list[str], files: list[str], env: dict[str, str]) -> None:
    os.setsid()  # so that the first terminal that is opened controls this process
    os.environ.clear()
    os.environ.update(env)
    for descriptor, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR), descriptor)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = os.fdopen(0, encoding=encoding)
    sys.stdout = os.fdopen(1, "w", encoding=encoding, buffering=1)
    sys.stderr = os.fdopen(2, "w", encoding=encoding, buffering=1, errors="backslashreplace")
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
