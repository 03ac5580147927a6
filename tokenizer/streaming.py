"""Text from ids that come one at a time, never showing half a character.

`transformers.TextStreamer` decodes the whole line again for every id and holds back the last word.
This decoder keeps the bytes of at most one unfinished character, and nothing else.
"""

import codecs
import operator
import reprlib
from typing import TYPE_CHECKING, Final

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from kimi_linear.tokenizer.byte_level import chars_to_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_ID: Final[int] = 2**32 - 1  # of `tokenizers`


def check_id(token_id: object, where: str = "token_id") -> int:
    """A token id as an int.

    Args:
        token_id: an integer of any kind, a tensor's element among them.
        where: what the error calls it.

    Raises:
        ValueError: it is none that a tokenizer can have.
    """
    try:
        number = operator.index(token_id)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # torch raises any of them
        number = -1
    if not 0 <= number <= MAX_ID:
        shown = reprlib.repr(token_id)
        raise ValueError(f"{where} is {shown}; allowed: integers from 0 to {MAX_ID}")
    return number


class StreamDecoder:
    """Decodes ids one by one; the pieces joined are what `tokenizer.decode` gives for all of them.

    That holds for any ids, also such whose bytes are not valid UTF-8: what cannot become a
    character is U+FFFD, as in `decode`. A piece never ends inside a character: the first bytes of
    one are held back until the next ids complete it, or show that they can't.

        decoder = StreamDecoder(tokenizer)
        for token_id in ids:
            print(decoder.put(token_id), end="", flush=True)
        print(decoder.end())

    Args:
        tokenizer: a byte-level tokenizer: one loaded by `AutoTokenizer`, or a
            `tokenizers.Tokenizer`.
        skip_special_tokens: leave out the tokens flagged special, as `decode` does; those of tool
            calls are not flagged.

    Raises:
        ValueError: the tokenizer's decoder is not byte-level.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast | Tokenizer", *, skip_special_tokens: bool = False
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        kind = getattr(backend, "decoder", None)
        if not isinstance(kind, ByteLevel):
            raise ValueError(
                f"tokenizer is {type(tokenizer).__name__} with the decoder {type(kind).__name__}; "
                "allowed: tokenizers with the decoder ByteLevel"
            )
        added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
        skipped = [token_id for token_id, token in added.items() if token.special]
        self._backend = backend
        self._bytes_of: dict[int, bytes] = dict.fromkeys(skipped, b"")
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token_id: int) -> str:
        """Take one id.

        Args:
            token_id: the id, below 2^32; one that the tokenizer does not have adds nothing, as in
                `decode`.

        Returns:
            The characters that it completes; often one token's text, sometimes none.

        Raises:
            ValueError: `token_id` is none.
        """
        token_id = check_id(token_id)
        piece = self._bytes_of.get(token_id)
        if piece is None:
            piece = self._bytes_of[token_id] = self._look_up(token_id)
        return self._utf8.decode(piece)

    def end(self) -> str:
        """End the text.

        Returns:
            U+FFFD where the ids end inside a character, else nothing. The decoder is then as new.
        """
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def _look_up(self, token_id: int) -> bytes:
        """The bytes of an id, found once."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        byte_of = chars_to_bytes()
        spelled = [byte_of.get(char) for char in token]
        # As the decoder of `tokenizers`: a token that is not spelled in byte characters is text.
        return token.encode() if None in spelled else bytes(b for b in spelled if b is not None)
