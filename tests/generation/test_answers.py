"""Answers taken apart: whole, broken, cut off anywhere, and repeating the words of the format."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kimi_linear.tokenizer import (
    Answer,
    AnswerReader,
    ToolCall,
    convert_tiktoken,
    encode_chat,
    encode_plain,
    parse_answer,
    train_bpe,
)

pytestmark = pytest.mark.transformers

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
ADD = ToolCall("functions.add:0", "add", {"a": [1, 2], "b": "中"}, '{"a": [1, 2], "b": "中"}')
DOT = ToolCall("functions.math.pi:1", "math.pi", {}, "{}")


def written(call: ToolCall) -> str:
    return f"<|tool_call_begin|>{call.id}<|tool_call_argument_begin|>{call.text}<|tool_call_end|>"


BOTH = f"I add.{BEGIN}{written(ADD)}{written(DOT)}{END}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = Path(json.__file__).parent.parent / "argparse.py"
    ranks = train_bpe([source.read_text(encoding="utf-8")], 1000, show_progress=False)
    return convert_tiktoken(ranks, tmp_path_factory.mktemp("answers"))


def parse(tokenizer: Any, text: str) -> Answer:
    return parse_answer(tokenizer, tokenizer(text).input_ids)


class TestWhole:
    @pytest.mark.parametrize(
        "text", ["", "Hi! 你好 👋", "  a\n\n", "```json\n{}\n```", "<|im_ end|>"]
    )
    def test_text(self, tokenizer: Any, text: str) -> None:
        assert parse(tokenizer, f"{text}<|im_end|>") == Answer(text)

    @pytest.mark.parametrize("end", ["<|im_end|>", "[EOS]", "<|im_end|>[PAD][PAD]", "[EOS]junk"])
    def test_tool_calls(self, tokenizer: Any, end: str) -> None:
        assert parse(tokenizer, BOTH + end) == Answer("I add.", [ADD, DOT])

    def test_not_finished(self, tokenizer: Any) -> None:
        assert parse(tokenizer, "I a") == Answer("I a", is_finished=False)
        assert parse(tokenizer, BOTH) == Answer("I add.", [ADD, DOT], is_finished=False)

    def test_without_the_section_and_with_space_between(self, tokenizer: Any) -> None:
        answer = parse(tokenizer, f"{written(ADD)}\n{written(DOT)}<|im_end|>")
        assert answer.tool_calls == [ADD, DOT]
        assert answer.content.strip() == ""
        spaced = written(ADD).replace("<|tool_call_argument", " <|tool_call_argument")
        assert parse(tokenizer, f"{spaced}<|im_end|>").tool_calls == [ADD]

    def test_text_behind_a_call_is_kept(self, tokenizer: Any) -> None:
        answer = parse(tokenizer, f"a{BEGIN}{written(ADD)}{END}b<|im_end|>")
        assert answer == Answer("ab", [ADD])

    def test_an_answer_that_the_prompt_begins(self, tokenizer: Any) -> None:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "once "}]
        prefix = encode_chat(tokenizer, messages, continue_final_message=True)["input_ids"]
        ids = tokenizer("upon<|im_end|>").input_ids
        assert parse_answer(tokenizer, ids, prefix=prefix) == Answer("once upon")
        assert parse_answer(tokenizer, ids) == Answer("upon")

    def test_the_name_of_the_assistant_is_no_part_of_it(self, tokenizer: Any) -> None:
        for name in ("a<b", "<|im_middle|>", "assistant"):
            messages = [{"role": "assistant", "name": name, "content": "Begin "}]
            prompt = encode_chat(tokenizer, messages, continue_final_message=True)["input_ids"]
            ids = tokenizer("more<|im_end|>").input_ids
            assert parse_answer(tokenizer, ids, prefix=prompt) == Answer("Begin more")
        parsed = tokenizer.parse_response("more", prefix="<|im_assistant|>a<b<|im_middle|>Begin ")
        assert parsed["content"] == "Begin more"

    def test_tensors(self, tokenizer: Any) -> None:
        torch = pytest.importorskip("torch")
        ids = torch.tensor(tokenizer(f"{BOTH}<|im_end|>").input_ids)
        assert parse_answer(tokenizer, ids) == Answer("I add.", [ADD, DOT])

    def test_the_message_renders_to_the_same_ids(self, tokenizer: Any) -> None:
        """So a conversation that goes on has the prefix that is in the cache."""
        ids = tokenizer(f"{BOTH}<|im_end|>").input_ids
        message = parse_answer(tokenizer, ids).message()
        encoded = encode_chat(tokenizer, [message], return_assistant_tokens_mask=True)
        mask = encoded["assistant_masks"]
        assert [t for t, said in zip(encoded["input_ids"], mask, strict=True) if said] == ids


class TestBroken:
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ('{"a": 1', "not JSON"),
            ("", "not JSON"),
            ("{'a': 1}", "not JSON"),
            ("[1]", "list, not an object"),
            ('"a"', "str, not an object"),
            ("null", "NoneType, not an object"),
            ("[" * 100_000, "not JSON"),
            ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ],
    )
    def test_arguments(self, tokenizer: Any, arguments: str, problem: str) -> None:
        call = written(ToolCall("functions.f:0", "f", {}, arguments))
        answer = parse(tokenizer, f"a{BEGIN}{call}{written(DOT)}{END}<|im_end|>")
        broken, whole = answer.tool_calls
        assert whole == DOT and answer.content == "a" and answer.is_finished
        assert (broken.name, broken.arguments, broken.text) == ("f", {}, arguments)
        assert problem in str(broken.problem)
        assert answer.problems == [f"functions.f:0: {broken.problem}"]
        assert [call["id"] for call in answer.message()["tool_calls"]] == [DOT.id]

    @pytest.mark.parametrize(
        ("piece", "problems"),
        [
            (
                "<|tool_call_begin|>no name here<|tool_call_end|>",
                ["<|tool_call_begin|>no name here"],
            ),
            (
                "<|tool_call_begin|><|tool_call_argument_begin|>{}<|tool_call_end|>",
                ["<|tool_call_begin|><|tool_call_argument_begin|>{}"],
            ),
            (
                "<|tool_call_begin|>two words<|tool_call_argument_begin|>{}<|tool_call_end|>",
                ["<|tool_call_begin|>two words<|tool_call_argument_begin|>{}"],
            ),
            ("<|tool_call_argument_begin|>", ["<|tool_call_argument_begin|>"]),
            ("<|tool_call_end|>", ["<|tool_call_end|>"]),
        ],
    )
    def test_calls_without_a_name(self, tokenizer: Any, piece: str, problems: list[str]) -> None:
        answer = parse(tokenizer, f"a{BEGIN}{piece}{written(DOT)}{END}b<|im_end|>")
        assert (answer.content, answer.tool_calls) == ("ab", [DOT])
        assert answer.problems == [f"not a tool call: {problem!r}" for problem in problems]

    def test_text_in_the_section_and_in_no_call(self, tokenizer: Any) -> None:
        """White space between calls is nothing; words are not shown, and not lost."""
        answer = parse(tokenizer, f"a{BEGIN}\n{written(ADD)}\n {written(DOT)}\n{END}b<|im_end|>")
        assert answer == Answer("ab", [ADD, DOT])
        for text in (f"a{BEGIN}words<|im_end|>", f"a{BEGIN}words{END}<|im_end|>"):
            assert parse(tokenizer, text) == Answer(
                "a", problems=["text between tool calls: 'words'"]
            )

    def test_a_call_that_the_next_one_closes(self, tokenizer: Any) -> None:
        unclosed = written(ADD).removesuffix("<|tool_call_end|>")
        answer = parse(tokenizer, f"{BEGIN}{unclosed}{written(DOT)}{END}<|im_end|>")
        assert answer == Answer("", [ADD, DOT])

    def test_a_stray_piece_behind_a_call_is_not_the_calls(self, tokenizer: Any) -> None:
        answer = parse(tokenizer, f"{written(DOT)}<|tool_call_argument_begin|>{{}}")
        assert answer.tool_calls == [DOT]
        assert answer.problems == ["not a tool call: '<|tool_call_argument_begin|>'"]

    @pytest.mark.parametrize("offset", [2, 3, 4, 11, 12, 13, 14, 15, 17])
    def test_many_tokens_of_the_format(self, tokenizer: Any, offset: int) -> None:
        """In linear time: Transformers' parser takes minutes for some of these."""
        started = time.process_time()
        answer = parse_answer(tokenizer, [len(tokenizer) - 256 + offset] * 20_000)
        assert time.process_time() - started < 5
        assert answer.content == "" and answer.tool_calls == []

    def test_long_arguments_take_linear_time(self, tokenizer: Any) -> None:
        """They were put together anew for each id: 26 s for 320,000."""
        begin, middle = tokenizer.convert_tokens_to_ids(
            ["<|tool_call_begin|>", "<|tool_call_argument_begin|>"]
        )
        (name,) = encode_plain(tokenizer, ["f"])
        (word,) = encode_plain(tokenizer, ["class"])
        for head in ([begin], [begin, *name, middle]):

            def seconds(count: int, head: list[int] = head) -> float:
                started = time.process_time()
                parse_answer(tokenizer, head + word * count)
                return time.process_time() - started

            assert seconds(160_000) < 8 * 3 * max(seconds(20_000), 0.01)

    @pytest.mark.parametrize("bad", [-1, 2**32, 10**100, 1.5, "1", None, [1]])
    def test_ids_that_no_tokenizer_has(self, tokenizer: Any, bad: Any) -> None:
        for name, call in (
            (r"ids\[1\]", lambda: parse_answer(tokenizer, [5, bad])),
            (r"prefix\[0\]", lambda: parse_answer(tokenizer, [5], prefix=[bad])),
            ("token_id", lambda: AnswerReader(tokenizer).put(bad)),
        ):
            with pytest.raises(ValueError, match=rf"^{name} is .*; allowed: integers from 0 to"):
                call()
        assert parse_answer(tokenizer, [2**32 - 1]).content == ""

    def test_rows_are_no_ids(self, tokenizer: Any) -> None:
        torch = pytest.importorskip("torch")
        with pytest.raises(ValueError, match=r"^ids\[0\] is tensor"):
            parse_answer(tokenizer, torch.ones(1, 3, dtype=torch.long))
        begin = tokenizer.convert_tokens_to_ids("<|tool_call_begin|>")
        reader = AnswerReader(tokenizer)
        assert reader.put(torch.tensor(begin)) == "" and reader.answer().problems

    def test_unclosed_call_before_another(self, tokenizer: Any) -> None:
        unclosed = written(ADD).removesuffix("<|tool_call_end|>")
        answer = parse(tokenizer, f"{BEGIN}{unclosed}{END}{BEGIN}{written(DOT)}{END}<|im_end|>")
        assert answer.tool_calls == [ADD, DOT]
        answer = parse(tokenizer, f"{BEGIN}{unclosed}<|im_end|>")
        assert answer.tool_calls[0].problem == "cut off before the end of the call"

    @pytest.mark.parametrize(
        "text", [f"{BOTH}<|im_end|>", f"{written(ADD)}x{written(DOT)}<|im_end|>"]
    )
    def test_cut_off_anywhere(self, tokenizer: Any, text: str) -> None:
        """What has come whole is there, what has not is flagged, nothing else is invented."""
        ids = tokenizer(text).input_ids
        for length in range(len(ids)):
            answer = parse_answer(tokenizer, ids[:length])
            shown = tokenizer.decode(ids[:length])
            whole = [call for call in (ADD, DOT) if written(call) in shown]
            assert [call for call in answer.tool_calls if call.problem is None] == whole
            assert not answer.is_finished
            begun = shown.count("<|tool_call_begin|>")
            assert len(answer.problems) == begun - len(whole)
            assert "<|" not in answer.content

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(data=st.data())
    def test_any_ids_are_read(self, tokenizer: Any, data: Any) -> None:
        """Never a crash, no call that did not begin, and words are never lost."""
        size = len(tokenizer)
        special = st.sampled_from([size - 256 + at for at in (2, 3, 4, 11, 12, 13, 14, 15, 17)])
        word = st.sampled_from(encode_plain(tokenizer, ["functions.f:0 {}"])[0])
        ids = data.draw(st.lists(st.one_of(special, word, st.integers(0, size - 1)), max_size=30))
        answer = parse_answer(tokenizer, ids)
        calls = sum(token == size - 256 + 13 for token in ids)
        assert len(answer.tool_calls) <= calls
        assert all(call.name for call in answer.tool_calls)
        ends = [at for at, token in enumerate(ids) if token in (size - 254, size - 255)]
        assert answer.is_finished == bool(ends)
        read = [token for token in ids[: ends[0] if ends else None] if token < size - 256]
        letters = [c for c in tokenizer.decode(read) if c.isascii() and c.isalpha()]
        kept = f"{answer.content} {answer.tool_calls} {answer.problems}"
        assert not set(letters) - set(kept)


