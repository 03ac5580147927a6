"""scripts/experiment_needle.py: its rows, and that a small model learns to look up."""

import json
from pathlib import Path
from typing import Any

import experiment_needle
import pytest
import torch
from experiment_needle import TEXT_ROWS, Haystack
from experiments.tasks import IGNORED
from experiments.training import Learner, Pool, Recipe
from experiments.variants import build_variant
from one_thread import one_thread  # noqa: F401

TEXT, PAIRS, VALUES = 40, 3, 8
SMALL: dict[str, Any] = {
    "device": "cpu",
    "models": ("hybrid", "mla"),
    "layers": 4,
    "heads": 2,
    "head_dim": 16,
    "length": 64,
    "factors": (2, 1),
    "depths": (0.0, 1.0),
    "pairs": 2,
    "repeats": 1,
    "values": 8,
    "rows": 4,
    "batch_tokens": 128,
    "steps": 3,
    "eval_every": 2,
    "warmup": 1,
    "vocab_size": 512,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def haystack(repeats: int = 1) -> Haystack:
    tokens = torch.randint(TEXT, (3000,), generator=generator(9))
    return Haystack(tokens, TEXT, PAIRS, VALUES, repeats)


def pairs_of(row: list[int], mark: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Value and place by key."""
    places = [i for i, token in enumerate(row) if token == mark]
    return {(row[i + 1], row[i + 2]): (row[i + 3], i) for i in places if i + 3 < len(row)}


def test_training_rows_ask_for_every_pair() -> None:
    hay = haystack()
    ids, labels = hay.training_rows(33, 60, generator())
    assert ids.shape == labels.shape == (33, 60)
    places = set()
    for i, (row, wanted) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        known = pairs_of(row, hay.pair_mark)
        assert len(known) == PAIRS
        asked = [j for j, token in enumerate(row) if token == hay.question_mark]
        assert len(asked) == PAIRS and asked[-1] == 57  # the last answer is a label only
        answers = {(row[j + 1], row[j + 2]): wanted[j + 2] for j in asked}
        assert answers == {key: value for key, (value, _) in known.items()}
        others = [x for j, x in enumerate(wanted) if j - 2 not in asked]
        if i % TEXT_ROWS:
            assert set(others) == {IGNORED}
        else:
            following = [x if x < TEXT else IGNORED for x in row[1:]]
            expected = [x for j, x in enumerate(following) if j - 2 not in asked]
            assert others == expected
        places |= {place for _, place in known.values()}
    assert len(places) > 8 and int(ids.max()) < hay.vocab_size


def test_every_pair_is_asked_for_more_than_once() -> None:
    hay = haystack(repeats=3)
    ids, labels = hay.training_rows(5, 90, generator())
    assert ids.shape == (5, 90)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        known = pairs_of(row, hay.pair_mark)
        asked = [j for j, token in enumerate(row) if token == hay.question_mark]
        keys = [(row[j + 1], row[j + 2]) for j in asked]
        assert [wanted[j + 2] for j in asked] == [known[key][0] for key in keys]
        for part in range(3):  # all of them before one comes again
            assert set(keys[part * PAIRS : (part + 1) * PAIRS]) == set(known)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_is_where_it_should_be(depth: float) -> None:
    hay = haystack()
    ids, answers = hay.test_rows(16, 200, depth, generator())
    assert ids.shape == (16, 200) and answers.shape == (16,)
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        assert row[-3] == hay.question_mark
        known = pairs_of(row, hay.pair_mark)
        assert len(known) == PAIRS
        value, place = known[row[-2], row[-1]]
        assert value == answer
        assert place == pytest.approx(depth * 192, abs=4)
    assert len(set(answers.tolist())) > 3


def test_a_small_model_learns_to_look_up() -> None:
    """Two pairs in 24 tokens, from chance, 1 in 4, to more than 17 in 20."""
    hay = Haystack(torch.randint(8, (2000,), generator=generator(9)), 8, 2, 4)
    model = build_variant("1:0", hay.vocab_size, 0, num_layers=2, num_heads=2, head_dim=32)
    learner = Learner(model, Recipe(5e-3, warmup=10), (32, 24))
    make = generator(1)
    pool = Pool(lambda count: hay.training_rows(count, 24, make), 32, 16)
    ids, answers = hay.test_rows(128, 24, 0.3, generator(2))
    assert (learner.predict_last(ids) == answers).float().mean() < 0.5
    for _ in range(75):
        learner.step(*pool.batch())
    assert (learner.predict_last(ids) == answers).float().mean() > 0.85


def test_a_run(tmp_path: Path) -> None:
    for i in range(40):
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(8)]
        (tmp_path / f"module_{i}.py").write_text("\n".join(lines))
    output = tmp_path / "lines.jsonl"
    options = {**SMALL, "corpus": tmp_path, "output": output}
    lines = experiment_needle.main(**options)
    assert [json.loads(text) for text in output.read_text().splitlines()] == lines
    cells = [line for line in lines if line["event"] == "cell"]
    assert [(c["model"], c["length"], c["depth"]) for c in cells] == [
        (model, length, depth)
        for model in ("hybrid", "mla")
        for length in (64, 128)
        for depth in (0.0, 1.0)
    ]
    assert all(0 <= cell["accuracy"] <= 1 and cell["rows"] == 4 for cell in cells)
    runs = {line["model"]: line for line in lines if line["event"] == "run"}
    assert runs["hybrid"]["full_layers"] == [4] and runs["mla"]["full_layers"] == [1, 2, 3, 4]
    sizes = [run["parameters"] for run in runs.values()]
    assert max(sizes) < 1.03 * min(sizes)
    again = experiment_needle.main(**options)
    assert [line["event"] for line in again] == ["environment"]  # nothing left to do
    with pytest.raises(ValueError, match="--length 64 is not allowed: it must be"):
        experiment_needle.main(**{**options, "factors": (10**6,)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("gdn",)}, "--models 'gdn' is not allowed"),
        ({"depths": (1.5,)}, "--depths"),
        ({"length": 20}, "--length 20 is not allowed: it must be at least 24 for"),
        ({"pairs": 100}, "--pairs 100 is not allowed"),
        ({"layers": 3}, "num_layers=3 is not allowed"),
        ({"factors": ()}, "--factors"),
    ],
)
def test_what_the_script_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment_needle.main(**{**SMALL, **options})
