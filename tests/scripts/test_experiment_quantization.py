"""scripts/experiment_quantization.py: its slices, its judge, its forms, and a small run."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import experiment_quantization
import pytest
import torch
from experiment_quantization import SECTIONS, Settings, everything
from experiments import slices
from experiments.calibrating import calibrate_model
from experiments.judging import Judge, packed_model
from experiments.recorded import RecordedGradients
from experiments.slices import Recipe, SlicedTraining, load_trained, save_trained
from experiments.sources import Sources, positions_of
from measuring.forms import quantization
from one_thread import one_thread  # noqa: F401
from texts.corpus import first_bytes, installed_packages
from texts.evaluation import bits_per_byte

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.quantization.packing import check_places, packed_places
from kimi_linear.training.expert_loads import ExpertLoads

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "device": "cpu",
    "preset": "2m",
    "expert_width": 64,
    "train_minutes": 0.03,
    "vocab_size": 512,
    "packages": 0.0,
    "rows": 2,
    "length": 48,
    "eval_tokens": 600,
    "calibration_tokens": 2048,
}
FORMS = {
    "main": ("none", everything("4/32"), "24gb"),
    "parts": ("experts=3/64", "head=3/64"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen short modules."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(24):
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(8)]
        (root / f"module_{i}.py").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources.load(tmp_path_factory.mktemp("tokens"), 512, corpus)


@pytest.fixture(autouse=True)
def without_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MARGIN_SECONDS", 0.0)


def config(sources: Sources) -> KimiLinearConfig:
    return Settings(**SMALL).config(sources)


@pytest.fixture(scope="module")
def model(sources: Sources) -> KimiLinearForCausalLM:
    """With weights large enough that predictions differ."""
    torch.manual_seed(0)
    found = KimiLinearForCausalLM(config(sources)).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.normal_(0, 0.08)
    return found


# ---- text ---------------------------------------------------------------------------------------


def test_text_is_kept_and_held_out_by_file(corpus: Path, tmp_path: Path) -> None:
    made = Sources.load(tmp_path, 512, corpus)
    begin, end = made.special["bos_token_id"], made.special["eos_token_id"]
    assert int((made.train == begin).sum()) + len(made.held_out) == 24
    assert all(ids[0] == begin and ids[-1] == end for ids in made.held_out)
    assert len(made.held_out_bytes) == len(made.held_out)
    again = Sources.load(tmp_path, 512, corpus)
    assert torch.equal(again.train, made.train) and again.held_out == made.held_out
    other = Sources.load(tmp_path, 520, corpus)
    assert other.special["vocab_size"] == 520 != made.special["vocab_size"]


def test_positions_restart_with_every_file(sources: Sources) -> None:
    ids = torch.tensor([[5, 6, 1, 7, 8], [1, 2, 3, 1, 1]])
    assert positions_of(ids, 1).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    rows, positions = sources.rows(3, 40, seed=7)
    assert rows.shape == positions.shape == (3, 40) and rows.dtype == torch.int64
    assert torch.equal(sources.rows(3, 40, seed=7)[0], rows)
    assert not torch.equal(sources.rows(3, 40, seed=8)[0], rows)
    same, places = sources.rows(3, 40, seed=7, repeats=1.0)
    assert places.tolist() == [list(range(40))] * 3
    for row, whole in zip(same, rows, strict=True):
        assert any(torch.equal(row, whole[torch.arange(40) % n]) for n in range(16, 21))
    rows, mixed = (sources.rows(64, 40, seed=7, repeats=each)[0] for each in (0.0, 0.25))
    assert 4 < int((rows != mixed).any(dim=1).sum()) < 28
    with pytest.raises(ValueError, match="--length 100000 is not allowed"):
        sources.rows(1, 100_000, seed=0)


def test_files_of_packages(tmp_path: Path) -> None:
    for name in ("a/one.py", "a/tests/two.py", "b/three.py", "b/copied.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    found = list(installed_packages({"copied.py"}, tmp_path))
    assert sorted(file.name for file in found) == ["a/one.py", "b/three.py"]
    assert len(first_bytes(found, 1)) == 1 and first_bytes(found, 0) == []


# ---- training in slices -------------------------------------------------------------------------


def training(sources: Sources, folder: Path, **changes: Any) -> SlicedTraining:
    recipe = {"seconds": 16, "rows": 2, "length": 32, "learning_rate": 1e-3}
    recipe |= {"weight_decay": 0.1, "seed": 3, "bias_rate": 1e-3, **changes}
    return SlicedTraining(config(sources), Recipe(**recipe), sources, folder, CPU)


def test_slices_are_one_training(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves a second when it is read: a step takes two."""
    clock = itertools.count()
    monkeypatch.setattr(slices.time, "monotonic", lambda: float(next(clock)))
    points: list[dict[str, Any]] = []
    whole = training(sources, tmp_path / "whole")
    assert whole.run(float("inf"), lambda **figures: points.append(figures))
    assert whole.step == 8 and whole.num_tokens == 8 * 64
    assert points[-1]["step"] == 8 and points[-1]["train_seconds"] == 16
    assert not (tmp_path / "whole" / "slice.pt").exists()

    first = training(sources, tmp_path / "parts")
    assert not first.run(next(clock) + 8.0, lambda **figures: None)
    assert 0 < first.step < 8
    second = training(sources, tmp_path / "parts")
    assert (second.step, second.name) == (first.step, first.name)
    assert second.run(float("inf"), lambda **figures: None)
    expected = whole.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    with pytest.raises(ValueError, match="--folder .* holds a training of other settings"):
        training(sources, tmp_path / "parts", learning_rate=2e-3)
    training(sources, tmp_path / "parts", seconds=99)  # which may change


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_recorded_gradients_are_those_of_kernel_by_kernel(
    sources: Sources, tmp_path: Path, device: str
) -> None:
    """Over several batches, with an update between them."""
    recipe = Recipe(1, 2, 64, learning_rate=1e-3, weight_decay=0.1, seed=3, bias_rate=1e-3)
    made = SlicedTraining(config(sources), recipe, sources, tmp_path, torch.device(device))
    made.model.train()
    loads = ExpertLoads(made.model)
    recorded = RecordedGradients(
        lambda ids: made._gradients(ids, loads), made._batch(), made.optimizer.zero_grad
    )
    assert not recorded.error
    is_cuda = torch.device(device).type == "cuda"
    for _ in range(3):
        ids = made._batch()
        loss, norm, counts = (each.clone() for each in recorded(ids))
        plain = KimiLinearForCausalLM(config(sources)).to(device).train()
        plain.load_state_dict(made.model.state_dict())
        with torch.autocast("cuda", torch.bfloat16, enabled=is_cuda):
            expected = plain(input_ids=ids, labels=ids, use_cache=False).loss
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert float(loss) == pytest.approx(float(expected), rel=1e-3)
        assert float(norm) == pytest.approx(float(expected_norm), rel=2e-2)
        assert int(counts.sum()) > 0
        total = torch.zeros((), device=device)
        for ours, other in zip(made.model.parameters(), plain.parameters(), strict=True):
            if other.grad is not None:
                total += (ours.grad - other.grad).square().sum()
        assert total.sqrt() <= 0.05
        made._update(recorded, loads)


