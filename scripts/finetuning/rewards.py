"""Rewards that are computed, for finetune.py's `grpo`.

A reward takes keyword arguments, as TRL passes them, and gives a number for each answer:
`completions`, the answers as lists of messages, and every column of the dataset by its name, a list
with the value of each answer's row.
"""

import importlib.util
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

Reward = Callable[..., list[float]]
NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")


def make_reward(name: str, answer_column: str) -> Reward:
    """A reward by its name.

    Args:
        name: "number": 1 where the last number of the answer equals the last one of the row's;
            "exact": 1 where the text does, but for white space around it; or FILE.py:FUNCTION.
        answer_column: What the first two compare with.

    Raises:
        ValueError: For another name, or a file that has no such function.
    """
    if name in _REWARDS:
        compare = _REWARDS[name]

        def reward(completions: list[Any], **columns: Any) -> list[float]:
            if answer_column not in columns:
                raise ValueError(
                    f"answer_column={answer_column!r} is not allowed: the dataset has "
                    f"{', '.join(sorted(columns))}"
                )
            answers = columns[answer_column]
            return [
                float(compare(text_of(completion), str(answer)))
                for completion, answer in zip(completions, answers, strict=True)
            ]

        reward.__name__ = name
        return reward
    file, colon, function = name.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ValueError(
            f"reward={name!r} is not allowed: it must be one of {tuple(_REWARDS)} or "
            "FILE.py:FUNCTION, of a file that is there"
        )
    return _from_file(Path(file), function)


def _from_file(path: Path, function: str) -> Reward:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward={function!r} is not allowed: {path} has no such function")
    return getattr(module, function)


def text_of(completion: Any) -> str:
    """The text of an answer, which is text or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, without its thousands' commas; None if there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _same_number(text: str, answer: str) -> bool:
    wanted = last_number(answer)
    return wanted is not None and last_number(text) == wanted


_REWARDS: dict[str, Callable[[str, str], bool]] = {
    "number": _same_number,
    "exact": lambda text, answer: text.strip() == answer.strip(),
}
