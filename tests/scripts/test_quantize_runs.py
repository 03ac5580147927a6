"""scripts/quantize.py: runs that are killed, and runs that read a text."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
import quantize
import torch
from builders import token_ids
from one_thread import one_thread  # noqa: F401
from quantize_runs import (
    SCRIPTS,
    assert_same,
    calibration,
    contents,
    logits,
    make_snapshot,
    make_text,
    run,
    settings,
    tensors_of,
)
from quantizing.calibration import read_calibration
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kimi_linear import KimiLinearConfig

pytestmark = pytest.mark.transformers

# Dies when the script has written so many tensors, or has begun or ended so many files.
DYING = f"""
import json, os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {str(SCRIPTS)!r})
import quantize
from quantizing.writing import TensorFile
left = int(sys.argv[1])
def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
def wrap(name, is_around):
    inner = getattr(TensorFile, name)
    def outer(*args):
        count()
        found = inner(*args)
        if is_around:
            count()
        return found
    setattr(TensorFile, name, outer)
wrap("write", False)
wrap("__exit__", True)
copy = quantize._copy_files
quantize._copy_files = lambda *args: [count(), copy(*args), count()]
quantize.main(**json.loads(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_snapshot(tmp_path_factory.mktemp("original"))


@pytest.fixture
def snapshot(original: Path, tmp_path: Path) -> Path:
    """One that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "snapshot"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def output(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without data makes."""
    return run(original, tmp_path_factory.mktemp("data-free") / "out")


@pytest.fixture(scope="module")
def calibrated(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(original, tmp_path_factory.mktemp("calibrated") / "out", **calibration(text))


# ---- killed --------------------------------------------------------------------------------------


def run_until_whole(arguments: dict[str, Any], events: int) -> int:
    """Run a script that dies again and again, each time later; returns how often it did."""
    for deaths in range(40):
        number = events + 7 * deaths
        process = commands.start(["-c", DYING, str(number), json.dumps(arguments)])
        process.join(commands.PATIENCE)
        assert process.exitcode in (0, -9)
        if process.exitcode == 0:
            return deaths
        assert not Path(arguments["output"]).exists()
    raise AssertionError("it makes no progress")


def test_killed_runs_go_on_and_end_as_others(original: Path, output: Path, tmp_path: Path) -> None:
    arguments = settings(original, tmp_path / "out")
    assert run_until_whole(arguments, 100) >= 3
    assert contents(tmp_path / "out") == contents(output)
    assert os.listdir(tmp_path) == ["out"]


def test_killed_calibration_goes_on_and_ends_as_others(
    original: Path, text: Path, calibrated: Path, tmp_path: Path
) -> None:
    arguments = settings(original, tmp_path / "out", **calibration(text))
    assert run_until_whole(arguments, 101) >= 3
    assert contents(tmp_path / "out") == contents(calibrated)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_a_kill_at_the_end_of_a_file_or_of_all(
    is_calibrated: bool, original: Path, text: Path, tmp_path: Path, request: Any
) -> None:
    options = calibration(text) if is_calibrated else {}
    arguments = settings(original, tmp_path / "out", **options)
    draft = tmp_path / "_unfinished-out-to-resume"
    # of the embedding's file: after its three tensors, around its end and that of hidden states
    for events in (4, 5, 6, 7) if is_calibrated else (4, 5):
        process = commands.start(["-c", DYING, str(events), json.dumps(arguments)])
        process.join(commands.PATIENCE)
        assert process.exitcode == -9 and draft.is_dir()
    run(original, tmp_path / "out", **options)
    wanted = request.getfixturevalue("calibrated" if is_calibrated else "output")
    assert contents(tmp_path / "out") == contents(wanted)


def stopped(arguments: dict[str, Any], output: Path) -> Path:
    """The folder of a run that died when two files were whole."""
    process = commands.start(["-c", DYING, "60", json.dumps(arguments)])
    process.join(commands.PATIENCE)
    assert process.exitcode == -9
    return output.with_name(f"_unfinished-{output.name}-to-resume")


def test_whole_files_are_kept_and_broken_ones_are_not(
    original: Path, output: Path, tmp_path: Path
) -> None:
    draft = stopped(settings(original, tmp_path / "out"), tmp_path / "out")
    whole = sorted(draft.glob("*.safetensors"))
    assert len(whole) == 2 and len(list(draft.glob("*.unfinished"))) == 1
    kept = whole[0].stat()
    os.truncate(whole[1], whole[1].stat().st_size - 1)
    out = run(original, tmp_path / "out")
    assert contents(out) == contents(output)
    found = (out / whole[0].name).stat()
    assert (found.st_ino, found.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_other_settings_are_refused(snapshot: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draft = stopped(settings(snapshot, out), out)
    changed = r"quantization\.experts\.bits is 4, and was 3 in the unfinished run in .*to-resume"
    with pytest.raises(ValueError, match=changed):
        run(snapshot, out, experts="bits=4,group=32")
    with pytest.raises(ValueError, match=r"calibration.* is .*, and was None"):
        run(snapshot, out, **calibration(text))
    shard = next(snapshot.glob("*.safetensors"))
    os.utime(shard)
    with pytest.raises(ValueError, match=rf"files\.{shard.name} is \[.*, and was \["):
        run(snapshot, out)
    (draft / "quantize.json").unlink()
    with pytest.raises(ValueError, match=r"to-resume has no quantize.json, and is in the way"):
        run(snapshot, out)
    shutil.rmtree(draft)
    run(snapshot, out)


def test_an_error_after_the_last_file(
    original: Path, text: Path, calibrated: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_copy_files", fail)
        with pytest.raises(OSError, match="no room"):
            run(original, tmp_path / "out", **calibration(text))
    draft = tmp_path / "_unfinished-out-to-resume"
    # as if killed before what is needed no more was removed
    (draft / "hidden-00005.safetensors").write_text("old")
    run(original, tmp_path / "out", **calibration(text))
    assert contents(tmp_path / "out") == contents(calibrated)


# ---- calibrated ----------------------------------------------------------------------------------


def test_calibrated_weights_answer_better_on_such_text(
    original: Path, output: Path, calibrated: Path, text: Path
) -> None:
    assert tensors_of(calibrated).keys() == tensors_of(output).keys()
    held = load_file(calibrated / "model-00001-of-00006.safetensors")
    assert_same(held, load_file(output / "model-00001-of-00006.safetensors"))
    ids = AutoTokenizer.from_pretrained(original)(text.read_text())["input_ids"]
    ids = torch.tensor(ids[1024:1536])[None]
    wide = logits(original, ids)
    errors = [(logits(folder, ids) - wide).norm() / wide.norm() for folder in (output, calibrated)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("num_tokens", [2, 33])
def test_experts_that_no_token_chooses(
    num_tokens: int, original: Path, text: Path, tmp_path: Path
) -> None:
    out = run(original, tmp_path / "out", calibrate=text, calibration_tokens=num_tokens)
    assert logits(out, token_ids(1, 8)).isfinite().all()


def test_lines_of_texts_and_conversations(original: Path, tmp_path: Path) -> None:
    config = KimiLinearConfig.from_pretrained(original)
    file = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]
    rows = [{"text": "the first"}, {"messages": chat}, {"text": "the other"}]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = read_calibration(file, original, config, 1000)
    assert found.ids.shape[0] == 1 and found.ids.shape == found.positions.shape
    assert (found.positions == 0).sum() == 3  # where a text begins
    assert found.settings == read_calibration(file, original, config, 1000).settings
    few = read_calibration(file, original, config, 10)
    assert few.ids.shape == (1, 10) and few.settings != found.settings


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": 3}\n', "line 1 has the fields text; allowed: one with `text`"),
        ("rows.jsonl", b'{"text": "a b"}\n[1]\n', "line 2 holds no object"),
        ("rows.jsonl", b"text\n", "line 1 is not JSON"),
        ("rows.jsonl", b"\n", "has no text of two tokens or more"),
        ("text.txt", b"", "has no text of two tokens or more"),
        ("text.txt", b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_text(
    name: str, content: bytes, message: str, original: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(original, tmp_path / "out", calibrate=tmp_path / name)


def test_a_snapshot_without_a_tokenizer(snapshot: Path, text: Path, tmp_path: Path) -> None:
    (snapshot / "tokenizer.json").unlink()
    run(snapshot, tmp_path / "converted", **calibration(text))
    (snapshot / "tiktoken.model").unlink()
    with pytest.raises(ValueError, match="has neither tokenizer.json nor tiktoken.model"):
        run(snapshot, tmp_path / "out", **calibration(text))
