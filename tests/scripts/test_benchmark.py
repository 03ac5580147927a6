"""scripts/benchmark.py: its limits, its two models, and runs of small sizes."""

import json
from pathlib import Path
from typing import Any

import benchmark
import commands
import pytest
import torch
from measuring.bench import Bench, Effort, packed_lengths
from measuring.device import Rates
from measuring.limits import Limits
from measuring.long_text import LongText
from measuring.models import MODELS, build
from measuring.plot import plot_lines
from options.settings import numbers
from tolerance import assert_close

from kimi_linear import KimiLinearConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "device": "cpu",
    "contexts": (24, 8),
    "batches": (1, 2),
    "prompt_length": 6,
    "new_tokens": 8,
    "train_tokens": 24,
    "repeats": 1,
}
PNG_SIGNATURE = b"\x89PNG"


@pytest.fixture(scope="module")
def limits() -> Limits:
    """Of the 48B model on an H200 that copies 4.24 TB/s."""
    return Limits.of(
        KimiLinearConfig.from_preset("48b-a3b"), torch.bfloat16, Rates(4.24e12, 7.0e14)
    )


def bench(kind: str, **effort: Any) -> Bench:
    """The smallest preset, ready to be measured."""
    config = KimiLinearConfig.from_preset("2m")
    limits = Limits.of(config, torch.float32, Rates(1e10, 1e11))
    model = build(kind, config, device=CPU, dtype=torch.float32)
    return Bench(kind, model, limits, Effort(**effort))


# ---- limits -------------------------------------------------------------------------------------


def test_weights_of_a_decoding_step(limits: Limits) -> None:
    """6.21 GB in 1.47 ms at batch 1; tokens/s of larger batches with uniform routing."""
    step = limits.decode(512)
    assert step["weight_bytes"] == pytest.approx(6.21e9, rel=1e-3)
    assert 1e3 * step["weight_bytes"] / 4.24e12 == pytest.approx(1.47, abs=0.01)
    for batch, tokens_per_second in ((8, 1390), (32, 2140), (128, 5660)):
        seconds = limits.decode(512, batch)["weight_bytes"] / 4.24e12
        assert batch / seconds == pytest.approx(tokens_per_second, rel=1e-3)


def test_states_and_latents_of_a_decoding_step(limits: Limits) -> None:
    """They come on top: at batch 128, states of 20 KDA layers are a tenth of the weights."""
    step = limits.decode(1 << 20, 3)
    assert step["latent_bytes"] == 3 * (1 << 20) * 7 * 1152
    states = 20 * (4 * 32 * 128 * 128 + 2 * 3 * 4096 * 3)
    assert step["state_bytes"] == 2 * 3 * states
    assert limits.cache_bytes(100, 3) == 3 * (100 * 7 * 1152 + states)
    total = sum(step[part] for part in ("weight_bytes", "state_bytes", "latent_bytes"))
    assert step["byte_ms"] == step["ms"] == pytest.approx(1e3 * total / 4.24e12)


def test_operations_of_a_prefill(limits: Limits) -> None:
    """Linear in the tokens but for attention, which takes half of the square."""
    short, long = (limits.prefill(n)["operations"] for n in (1 << 16, 1 << 17))
    head = 2 * 163840 * 2304
    square = 7 * 32 * (192 + 128) * (1 << 16) ** 2 * 2
    assert long - 2 * short + head == pytest.approx(square, rel=1e-6)
    # "3B active": without the embedding table and the head
    active = limits.decode(0)["operations"] / 2 - 163840 * 2304
    assert 2.4e9 < active < 3.0e9
    assert limits.prefill(1 << 17)["ms"] == limits.prefill(1 << 17)["operation_ms"]


def test_a_training_step_is_three_forwards_over_all_logits(limits: Limits) -> None:
    lengths = packed_lengths(1000)
    assert sum(lengths) == 1000 and len(lengths) == 4
    forward = sum(
        limits.prefill(n)["operations"] + 2 * (n - 1) * limits.head_weights for n in lengths
    )
    assert limits.train(lengths)["operations"] == pytest.approx(3 * forward, rel=1e-6)


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_both_models_are_the_same_function() -> None:
    ids = torch.randint(0, 2048, (2, 37))
    logits = []
    for kind in MODELS:
        model = bench(kind).model
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert logits[0].std() > 0.05
    assert_close(logits[0], logits[1], torch.float32)


