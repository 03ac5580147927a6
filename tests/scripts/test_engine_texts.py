"""benchmarks/engine_texts.py and compare_engines.py, with our own model as the engine."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_models import write_engine_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import compare_engines
import engine_texts

NEW_TOKENS = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of both of our dtypes, by engine."""
    folder = tmp_path_factory.mktemp("engines")
    write_engine_model(folder / "model")
    reference, other = folder / "reference.json", folder / "other.json"
    options = ["--new-tokens", str(NEW_TOKENS)]
    engine_texts.main(["ours-float32", str(folder / "model"), str(reference), *options])
    options += ["--prompts", str(reference)]
    engine_texts.main(["ours-bfloat16", str(folder / "model"), str(other), *options])
    return {"reference": reference, "other": other}


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_lines(results: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    compare_engines.main([str(results["reference"]), str(results["other"])])
    reference, line = map(json.loads, capsys.readouterr().out.splitlines())
    assert (reference["case"], reference["engine"]) == ("reference", "ours-float32")
    assert line["engine"] == "ours-bfloat16"
    assert line["prompts"] == len(engine_texts.LENGTHS)
    assert line["tokens"] == sum(engine_texts.LENGTHS) - len(engine_texts.LENGTHS)
    assert 0 < line["mean_difference"] < 0.3
    assert line["of_tokens"] == NEW_TOKENS
    parted = [count for count in line["equal_tokens"] if count < NEW_TOKENS]
    assert len(parted) == len(line["gaps_where_they_part"])


def test_lines_tell_where_each_result_is_from(
    results: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where they are compared."""
    elsewhere, path = read(results["other"]), tmp_path / "elsewhere.json"
    elsewhere["setting"] |= {"gpu": "another", "torch": "0.1", "commit": "unknown"}
    path.write_text(json.dumps(elsewhere))
    names = [str(results["reference"]), str(results["other"]), str(path)]
    compare_engines.main([*names, "--commit", "abc"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, name in zip(lines, names, strict=True):
        kept = read(Path(name))["setting"]
        commit = "abc" if kept["commit"] == "unknown" else kept["commit"]
        assert {key: line[key] for key in kept} == {**kept, "commit": commit}
    assert lines[2]["commit"] == "abc"


def test_a_result_equals_itself(results: dict[str, Path]) -> None:
    reference = read(results["reference"])
    line = compare_engines.compare(reference, reference)
    assert line["max_difference"] == 0
    assert line["equal_tokens"] == [NEW_TOKENS] * len(engine_texts.LENGTHS)
    assert line["gaps_where_they_part"] == []


def test_what_differs_is_said(results: dict[str, Path]) -> None:
    reference, other = read(results["reference"]), read(results["reference"])
    row = other["prompts"][2]
    row["logprobs"][5] -= 0.5
    second = reference["prompts"][2]["new_top"][1][1]
    row["new_ids"][1] = second[0]
    line = compare_engines.compare(reference, other)
    assert line["max_difference"] == pytest.approx(0.5)
    assert line["max_difference_at"] == [engine_texts.LENGTHS[2], 5]
    assert line["median_difference"] == 0
    assert line["loss"] > line["loss_of_reference"]
    assert line["equal_tokens"][2] == 1
    likeliest = reference["prompts"][2]["new_top"][1][0]
    assert line["gaps_where_they_part"] == [round(likeliest[1] - second[1], 4)]


def test_other_prompts_are_refused(results: dict[str, Path]) -> None:
    reference, other = read(results["reference"]), read(results["reference"])
    other["prompts"][0]["ids"][0] += 1
    with pytest.raises(ValueError, match="different prompts"):
        compare_engines.compare(reference, other)
