"""Results of `engine_texts.py` beside a reference, a line of JSON for each.

The log-probabilities that each engine gives the prompts' tokens are compared one by one, in nats.
The median is rounding; the largest are where rounding changes which experts a router chooses.
`max_difference_at` is the length of a prompt and the place in it. Of greedy texts a line says how
many tokens are the reference's before the first that is not, and how much likelier the reference
finds its own token there: engines in 16 bits part where two tokens are about as likely. Versions,
device, commit and command are those of each result's own run.

    python benchmarks/compare_engines.py reference.json ours.json vllm.json \\
        --record benchmarks/results/engines_h200.jsonl
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Recorder, make_parser

Result = dict[str, Any]


def scored(result: Result) -> list[float]:
    """The log-probabilities of all prompts' tokens but their first."""
    return [value for row in result["prompts"] for value in row["logprobs"][1:]]


def compare(reference: Result, other: Result) -> dict[str, Any]:
    """What a line says."""
    for wanted, found in zip(reference["prompts"], other["prompts"], strict=True):
        if wanted["ids"] != found["ids"]:
            raise ValueError("the results are of different prompts")
    wanted_values, found_values = scored(reference), scored(other)
    pairs = zip(wanted_values, found_values, strict=True)
    differences = [abs(found - wanted) for wanted, found in pairs]
    rows = list(zip(reference["prompts"], other["prompts"], strict=True))
    places = [[len(a["ids"]), at] for a, _ in rows for at in range(1, len(a["ids"]))]
    equal = [shared(a["new_ids"], b["new_ids"]) for a, b in rows]
    gaps = [gap(a, b["new_ids"], at) for (a, b), at in zip(rows, equal, strict=True)]
    return {
        "prompts": len(rows),
        "tokens": len(differences),
        "loss": -statistics.fmean(found_values),
        "loss_of_reference": -statistics.fmean(wanted_values),
        "max_difference": max(differences),
        "max_difference_at": places[differences.index(max(differences))],
        "median_difference": statistics.median(differences),
        "mean_difference": statistics.fmean(differences),
        "rms_difference": math.sqrt(statistics.fmean(each * each for each in differences)),
        "equal_tokens": equal,
        "of_tokens": len(reference["prompts"][0]["new_ids"]),
        "gaps_where_they_part": [each for each in gaps if each is not None],
    }


def shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with together."""
    same = [a == b for a, b in zip(ids, others, strict=True)]
    return same.index(False) if False in same else len(same)


def gap(wanted: dict[str, Any], found: Sequence[int], at: int) -> float | None:
    """How much likelier the reference finds its own token than the other at the place where they
    part; at least so much, if the other is not among its likeliest."""
    if at == len(found):
        return None
    top = dict(wanted["new_top"][at])
    return round(top[wanted["new_ids"][at]] - top.get(found[at], min(top.values())), 4)


def origin(result: Result, commit: str | None) -> dict[str, Any]:
    """What ran, and where; the commit is the given one where the run could not tell its own."""
    names = {key: result[key] for key in ("engine", "version", "folder")}
    setting = dict(result["setting"])
    if setting["commit"] == "unknown":
        setting["commit"] = commit or "unknown"
    return names | setting


def main(argv: list[str] | None = None) -> None:
    """Compare, print, record."""
    parser = make_parser(__doc__)
    parser.add_argument("reference", type=Path, help="of ours-float32")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--commit", help="of results from where there was no history to ask")
    args = parser.parse_args(argv)
    reference, *others = (
        json.loads(path.read_text(encoding="utf-8")) for path in (args.reference, *args.results)
    )
    tell = Recorder(args.record, is_appended=True).tell
    tell({"case": "reference", **origin(reference, args.commit)})
    for other in others:
        tell({"case": "engine", **origin(other, args.commit), **compare(reference, other)})


if __name__ == "__main__":
    main(sys.argv[1:])