@pytest.mark.parametrize("kind", MODELS)
def test_decoding_goes_on_behind_the_text_that_was_read(kind: str) -> None:
    """Read in pieces, decoded on the way: greedy text as from the whole text at once."""
    ready = bench(kind, repeats=1, new_tokens=3, prefill_chunk=5)
    text = LongText(ready, 40)
    for context in (12, 40):
        assert text.decode(context)["ms_per_token"] > 0
        assert text.cache.get_seq_length() == text.text.shape[1] - 1 > context
        new = text.text.shape[1] - context
        prompt = text.text[:, : context + 1]
        whole = ready.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new - 1,
            do_sample=False,
        )
        assert torch.equal(whole, text.text)


class FakeEvent:
    """A CUDA event whose time is a count of the events recorded before it."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.time = FakeEvent.recorded

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.time - self.time


@pytest.mark.parametrize("kind", MODELS)
def test_decoding_forwards_are_timed_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = bench(kind)
    ids = ready.random_ids(1, 4)

    def run(count: int) -> None:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in ready.model.modules())
        ready.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )

    assert ready._forward_ms(run, 3) is None  # there is no GPU here
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ready.device = torch.device("cuda")
    before = FakeEvent.recorded
    assert ready._forward_ms(run, 3) == 1.0
    assert FakeEvent.recorded - before == 2 * (1 + 3)
    assert "forward" not in vars(ready.model)


def test_a_failed_reading_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    text = LongText(bench("ours", repeats=1, new_tokens=3), 16)
    monkeypatch.setattr(text, "_read_to", lambda context: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        text.decode(8)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="reading a shorter context failed"):
        text.decode(16)


# ---- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Folder and lines of one run of everything but first-call."""
    folder = tmp_path_factory.mktemp("benchmark")
    for _ in range(4):  # on a busy machine a run of 9 tokens may take no longer than one of 1
        lines = benchmark.main(output=folder / "lines.jsonl", plot=folder / "speed.png", **SMALL)
        if not any("the machine is busy" in line.get("error", "") for line in lines):
            break
    return folder, lines


def test_a_run_has_every_figure_of_both_models(run: tuple[Path, list[Any]]) -> None:
    _, lines = run
    assert [line for line in lines if "error" in line] == []
    places = [(line["measure"], line.get("context", line.get("batch"))) for line in lines]
    measures = [("generate", 1), ("generate", 2), ("prefill", 8), ("prefill", 24)]
    measures += [("decode", 8), ("first-token", 24), ("decode", 24)]
    assert places == [("environment", None), *2 * [("train", None)], *2 * measures]
    for line in lines[1:]:
        assert 0 < line["fraction_of_limit"] < 1 and line["tokens_per_second"] > 0
        limit = line["limit"]
        assert limit["ms"] == max(limit["byte_ms"], limit["operation_ms"])
        assert line["needed_bytes_above_weights"] > 0
    assert [line["model"] for line in lines[3:]] == 7 * ["ours"] + 7 * ["native"]


def test_the_first_line_says_where_and_how(run: tuple[Path, list[Any]]) -> None:
    first = run[1][0]
    assert first["torch"] == torch.__version__ and first["dtype"] == "float32"
    for key in ("gpu", "transformers", "triton", "fla-core", "commit", "command", "threads"):
        assert key in first
    assert first["copy_bytes_per_second"] > 1e8 and first["operations_per_second"] > 1e8


