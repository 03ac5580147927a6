"""The characters that stand for bytes in byte-level BPE."""

import functools


@functools.cache
def bytes_to_chars() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE files.

    Returns:
        Byte value to character, for all 256 bytes: printable Latin-1 stands for itself, the other
        bytes in their order for U+0100 and on (the mapping of GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: 0x100 + index for index, byte in enumerate(others)}
    return {byte: chr(shifted.get(byte, byte)) for byte in range(256)}


@functools.cache
def chars_to_bytes() -> dict[str, int]:
    """The inverse of `bytes_to_chars`: the byte that each character stands for."""
    return {char: byte for byte, char in bytes_to_chars().items()}
