"""Read and write `tiktoken.model`: one line per token, its bytes in base64, a space, its rank."""

import base64
import binascii
import os
from pathlib import Path

_ALLOWED_LINE = "BASE64 RANK, for example 'IQ== 0'"


def check_ranks(ranks: dict[bytes, int], source: str = "ranks") -> None:
    """Check that ranks form a complete vocabulary of a byte-level BPE.

    Args:
        ranks: token bytes to rank.
        source: what the errors call the vocabulary, for instance its file.

    Raises:
        ValueError: an empty token, a byte without a token, or ranks that are not 0 .. n-1.
    """
    if b"" in ranks:
        raise ValueError(f"{source}: rank {ranks[b'']} is an empty token; allowed: at least 1 byte")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} single bytes have no rank, the first is 0x{missing[0]:02x}; "
            "allowed: vocabularies with all 256 bytes"
        )
    seen = set(ranks.values())
    if seen != set(range(len(ranks))):
        absent = next(rank for rank in range(len(ranks)) if rank not in seen)
        raise ValueError(
            f"{source}: {len(ranks)} tokens, but none has rank {absent}; "
            f"allowed: every rank from 0 to {len(ranks) - 1} once"
        )


def load_tiktoken(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Read a `tiktoken.model` file.

    Args:
        path: the file.

    Returns:
        Token bytes to rank, in the order of the file.

    Raises:
        ValueError: a malformed or repeated line (named by number), or an incomplete vocabulary.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty; allowed: lines of {_ALLOWED_LINE}")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer; download the file that it stands for")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        token, rank = _parse_line(line, f"{path}, line {number}")
        if token in ranks:
            raise ValueError(f"{path}, line {number}: token {token!r} has rank {ranks[token]} too")
        ranks[token] = rank
    check_ranks(ranks, str(path))
    return ranks


def save_tiktoken(ranks: dict[bytes, int], path: str | os.PathLike[str]) -> None:
    """Write ranks as a `tiktoken.model` file, in the order of the ranks.

    Args:
        ranks: token bytes to rank, a complete vocabulary.
        path: the file to write; its folder must exist.

    Raises:
        ValueError: the vocabulary is incomplete (see `check_ranks`).
    """
    check_ranks(ranks)
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    lines = (b"%b %d\n" % (base64.b64encode(token), rank) for token, rank in by_rank)
    Path(path).write_bytes(b"".join(lines))


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    """Token and rank of one line."""
    fields = line.split(b" ")
    if len(fields) != 2 or not fields[1].isdigit():
        raise ValueError(f"{where}: {line[:80]!r}; allowed: {_ALLOWED_LINE}")
    try:
        return base64.b64decode(fields[0], validate=True), int(fields[1])
    except binascii.Error as error:
        raise ValueError(f"{where}: {fields[0][:80]!r} is not base64 ({error})") from error
