"""What a language model has to beat: general compressors, and a trigram model of the same tokens.

Every figure is in bits per byte of UTF-8 text, summed over files before dividing. A compressor sees
one file at a time and knows nothing else; the trigram model has the same training files and tokens
as the language model.
"""

import lzma
import zlib
from collections.abc import Sequence

import numpy as np

IntArray = np.ndarray


def zlib_bits_per_byte(texts: Sequence[str]) -> float:
    """`zlib` at level 9, file by file."""
    return _compressed_bits_per_byte(texts, lambda data: zlib.compress(data, 9))


def lzma_bits_per_byte(texts: Sequence[str]) -> float:
    """`lzma` at its strongest preset, file by file, in the container with the shortest header."""
    preset = 9 | lzma.PRESET_EXTREME
    return _compressed_bits_per_byte(
        texts, lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=preset)
    )


def _compressed_bits_per_byte(texts, compress) -> float:
    raw = [text.encode("utf-8") for text in texts]
    if not any(raw):
        raise ValueError(f"texts has {len(raw)} texts without a byte; allowed: some text")
    return 8 * sum(len(compress(data)) for data in raw) / sum(len(data) for data in raw)


class TrigramModel:
    """Interpolated Kneser-Ney trigrams over token ids.

    A trigram's probability is its discounted count, and what the discount freed goes to a bigram
    model of continuation counts, from there to unigrams and to the uniform distribution (Chen and
    Goodman 1999, equation 20). The discount of each order is n1 / (n1 + 2 n2), from the numbers of
    entries seen once and twice.

    Args:
        sequences: Training sequences of token ids, each with its own end token.
        vocab_size: Number of token ids.
        start_id: Token that stands twice before every sequence; it is never predicted.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], vocab_size: int, start_id: int) -> None:
        if not sequences:
            raise ValueError("sequences is empty; allowed: at least one sequence")
        self.vocab_size, self.start_id = vocab_size, start_id
        context, word = self._contexts_and_words(sequences)
        keys, counts = np.unique(context * vocab_size + word, return_counts=True)
        self._trigrams = _Order(keys, counts, keys // vocab_size)
        # lower orders count the distinct contexts of a word, not its occurrences
        keys, counts = np.unique(keys % vocab_size**2, return_counts=True)
        self._bigrams = _Order(keys, counts, keys // vocab_size)
        keys, counts = np.unique(keys % vocab_size, return_counts=True)
        self._unigrams = _Order(keys, counts, np.zeros_like(keys))

    def bits(self, sequences: Sequence[Sequence[int]]) -> float:
        """Sum of -log2 p over every token of the sequences."""
        context, word = self._contexts_and_words(sequences)
        return float(-np.log2(self.probabilities(context, word)).sum())

    def probabilities(self, context: IntArray, word: IntArray) -> np.ndarray:
        """Probability of each word after its context.

        Args:
            context: [n], `second_last * vocab_size + last` of the two tokens before.
            word: [n] token ids.

        Returns:
            [n] float64, above 0.
        """
        size = self.vocab_size
        p = np.full(word.shape, 1.0 / size)
        p = self._unigrams.interpolate(word, np.zeros_like(word), p)
        p = self._bigrams.interpolate(context % size * size + word, context % size, p)
        return self._trigrams.interpolate(context * size + word, context, p)

    def _contexts_and_words(self, sequences: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
        contexts, words = [], []
        for sequence in sequences:
            ids = np.array([self.start_id, self.start_id, *sequence], dtype=np.int64)
            contexts.append(ids[:-2] * self.vocab_size + ids[1:-1])
            words.append(ids[2:])
        return np.concatenate(contexts), np.concatenate(words)


class _Order:
    """Counts of one n-gram order: entries by key, and their sums by context."""

    def __init__(self, keys: IntArray, counts: IntArray, contexts: IntArray) -> None:
        self._keys, self._counts = keys, counts
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        # without rare entries there is nothing to estimate it from
        self._discount = float(once / (once + 2 * twice)) if once and twice else 0.5
        self._contexts, start = np.unique(contexts, return_index=True)
        self._totals = np.add.reduceat(counts, start)
        self._kinds = np.diff(np.append(start, len(contexts)))

    def interpolate(self, keys: IntArray, contexts: IntArray, lower: np.ndarray) -> np.ndarray:
        """This order's probabilities [n], given the lower order's [n]."""
        count = _look_up(self._keys, self._counts, keys)
        total = _look_up(self._contexts, self._totals, contexts)
        kinds = _look_up(self._contexts, self._kinds, contexts)
        seen = total > 0
        divisor = np.where(seen, total, 1)
        own = np.maximum(count - self._discount, 0) / divisor
        return np.where(seen, own + self._discount * kinds / divisor * lower, lower)


def _look_up(keys: IntArray, values: IntArray, wanted: IntArray) -> IntArray:
    """Values at sorted `keys`, 0 for keys that are not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
