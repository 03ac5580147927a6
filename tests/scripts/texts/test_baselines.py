"""Compressors and trigrams that a language model has to beat."""

import itertools
import zlib

import numpy as np
import pytest
from texts.baselines import TrigramModel, lzma_bits_per_byte, zlib_bits_per_byte


def test_compressors_sum_over_files_before_dividing() -> None:
    texts = ["abc" * 100, "é" * 7]
    expected = 8 * sum(len(zlib.compress(t.encode(), 9)) for t in texts) / (300 + 14)
    assert zlib_bits_per_byte(texts) == pytest.approx(expected)
    assert 0 < lzma_bits_per_byte(["abc" * 10_000]) < 0.1
    with pytest.raises(ValueError, match="without a byte"):
        zlib_bits_per_byte([""])


def test_trigram_probabilities_sum_to_one() -> None:
    size, rng = 7, np.random.default_rng(0)
    sequences = [rng.choice(5, size=n, p=[0.5, 0.2, 0.1, 0.1, 0.1]).tolist() for n in (40, 3, 90)]
    model = TrigramModel(sequences, size, start_id=6)
    words = np.arange(size)
    # contexts seen and unseen, the start among them
    for second_last, last in itertools.product(range(size), range(size)):
        p = model.probabilities(np.full(size, second_last * size + last), words)
        assert p.sum() == pytest.approx(1.0, abs=1e-12)
        assert (p > 0).all()


def test_trigram_beats_uniform_on_what_repeats_and_counts_every_token() -> None:
    model = TrigramModel([[1, 2, 3] * 50], 8, start_id=0)
    seen = model.bits([[1, 2, 3] * 10])
    assert seen < 0.3 * 30 * 3  # uniform takes 3 bits per token
    assert model.bits([[5, 5]]) > 2 * 3
    both = model.bits([[1, 2], [5, 5]])
    assert both == pytest.approx(model.bits([[1, 2]]) + model.bits([[5, 5]]))
