"""Throughput of the fast tokenizer beside tiktoken, over the same ranks and texts.

The text is 10 MB: Python's standard library and generated text in many scripts, in documents of
2,000 to 30,000 characters. It is encoded as one string, document by document, and as a batch on
two threads. Rounds are interleaved: each round runs every measurement once, so that what else the
machine does hits all of them alike; results of the first round are compared. Prints one JSON object
a line, the stages of encoding among them (processor time, the least of the rounds); the last one is
the summary. Progress goes to stderr.

    python benchmarks/tokenizer_speed.py --record benchmarks/results/tokenizer_speed.jsonl
    python benchmarks/tokenizer_speed.py --megabytes 1 --vocab-size 4096 --rounds 3
"""

import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from common import Recorder, current_commit, make_parser

THREADS = 2

# Megabytes of the sample that the stages are measured on.
STAGE_MEGABYTES = 1.0
HAN = [chr(point) for point in range(0x4E00, 0x5200)]
EMOJI = ("👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "😀", "✨")
WORDS = ("don't ", "WE'LL ", "e\u0301te\u0301 ", "한국어 ", "カタカナ", "हिन्दी ", "naïve ")
SPACES = (" " * 8, " " * 20, "\n", "\n\n\n", "\r\n", "\t\t", "\u3000")


def many_scripts(num_bytes: int) -> str:
    """Generated text of about so many bytes: the same on every machine."""
    rng = random.Random(0)
    kinds: tuple[Callable[[], str], ...] = (
        lambda: "".join(rng.choices(HAN, k=rng.randint(2, 12))) + rng.choice("，。、 "),
        lambda: "".join(rng.choices("абвгдежзиклмнопрсту", k=rng.randint(2, 9))) + " ",
        lambda: "".join(rng.choices("αβγδεζηθικλ", k=rng.randint(2, 9))) + " ",
        lambda: "".join(rng.choices("0123456789٣٤", k=rng.randint(1, 9))) + " ",
        lambda: "".join(rng.choices(EMOJI, k=rng.randint(1, 4))),
        lambda: rng.choice(SPACES),
        lambda: rng.choice(WORDS),
    )
    pieces, size = [], 0
    while size < num_bytes:
        pieces.append(rng.choice(kinds)())
        size += len(pieces[-1].encode())
    return "".join(pieces)


def make_documents(megabytes: float) -> list[str]:
    """Half source, half generated, cut into documents and mixed."""
    from texts.corpus import standard_library

    half = int(megabytes * 1e6) // 2
    source = (
        "".join(file.text for file in standard_library()).encode()[:half].decode("utf-8", "ignore")
    )
    rng = random.Random(1)
    documents = []
    for text in (source, many_scripts(half)):
        at = 0
        while at < len(text):
            size = rng.randint(2000, 30_000)
            documents.append(text[at : at + size])
            at += size
    rng.shuffle(documents)
    return documents


def measurements(auto: Any, encoding: Any, documents: list[str]) -> dict[str, dict[str, Any]]:
    """For every kind of call: tiktoken's first, then ours."""
    from kimi_linear.tokenizer.streaming import StreamDecoder

    fast = auto.backend_tokenizer
    text = "".join(documents)
    ids = encoding.encode_ordinary(text)

    def stream() -> str:
        decoder = StreamDecoder(auto)
        return "".join([decoder.put(token_id) for token_id in ids]) + decoder.end()

    calls = {
        "encode, one string": {
            "tiktoken": lambda: encoding.encode_ordinary(text),
            "tokenizers": lambda: fast.encode(text).ids,
            "AutoTokenizer": lambda: auto(text).input_ids,
        },
        "encode, by document": {
            "tiktoken": lambda: [encoding.encode_ordinary(d) for d in documents],
            "tokenizers": lambda: [fast.encode(d).ids for d in documents],
            "AutoTokenizer": lambda: [auto(d).input_ids for d in documents],
        },
        "encode, batch on 2 threads": {
            "tiktoken": lambda: encoding.encode_ordinary_batch(documents, num_threads=THREADS),
            "tokenizers": lambda: [e.ids for e in fast.encode_batch(documents)],
            "tokenizers, no offsets": lambda: [e.ids for e in fast.encode_batch_fast(documents)],
            "AutoTokenizer": lambda: auto(documents).input_ids,
        },
        "decode": {
            "tiktoken": lambda: encoding.decode(ids),
            "tokenizers": lambda: fast.decode(ids),
            "AutoTokenizer": lambda: auto.decode(ids),
            "StreamDecoder": stream,
        },
    }
    return calls


def stages(ranks: dict[bytes, int], documents: list[str]) -> dict[str, Callable[[], Any]]:
    """Encoding with more and more of what it does, on one thread; the model comes last."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import PreTokenizer, Split

    from kimi_linear.tokenizer.convert import build_tokenizer, make_pre_tokenizer
    from kimi_linear.tokenizer.special_tokens import PATTERN

    def without_model(pre_tokenizer: PreTokenizer | None) -> Tokenizer:
        """Every piece is one unknown word."""
        tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        return tokenizer

    nothing = without_model(None)
    split = without_model(Split(Regex(PATTERN), behavior="isolated"))
    mapped = without_model(make_pre_tokenizer())
    simple = without_model(Split(Regex(r"\s+|\S+"), behavior="isolated"))
    whole = build_tokenizer(ranks)
    return {
        "text taken over": lambda: [nothing.encode_batch_fast([d]) for d in documents],
        "+ split by \\s+|\\S+ instead": lambda: [simple.encode_batch_fast([d]) for d in documents],
        "+ split by the pattern": lambda: [split.encode_batch_fast([d]) for d in documents],
        "+ bytes to characters": lambda: [mapped.encode_batch_fast([d]) for d in documents],
        "+ merges": lambda: [whole.encode_batch_fast([d]) for d in documents],
        "+ offsets": lambda: [whole.encode_batch([d]) for d in documents],
        "+ ids as a list": lambda: [whole.encode_batch([d])[0].ids for d in documents],
    }


def run_rounds(
    kinds: dict[str, dict[str, Callable[[], Any]]],
    rounds: int,
    clock: Callable[[], float],
    compare: bool,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call, round by round; if asked, a kind's calls must give the same."""
    seconds: dict[str, dict[str, list[float]]] = {k: {w: [] for w in kinds[k]} for k in kinds}
    for number in range(rounds):
        for kind, ways in kinds.items():
            expected = None
            for way, call in ways.items():
                print(f"round {number + 1} of {rounds}: {kind}, {way}", file=sys.stderr, flush=True)
                start = clock()
                result = call()
                seconds[kind][way].append(clock() - start)
                if compare and number == 0:
                    expected = result if expected is None else expected
                    assert result == expected, (kind, way)
    return seconds


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def tell_throughput(
    kinds: dict[str, dict[str, Any]], rounds: int, num_bytes: int, tell: Callable[[Any], None]
) -> dict[str, float]:
    """A line for every call; its throughput over tiktoken's, by kind and way."""
    seconds = run_rounds(kinds, rounds, time.perf_counter, compare=True)
    ratios = {}
    for kind, ways in seconds.items():
        for way, own in ways.items():
            ratio = statistics.median(r / o for r, o in zip(ways["tiktoken"], own, strict=True))
            median = statistics.median(own)
            line = {
                "kind": kind,
                "way": way,
                "seconds": round(median, 3),
                "megabytes_per_second": round(num_bytes / 1e6 / median, 2),
                "throughput_over_tiktoken": round(ratio, 3),
            }
            tell(line)
            if way != "tiktoken":
                ratios[f"{kind}, {way}"] = line["throughput_over_tiktoken"]
    return ratios


def tell_stages(
    ranks: dict[bytes, int], documents: list[str], rounds: int, tell: Callable[[Any], None]
) -> None:
    """A line for every stage of encoding, on the first documents."""
    few, size = [], 0
    for document in documents:
        if size < STAGE_MEGABYTES * 1e6:
            few.append(document)
            size += len(document.encode())
    steps = {"stage": stages(ranks, few)}
    for name, values in run_rounds(steps, rounds, time.process_time, False)["stage"].items():
        cost = min(values) / size * 1e9
        tell({"stage": name, "nanoseconds_per_byte": round(cost, 1)})


def main(
    *, megabytes: float, vocab_size: int, rounds: int, record: Path | None = None
) -> dict[str, Any]:
    """Train, convert, compare, measure; print the lines.

    Args:
        megabytes: size of the text in 10^6 bytes of UTF-8.
        vocab_size: ids of the vocabulary, trained on the text itself.
        rounds: how often everything is measured; the figures are medians.
        record: file for the lines.

    Returns:
        The summary.
    """
    import tiktoken
    from transformers import AutoTokenizer

    from kimi_linear.tokenizer import convert_tiktoken, special_token_ids, train_bpe
    from kimi_linear.tokenizer.special_tokens import PATTERN

    tell, documents = Recorder(record).tell, make_documents(megabytes)
    num_bytes = sum(len(document.encode()) for document in documents)
    ranks = train_bpe(documents, vocab_size)
    special = special_token_ids(len(ranks))
    encoding = tiktoken.Encoding(
        "speed", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    with tempfile.TemporaryDirectory() as folder:
        convert_tiktoken(ranks, folder)
        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    kinds = measurements(auto, encoding, documents)
    ratios = tell_throughput(kinds, rounds, num_bytes, tell)
    tell_stages(ranks, documents, rounds, tell)
    summary = {
        "summary": ratios,
        "megabytes": round(num_bytes / 1e6, 2),
        "documents": len(documents),
        "vocab_size": vocab_size,
        "rounds": rounds,
        "threads": THREADS,
        "versions": {n: version(n) for n in ("tokenizers", "transformers", "tiktoken")},
        "python": platform.python_version(),
        "processor": processor(),
        "commit": current_commit(),
    }
    tell(summary)
    return summary


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
