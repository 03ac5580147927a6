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

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from generating.loading import Sampling, add_arguments, load
from generating.terminal import shown, tolerate_any_text
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging


def main(
    *,
    model: str | os.PathLike[str],
    prompt: str,
    max_new_tokens: int = 256,
    greedy: bool = False,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    chat: bool = False,
    system: str | None = None,
    begin_token: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = True,
    session: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> str:
    """Load a model, continue the prompt, stream the text to stdout.

    Args:
        model: Folder, or repository of the Hub.
        prompt: Text to continue, or with `chat` the user's message.
        max_new_tokens: Stop after so many tokens, or before at an end token.
        greedy, temperature, top_p, top_k, min_p, repetition_penalty: See `Sampling`.
        seed: For the same text again; None: another one each time.
        chat: Apply the tokenizer's chat template to the prompt.
        system: System message of the chat.
        begin_token: Put the begin token before the prompt (not with `chat`).
        device, dtype, revision, threads, trust_remote_code: See `load`.
        session: File that keeps what the model has read of the prompt: the next run, with a prompt
            that begins in the same way, reads only the rest. The text is the same as without it.
        quiet: Say nothing on stderr.

    Returns:
        Prompt and continuation, or with `chat` the answer.

    Raises:
        ValueError: For an argument out of range.
    """
    _check(max_new_tokens, prompt, chat, system)
    sampling = Sampling(greedy, temperature, top_p, top_k, min_p, repetition_penalty)
    if quiet:
        logging.disable_progress_bar()
    tokenizer, network = load(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    ids = _prompt_ids(tokenizer, prompt, chat, system, begin_token).to(network.device)
    if not chat:
        print(prompt, end="", flush=True)
    if seed is not None:
        torch.manual_seed(seed)
    started = time.perf_counter()
    cache = None if session is None else _read_session(network, session, ids)
    with torch.inference_mode():
        out = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling.options(),
        )[0, ids.shape[1] :]
    if not quiet:
        seconds = time.perf_counter() - started
        print(f"[{len(out)} tokens, {len(out) / seconds:.1f} per second]", file=sys.stderr)
    text = tokenizer.decode(out, skip_special_tokens=True)
    return text if chat else prompt + text


class _Printer(TextStreamer):
    """Prints the text as it comes: as it is into a file, and as what cannot command a terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(shown(text) if sys.stdout.isatty() else text, stream_end)


def _check(max_new_tokens: int, prompt: str, chat: bool, system: str | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not allowed: it must be at least 1")
    if chat and not prompt.strip():
        raise ValueError("prompt is empty; allowed with chat: a message")
    if system is not None and not chat:
        raise ValueError(f"system={system!r} is only allowed with chat")


def _read_session(network: Any, session: str | os.PathLike[str], ids: torch.Tensor) -> Any:
    """The cache of the prompt; None if there is nothing to keep."""
    if not hasattr(network, "read_session"):
        raise ValueError(f"session={os.fspath(session)!r} needs the code beside the weights")
    return network.read_session(session, ids) if ids.shape[1] > 1 else None


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    chat: bool,
    system: str | None,
    begin_token: bool,
) -> torch.Tensor:
    """[1, T] int64."""
    if chat:
        from kimi_linear.tokenizer import encode_chat

        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
        if begin_token and tokenizer.bos_token_id is not None:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder, or repository of the Hub")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT")
    text.add_argument("--prompt-file", metavar="FILE", help="else the prompt is read from stdin")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--chat", action="store_true", help="apply the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--begin-token", action="store_true", help="begin token before the prompt")
    add_arguments(parser)
    parser.add_argument("--session", metavar="FILE", help="keep what was read of the prompt here")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr")
    found = vars(parser.parse_args(argv))
    try:
        found["prompt"] = read_prompt(found["prompt"], found.pop("prompt_file"))
    except ValueError as error:
        parser.error(str(error))
    return found


if __name__ == "__main__":
    tolerate_any_text()
    main(**_arguments())