def test_the_trained_model_comes_back(sources: Sources, tmp_path: Path) -> None:
    made = training(sources, tmp_path, seconds=0.01)
    assert made.run(float("inf"), lambda **figures: None)
    save_trained(made, tmp_path / "trained.pt", torch.bfloat16)
    found, state = load_trained(tmp_path / "trained.pt", config(sources), CPU)
    assert state == {"name": made.name} and found.dtype == torch.bfloat16
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[name]), name
    assert not any(each.is_meta for each in (*found.parameters(), *found.buffers()))
    assert not any(each.requires_grad for each in found.parameters())
    assert not (tmp_path / "slice.pt").exists()


def test_a_step_without_finite_gradients_changes_nothing(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = training(sources, tmp_path, seconds=0.01)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: infinite)
    assert made.run(float("inf"), lambda **figures: None)
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- judging ------------------------------------------------------------------------------------


def test_a_judge_finds_no_difference_from_itself(sources: Sources, model: Any) -> None:
    judge = Judge(model, sources.held_out, sources.held_out_bytes, 10**9, batch_tokens=300)
    found = judge.figures(model)
    assert found["kl"] == 0 and found["agreement"] == 1
    ids = [each[1:] for each in sources.held_out]
    begin, num_bytes = sources.special["bos_token_id"], sum(sources.held_out_bytes)
    expected = bits_per_byte(model, ids, num_bytes, begin)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
    assert judge.num_tokens == sum(map(len, ids))
    assert Judge(model, sources.held_out, sources.held_out_bytes, 1).num_tokens == len(ids[0])
    with pytest.raises(ValueError, match="--eval-tokens"):
        Judge(model, [], [], 9)


