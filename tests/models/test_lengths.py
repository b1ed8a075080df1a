"""Padded lengths and batches of few shapes."""

import numpy as np
import pytest

from saejax.models.lengths import bucket_lengths, even_batches, round_length


@pytest.mark.parametrize("multiple", [16, 32])
def test_rounded_lengths_are_few_and_little_longer(multiple):
    rounded = [round_length(length, multiple) for length in range(1, 4097)]
    assert rounded[0] == multiple and rounded[-1] == 4096 and rounded == sorted(rounded)
    for length, longer in enumerate(rounded, start=1):
        assert length <= longer <= max(length * 9 / 8, length + multiple - 1) and longer % multiple == 0
        assert round_length(longer, multiple) == longer
    assert len(set(rounded)) <= 16 + 8 * 4


def test_bucket_lengths_weigh_padding_against_programs_and_stay_few():
    counts = np.bincount([10, 11, 12, 100, 101] * 50)
    np.testing.assert_array_equal(bucket_lengths(counts, compile_cost=400), [12, 101])
    np.testing.assert_array_equal(bucket_lengths(counts, compile_cost=1), [10, 11, 12, 100, 101])
    np.testing.assert_array_equal(bucket_lengths(counts, compile_cost=10**9), [101])
    assert len(bucket_lengths(np.zeros(0, int), 1)) == 0
    for texts in (10, 10_000, 100_000_000):
        counts = np.full(1025, texts)
        counts[0], counts[1024] = 0, 10 * texts  # pieces cut at 1,024 tokens, most of them whole
        lengths = bucket_lengths(counts, compile_cost=4096)
        assert len(lengths) <= 16 and lengths[-1] == 1024
        real_N, padded_N = np.arange(1025), lengths[np.searchsorted(lengths, np.arange(1025))]
        assert counts @ padded_N < 1.08 * counts @ real_N


@pytest.mark.parametrize("most", [1, 64, 1000])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_text_is_in_one_batch(most, multiple):
    assert even_batches(np.zeros(0, int), most, multiple, compile_cost=300) == []
    lengths_N = np.random.default_rng(0).integers(1, 200, 137)
    batches = even_batches(lengths_N, most, multiple, compile_cost=300)
    assert sorted(np.concatenate([own for own, _, _ in batches]).tolist()) == list(range(137))
    for own, rows, length in batches:
        assert lengths_N[own].max() <= length and 0 < len(own) <= rows and rows % multiple == 0
        assert rows * length <= most or rows == multiple
    if multiple > 1:  # texts that are next in length fill batches up
        assert sum(rows - len(own) for own, rows, _ in batches) < multiple
    assert len({(rows, length) for _, rows, length in batches}) <= len(bucket_lengths(np.bincount(lengths_N), 300)) + 1
    assert [length for _, _, length in batches] == sorted((length for _, _, length in batches), reverse=True)
