"""Training of small vocabularies, and the script around it."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kimi_linear.tokenizer.convert import build_tokenizer
from kimi_linear.tokenizer.special_tokens import PATTERN, special_token_ids
from kimi_linear.tokenizer.tiktoken_format import load_tiktoken, save_tiktoken
from kimi_linear.tokenizer.train import train_bpe

tiktoken = pytest.importorskip("tiktoken")

LIBRARY = Path(json.__file__).parent.parent
SOURCES = [LIBRARY / name for name in ("argparse.py", "ast.py", "inspect.py", "typing.py")]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_tokenizer.py"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Python source with some other scripts mixed in."""
    source = [path.read_text(encoding="utf-8") for path in SOURCES]
    return [*source, "月之暗面的线性注意力, 月之暗面 ÀÉÎ àéî Ελληνικά ελληνικά 👩‍🚀👩‍🚀\r\n" * 20]


@pytest.fixture(scope="module")
def ranks(texts: list[str]) -> dict[bytes, int]:
    return train_bpe(texts, 2048, show_progress=False)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tokenizer_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ranks_are_the_bytes_and_then_the_merges(ranks: dict[bytes, int]) -> None:
    assert len(ranks) == 2048 - 256
    assert list(ranks.values()) == list(range(len(ranks)))
    tokens = list(ranks)
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert all(len(token) > 1 for token in tokens[256:])
    # In the spelling of bytes, not in that of byte-level characters.
    assert {b" self", b" def", "月之暗面".encode()} <= set(tokens)


def test_first_merge_is_the_most_frequent_pair() -> None:
    ranks = train_bpe(["abab ab", "zq zq"], 256 + 256 + 1, show_progress=False)
    assert list(ranks)[256:] == [b"ab"]


def test_no_token_crosses_a_split_of_the_pattern(ranks: dict[bytes, int]) -> None:
    for token in ranks:
        text = token.decode("utf-8", errors="ignore")
        assert not (any(c.isdigit() for c in text) and any(c.isalpha() for c in text)), token


def test_ids_equal_tiktoken_over_the_written_file(
    texts: list[str], ranks: dict[bytes, int], tmp_path: Path
) -> None:
    save_tiktoken(ranks, tmp_path / "tiktoken.model")
    read = load_tiktoken(tmp_path / "tiktoken.model")
    assert read == ranks
    special = special_token_ids(len(read))
    reference = tiktoken.Encoding(
        "trained", pat_str=PATTERN, mergeable_ranks=read, special_tokens=special
    )
    tokenizer = build_tokenizer(read)
    for text in texts:
        assert tokenizer.encode(text).ids == reference.encode_ordinary(text)


def test_every_learned_token_is_used_for_itself(ranks: dict[bytes, int]) -> None:
    tokenizer = build_tokenizer(ranks)
    whole = {t.decode(): i for t, i in ranks.items() if t.isascii() and t.strip(b" ").isalpha()}
    assert len(whole) > 500
    for text, rank in whole.items():
        assert tokenizer.encode(text).ids == [rank]


def test_runs_are_byte_identical_on_any_number_of_threads(tmp_path: Path) -> None:
    program = (
        "import sys, types\n"
        "for name, path in (('kimi_linear', ''), ('kimi_linear.tokenizer', '/tokenizer')):\n"
        "    sys.modules[name] = types.ModuleType(name)  # not the package: it imports torch\n"
        f"    sys.modules[name].__path__ = [{str(ROOT)!r} + path]\n"
        "from kimi_linear.tokenizer.train import train_bpe\n"
        "from kimi_linear.tokenizer.tiktoken_format import save_tiktoken\n"
        "texts = (open(path, encoding='utf-8').read() for path in sys.argv[2:])\n"
        "save_tiktoken(train_bpe(texts, 3000, show_progress=False), sys.argv[1])"
    )
    digests = set()
    for threads, seed in ((1, 0), (2, 1), (2, 2)):
        path = tmp_path / f"{threads}-{seed}.model"
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(seed)}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", program, str(path), *map(str, SOURCES)]
        subprocess.run(command, env=env, check=True)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_too_little_text_says_what_was_reached() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 4096, .* for 513 only"):
        train_bpe(["abab"], 4096, show_progress=False)
    with pytest.raises(ValueError, match="for 512 only"):
        train_bpe([], 600, show_progress=False)