def test_fewer_bits_are_further_away(sources: Sources, model: Any) -> None:
    judge = Judge(model, sources.held_out, sources.held_out_bytes, 600)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apart = []
    for bits in ("8/64", "4/64", "3/64"):
        found = quantization(everything(bits))
        assert found is not None
        made = packed_model(model, found)
        apart.append(judge.figures(made)["kl"])
        shared = {id(each) for each in model.parameters()}
        for name, parameter in made.named_parameters():
            is_packed = isinstance(parameter, PackedWeights)
            assert is_packed != (id(parameter) in shared), name
    assert 0 < apart[0] < apart[1] / 4 < apart[2] / 5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_calibration_brings_predictions_nearer(sources: Sources, model: Any) -> None:
    judge = Judge(model, sources.held_out, sources.held_out_bytes, 600)
    found = quantization(everything("3/64"))
    assert found is not None
    made = copy.deepcopy(model).requires_grad_(False)
    calibrate_model(made, sources.rows(8, 256, seed=1), found)
    names = {place.name for place in packed_places(model, found)}
    packed = {n for n, each in made.named_parameters() if isinstance(each, PackedWeights)}
    assert packed == names
    without_data = judge.figures(packed_model(model, found))["kl"]
    assert judge.figures(made)["kl"] < 0.9 * without_data


# ---- runs ---------------------------------------------------------------------------------------


def test_every_form_fits_the_model_that_is_trained() -> None:
    """Groups divide all inputs, so that none of an expensive run's forms is refused."""
    special = {"vocab_size": 16384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    settings = Settings(device="cpu")
    found = settings.config(Sources(torch.zeros(0), [], [], special))
    assert found.moe_intermediate_size == 512
    with torch.device("meta"):
        empty = KimiLinearForCausalLM(found)
    assert 1.0e9 < empty.num_parameters() < 1.3e9
    for form in itertools.chain(*SECTIONS.values()):
        held = quantization(form)
        if held is not None:
            check_places(empty, held)


def test_a_run_in_slices(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_quantization, "SECTIONS", FORMS)
    output = tmp_path / "lines.jsonl"
    options = {**SMALL, "corpus": str(corpus), "folder": str(tmp_path / "f"), "output": output}
    options["sections"] = ("main", "parts")
    lines = experiment_quantization.main(**options, time_limit=1e-6)
    assert [line["event"] for line in lines] == ["environment", "slice"]
    assert lines[-1]["is_done"] is False
    lines += experiment_quantization.main(**options)
    assert lines[-1]["is_done"] is True
    trained = next(line for line in lines if line["event"] == "trained")
    assert trained["steps"] > 0 and trained["tokens"] == trained["steps"] * 96
    found = {line["form"]: line for line in lines if line["event"] == "quality"}
    assert list(found) == [*FORMS["main"], *FORMS["parts"]]
    assert "must divide the 192 inputs" in found.pop("24gb")["error"]
    for line in found.values():
        assert line["model"] == trained["model"] and line["is_calibrated"] is False
        assert line["bits_per_byte"] > 0 and line["eval_tokens"] >= 300
        assert line["held_bytes"] <= found["none"]["held_bytes"]
        assert line["held_bytes_48b"] <= found["none"]["held_bytes_48b"] == 98245515264
    assert found["none"]["kl"] == 0 < found["experts=3/64"]["kl"]

    again = experiment_quantization.main(**options)  # tries what failed, and nothing else
    assert [line.get("form") for line in again if line["event"] == "quality"] == ["24gb"]
    assert [json.loads(text) for text in output.read_text().splitlines()] == [*lines, *again]


def test_what_there_is_no_time_for_is_left_to_the_next_call(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_quantization, "SECTIONS", FORMS)
    options = {**SMALL, "corpus": str(corpus), "folder": str(tmp_path), "sections": ("parts",)}
    experiment_quantization.main(**options)
    lines = experiment_quantization.main(**options, time_limit=1e-6)
    assert [line["event"] for line in lines] == ["environment", "slice"]
    assert lines[-1]["is_done"] is False


@pytest.mark.gpu
def test_a_run_on_a_gpu(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that all forms fit."""
    forms = ("none", "24gb", "fp8", everything("8/64"))
    sections = {"main": forms, "calibrated": forms[1:2]}
    monkeypatch.setattr(experiment_quantization, "SECTIONS", sections)
    options = {**SMALL, "device": "cuda", "preset": "20m", "expert_width": 128}
    options |= {"corpus": str(corpus), "folder": str(tmp_path), "sections": tuple(sections)}
    experiment_quantization.main(**options, time_limit=1e-6)
    lines = experiment_quantization.main(**options)
    found = [line for line in lines if line["event"] == "quality"]
    assert [line for line in found if "error" in line] == []
    assert [line["form"] for line in found] == [*forms, "24gb"]
    assert found[0]["kl"] < found[3]["kl"] < found[1]["kl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sections": ("all",)}, "--sections 'all' is not allowed"),
        ({"train_minutes": 0}, "--train-minutes 0"),
        ({"preset": "tiny"}, "--preset 'tiny'"),
        ({"expert_width": 8}, "--expert-width 8"),
        ({"calibration_tokens": 100}, "--calibration-tokens 100"),
    ],
)
def test_what_the_script_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment_quantization.main(**{**SMALL, **options})