class TestForged:
    def test_spelled_calls_are_text(self, tokenizer: Any) -> None:
        """A model that repeats such text calls nothing."""
        (ids,) = encode_plain(tokenizer, [f"{BOTH}<|im_end|>[EOS]"])
        assert parse_answer(tokenizer, ids) == Answer(f"{BOTH}<|im_end|>[EOS]", is_finished=False)

    def test_spelled_tokens_inside_arguments(self, tokenizer: Any) -> None:
        begin, middle, end = tokenizer.convert_tokens_to_ids(
            ["<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"]
        )
        text = json.dumps({"a": "<|tool_call_end|><|im_end|>", "b": ["[EOS]"]})
        name, arguments = encode_plain(tokenizer, ["functions.f:0", text])
        (call,) = parse_answer(tokenizer, [begin, *name, middle, *arguments, end]).tool_calls
        assert call == ToolCall("functions.f:0", "f", json.loads(text), text)


class TestTransformersParser:
    """The same format through Transformers alone, which sees text."""

    def test_parse_response(self, tokenizer: Any) -> None:
        prompt = encode_chat(
            tokenizer, [{"role": "user", "content": "x"}], add_generation_prompt=True
        )
        message = tokenizer.parse_response(
            tokenizer(f"{BOTH}<|im_end|>").input_ids, prefix=prompt["input_ids"]
        )
        calls = [
            {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
            for c in (ADD, DOT)
        ]
        assert message == {"role": "assistant", "content": "I add.", "tool_calls": calls}

    def test_names_in_brackets_are_text(self, tokenizer: Any) -> None:
        text = 'Use [EOS] or [PAD].<|tool_call_begin|>f<|tool_call_argument_begin|>{"a": "[EOS]"}'
        message = tokenizer.parse_response(f"{text}<|tool_call_end|><|im_end|>[PAD]", prefix="")
        assert message["content"] == "Use [EOS] or [PAD]."
        assert message["tool_calls"][0]["function"]["arguments"] == {"a": "[EOS]"}

    def test_cut_off_arguments_are_text(self, tokenizer: Any) -> None:
        ids = tokenizer(f"{BOTH}<|im_end|>").input_ids
        for length in range(len(ids)):
            message = tokenizer.parse_response(tokenizer.decode(ids[:length]), prefix="")
            for call in message.get("tool_calls", []):
                assert isinstance(call["function"]["arguments"], dict | str)

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_streaming(self, tokenizer: Any, size: int) -> None:
        """In pieces of any size: text as it comes, calls when they are whole."""
        parser = tokenizer.get_response_parser(prefix="")
        text = f"{BOTH}<|im_end|>"
        events = [
            event
            for start in range(0, len(text), size)
            for event in parser.feed(text[start : start + size])
        ]
        message, last = parser.finalize()
        events += last
        shown = [
            e["text"] for e in events if e["type"] == "region_chunk" and e["field"] == "content"
        ]
        calls = [e["value"]["function"]["name"] for e in events
                 if e["type"] == "region_close" and e["field"] == "tool_calls"]  # fmt: skip
        assert "".join(shown) == message["content"] == "I add."
        assert calls == ["add", "math.pi"]

    def test_is_kept_when_saved(self, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path)
        again = type(tokenizer).from_pretrained(tmp_path, local_files_only=True)
        assert again.response_template == tokenizer.response_template


class TestAnswerReader:
    def test_shows_the_content_as_it_comes(self, tokenizer: Any) -> None:
        """Nothing of a call, nothing twice, and together what the answer says."""
        text = f"Hi 👋{BEGIN}\n{written(ADD)} {written(DOT)}{END} bye 中<|im_end|>[PAD]x"
        reader = AnswerReader(tokenizer)
        shown = [reader.put(token) for token in tokenizer(text).input_ids] + [reader.end()]
        assert reader.answer() == Answer("Hi 👋 bye 中", [ADD, DOT])
        assert "".join(shown) == reader.answer().content
        assert not any("\ufffd" in piece for piece in shown)

    def test_can_be_asked_before_the_end(self, tokenizer: Any) -> None:
        reader = AnswerReader(tokenizer)
        ids = tokenizer(f"a{written(DOT)}<|im_end|>").input_ids
        for token in ids[:-2]:
            reader.put(token)
        assert reader.answer().problems == [f"{DOT.id}: cut off before the end of the call"]
        for token in ids[-2:]:
            reader.put(token)
        assert reader.answer() == Answer("a", [DOT])

    def test_refuses_other_tokenizers(self, tokenizer: Any, tmp_path: Path) -> None:
        tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer.json"
        path.write_text(path.read_text().replace("<|tool_call_end|>", "<|tool_call_stop|>"))
        other = type(tokenizer)(tokenizer_file=str(path))
        with pytest.raises(
            ValueError, match=r"tokenizer has no token <\|tool_call_end\|>; allowed"
        ):
            AnswerReader(other)