def test_min_frequency_one_takes_pairs_seen_once() -> None:
    with pytest.raises(ValueError, match="for 512 only"):
        train_bpe(["abcd"], 515, show_progress=False)
    ranks = train_bpe(["abcd"], 515, show_progress=False, min_frequency=1)
    assert list(ranks)[-1] == b"abcd"


@pytest.mark.parametrize("vocab_size", [511, 0, -1, 1024.0, "1024", None])
def test_refuses_vocab_size(vocab_size: object) -> None:
    with pytest.raises(ValueError, match=r"vocab_size is .*at least 512"):
        train_bpe(["text"], vocab_size, show_progress=False)  # type: ignore[arg-type]


def test_smallest_vocabulary_is_the_bytes() -> None:
    ranks = train_bpe(["text text"], 512, show_progress=False)
    assert ranks == {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one string", "texts is one str"),
        (["fine", 3], r"texts\[1\] is of type int"),
        (["fine", "ab\ud800"], r"texts\[1\] has the lone surrogate U\+D800 at character 2"),
    ],
)
def test_refuses_texts(texts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_bpe(texts, 600, show_progress=False)  # type: ignore[arg-type]


def test_refuses_min_frequency() -> None:
    with pytest.raises(ValueError, match="min_frequency is 0"):
        train_bpe(["text"], 600, show_progress=False, min_frequency=0)


def test_script_trains_on_files_and_folders(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "corpus" / "below"
    folder.mkdir(parents=True)
    (folder / "a.py").write_bytes(SOURCES[0].read_bytes())
    (folder / "latin1.py").write_bytes(b"\xe9\xe8 not UTF-8")
    (folder / "ignored.txt").write_text("xyzzy " * 1000)
    single = tmp_path / "b.txt"
    single.write_text("plugh " * 1000)
    arguments = [str(tmp_path / "corpus"), str(single), "--pattern-glob", "*.py"]
    arguments += ["--vocab-size", "1000", "--output", str(tmp_path / "out")]
    script.main(**vars(script.parse_arguments([*arguments, "--eos-token", "[EOS]"])))
    ranks = load_tiktoken(tmp_path / "out" / "tiktoken.model")
    assert len(ranks) == 1000 - 256
    assert b" plugh" in ranks and b" self" in ranks
    assert b" xyzzy" not in ranks
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "[EOS]"


def test_script_refuses_bad_input(script: ModuleType, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    target = {"vocab_size": 600, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match="binary is not UTF-8"):
        script.main(paths=[binary], **target)
    with pytest.raises(ValueError, match="missing does not exist"):
        script.main(paths=[tmp_path / "missing"], **target)
    with pytest.raises(ValueError, match=r"holds no file named '\*.rst'"):
        script.main(paths=[tmp_path], pattern_glob="*.rst", **target)
    with pytest.raises(ValueError, match="either files"):
        script.main(**target)
    with pytest.raises(ValueError, match="either files"):
        script.main(paths=[binary], dataset="some/dataset", **target)
    assert not (tmp_path / "out").exists()


def test_script_trains_on_a_dataset(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"body": "frobnicate the widget " * 50}, {"body": None}, {"body": "widget\n" * 9}]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"dataset": str(data), "vocab_size": 530, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"--text-column is 'text'; allowed in .*: body"):
        script.main(**arguments)
    script.main(**arguments, text_column="body")
    assert b" widget" in load_tiktoken(tmp_path / "out" / "tiktoken.model")
