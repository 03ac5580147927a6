"""A downloaded model's tokenizer converted, and what other engines read of it."""

import json
from pathlib import Path
from typing import Any

import commands
import convert_tokenizer
import official
import pytest
from transformers import AutoTokenizer

from kimi_linear.tokenizer import (
    convert_snapshot,
    convert_tiktoken,
    load_tiktoken,
    ranks_of,
    recover_merges,
    save_tiktoken,
    save_tokenizer,
    special_token_ids,
    train_bpe,
)

pytestmark = pytest.mark.transformers

WRITTEN = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tiktoken.model"),
}
TEXT = "def f(x):\n    return '中文 12345'  # don't<|im_end|><|tool_call_end|>[PAD]"


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    source = Path(json.__file__).parent.parent / "argparse.py"
    return train_bpe([source.read_text(encoding="utf-8")], 900, show_progress=False)


@pytest.fixture
def snapshot(ranks: dict[bytes, int], tmp_path: Path) -> Path:
    """As Moonshot publishes it, with a small vocabulary: code beside it that must not run."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_tiktoken(ranks, folder / "tiktoken.model")
    ids = special_token_ids(len(ranks))
    config = {**official.CONFIG, "vocab_size": 900, "eos_token_id": ids["<|im_end|>"]}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {
        "added_tokens_decoder": {
            str(ids[name]): {"content": name, "special": True}
            for name in ("[BOS]", "<|im_middle|>")
        },
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "eos_token": "[EOS]",
        "model_max_length": 4096,
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_kimi.py").write_text("raise ImportError('the other tokenizer')\n")
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class TestConvertSnapshot:
    def test_loads_without_trust(self, snapshot: Path, tmp_path: Path) -> None:
        made = convert_snapshot(snapshot, tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert loaded(TEXT).input_ids == made(TEXT).input_ids
        assert loaded.decode(loaded(TEXT).input_ids) == TEXT
        assert len(loaded) == 900
        assert loaded.model_max_length == 1_048_576  # config.json's
        source = (snapshot / "tiktoken.model").read_bytes()
        assert (tmp_path / "out" / "tiktoken.model").read_bytes() == source

    def test_in_place(self, snapshot: Path) -> None:
        """Beside its own config and without the code that the folder had."""
        convert_snapshot(snapshot, snapshot)
        loaded = AutoTokenizer.from_pretrained(snapshot)
        assert loaded.convert_tokens_to_ids("[PAD]") == 899
        assert loaded.decode(loaded(TEXT).input_ids) == TEXT
        assert not list(snapshot.glob(".tokenizer-*"))

    def test_links_are_replaced_and_not_written_through(
        self, snapshot: Path, tmp_path: Path
    ) -> None:
        """In the Hub's cache every file is a link to a blob that other snapshots share."""
        blobs, linked = tmp_path / "blobs", tmp_path / "linked"
        blobs.mkdir()
        linked.mkdir()
        for path in snapshot.iterdir():
            path.rename(blobs / path.name)
            (linked / path.name).symlink_to(blobs / path.name)
        before = {path.name: path.read_bytes() for path in blobs.iterdir()}
        convert_snapshot(linked, linked)
        assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
        assert not (linked / "tokenizer_config.json").is_symlink()
        assert AutoTokenizer.from_pretrained(linked)(TEXT).input_ids

    @pytest.mark.parametrize(
        ("generation", "config", "settings", "expected"),
        [
            ([646], 645, "<|im_end|>", "<|im_end|>"),
            ([645, 646], 645, "[EOS]", "<|im_end|>"),
            (None, 645, "<|im_end|>", "[EOS]"),
            (None, None, "[EOS]", "[EOS]"),
            (None, None, {"content": "[EOS]"}, "[EOS]"),
            (None, None, "</s>", "<|im_end|>"),
        ],
    )
    def test_what_ends_an_answer(
        self, snapshot: Path, generation: Any, config: Any, settings: Any, expected: str
    ) -> None:
        if generation is not None:
            text = json.dumps({"eos_token_id": generation})
            (snapshot / "generation_config.json").write_text(text)
        change(snapshot / "config.json", eos_token_id=config)
        change(snapshot / "tokenizer_config.json", eos_token=settings)
        assert convert_snapshot(snapshot, snapshot).eos_token == expected

    def test_the_vocabulary_alone_is_enough(self, ranks: dict[bytes, int], tmp_path: Path) -> None:
        save_tiktoken(ranks, tmp_path / "tiktoken.model")
        assert convert_snapshot(tmp_path, tmp_path, eos_token="[EOS]").eos_token_id == 645

    def test_refusals(self, snapshot: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        settings = snapshot / "tokenizer_config.json"
        shifted = {"646": {"content": "<|im_end|>"}, "649": {"content": "<|start_header_id|>"}}
        change(settings, added_tokens_decoder=shifted)
        with pytest.raises(
            ValueError, match=r"added_tokens_decoder\['649'\] is '<\|start_header_id"
        ):
            convert_snapshot(snapshot, output)
        change(settings, added_tokens_decoder={"7": {"content": "<s>"}})
        with pytest.raises(ValueError, match=r"\['7'\] is '<s>'; allowed: ids from 644 to 899"):
            convert_snapshot(snapshot, output)
        change(settings, added_tokens_decoder={"x": "<s>"})
        with pytest.raises(ValueError, match=r"\['x'\] is '<s>'; allowed: ids from 644 to 899"):
            convert_snapshot(snapshot, output)
        change(settings, added_tokens_decoder=[1])
        with pytest.raises(
            ValueError, match=r"added_tokens_decoder is of type list; allowed: an o"
        ):
            convert_snapshot(snapshot, output)
        settings.write_text("[]")
        with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list"):
            convert_snapshot(snapshot, output)
        settings.write_text("{")
        with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
            convert_snapshot(snapshot, output)
        settings.unlink()
        for size in (163840, 901, "900", None):
            change(snapshot / "config.json", vocab_size=size)
            message = rf"tiktoken\.model gives 900 ids; .*config\.json, which is {size!r}"
            with pytest.raises(ValueError, match=message):
                convert_snapshot(snapshot, output)
        (snapshot / "config.json").unlink()
        (snapshot / "tiktoken.model").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ValueError, match=r"tiktoken\.model is a Git LFS pointer"):
            convert_snapshot(snapshot, output)
        (snapshot / "tiktoken.model").unlink()
        with pytest.raises(ValueError, match=r"tiktoken\.model is missing"):
            convert_snapshot(snapshot, output)
        assert not output.exists()

    def test_a_cut_off_file_is_seen_without_a_config(self, snapshot: Path, tmp_path: Path) -> None:
        """The special tokens of tokenizer_config.json do not fit what is left of it."""
        (snapshot / "config.json").unlink()
        lines = (snapshot / "tiktoken.model").read_bytes().splitlines(keepends=True)
        (snapshot / "tiktoken.model").write_bytes(b"".join(lines[:-100]))
        with pytest.raises(
            ValueError, match=r"added_tokens_decoder\['644'\] is '\[BOS\]'; allowed"
        ):
            convert_snapshot(snapshot, tmp_path / "out")

    def test_other_templates_in_the_way(self, snapshot: Path) -> None:
        """Transformers would take this one for conversations with tools."""
        (snapshot / "additional_chat_templates").mkdir()
        with pytest.raises(ValueError, match=r"additional_chat_templates holds chat templates of"):
            convert_snapshot(snapshot, snapshot)

    def test_command_line(self, snapshot: Path, tmp_path: Path) -> None:
        command = [convert_tokenizer.__file__, str(snapshot), "--output"]
        done = commands.run([*command, str(tmp_path / "out")])
        assert done.returncode == 0, done.stderr
        assert "900 tokens, answers end with <|im_end|>" in done.stdout
        (snapshot / "tiktoken.model").unlink()
        done = commands.run([*command, str(tmp_path / "out2")])
        assert done.returncode == 1
        assert done.stderr.strip().startswith("error: ") and "is missing" in done.stderr


