"""Special ids, tiktoken files and conversion; tiktoken itself is the ground truth for ids."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers_for_tests import BYTES, auto_load, reference_of, trained_ranks

from kimi_linear.tokenizer.convert import (
    build_tokenizer,
    bytes_to_chars,
    convert_tiktoken,
    recover_merges,
)
from kimi_linear.tokenizer.special_tokens import (
    NOT_SPECIAL,
    OFFICIAL_NUM_RANKS,
    PATTERN_ALTERNATIVES,
    special_token_ids,
)
from kimi_linear.tokenizer.tiktoken_format import load_tiktoken, save_tiktoken

pytestmark = pytest.mark.transformers

pytest.importorskip("tiktoken")

OFFICIAL_IDS = {
    "[BOS]": 163584,
    "[EOS]": 163585,
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "<|reserved_token_163589|>": 163589,
    "<|start_header_id|>": 163590,
    "<|end_header_id|>": 163591,
    "<|reserved_token_163592|>": 163592,
    "[EOT]": 163593,
    "<|im_system|>": 163594,
    "<|tool_calls_section_begin|>": 163595,
    "<|tool_calls_section_end|>": 163596,
    "<|tool_call_begin|>": 163597,
    "<|tool_call_argument_begin|>": 163598,
    "<|tool_call_end|>": 163599,
    "<|reserved_token_163600|>": 163600,
    "<|im_middle|>": 163601,
    "<|reserved_token_163602|>": 163602,
    "<|reserved_token_163837|>": 163837,
    "[UNK]": 163838,
    "[PAD]": 163839,
}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return trained_ranks()


@pytest.fixture(scope="module")
def folder(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer")
    convert_tiktoken(ranks, output)
    return output


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return auto_load(folder)


class TestSpecialTokens:
    def test_official_ids(self) -> None:
        ids = special_token_ids(OFFICIAL_NUM_RANKS)
        assert list(ids.values()) == list(range(163584, 163840))
        assert {name: ids[name] for name in OFFICIAL_IDS} == OFFICIAL_IDS
        assert sum(name.startswith("<|reserved_token_") for name in ids) == 256 - 17

    def test_same_offsets_in_a_small_vocabulary(self) -> None:
        ids = special_token_ids(1000)
        assert (ids["[BOS]"], ids["<|im_middle|>"], ids["[PAD]"]) == (1000, 1017, 1255)
        assert ids["<|reserved_token_1005|>"] == 1005

    def test_refuses_too_few_ranks(self) -> None:
        with pytest.raises(ValueError, match="num_ranks is 255; allowed: at least 256"):
            special_token_ids(255)

    def test_pattern_spells_the_classes_out(self) -> None:
        assert len(PATTERN_ALTERNATIVES) == 8
        assert PATTERN_ALTERNATIVES[1] == (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        )
        assert PATTERN_ALTERNATIVES[2] == (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        )


class TestTiktokenFormat:
    def test_round_trip_in_rank_order(self, tmp_path: Path) -> None:
        shuffled = BYTES | {b"ab": 257, b" \n": 256}
        save_tiktoken(shuffled, tmp_path / "v")
        assert load_tiktoken(tmp_path / "v") == shuffled
        lines = (tmp_path / "v").read_bytes().splitlines()
        assert lines[0] == b"AA== 0" and lines[256] == base64.b64encode(b" \n") + b" 256"
        load = pytest.importorskip("tiktoken.load")
        assert load.load_tiktoken_bpe(str(tmp_path / "v")) == shuffled

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"YWI=", r"line 257: b'YWI='; allowed: BASE64 RANK"),
            (b"YWI= x", r"line 257: b'YWI= x'; allowed: BASE64 RANK"),
            (b"YWI= -1", r"line 257: .*; allowed: BASE64 RANK"),
            (b"YWI 256", r"line 257: b'YWI' is not base64"),
            (b"Y!I= 256", r"line 257: b'Y!I=' is not base64"),
            (b"AA== 256", r"line 257: token b'\\x00' has rank 0 too"),
            (b"YWI= 255", r"257 tokens, but none has rank 256"),
            (b"YWI= 300", r"257 tokens, but none has rank 256"),
            (b" 256", r"rank 256 is an empty token"),
        ],
    )
    def test_refuses_a_line_by_number(self, tmp_path: Path, line: bytes, message: str) -> None:
        save_tiktoken(BYTES, tmp_path / "v")
        (tmp_path / "v").write_bytes((tmp_path / "v").read_bytes() + line + b"\n")
        with pytest.raises(ValueError, match=message):
            load_tiktoken(tmp_path / "v")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
            (b"IQ== 0\n", "255 single bytes have no rank, the first is 0x00"),
            (b'{"model": {}}\n', "line 1: .*allowed: BASE64 RANK"),
        ],
    )
    def test_refuses_a_file_by_name(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "some.model").write_bytes(content)
        with pytest.raises(ValueError, match=f"some.model.*{message}"):
            load_tiktoken(tmp_path / "some.model")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_tiktoken(tmp_path / "nowhere")

    def test_does_not_write_an_incomplete_vocabulary(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="allowed: every rank from 0 to 256 once"):
            save_tiktoken(BYTES | {b"ab": 999}, tmp_path / "v")
        assert not (tmp_path / "v").exists()


class TestMerges:
    def test_byte_characters_are_those_of_tokenizers(self) -> None:
        assert sorted(bytes_to_chars().values()) == sorted(ByteLevel.alphabet())
        pre = ByteLevel(add_prefix_space=False, use_regex=False)
        text = "".join(map(chr, range(0x250))) + "中👍"
        mapped = "".join(bytes_to_chars()[byte] for byte in text.encode())
        assert pre.pre_tokenize_str(text)[0][0] == mapped

    def test_last_pair_follows_the_ranks(self) -> None:
        ranks = BYTES | {b"bc": 256, b"ab": 257, b"abc": 258, b"abcd": 259, b"xyz": 260}
        assert recover_merges(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"abc", b"d")]

    @pytest.mark.parametrize("seed", range(6))
    def test_any_ranks_give_the_ids_of_tiktoken(self, seed: int) -> None:
        """Also where tokens cannot be reached by merges, or rank below their parts."""
        rng = random.Random(seed)
        tokens = sorted({bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(90)})
        order = [*BYTES, *rng.sample(tokens, len(tokens))]
        if seed % 2:
            rng.shuffle(order)
        ranks = {token: rank for rank, token in enumerate(order)}
        assert len(recover_merges(ranks)) < len(tokens)
        fast, reference = build_tokenizer(ranks), reference_of(ranks)
        for _ in range(200):
            text = "".join(rng.choices("aabbc", k=rng.choice((1, 5, 9, 30, 200))))
            assert fast.encode(text).ids == reference.encode_ordinary(text)


class TestConversion:
    def test_refuses_ranks_that_spell_a_special_token(self) -> None:
        """Its id would be the rank's, and every later special id would shift."""
        message = r"ranks\[b'\[BOS\]'\] is 256, but \[BOS\] is the special token 257; allowed"
        with pytest.raises(ValueError, match=message):
            build_tokenizer(BYTES | {b"[BOS]": 256})

    def test_folder_holds_what_engines_read(self, folder: Path, ranks: dict[bytes, int]) -> None:
        assert {path.name for path in folder.iterdir()} == {
            "chat_template.jinja",
            "special_tokens_map.json",
            "tiktoken.model",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert load_tiktoken(folder / "tiktoken.model") == ranks
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "auto_map" not in config
        assert config["clean_up_tokenization_spaces"] is False
        assert len(config["added_tokens_decoder"]) == 256
        roles = json.loads((folder / "special_tokens_map.json").read_text())
        assert roles["bos_token"] == "[BOS]" and roles["eos_token"] == "<|im_end|>"

    def test_loads_with_every_id_in_place(self, tokenizer: Any, ranks: dict[bytes, int]) -> None:
        num_ranks = len(ranks)
        assert len(tokenizer) == num_ranks + 256
        for name, token_id in special_token_ids(num_ranks).items():
            assert tokenizer.convert_tokens_to_ids(name) == token_id
            assert tokenizer(name).input_ids == [token_id]
            assert tokenizer.added_tokens_decoder[token_id].special is (name not in NOT_SPECIAL)
        roles = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert roles == (num_ranks, num_ranks + 2)
        assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (
            num_ranks + 254,
            num_ranks + 255,
        )
        assert tokenizer.model_max_length == 1_048_576
        assert tokenizer.model_input_names == ["input_ids", "attention_mask"]

    def test_adds_nothing_and_hides_special_tokens_only(self, tokenizer: Any) -> None:
        ids = tokenizer("a").input_ids
        assert len(ids) == 1
        text = "<|im_user|>a<|tool_call_begin|>b<|im_end|>"
        shown = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert shown == "a<|tool_call_begin|>b"

    def test_special_text_is_not_in_the_bpe_vocabulary(self, folder: Path) -> None:
        """Else text that spells `[BOS]` would become it even where special tokens are off."""
        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.encode_special_tokens = True
        assert len(fast.encode("[BOS]").ids) > 1
        assert len(fast.encode("<|im_end|>").ids) > 1

    def test_loads_beside_an_official_config(self, folder: Path, tmp_path: Path) -> None:
        """Transformers' own conversion of tiktoken.model must not be taken: it shifts the ids."""
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        auto_map = {"AutoConfig": "configuration_kimi_linear.KimiLinearConfig"}
        config = {"model_type": "kimi_linear", "auto_map": auto_map}
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = auto_load(tmp_path)
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "Hi 'S\n\n 中文ab 12345<|im_middle|>[PAD]"
        assert loaded(text).input_ids == own.encode(text).ids

    def test_saved_again_it_is_the_same(self, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path)
        again = type(tokenizer).from_pretrained(tmp_path, local_files_only=True)
        text = "def f(x):\n    return '中文'<|im_end|><|tool_call_end|>"
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.chat_template == tokenizer.chat_template

    def test_keeps_the_file_byte_for_byte(self, tmp_path: Path) -> None:
        """Official files give the bytes ranks in another order, and the order of lines is free."""
        order = [*range(255, -1, -1)]
        lines = [b"%b %d\n" % (base64.b64encode(bytes([b])), r) for r, b in enumerate(order)]
        source = tmp_path / "tiktoken.model"
        source.write_bytes(b"".join(reversed(lines)))
        content = source.read_bytes()
        elsewhere = convert_tiktoken(source, tmp_path / "out", vocab_size=512)
        in_place = convert_tiktoken(source, tmp_path)
        assert (tmp_path / "out" / "tiktoken.model").read_bytes() == content
        assert source.read_bytes() == content
        assert elsewhere("\x00~").input_ids == in_place("\x00~").input_ids == [255, 255 - 0x7E]

    def test_options(self, tmp_path: Path) -> None:
        base = convert_tiktoken(BYTES, tmp_path, eos_token="[EOS]", model_max_length=4096)
        assert (base.eos_token, base.eos_token_id, base.model_max_length) == ("[EOS]", 257, 4096)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eos_token": "</s>"}, r"eos_token is '</s>'; allowed: <\|im_end\|>, \[EOS\]"),
            ({"model_max_length": 0}, "model_max_length is 0"),
            ({"vocab_size": 163840}, "ranks gives 512 ids; allowed: vocab_size, which is 163840"),
        ],
    )
    def test_refuses_options(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            convert_tiktoken(BYTES, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
