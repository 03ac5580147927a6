"""Which files of a model folder are pushed."""

import collections
import fnmatch
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from generating.terminal import shown

from publishing.folder import Checkpoint

CARD = "README.md"
# What a model folder consists of beside its weights and code. Whatever else lies there, such as
# training state, sessions, drafts of a killed run, logs and secrets, stays where it is.
BELONGS = (
    CARD,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tiktoken.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "eval_results.json",
    "curves.png",
)
# Where a link of a card leads: [text](here), [label]: here, src="here".
LINK = re.compile(
    r"""(?:\]\(|\]:|\b(?:src|href)=)\s*"""
    r"""(?:<([^<>\n]+)>|"([^"\n]+)"|'([^'\n]+)'|((?:[^\s()<>"']|\([^\s()]*\))+))"""
)
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


def files_to_push(
    checkpoint: Checkpoint, include: Sequence[str] = (), *, keeps_card: bool = True
) -> list[str]:
    """The files that are pushed, as paths in the repository: what a model folder consists of, the
    images of its card if `keeps_card`, and what matches `include`. Prints what else is there.

    Raises:
        ValueError: A pattern of `include` matches nothing.
    """
    folder = checkpoint.folder
    found = matching_files(folder, include)
    own = checkpoint.files | (_card_images(folder / CARD) if keeps_card else set())
    wanted = (*BELONGS, *include)
    names = [name for name in found if name in own or any(_matches(name, each) for each in wanted)]
    rest = collections.Counter(
        top + "/" * bool(inner)
        for top, _, inner in (name.partition("/") for name in found if name not in set(names))
    )
    listed = [f"{n} ({c} files)" if n[-1] == "/" else n for n, c in rest.items()]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.is_file():
            kind = "a folder" if path.is_dir() else "nothing"
            listed.append(f"{path.relative_to(folder).as_posix()} (link to {kind})")
    if listed:
        text = f"not pushed, no part of a model: {', '.join(listed)} (--include takes files in)"
        print(shown(text), flush=True)
    return names


def matching_files(folder: Path, include: Sequence[str]) -> list[str]:
    """All files of a folder; ValueError if a pattern of `include` matches none."""
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for pattern in include:
        if not any(_matches(name, pattern) for name in found):
            raise ValueError(
                f"include: {pattern!r} is no file of {folder}; allowed: patterns, whose * stays in "
                "one folder and takes no name that begins with a dot"
            )
    return found


def _matches(name: str, pattern: str) -> bool:
    """As in a shell: `*` stays in one folder, and takes no name that begins with a dot."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(
        fnmatch.fnmatchcase(part, each) and part.startswith(".") <= each.startswith(".")
        for part, each in zip(parts, wanted, strict=True)
    )


def _card_images(card: Path) -> set[str]:
    """Where a card's links to images lead, as paths from its folder; {} without a card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    targets = ("".join(groups) for groups in LINK.findall(text))
    paths = {posixpath.normpath(unquote(re.split("[?#]", each)[0])) for each in targets}
    return {path for path in paths if path.lower().endswith(IMAGES)}
