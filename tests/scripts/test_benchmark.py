"""scripts/benchmark.py: its limits, its two models, and runs of small sizes."""

import json
from pathlib import Path
from typing import Any

import benchmark
import commands
import pytest
import torch
from measuring import limits_plot
from measuring.bench import Bench, Effort, packed_lengths
from measuring.child import ChildError, run_child
from measuring.device import Rates
from measuring.forms import bits_of, quantization
from measuring.limits import Limits
from measuring.long_text import LongText
from measuring.memory import allocator_limit, default_chunk
from measuring.models import MODELS, build
from measuring.packed import code_spread, fill_packed
from measuring.plot import plot_lines
from measuring.report import Recorder
from options.settings import numbers
from tolerance import assert_close

from kimi_linear import KimiLinearConfig
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import NAMED, Scheme

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


@pytest.mark.parametrize(
    ("form", "gigabytes", "one_row"),
    [
        ("none", 98.25, 6.21),
        ("24gb", 21.25, 2.33),
        ("48gb", 27.51, 2.51),
        ("80gb", 50.33, 3.22),
        ("fp8", 49.95, 3.55),
        ("48gb+head=none", 27.88, 2.88),
    ],
)
def test_bytes_of_packed_weights(form: str, gigabytes: float, one_row: float) -> None:
    """Of all weights of the 48B model, and of those that a token needs."""
    config = KimiLinearConfig.from_preset("48b-a3b")
    found = Limits.of(config, torch.bfloat16, Rates(1e12, 1e14), quantization(form))
    assert found.total_bytes == pytest.approx(1e9 * gigabytes, rel=1e-3)
    assert found.decode(0)["weight_bytes"] == pytest.approx(1e9 * one_row, rel=2e-3)


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


@pytest.mark.parametrize(
    "scheme",
    [Scheme(3, 64), Scheme(4, 32, is_symmetric=False), Scheme(8, None), Scheme(**NAMED["fp8"])],
    ids=str,
)
def test_random_packed_weights_have_a_usual_size(scheme: Scheme) -> None:
    packed = PackedWeights.empty((3, 256, 1024), scheme, torch.bfloat16, CPU)
    for part in packed.parts().values():
        part.fill_(77)
    fill_packed("any", packed, 0.02)
    weights = packed.dequantized().float()
    assert weights.isfinite().all() and len(packed.codes().unique()) >= min(128, 1 << scheme.bits)
    assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(weights.mean().item()) < 0.004
    other = PackedWeights.empty((3, 256, 1024), scheme, torch.bfloat16, CPU)
    fill_packed("any", other, 0.02)
    assert torch.equal(other.dequantized(), packed.dequantized())


def test_spread_of_codes() -> None:
    assert code_spread(Scheme(3)) == pytest.approx(5.5**0.5)
    assert 0.4 < code_spread(Scheme(**NAMED["fp8"])) < 0.8


def test_a_packed_model_has_no_wide_copy() -> None:
    """Parts that are packed are so from the start; the others get the numbers that they had."""
    config = KimiLinearConfig.from_preset("2m")
    form = "experts=3+attention=8/64+embeddings=4z"
    made = {"device": CPU, "dtype": torch.float32}
    model = build("ours", config, quantization=quantization(form), **made)
    plain = dict(build("ours", config, **made).named_parameters())
    kinds = {name for name, each in model.named_parameters() if isinstance(each, PackedWeights)}
    assert {name.split(".")[-1] for name in kinds} == {"weight", "gate_up_proj", "down_proj"}
    assert "model.embed_tokens.weight" in kinds and "lm_head.weight" not in kinds
    for name, parameter in model.named_parameters():
        assert parameter.device == CPU and not parameter.is_meta
        assert name in kinds or torch.equal(parameter, plain[name])
    held = sum(each.held_bytes() for each in model.parameters() if hasattr(each, "held_bytes"))
    rest = sum(each.nbytes for name, each in model.named_parameters() if name not in kinds)
    limits = Limits.of(config, torch.float32, Rates(1, 1), quantization(form))
    assert limits.total_bytes == held + rest
    with torch.no_grad():
        logits = model(torch.randint(0, 2048, (2, 37))).logits
    assert logits.isfinite().all() and 0.05 < logits.std() < 1


