"""Batches of few shapes."""

import numpy as np
import pytest

from saejax.models.tokens import even_batches, few_lengths


def test_few_lengths_weigh_padding_against_programs():
    counts = np.bincount([10, 11, 12, 100, 101] * 50)
    np.testing.assert_array_equal(few_lengths(counts, program=400), [12, 101])
    np.testing.assert_array_equal(few_lengths(counts, program=1), [10, 11, 12, 100, 101])
    np.testing.assert_array_equal(few_lengths(counts, program=10**9), [101])
    assert len(few_lengths(np.zeros(0, int), 1)) == 0


@pytest.mark.parametrize("texts", [10, 10_000, 100_000_000])
def test_lengths_stay_few_whatever_the_number_of_texts(texts):
    counts = np.full(1025, texts)
    counts[0], counts[1024] = 0, 10 * texts  # pieces cut at 1,024 tokens, most of them whole
    lengths = few_lengths(counts, program=4096)
    assert len(lengths) <= 16 and lengths[-1] == 1024
    real_N, padded_N = np.arange(1025), lengths[np.searchsorted(lengths, np.arange(1025))]
    assert counts @ padded_N < 1.08 * counts @ real_N
    np.testing.assert_array_equal(few_lengths(counts, program=4096, most=1), [1024])


@pytest.mark.parametrize("most", [1, 64, 1000])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_text_is_in_one_batch(most, multiple):
    lengths_N = np.random.default_rng(0).integers(1, 200, 137)
    batches = even_batches(lengths_N, most, multiple, program=300)
    assert sorted(np.concatenate([own for own, _, _ in batches]).tolist()) == list(range(137))
    for own, rows, length in batches:
        assert lengths_N[own].max() <= length and 0 < len(own) <= rows and rows % multiple == 0
        assert rows * length <= most or rows == multiple
    assert len({(rows, length) for _, rows, length in batches}) <= len(few_lengths(np.bincount(lengths_N), 300)) + 1
    assert [length for _, _, length in batches] == sorted((length for _, _, length in batches), reverse=True)


def test_no_texts():
    assert even_batches(np.zeros(0, int), 100, 1, 1) == []
