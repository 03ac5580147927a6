"""benchmarks/prefill_parts.py: its sums of a device's kernels and of the host's functions."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import prefill_parts


def test_idle_is_what_no_kernel_covers(monkeypatch):
    """Kernels may overlap, and one may end before the one that began first."""
    times = [("a", 100.0, 400.0), ("b", 200.0, 300.0), ("a", 350.0, 500.0), ("c", 1500.0, 1600.0)]
    monkeypatch.setattr(prefill_parts, "kernels", lambda call: iter(times))
    total, lines = prefill_parts.device_lines(lambda: None, 2)
    assert total == {"device_ms": pytest.approx(0.65), "idle_ms": pytest.approx(1.0), "kernels": 4}
    assert [(line["name"], line["calls"]) for line in lines] == [("a", 2), ("b", 1)]


def test_functions_come_by_their_own_time():
    def slow():
        return sum(range(300_000))

    def fast():
        return slow()

    lines = prefill_parts.host_lines(fast, 50)
    names = [line["name"].rpartition(" ")[2] for line in lines]
    assert names.index("slow") < names.index("fast")
    assert all(line["calls"] for line in lines)


def test_places_are_short():
    assert (
        prefill_parts.place(str(prefill_parts.ROOT / "ops" / "launch.py"), 7, "f")
        == "ops/launch.py:7 f"
    )
    assert prefill_parts.place("/a/b/c/d/e.py", 3, "g") == "c/d/e.py:3 g"
    assert prefill_parts.place("~", 0, "<built-in method len>") == "<built-in method len>"
