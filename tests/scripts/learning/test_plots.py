"""The figures of trainings."""

from pathlib import Path

import pytest
from learning.plots import plot_curves, plot_training


def test_figure_is_written(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    lines = {"zlib -9": 2.1, "lzma": 2.0}
    plot_training(path, [(1, 8.0), (2, 7.0)], [(1, 3.0), (2, 2.5)], 1.9, lines, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000
    with pytest.raises(ValueError, match="losses and points"):
        plot_training(path, [], [], 1.9, lines, "title")


@pytest.mark.finetune
def test_curves_of_what_there_is(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 1 / step, "reward": step, "odd": 1.0} for step in (1, 2, 3)]
    plot_curves(tmp_path / "curves.png", [*history, {"step": 3, "eval_loss": 0.5}], "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    with pytest.raises(ValueError, match="history has 1 entries"):
        plot_curves(tmp_path / "x.png", [{"step": 1, "odd": 1.0}], "title")
