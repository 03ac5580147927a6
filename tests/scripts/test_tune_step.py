"""benchmarks/tune_step.py: its constants are those that steps are made of."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tune_step
from tune_step import GAIN, Constant, constants, tune

from kimi_linear.decode.fixed_point import Tile


@pytest.mark.parametrize("form", ["none", "24gb", "48gb", "80gb", "fp8"])
def test_every_constant_can_be_set_and_put_back(form):
    found = constants(form)
    assert len({each.name for each in found}) == len(found) > 3
    for constant in found:
        before = constant.value
        assert before in constant.values, constant.name
        for value in constant.values:
            constant.set(value)
            assert constant.value == value
        constant.set(before)


def test_a_field_of_a_tile_is_set_alone():
    tiles = {3: Tile(64, 4, 5, early=0), 4: Tile(64, 4, 5, early=1)}
    Constant("stages", (tiles,), 4, (3, 5), "stages").set(3)
    assert tiles == {3: Tile(64, 4, 5, early=0), 4: Tile(64, 4, 3, early=1)}


class FakeSteps:
    """Steps whose time a rule gives."""

    def __init__(self, holder, milliseconds):
        self.holder, self.milliseconds = holder, milliseconds

    def run(self):
        return self.milliseconds(self.holder)


class Lines(list):
    tell = list.append


def test_faster_choices_stay_unless_their_logits_are_others():
    logits = torch.arange(1.0, 9.0)
    times = {(4, 2): 1.0, (8, 2): 0.9, (8, 1): 0.5, (8, 3): 0.9 * (1 - GAIN / 2)}

    def run(holder):
        place = holder["warps"], holder["stages"]
        if place not in times:
            raise RuntimeError("out of shared memory")
        return times[place], 2 * logits if place == (8, 1) else logits

    holder, lines = {"warps": 4, "stages": 2}, Lines()
    every = [
        Constant("warps", (holder,), "warps", (4, 8, 16)),
        Constant("stages", (holder,), "stages", (1, 2, 3)),
    ]
    tune(FakeSteps(holder, run), every, 60, lines)
    assert holder == {"warps": 8, "stages": 2}
    assert lines[-1] == {"event": "end", "ms": 0.9, "warps": 8, "stages": 2}
    assert any("out of shared memory" in line.get("error", "") for line in lines)


@pytest.mark.parametrize(("form", "rows"), [("none", 4), ("48gb", 5), ("48gb", 0)])
def test_rows_of_another_step_are_refused(form, rows, monkeypatch, capsys):
    """It reads none of the constants: what differs is noise."""
    monkeypatch.setattr(sys, "argv", ["tune_step.py", "--quantize", form, "--rows", str(rows)])
    monkeypatch.delattr(tune_step, "build")
    with pytest.raises(SystemExit):
        tune_step.main()
    assert f"--rows {rows} is not allowed" in capsys.readouterr().err
