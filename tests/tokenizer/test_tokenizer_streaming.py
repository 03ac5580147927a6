"""Ids decoded one at a time give the text of all of them, and never half a character."""

import bisect
import time
from itertools import accumulate
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE
from tokenizers_for_tests import BYTES, Case, make_case, substring_ranks, text_strategy

from kimi_linear.tokenizer.streaming import StreamDecoder

pytestmark = pytest.mark.transformers

transformers = pytest.importorskip("transformers")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TEXTS = text_strategy()
INVALID = (
    b"\x80 a",
    b"\xe4\xb8",
    b"\xe4\xb8a\xad",
    b"\xc0\xaf\xc1",
    b"\xe0\x80\xaf",
    b"\xed\xa0\x80\xed\xb0\x80",
    b"\xf0\x9f\x91 \xf0\x9f\xf0",
    b"\xf4\x90\x80\x80\xf5\xff\xfe",
    b"\xe4\xb8\xad\xe4",
    b"\xf0\x80\x80\x80a",
)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Tokens that hold parts of characters, at both ends."""
    return make_case("substrings", substring_ranks(1), tmp_path_factory.mktemp("substrings"))


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_case("bytes", BYTES, tmp_path_factory.mktemp("bytes")).tokenizer


def pieces_of(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.put(token_id) for token_id in ids] + [decoder.end()]


class TestStreamDecoder:
    @hypothesis.settings(max_examples=500, deadline=None)
    @hypothesis.given(text=TEXTS)
    def test_shows_every_whole_character_at_once(self, case: Case, text: str) -> None:
        decoder = StreamDecoder(case.tokenizer)
        ends = list(accumulate(len(char.encode()) for char in text))
        shown, num_bytes = "", 0
        for token_id in case.tokenizer(text).input_ids:
            shown += decoder.put(token_id)
            num_bytes += len(case.token_bytes[token_id])
            assert shown == text[: bisect.bisect_right(ends, num_bytes)]
        assert shown == text and decoder.end() == ""

    @pytest.mark.parametrize("skip", [False, True])
    @hypothesis.settings(max_examples=500, deadline=None)
    @hypothesis.given(data=st.data())
    def test_any_ids(self, case: Case, skip: bool, data: Any) -> None:
        """Ids that no text gives: their bytes are seldom UTF-8. Some do not exist."""
        last = len(case.token_bytes) - 1
        some = st.one_of(st.integers(0, last + 2), st.integers(last - 255, last))
        ids = data.draw(st.lists(some, max_size=12))
        expected = case.tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces_of(case.tokenizer, ids, skip_special_tokens=skip)) == expected

    @pytest.mark.parametrize("data", INVALID)
    def test_invalid_bytes_one_by_one(self, bytewise: Any, data: bytes) -> None:
        ids = list(data)
        assert "".join(pieces_of(bytewise, ids)) == bytewise.decode(ids)
        assert "\ufffd" in bytewise.decode(ids)

    def test_special_tokens(self, bytewise: Any) -> None:
        ids = bytewise("<|im_user|>a<|tool_call_begin|>b<|im_end|>").input_ids
        kept = ["<|im_user|>", "a", "<|tool_call_begin|>", "b", "<|im_end|>", ""]
        assert pieces_of(bytewise, ids) == kept
        skipped = pieces_of(bytewise, ids, skip_special_tokens=True)
        assert skipped == ["", *kept[1:4], "", ""]

    def test_a_character_across_a_special_token(self, bytewise: Any) -> None:
        """Skipped tokens add no bytes, so the character is whole, as in `decode`."""
        ids = [0xE4, 0xB8, 256, 0xAD]
        for skip, expected in ((True, "中"), (False, "\ufffd[BOS]\ufffd")):
            assert bytewise.decode(ids, skip_special_tokens=skip) == expected
            assert "".join(pieces_of(bytewise, ids, skip_special_tokens=skip)) == expected

    def test_tokens_of_any_text_added_later(self, bytewise: Any) -> None:
        backend = Tokenizer.from_str(bytewise.backend_tokenizer.to_str())
        backend.add_tokens(["<中>", "é", "Ġ", "x y"])
        for first in range(508, 516):
            ids = [first, 0xE4, first, 0xB8, 0xAD, first]
            assert "".join(pieces_of(backend, ids)) == backend.decode(
                ids, skip_special_tokens=False
            )

    def test_end_starts_anew(self, bytewise: Any) -> None:
        decoder = StreamDecoder(bytewise)
        assert (decoder.put(0xE4), decoder.end()) == ("", "\ufffd")
        assert (decoder.put(torch.tensor(97)), decoder.end()) == ("a", "")

    def test_time_grows_with_the_ids(self, bytewise: Any) -> None:
        """Without a space or a newline, and inside an endless broken character."""
        for token_id in (97, 0x80):
            short, long = ([token_id] * 2000, [token_id] * 40_000)
            assert best_seconds(bytewise, long) < 100 * best_seconds(bytewise, short)

    def test_refuses(self, bytewise: Any) -> None:
        with pytest.raises(ValueError, match="token_id is -1; allowed: integers from 0"):
            StreamDecoder(bytewise).put(-1)
        with pytest.raises(ValueError, match="decoder NoneType; allowed: .* ByteLevel"):
            StreamDecoder(Tokenizer(BPE()))


def best_seconds(tokenizer: Any, ids: list[int]) -> float:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        pieces_of(tokenizer, ids)
        seconds.append(time.process_time() - start)
    return min(seconds)


class Captured(transformers.TextStreamer):
    """What the streamer would print."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)


class TestStreamersOfTheLibraries:
    """They are right for ids that a text gives. `DecodeStream` drops the end of others."""

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(text=TEXTS)
    def test_valid_text(self, case: Case, text: str) -> None:
        ids = case.tokenizer(text).input_ids
        printed = Captured(case.tokenizer)
        iterated = transformers.TextIteratorStreamer(case.tokenizer)
        stream = DecodeStream(skip_special_tokens=False)
        for token_id in ids:
            printed.put(torch.tensor([token_id]))
            iterated.put(torch.tensor([token_id]))
        printed.end()
        iterated.end()
        stepped = [stream.step(case.tokenizer.backend_tokenizer, i) or "" for i in ids]
        for pieces in (printed.pieces, list(iterated), stepped):
            assert "".join(pieces) == text
            assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