def test_forms_of_weights() -> None:
    assert quantization("none") is None and quantization("head=none") is None
    found = quantization("48gb+head=none+experts=4/32z")
    assert found is not None and found.schemes["head"] is None
    assert found.schemes["experts"] == Scheme(4, 32, is_symmetric=False)
    assert found.schemes["attention"] == Scheme(8, 128)
    blocks = quantization("fp8")
    assert blocks is not None and blocks.schemes["embeddings"] is None
    assert blocks.schemes["experts"] == Scheme(**NAMED["fp8"])
    assert quantization("head=8/row").schemes["head"] == Scheme(8, None)
    bits = bits_of("24gb", torch.bfloat16)
    assert bits["experts"] == 3.25 and bits["head"] == 8.125
    assert bits_of("none", torch.bfloat16) == {}


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
    plots = {"plot": tmp_path / "again.png", "plot_limits": tmp_path / "limits.png"}
    again = benchmark.main(plot_from=[folder / "lines.jsonl"], **plots)
    assert again == lines
    assert (tmp_path / "again.png").read_bytes() == (folder / "speed.png").read_bytes()
    for plot in plots.values():
        assert plot.read_bytes().startswith(PNG_SIGNATURE)
    said = capsys.readouterr()
    assert said.out == ""
    assert "of limit" in said.err and "decode" in said.err and "native" in said.err


def test_limits_are_drawn_of_the_newest_line_of_each_case() -> None:
    case = {"measure": "generate", "model": "ours", "preset": "48b-a3b", "tokens_per_second": 500.0}
    lines: list[Any] = [
        {"measure": "environment"},
        {**case, "batch": 1, "fraction_of_limit": 0.5, "ms_per_token": 2.4},
        {**case, "batch": 8, "fraction_of_limit": 0.6},
        {**case, "batch": 1, "quantize": "24gb", "error": "RuntimeError: no"},
        {**case, "batch": 1, "fraction_of_limit": 0.7, "ms_per_token": 2.0},
        {**case, "batch": 1, "model": "native", "fraction_of_limit": 0.1},
        {**case, "measure": "step", "tokens": 4, "ms": 5.4321, "fraction_of_limit": 0.4},
    ]
    drawn = [
        (limits_plot.label_of(x), limits_plot.figure_of(x), x["fraction_of_limit"])
        for x in limits_plot.newest(lines)
    ]
    assert drawn == [
        ("16 bits, 1 row", "2.00 ms a token", 0.7),
        ("16 bits, 8 rows", "500 tokens/s", 0.6),
        ("16 bits, 4 tokens", "5.43 ms", 0.4),
    ]
    with pytest.raises(ValueError, match="--plot-limits x.png .*how near it is to its limit"):
        limits_plot.plot_limits(lines[:1], Path("x.png"))


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


@pytest.mark.gpu
def test_packed_weights_on_a_gpu() -> None:
    options = {**SMALL, "device": "cuda", "models": ("ours",), "new_tokens": 24, "repeats": 3}
    options |= {"quantize": ("experts=3+head=4", "fp8"), "measure": ("generate", "memory")}
    lines = benchmark.main(**{**options, "prompt_length": 64, "memory_limit": 2.0})
    assert [line for line in lines if "error" in line] == []
    for line in lines[1:]:
        if line["measure"] == "generate":
            assert line["backend"] in ("graph", "layer by layer")
            continue
        assert line["held_bytes"] <= line["build_allocated_bytes"] <= line["peak_allocated_bytes"]
        assert line["peak_allocated_bytes"] <= line["peak_reserved_bytes"] <= 2e9
        assert line["peak_reserved_bytes"] < line["process_bytes"]


def test_the_first_call_of_a_new_process() -> None:
    options = {**SMALL, "models": ("native",), "measure": ("first-call",)}
    lines = benchmark.main(**options)
    assert [line["disk_caches"] for line in lines[1:]] == ["empty", "filled"]
    for line in lines[1:]:
        steps = (
            "import_seconds",
            "build_seconds",
            "first_call_seconds",
            "second_call_seconds",
            "third_call_seconds",
        )
        assert all(line[step] > 0 for step in steps)


def test_a_first_call_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.sys, "executable", "/bin/false")
    lines = benchmark.main(**{**SMALL, "models": ("ours",), "measure": ("first-call",)})
    assert lines[1]["error"] == "RuntimeError: the process ended with 1: no message"


# ---- packed weights and memory ------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Folder and lines of a run with and without packed weights."""
    folder = tmp_path_factory.mktemp("packed")
    options = {
        **SMALL,
        "models": ("ours",),
        "quantize": ("experts=4/32+head=8", "none", "fp8"),
        "measure": ("prefill", "memory", "train"),
        "contexts": (8,),
        "prefill_chunk": 3,
        "new_tokens": 2,
    }
    return folder, benchmark.main(output=folder / "x.jsonl", plot=folder / "x.png", **options)


