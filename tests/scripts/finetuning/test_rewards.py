"""Rewards that are computed."""

from pathlib import Path

import pytest
from finetuning.rewards import last_number, make_reward, text_of

pytestmark = pytest.mark.finetune


def test_last_numbers() -> None:
    for text, number in (
        ("It is 1,234.50.", "1234.5"),
        ("-3 apples", "-3"),
        ("from 7 to 8", "8"),
        ("#### .5", "0.5"),
    ):
        found = last_number(text)
        assert found is not None and found == type(found)(number), text
    assert last_number("none") is None


def test_rewards_compare_with_the_column() -> None:
    answers = [[{"role": "assistant", "content": text}] for text in ("So 42.0", "41", "", "4,2")]
    columns = {"solution": ["20 + 22 #### 42"] * 4, "other": [0] * 4}
    number = make_reward("number", "solution")
    assert number(completions=answers, **columns) == [1, 0, 0, 1]
    exact = make_reward("exact", "solution")
    columns = {"solution": ["41 ", " So 42.0", "", "42"]}
    assert exact(completions=answers, **columns) == [0, 0, 1, 0]
    assert text_of("plain") == "plain"
    with pytest.raises(ValueError, match="answer_column='solution' .* answer"):
        number(completions=answers, answer=["1"] * 4)


def test_rewards_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def longest(completions, **columns):\n    return [len(c) for c in completions]"
    )
    assert make_reward(f"{file}:longest", "answer")(completions=["ab"]) == [2]
    with pytest.raises(ValueError, match="has no such function"):
        make_reward(f"{file}:shortest", "answer")
    with pytest.raises(ValueError, match="reward='numbers' is not allowed: it must be one of"):
        make_reward("numbers", "answer")
