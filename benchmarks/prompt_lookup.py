"""What `generate(prompt_lookup_num_tokens=...)` gains on texts of a trained model, by kind of text.

The model and its held-out files are those that `scripts/experiment_quantization.py` left in its
--folder. A prompt of each kind is made of every file:

    copied   the file, and its beginning once more: the text goes on as it did before
    edited   the same, but in the second beginning the file's commonest name is another one
    new      the file's beginning; tokens are sampled, so that greedy text's loops are none

Minutes of training make a model that copies if some of its texts repeat themselves:

    python scripts/experiment_quantization.py --train-minutes 7 --repeats 0.6 --rows 2 \\
        --length 2048 --learning-rate 1e-3 --vocab-size 512 --packages 10 --time-limit 560 \\
        --sections main --folder /tmp/quantization

With few ids each is seen often, and a 1B model copies after 2,000 steps; with 16,384 it does not
after 6,500.

Each is continued with and without drafts in turn, after one continuation of each to warm up. A line
of JSON for each kind: seconds of all continuations, and of those seconds the prompts'; how many
times as fast drafts are, over all files, and by file; forwards that drafts took, by the tokens that
they read; and how many tokens of greedy text are the same before the first other one, and how much
likelier the text without drafts is there, in nats: bfloat16 sums of another order part near-ties.

    python benchmarks/prompt_lookup.py --folder /tmp/quantization \\
        --record benchmarks/results/prompt_lookup.jsonl
"""

import functools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import Recorder, make_parser, setting
from experiments.slices import load_trained
from experiments.sources import Sources
from measuring.device import synchronise
from torch import Tensor

from kimi_linear import KimiLinearConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("copied", "edited", "new")


def renamed(ids: list[int], is_name: Tensor) -> list[int]:
    """Ids with the commonest name exchanged for the second commonest, and the other way round.

    Raises:
        ValueError: If there are no two.
    """
    found = [name for name, _ in Counter(i for i in ids if is_name[i]).most_common(2)]
    if len(found) < 2:
        raise ValueError(f"{len(ids)} tokens of a file have {len(found)} names, and must have two")
    first, second = found
    other = {first: second, second: first}
    return [other.get(i, i) for i in ids]