def test_a_run_of_packed_weights(packed_run: tuple[Path, list[Any]]) -> None:
    folder, lines = packed_run
    assert [line for line in lines if "error" in line] == []
    places = [(line["measure"], line.get("quantize", "none")) for line in lines[1:]]
    forms = ["experts=4/32+head=8", "none", "fp8"]
    wanted = [("memory", form) for form in forms] + [("train", "none")]
    assert places == wanted + [("prefill", form) for form in forms]
    sizes = {form: set() for form in forms}
    for line in lines[1:]:
        sizes[line.get("quantize", "none")].add(line["held_bytes"])
        assert ("bits" in line) == ("quantize" in line)
    assert all(len(found) == 1 for found in sizes.values())
    assert max(sizes["fp8"]) < max(sizes["none"])
    assert lines[1]["bits"] == {"experts": 5.0, "head": 8.25}  # scales of float32
    assert (folder / "x.png").read_bytes().startswith(PNG_SIGNATURE)


def test_memory_of_a_process(packed_run: tuple[Path, list[Any]]) -> None:
    line = packed_run[1][3]
    assert line["context"] == 8 and line["chunk"] == 3 and line["new_tokens"] == 2
    assert line["limit_bytes"] == 80 * 10**9 - 800 * 10**6
    assert all(line[f"{step}_seconds"] > 0 for step in ("build", "prefill", "generate"))
    assert allocator_limit("24gb", None) == (24 << 30) - 800 * 10**6
    assert allocator_limit("24gb+head=4", 20.5) == 20_500_000_000
    assert allocator_limit("none", None) is None
    assert default_chunk("24gb+head=4") < default_chunk("48gb") == default_chunk("none")


def test_what_a_process_had_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "#!/bin/sh\necho '{\"a\": 1}'; echo noise; echo '{\"b\": 2}'; %s\n"
    options = {**SMALL, "models": ("ours",), "measure": ("memory",), "contexts": (8,)}

    def run_as(path: Path, end: str) -> None:
        path.write_text(program % end)
        path.chmod(0o755)
        monkeypatch.setattr(benchmark.sys, "executable", str(path))

    run_as(tmp_path / "fails", "echo out of memory >&2; exit 3")
    line = benchmark.main(**options)[1]
    assert (line["a"], line["b"]) == (1, 2)
    assert line["error"] == "RuntimeError: the process ended with 3: out of memory"
    run_as(tmp_path / "sleeps", "exec sleep 60")
    with pytest.raises(ChildError) as found:
        run_child("any", {}, 0.5)
    assert found.value.is_late and found.value.figures == {"a": 1, "b": 2}


def test_lines_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for is_appended, count in ((False, 1), (True, 2), (False, 1)):
        Recorder(path, is_appended).tell({"measure": "environment"})
        assert len(path.read_text().splitlines()) == count


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
        ({"memory_limit": 0.0}, "--memory-limit 0.0 .*above 0"),
        ({"quantize": ()}, r"--quantize \(\) .*none, 24gb"),
        ({"quantize": ("none", "12gb")}, "--quantize '12gb' .*none, 24gb, 48gb, 80gb, fp8"),
        ({"quantize": ("experts=5",)}, "--quantize 'experts=5' .*3, 4, 8"),
        ({"quantize": ("24gb+router=4",)}, r"--quantize '24gb\+router=4' .*shared_experts"),
        ({"quantize": ("experts=4/48",)}, "--quantize 'experts=4/48' .*group=48"),
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


def test_calls_of_several_tokens() -> None:
    options = {**SMALL, "models": ("ours",), "measure": ("step",), "step_tokens": (1, 5)}
    _, one, five = benchmark.main(**options)
    assert (one["tokens"], five["tokens"]) == (1, 5)
    assert "ms_at_50%" not in one and five["ms"] == five["ms_at_100%"]
    for share, kept in (("50%", 3), ("75%", 4), ("100%", 5)):
        found = five[f"tokens_per_second_at_{share}"] * five[f"ms_at_{share}"]
        assert found == pytest.approx(1e3 * kept, rel=1e-3)
    assert one["limit"]["weight_bytes"] < five["limit"]["weight_bytes"]
    assert one["limit"]["state_bytes"] == five["limit"]["state_bytes"]


def test_many_requests() -> None:
    few = {"request_count": 5, "request_prompts": (3, 9), "request_answers": (2, 7)}
    options = {**SMALL, "models": ("ours",), "measure": ("requests",), "batches": (2,), **few}
    _, line = benchmark.main(**options)
    assert (line["batch"], line["requests"]) == (2, 5)
    assert 15 <= line["prompt_tokens"] <= 45 and 10 <= line["answer_tokens"] <= 35
    found = line["tokens_per_second"] * line["seconds"]
    assert found == pytest.approx(line["answer_tokens"], rel=1e-3)
    share = line["tokens_per_second"] / line["full_batch_tokens_per_second"]
    assert line["fraction_of_full_batch"] == pytest.approx(share, rel=1e-3)
    assert 0 < line["late_first_token_seconds"] <= line["late_first_token_seconds_at_most"]
    with pytest.raises(ValueError, match="two numbers, the smaller one first"):
        benchmark.main(**{**options, "request_prompts": (9, 3)})
