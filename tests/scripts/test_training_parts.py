"""benchmarks/training_parts.py: what it trains."""

import json
import sys
from pathlib import Path

import pytest
from one_thread import one_thread  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import training_parts


@pytest.mark.parametrize("lora", [[], ["attention", "shared"]], ids=["all", "lora"])
def test_a_step(lora, monkeypatch, tmp_path):
    options = ["--tokens", "32", "--most", "500", "--record", str(tmp_path / "lines.jsonl")]
    options += ["--lora", *lora] if lora else []
    monkeypatch.setattr(sys, "argv", ["training_parts.py", *options])
    training_parts.main()
    lines = (tmp_path / "lines.jsonl").read_text().splitlines()
    first, step, *functions = map(json.loads, lines)
    assert (first["trained"] < 200_000) == bool(lora)
    assert step["case"] == "step" and step["ms"] >= step["host_ms"] > 0
    names = [line["name"] for line in functions]
    assert any("run_backward" in name for name in names)
    # a checkpointed layer runs once more
    forward = next(
        line
        for line in functions
        if "delta_attention.py" in line["name"] and line["name"].endswith(" attend")
    )
    assert forward["calls"] == 3 * (2 if lora else 1)


def test_adapters_of_the_native_model_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--model", "native", "--lora", "shared"])
    with pytest.raises(SystemExit):
        training_parts.main()
    assert "--lora is of ours" in capsys.readouterr().err