def prompt(kind: str, file: list[int], length: int, is_name: Tensor, end: int) -> Tensor:
    """[1, S] int64."""
    text = file[:length]
    if kind != "new":
        again = file[1 : length // 4]
        if kind == "edited":
            again = renamed(again, is_name)
        text = [*text, end, file[0], *again]
    return torch.tensor([text], device=DEVICE)


def names(vocab_size: int, sources: Sources) -> Tensor:
    """[V] bool: ids that stand often but not everywhere: names, by and large; of few ids most."""
    counts = torch.bincount(sources.train[: 1 << 22].long(), minlength=vocab_size)
    rank = counts.argsort(descending=True).argsort()
    return (rank > min(200, vocab_size // 16)) & (counts > 0)


class Runs:
    """Continuations of one model.

    Args:
        model: In eval mode.
        new_tokens: Of each.
        drafts: Tokens that are drafted at most.
    """

    def __init__(self, model: Any, new_tokens: int, drafts: int) -> None:
        self.model, self.new_tokens, self.drafts = model, new_tokens, drafts

    def __call__(
        self, ids: Tensor, with_drafts: bool, samples: bool, new_tokens: int | None = None
    ) -> tuple[float, list[int]]:
        """Seconds and new tokens."""
        torch.manual_seed(0)
        more = {"prompt_lookup_num_tokens": self.drafts} if with_drafts else {}
        more |= {"top_k": 0} if samples else {}
        synchronise(DEVICE)
        start = time.perf_counter()
        text = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=samples,
            max_new_tokens=new_tokens or self.new_tokens,
            eos_token_id=None,
            **more,
        )
        synchronise(DEVICE)
        return time.perf_counter() - start, text[0, ids.shape[1] :].tolist()

    def forwards(self, ids: Tensor, samples: bool) -> Counter[int]:
        """How many forwards behind the prompt a continuation with drafts takes, by their tokens."""
        found, forward = Counter[int](), self.model.forward

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            found[kwargs["input_ids"].shape[1]] += 1
            return forward(*args, **kwargs)

        self.model.forward = counted
        try:
            self(ids, True, samples)
        finally:
            del self.model.forward
        found.pop(ids.shape[1])
        return found

    def gap(self, ids: Tensor, text: list[int], other: int) -> float:
        """How much likelier the last token of a continuation is than another one, in nats."""
        prefix = torch.cat([ids, ids.new_tensor([text[:-1]])], dim=1)
        scores = self.model(prefix, logits_to_keep=1).logits[0, -1].float()
        return float(scores[text[-1]] - scores[other])


def figures(kind: str, run: Runs, prompts: list[Tensor], repeats: int) -> dict[str, Any]:
    """Of one kind of text."""
    samples = kind == "new"
    for with_drafts in (False, True):
        run(prompts[0], with_drafts, samples)
    plain, drafted, reading, same, ratios, gaps = 0.0, 0.0, 0.0, 0, [], []
    forwards = Counter[int]()
    for ids in prompts:
        forwards += run.forwards(ids, samples)
        reading += min(run(ids, False, samples, new_tokens=1)[0] for _ in range(repeats))
        pairs = [[run(ids, each, samples) for each in (False, True)] for _ in range(repeats)]
        least = [min(pair[i][0] for pair in pairs) for i in range(2)]
        plain, drafted = plain + least[0], drafted + least[1]
        ratios.append(least[0] / least[1])
        (_, text), (_, other) = pairs[0]
        first = next((i for i, token in enumerate(text) if token != other[i]), run.new_tokens)
        same += first
        if first < run.new_tokens and not samples:
            gaps.append(round(run.gap(ids, text[: first + 1], other[first]), 4))
    found: dict[str, Any] = {
        "case": "prompt lookup",
        "text": kind,
        "files": len(prompts),
        "prompt_tokens": sum(ids.shape[1] for ids in prompts),
        "new_tokens": run.new_tokens,
        "drafts_at_most": run.drafts,
        "plain_seconds": plain,
        "drafted_seconds": drafted,
        "prompt_seconds": reading,
        "times_as_fast": plain / drafted,
        "times_as_fast_behind_prompts": (plain - reading) / (drafted - reading),
        "times_as_fast_by_file": [round(each, 3) for each in ratios],
        "forwards_by_tokens": dict(sorted(forwards.items())),
    }
    if not samples:
        found["same_tokens"] = same / len(prompts) / run.new_tokens
        found["gaps_where_they_part"] = gaps
    return found


@torch.inference_mode()
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of experiment_quantization.py")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--length", type=int, default=900, help="tokens of a file's beginning")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--drafts", type=int, default=15, help="prompt_lookup_num_tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", help="in the lines, where git is not there to ask")
    args = parser.parse_args()
    record = Recorder(args.record)
    sources = Sources(
        **{k: v for k, v in torch.load(args.folder / "tokens.pt").items() if k != "wanted"}
    )
    state = torch.load(args.folder / "trained.pt", map_location="cpu")
    config = KimiLinearConfig(**state["config"])
    model, state = load_trained(args.folder / "trained.pt", config, DEVICE)
    record.tell(setting(args.commit) | {k: v for k, v in state.items() if k != "config"})
    run = Runs(model, args.new_tokens, args.drafts)
    is_name = names(config.vocab_size, sources)
    long_enough = [each for each in sources.held_out if len(each) > args.length][: args.files]
    for kind in KINDS:
        end = sources.special["eos_token_id"]
        prompts = [prompt(kind, each, args.length, is_name, end) for each in long_enough]
        record.tell(figures(kind, run, prompts, args.repeats))


if __name__ == "__main__":
    main()