def test_the_file_is_drawn_without_measuring(
    run: tuple[Path, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, lines = run
    monkeypatch.setattr(benchmark.Run, "run", lambda *_: pytest.fail("measured"))
    again = benchmark.main(plot_from=[folder / "lines.jsonl"], plot=tmp_path / "again.png")
    assert again == lines
    assert (tmp_path / "again.png").read_bytes() == (folder / "speed.png").read_bytes()
    assert (tmp_path / "again.png").read_bytes().startswith(PNG_SIGNATURE)
    said = capsys.readouterr()
    assert said.out == ""
    assert "of limit" in said.err and "decode" in said.err and "native" in said.err


def test_what_fails_is_a_line_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(self: Bench, context: int) -> dict[str, Any]:
        if context > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
        return prefill(self, context)

    prefill = Bench.prefill
    monkeypatch.setattr(Bench, "prefill", refuse)

    def decode(self: LongText, context: int) -> dict[str, Any]:
        return {"context": context, **figures}

    figures: dict[str, Any] = {"ms_per_token": 1.0, "tokens_per_second": 1e3, "limit": {"ms": 0.5}}
    figures["limit"]["tokens_per_second"] = 2e3
    figures |= {"peak_bytes_above_weights": None, "needed_bytes_above_weights": 9}
    monkeypatch.setattr(LongText, "decode", decode)
    options = {**SMALL, "models": ("ours",), "measure": ("prefill", "decode")}
    lines = benchmark.main(plot=tmp_path / "failed.png", **options)
    errors = {line["context"]: line["error"] for line in lines if "error" in line}
    assert list(errors) == [24]
    assert errors[24].startswith("OutOfMemoryError: CUDA out of memory")
    assert [line["context"] for line in lines if line["measure"] == "decode"] == [8, 24]
    assert (tmp_path / "failed.png").read_bytes().startswith(PNG_SIGNATURE)


def test_after_the_time_limit_what_was_not_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    lines = benchmark.main(time_limit=1e-6, measure=("prefill", "train", "first-call"), **SMALL)
    assert len(lines) == 1 + 4 + 2 + 4
    for line in lines[1:]:
        assert line["error"] == "not run: --time-limit 1e-06 is spent"
    assert "prefill native 2m 24: not run" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    options = {**SMALL, "device": "cuda", "new_tokens": 24, "repeats": 3, "prompt_length": 64}
    lines = benchmark.main(plot=tmp_path / "speed.png", **options)
    assert [line for line in lines if "error" in line] == []
    assert lines[0]["gpu"] == torch.cuda.get_device_name() and lines[0]["dtype"] == "bfloat16"
    for line in lines[1:]:
        assert line["peak_bytes_above_weights"] > 0
        if line["measure"] in ("generate", "decode"):
            device, host = line["device_ms_per_token"], line["host_ms_per_token"]
            assert device > 0 and device + host == pytest.approx(line["ms_per_token"], rel=1e-3)


def test_the_first_call_of_a_new_process() -> None:
    options = {**SMALL, "models": ("native",), "measure": ("first-call",)}
    lines = benchmark.main(**options)
    assert [line["disk_caches"] for line in lines[1:]] == ["empty", "filled"]
    for line in lines[1:]:
        steps = ("import_seconds", "build_seconds", "first_call_seconds", "second_call_seconds")
        assert all(line[step] > 0 for step in steps)


def test_a_first_call_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.sys, "executable", "/bin/false")
    lines = benchmark.main(**{**SMALL, "models": ("ours",), "measure": ("first-call",)})
    assert lines[1]["error"] == "RuntimeError: the process ended with 1: no message"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": ("speed",)}, "--measure 'speed' .*one of prefill, decode, generate"),
        ({"measure": ()}, r"--measure \(\) .*at least one"),
        ({"models": ("theirs",)}, "--models 'theirs' .*one of ours, native"),
        ({"preset": "tiny"}, "--preset 'tiny' .*one of 2m, 20m"),
        ({"train_preset": "tiny"}, "--train-preset 'tiny' .*one of 2m, 20m"),
        ({"device": "tpu"}, "--device 'tpu' .*one of auto, cuda, cpu"),
        ({"dtype": "int8"}, "--dtype 'int8' .*one of auto, float32"),
        ({"contexts": (8, 0)}, r"--contexts \(8, 0\) .*integers of at least 1"),
        ({"batches": ()}, r"--batches \(\) .*one or more integers"),
        ({"prefill_chunk": 0}, "--prefill-chunk 0 .*at least 1"),
        ({"threads": 0}, "--threads 0 .*at least 1"),
        ({"train_tokens": 3}, "--train-tokens 3 .*at least 16"),
        ({"time_limit": 0}, "--time-limit 0 .*above 0"),
    ],
)
def test_what_is_not_allowed_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.main(**options)


def test_files_without_figures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"case": "mark"}\n')
    with pytest.raises(ValueError, match="--plot-from .*other.jsonl.*must hold lines of --output"):
        benchmark.main(plot_from=[tmp_path / "other.jsonl"])
    with pytest.raises(ValueError, match="--plot .*one of prefill, decode, generate must have"):
        plot_lines([{"measure": "environment"}], tmp_path / "empty.png")


def test_numbers_of_the_command_line() -> None:
    assert numbers("512,4k,1M") == (512, 4096, 1048576)
    found = commands.run([SCRIPT, "--contexts", "4k,many"])
    assert found.returncode == 2
    assert "--contexts: 'many' is not allowed: it must be an integer such as 512" in found.stderr


def test_the_command_prints_lines_only(tmp_path: Path) -> None:
    flags = ["--models", "ours", "--measure", "prefill", "--contexts", "8", "--threads", "1"]
    flags += ["--device", "cpu", "--commit", "abc", "--output", str(tmp_path / "x.jsonl")]
    found = commands.run([SCRIPT, *flags])
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["measure"] for line in lines] == ["environment", "prefill"]
    assert lines[0]["threads"] == 1
    assert lines[0]["commit"] == "abc" and lines[0]["command"].endswith("x.jsonl")
    assert (tmp_path / "x.jsonl").read_text() == found.stdout