class TestSave:
    def test_tiktoken_model_is_kept(self, ranks: dict[bytes, int], tmp_path: Path) -> None:
        tokenizer = convert_tiktoken(ranks, tmp_path / "first")
        save_tokenizer(tokenizer, tmp_path / "second")
        first, second = (tmp_path / name / "tiktoken.model" for name in ("first", "second"))
        assert second.read_bytes() == first.read_bytes()
        assert load_tiktoken(second) == ranks == ranks_of(tokenizer)
        again = AutoTokenizer.from_pretrained(tmp_path / "second")
        assert again(TEXT).input_ids == tokenizer(TEXT).input_ids

    def test_links_are_replaced(self, ranks: dict[bytes, int], tmp_path: Path) -> None:
        tokenizer = convert_tiktoken(ranks, tmp_path / "first")
        (tmp_path / "second").mkdir()
        for name in ("tiktoken.model", "tokenizer.json"):
            (tmp_path / name).write_text("another's")
            (tmp_path / "second" / name).symlink_to(tmp_path / name)
        save_tokenizer(tokenizer, tmp_path / "second")
        assert (tmp_path / "tiktoken.model").read_text() == "another's"
        assert (tmp_path / "tokenizer.json").read_text() == "another's"
        assert load_tiktoken(tmp_path / "second" / "tiktoken.model") == ranks

    def test_other_tokenizers_have_none(self, ranks: dict[bytes, int], tmp_path: Path) -> None:
        tokenizer = convert_tiktoken(ranks, tmp_path / "first")
        path = tmp_path / "first" / "tokenizer.json"
        content = path.read_text().replace("<|im_middle|>", "<|im_centre|>")
        path.write_text(content)
        (tmp_path / "first" / "tokenizer_config.json").unlink()
        other = type(tokenizer)(tokenizer_file=str(path))
        assert ranks_of(other) is None
        save_tokenizer(other, tmp_path / "second")
        assert not (tmp_path / "second" / "tiktoken.model").exists()
        assert ranks_of(object()) is None  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    convert_tiktoken(ranks, folder)
    return folder


