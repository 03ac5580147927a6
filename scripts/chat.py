"""Chat with a saved model in the terminal: answers stream, the conversation goes on.

Ctrl-C stops an answer and keeps the chat; Ctrl-D, or /quit, ends it. What you type is encoded as
text, whatever it spells: it can't end your turn or begin another. Control characters in an answer
are shown, as `\\x1b`, and not sent to the terminal. With `--tools` the model may call a calculator,
which runs here and knows arithmetic only.

    python scripts/chat.py kimi-linear-48b --dtype bfloat16
    python scripts/chat.py runs/tuned --system 'Answer in one sentence.' --tools --greedy
    python scripts/chat.py runs/tuned --load yesterday.json --temperature 0.6
    echo 'What is a delta rule?' | python scripts/chat.py runs/tuned --quiet

In the chat:

    /reset         forget the conversation, keep the system message
    /system TEXT   set the system message (none without TEXT) and reset
    /save FILE     write the conversation to a file
    /load FILE     go on with the conversation of a file
    /help          show these lines
    /quit          end the chat
    //TEXT         say /TEXT
"""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from generating.calculator import calculator
from generating.conversation import Chat, Turn, read_messages
from generating.loading import GenerationSettings
from generating.terminal import shown, tolerate_any_text
from options.settings import add_flags, command_parser, setting

with contextlib.suppress(ImportError):  # not on every platform
    import readline  # noqa: F401  gives input() a history and editing

TOOLS: dict[str, Callable[..., Any]] = {"calculator": calculator}
COMMANDS = ("/reset", "/system", "/save", "/load", "/help", "/quit")


@dataclass(frozen=True, kw_only=True)
class Settings(GenerationSettings):
    """Which model chats, and how.

    Raises:
        ValueError: For an argument out of range.
    """

    system: str | None = setting(None, "system message", metavar="TEXT")
    tools: bool = setting(False, "let the model use a calculator")
    max_new_tokens: int = setting(1024, "of one answer")
    load_file: str | os.PathLike[str] | None = setting(
        None, "go on with a saved chat", metavar="FILE", name="--load"
    )
    temperature: float = setting(0.6, "divides the logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_file is not None and self.system is not None:
            raise ValueError(
                f"system={self.system!r} is not allowed with load_file, which has its own"
            )


def main(**values: Any) -> Chat:
    """Load a model and chat until the input ends.

    Args:
        **values: Fields of `Settings`; `model` is needed.

    Returns:
        The chat, as it was when the input ended.

    Raises:
        ValueError: For an argument out of range, a tokenizer without a chat format, or a file that
            holds no conversation.
        OSError: The file cannot be read.
    """
    settings = Settings(**values)
    load_file, quiet = settings.load_file, settings.quiet
    if load_file is not None:
        read_messages(load_file)  # what is wrong with it shows before the model is loaded
    tokenizer, network = settings.load()
    chat = Chat(
        network,
        tokenizer,
        system=settings.system,
        tools=TOOLS if settings.tools else None,
        max_new_tokens=settings.max_new_tokens,
        generate_options=settings.options(),
    )
    if load_file is not None:
        chat.load(load_file)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    _note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat", quiet)
    while (line := _read_line()) is not None:
        if not _is_command(line):
            _say(chat, line.removeprefix("/") if line.startswith("//") else line, quiet)
            continue
        try:
            if not _obey(chat, line, quiet):
                break
        except KeyboardInterrupt:
            _note("interrupted", False)
    return chat


def _read_line() -> str | None:
    """What the user types, None at the end. Ctrl-C at the prompt begins a new line."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            _note(f"the input is not UTF-8 ({error})", False)
            continue
        if line.strip():
            return line


def _is_command(line: str) -> bool:
    return line.startswith("/") and not line.startswith("//")


def _obey(chat: Chat, line: str, quiet: bool) -> bool:
    """Carry a command out; whether the chat goes on."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/quit":
        return False
    if command == "/help":
        print(str(__doc__).partition("In the chat:\n\n")[2].rstrip())
    elif command == "/reset":
        chat.reset()
        _note("the conversation is forgotten", quiet)
    elif command == "/system":
        chat.system = argument or None
        chat.reset()
        _note("the system message is set, the conversation forgotten", quiet)
    elif command in ("/save", "/load") and not argument:
        _note(f"{command} needs the name of a file", False)
    elif command in ("/save", "/load"):
        action = chat.save if command == "/save" else chat.load
        try:
            action(os.path.expanduser(argument))
        except (OSError, ValueError) as error:
            _note(str(error), False)
        else:
            done = "saved" if command == "/save" else "loaded"
            _note(f"{len(chat.messages)} messages {done}", quiet)
    else:
        _note(f"{command} is no command; allowed: {', '.join(COMMANDS)}", False)
    return True


def _say(chat: Chat, text: str, quiet: bool) -> None:
    """Ask, and show answers and tools as they come."""
    turn: Turn | None = None
    before = len(chat.messages)
    try:
        for turn in chat.ask(text, write=_show):
            print()
            _report(turn, quiet)
        if turn is not None and turn.results:
            _note("the model calls tools again and again: stopped here", False)
    except KeyboardInterrupt:
        del chat.messages[before:]
        print()
        _note("interrupted: this message and its answer are forgotten", False)
    except (ValueError, torch.OutOfMemoryError) as error:
        _note(f"{error}: this message is forgotten", False)


def _report(turn: Turn, quiet: bool) -> None:
    for call, result in turn.results:
        _note(f"{call.name}({call.text}) = {result}", quiet)
    for problem in turn.answer.problems:
        _note(f"the answer is broken: {problem}", False)
    if turn.is_stopped:
        _note("stopped", quiet)
    elif not turn.answer.is_finished:
        _note(f"cut off after {turn.num_tokens} tokens", False)
    rest = turn.seconds - turn.first_seconds
    speed = f", {(turn.num_tokens - 1) / rest:.1f} per second" if turn.num_tokens > 1 else ""
    _note(
        f"{turn.num_prompt_tokens:,} ({turn.num_reused_tokens:,} from the cache) + "
        f"{turn.num_tokens:,} tokens in {turn.seconds:.2f} s, the "
        f"first after {turn.first_seconds:.2f} s{speed}",
        quiet,
    )


def _show(piece: str) -> None:
    """A piece of the model's text."""
    print(shown(piece), end="", flush=True)


def _note(text: str, quiet: bool) -> None:
    """A line that is not the model's, though it may quote it."""
    if not quiet:
        print(f"[{shown(text)}]", file=sys.stderr, flush=True)


def _parser() -> Any:
    parser = command_parser(__doc__)
    parser.add_argument("model", help="folder, or repository of the Hub")
    add_flags(parser, Settings)
    return parser


if __name__ == "__main__":
    tolerate_any_text()
    try:
        main(**vars(_parser().parse_args()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {shown(str(error))}") from error
