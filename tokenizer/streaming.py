"""Text out of token ids as they come: whole characters, at once, in linear time."""

import codecs
from typing import TYPE_CHECKING

from .convert import bytes_to_chars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StreamDecoder:
    """Decodes ids one by one; what has been given out is never taken back.

    Only the beginning of a character is held back, until its last byte comes. All that is given out
    is together what `tokenizer.decode` gives for all the ids, where they are no valid text too.

    Args:
        tokenizer: A fast byte-level tokenizer.
        skip_special_tokens: Whether special tokens are left out, as `decode` does.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", *, skip_special_tokens: bool = False
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if skip_special_tokens and token.special}
        self._literal = {token_id: token.content.encode() for token_id, token in added.items()}
        self._to_byte = {char: byte for byte, char in bytes_to_chars().items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """Take the next id.

        Args:
            token_id: The id.

        Returns:
            The characters that it completes, often none or several.

        Raises:
            ValueError: The tokenizer has no such id.
        """
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._bytes_of(token_id))

    def end(self) -> str:
        """Give out what was held back, as U+FFFD; the next id begins a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest

    def _bytes_of(self, token_id: int) -> bytes:
        literal = self._literal.get(token_id)
        if literal is not None:
            return literal
        token = self._backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token_id is {token_id}; allowed: ids of the tokenizer")
        return bytes(self._to_byte[char] for char in token)
