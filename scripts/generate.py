"""Continue a prompt with a saved model, and show the text while it comes.

Needs nothing of this package but for `--chat`: it loads the code that lies beside the weights. A
chat's message is encoded as text, whatever it spells.

    python scripts/generate.py runs/demo --prompt 'def quicksort(' --max-new-tokens 100
    python scripts/generate.py runs/demo --prompt-file start.py --temperature 0.6 --top-p 0.95
    echo 'import os' | python scripts/generate.py runs/demo --greedy
    python scripts/generate.py user/model --chat --prompt 'What is a delta rule?' \\
        --device cuda --dtype bfloat16
    python scripts/generate.py user/model --prompt-file book-and-question.txt --session book.session
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from generating.loading import GenerationSettings
from generating.terminal import shown, tolerate_any_text
from options.settings import add_flags, command_parser, setting
from transformers import PreTrainedTokenizerBase, TextStreamer


@dataclass(frozen=True, kw_only=True)
class Settings(GenerationSettings):
    """What is continued, and how.

    Raises:
        ValueError: For an argument out of range.
    """

    prompt: str = setting(MISSING, flag=False)
    chat: bool = setting(False, "apply the chat template")
    system: str | None = setting(None, "system message of the chat", metavar="TEXT")
    begin_token: bool = setting(False, "begin token before the prompt, not with --chat")
    session: str | os.PathLike[str] | None = setting(
        None, "file that keeps what was read of the prompt for the next run", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat and not self.prompt.strip():
            raise ValueError("prompt is empty; allowed with chat: a message")
        if self.system is not None and not self.chat:
            raise ValueError(f"system={self.system!r} is only allowed with chat")


def main(**values: Any) -> str:
    """Load a model, continue the prompt, stream the text to stdout.

    Args:
        **values: Fields of `Settings`; `model` and `prompt` are needed. With a `session` the next
            run, with a prompt that begins in the same way, reads only the rest; the text stays the
            same.

    Returns:
        Prompt and continuation, or with `chat` the answer.

    Raises:
        ValueError: For an argument out of range.
    """
    settings = Settings(**values)
    prompt, chat, session = settings.prompt, settings.chat, settings.session
    tokenizer, network = settings.load()
    ids = _prompt_ids(tokenizer, settings).to(network.device)
    if not chat:
        print(prompt, end="", flush=True)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    started = time.perf_counter()
    cache = None if session is None else _read_session(network, session, ids)
    with torch.inference_mode():
        out = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **settings.options(),
        )[0, ids.shape[1] :]
    if not settings.quiet:
        seconds = time.perf_counter() - started
        print(f"[{len(out)} tokens, {len(out) / seconds:.1f} per second]", file=sys.stderr)
    text = tokenizer.decode(out, skip_special_tokens=True)
    return text if chat else prompt + text


class _Printer(TextStreamer):
    """Prints the text as it comes: as it is into a file, and as what cannot command a terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(shown(text) if sys.stdout.isatty() else text, stream_end)


def _read_session(network: Any, session: str | os.PathLike[str], ids: torch.Tensor) -> Any:
    """The cache of the prompt; None if there is nothing to keep."""
    if not hasattr(network, "read_session"):
        raise ValueError(f"session={os.fspath(session)!r} needs the code beside the weights")
    return network.read_session(session, ids) if ids.shape[1] > 1 else None


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> torch.Tensor:
    """[1, T] int64."""
    if settings.chat:
        from kimi_linear.tokenizer import encode_chat

        system = settings.system
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": settings.prompt})
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True)["input_ids"]
    else:
        ids = tokenizer(settings.prompt)["input_ids"]
        if settings.begin_token and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("prompt is empty: give a text, or begin_token to start from nothing")
    return torch.tensor([ids])


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from the argument, the file, or else stdin, read as UTF-8.

    Raises:
        ValueError: If none is given and stdin is a terminal.
    """
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        return Path(prompt_file).read_text(encoding="utf-8")
    if sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt, --prompt-file or text on stdin")
    return sys.stdin.buffer.read().decode("utf-8")


def _arguments(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = command_parser(__doc__)
    parser.add_argument("model", help="folder, or repository of the Hub")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT")
    text.add_argument("--prompt-file", metavar="FILE", help="else the prompt is read from stdin")
    add_flags(parser, Settings)
    found = vars(parser.parse_args(argv))
    try:
        found["prompt"] = read_prompt(found["prompt"], found.pop("prompt_file"))
    except ValueError as error:
        parser.error(str(error))
    return found


if __name__ == "__main__":
    tolerate_any_text()
    main(**_arguments())
