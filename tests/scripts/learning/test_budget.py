"""The budget of a training."""

import pytest
from learning.budget import Budget


def test_budget_counts_steps_or_running_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Budget(4, None)
    steps.count_step(3)
    assert steps.progress() == 0.75
    now = [100.0]
    monkeypatch.setattr("learning.budget.time.perf_counter", lambda: now[0])
    clock = Budget(None, 0.5)
    clock.run()
    now[0] += 12
    clock.pause()
    now[0] += 1000  # an evaluation costs no training time
    assert clock.progress() == pytest.approx(0.4)
    clock.run()
    now[0] += 6
    assert clock.progress() == pytest.approx(0.6)
    for steps_given, minutes in ((None, None), (1, 1.0), (0, None), (None, -1.0)):
        with pytest.raises(ValueError, match="steps="):
            Budget(steps_given, minutes)