class TestOtherEngines:
    def test_llama_cpp(self, folder: Path, ranks: dict[bytes, int]) -> None:
        """Its converter reads the merges, special ids and template with this class of its own."""
        gguf = pytest.importorskip("gguf")
        found = gguf.SpecialVocab(folder, load_merges=True)
        assert len(found.merges) == len(recover_merges(ranks)) > 300
        special = special_token_ids(len(ranks))
        assert found.special_token_ids == {
            "bos": special["[BOS]"],
            "eos": special["<|im_end|>"],
            "unk": special["[UNK]"],
            "pad": special["[PAD]"],
        }
        assert "<|im_middle|>" in found.chat_template

    def test_what_converters_ask_the_tokenizer(self, folder: Path, ranks: dict[bytes, int]) -> None:
        """Every id has a token; the added ones are the last 256 and decode to themselves."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert sorted(tokenizer.vocab.values()) == list(range(900))
        added = tokenizer.get_added_vocab()
        assert added == special_token_ids(len(ranks))
        for name, token_id in added.items():
            assert tokenizer.decode(tokenizer.encode(name, add_special_tokens=False)) == name
            assert not tokenizer.added_tokens_decoder[token_id].normalized

    def test_mlx_lm(self, folder: Path) -> None:
        """It takes its streaming decoder from tokenizer.json, its tool parser from the template."""
        content = json.loads((folder / "tokenizer.json").read_text())
        assert content["decoder"]["type"] == "ByteLevel"
        template = AutoTokenizer.from_pretrained(folder).chat_template
        assert "<|tool_calls_section_begin|>" in template
