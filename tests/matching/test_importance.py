"""Importance of matched features: models that share planted features, and strangers that share nothing."""

import dataclasses

import numpy as np
import pytest
import runs
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.matching import importance
from saejax.matching import rows as matching_rows
from saejax.matching.importance import LEAST as LEAST_PAIR
from saejax.matching.importance import (
    ItemFeatures,
    align_importance,
    correlated_pairs,
    match_features,
    rank_correlation,
    read_features,
)
from saejax.matching.rows import CentredRows
from saejax.matching.transfer.activity import Activity
from saejax.studies.alignment import LEAST, LEVEL
from saejax.studies.learned import MOST

TOKENS, FEATURES = 3000, 60


@pytest.fixture(autouse=True)
def fewer_permutations(monkeypatch):
    monkeypatch.setattr(importance, "_PERMUTATIONS", 199)


def pair(seed, shared, agree=0.9):
    """Two models of which ``shared`` features are the same, in another order, and agree on importance.

    Features fire on 2 to 10 % of the tokens. What fires often is important for every answer, in both models.
    """
    rng = np.random.default_rng(seed)

    def firings(count):
        fires_NxF = rng.random((TOKENS, count)) < rng.uniform(0.02, 0.1, count)
        return fires_NxF * rng.lognormal(0, 0.5, (TOKENS, count))

    common_NxK, common_K = firings(shared), rng.normal(size=shared)
    models = []
    for _ in range(2):
        noise_NxK = common_NxK * rng.lognormal(0, 0.3, common_NxK.shape)
        acts_NxF = np.concatenate([noise_NxK, firings(FEATURES - shared)], axis=1)
        importance_F = rng.normal(size=FEATURES)
        importance_F[:shared] = agree * common_K + np.sqrt(1 - agree**2) * importance_F[:shared]
        often_F, order_F = (acts_NxF > 0).mean(axis=0), rng.permutation(FEATURES)
        model = ItemFeatures(
            ids=("1",),
            activity=Activity(sparse.csr_array(acts_NxF[:, order_F].astype(np.float32)), np.ones(TOKENS, bool)),
            text_N=np.zeros(TOKENS, np.int64),
            end_N=np.arange(1, TOKENS + 1),
            importance_F=(importance_F + 5 * often_F)[order_F],
            placebo_RxF=(5 * often_F + rng.normal(size=(19, FEATURES)))[:, order_F],
        )
        models.append(model)
    return models


def align(first, second, **options):
    match = match_features(first, second)
    return match, align_importance(first, second, match, **options)


def is_aligned(found):
    controls = [value for value in (found.rotated, found.placebo) if value is not None]
    return found.correlation is not None and (
        found.correlation >= LEAST and found.p_value <= LEVEL and found.correlation > max(controls, default=-1)
    )


@pytest.mark.parametrize("shared", [15, 30, 45])
def test_two_models_that_share_features(shared):
    first, second = pair(shared, shared)
    match, found = align(first, second)
    assert match.shared == pytest.approx(shared / FEATURES, abs=0.1) and match.shared_null <= 0.1
    wanted = spearmanr(first.importance_F[match.first_M], second.importance_F[match.second_M]).statistic
    assert found.correlation == pytest.approx(wanted) and found.correlation == pytest.approx(0.81, abs=0.2)
    assert is_aligned(found)
    _, same = align(first, second, rotated=second)  # a rotated dictionary is a placebo
    assert same.rotated == pytest.approx(same.correlation) and not is_aligned(same)
    stranger, _ = pair(2, 0)
    assert align_importance(first, second, match, rotated=stranger).rotated is None
    # The match in the other direction is the same one.
    there, back = match_features(second, first), match.back()
    assert there.partner == back.partner and there.live == back.live and there.chance == back.chance


def test_pairs_are_those_of_the_best_assignment_of_all_products(monkeypatch):
    rng = np.random.default_rng(7)
    acts = [rng.random((40, 60)) * (rng.random((40, 60)) < 0.1) for _ in range(2)]
    acts[1][:, :30] = acts[0][:, :30] + 0.2 * rng.random((40, 30)) * (acts[0][:, :30] > 0)
    acts[0][:, 5] = 0  # pairs with nothing
    acts[0][:, 6], acts[1][:, 7] = rng.normal(-1, 1, (2, 40))  # of a kind whose activations may be below 0
    first, second = (CentredRows.of(sparse.csr_array(each), np.arange(60) != 8) for each in acts)
    with np.errstate(invalid="ignore"):
        table = np.nan_to_num(np.corrcoef(acts[0].T, acts[1].T)[:60, 60:])
    table[8], table[:, 8] = 0, 0  # not compared
    assigned = zip(*linear_sum_assignment(np.maximum(table, 0), maximize=True), strict=True)
    plain = [(int(f), int(g)) for f, g in assigned if table[f, g] >= LEAST_PAIR]
    assert 20 < len(plain) < 50
    for products in (1, 2**24):  # a row at a time, and all at once
        monkeypatch.setattr(matching_rows, "_PRODUCTS", products)
        assert list(zip(*(side.tolist() for side in correlated_pairs(first, second)), strict=True)) == plain
        blocks = list(first.products(second, np.arange(60)))
        product_FxG = sparse.vstack(blocks).toarray()
        missing_FxG = sparse.vstack([block != 0 for block in blocks]).toarray() == 0
        np.testing.assert_allclose(product_FxG[~missing_FxG], table[~missing_FxG], atol=1e-6)
        assert table[missing_FxG].max() < 1e-6 and (len(blocks) > 50 if products == 1 else len(blocks) == 1)
    nothing = CentredRows.of(sparse.csr_array((40, 3)), np.ones(3, bool))
    assert len(correlated_pairs(nothing, second)[0]) == len(correlated_pairs(first, nothing)[0]) == 0


def test_strangers_are_not_aligned():
    """Half of them share features, but not what is important beyond firing often; half share nothing at all."""
    found = [align(*pair(seed, 30 * (seed % 2), agree=0.0)) for seed in range(200)]
    aligned = sum(is_aligned(agreement) for _, agreement in found)
    most = sum(match.shared - match.shared_null > MOST for match, _ in found[::2])
    print(f"strangers: {aligned} of 200 aligned; of 100 that share no feature {most} share most")
    assert aligned <= 16 and most == 0
    assert max(match.shared for match, _ in found[::2]) <= 0.1


def test_models_that_share_most_features_are_told():
    """Three of four features are the same in 100 pairs of models, and matter as much; a quarter in 100 more."""
    found, aligned = {}, 0
    for shared in (45, 15):
        pairs = [pair(1000 + seed, shared) for seed in range(100)]
        matches = [match_features(*models) for models in pairs]
        found[shared] = sum(match.shared - match.shared_null > MOST for match in matches)
        if shared == 45:
            aligned = sum(
                is_aligned(align_importance(*models, match)) for models, match in zip(pairs, matches, strict=True)
            )
    print(f"most features shared: {found[45]} of 100 pairs that share 45 of 60, {found[15]} of 100 that share 15")
    print(f"the same features matter: {aligned} of 100 pairs where they do")
    assert found[45] >= 80 and found[15] <= 8 and aligned >= 80


def test_magnitudes_alone_make_no_correlation():
    """What fires strongly matters in both models, with signs that have nothing to do with each other: 200 worlds."""
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        size_N = rng.lognormal(size=30)
        found.append(rank_correlation(*(size_N * rng.choice([-1, 1], (2, 30))))[1] <= 0.05)
    assert np.mean(found) <= 0.08
    shared_N = rng.normal(size=30)
    assert rank_correlation(shared_N, shared_N + 0.5 * rng.normal(size=30))[1] <= 0.01


def test_tokens_are_paired_where_they_end_together():
    """The second model reads two characters a token: of the first's tokens every other one has a partner."""
    first, second = pair(0, 30)
    activity = Activity(second.activity.f_NxF[1::2], second.activity.real_N[1::2])
    half = dataclasses.replace(second, activity=activity, text_N=second.text_N[1::2], end_N=second.end_N[1::2])
    assert match_features(first, half).shared == pytest.approx(0.5, abs=0.1)
    assert match_features(first, dataclasses.replace(second, ids=("2",))) is None


def test_features_are_read_and_kept(lm, tmp_path, monkeypatch):
    W_dec_FxD = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    config = DictionaryConfig(kind="standard", site="resid_post.1", d_in=64, n_features=32, centred=False)
    zeros = dict(b_enc_F=np.zeros(32, np.float32), b_dec_D=np.zeros(64, np.float32))
    dictionary = Dictionary(config, W_enc_DxF=W_dec_FxD.T, W_dec_FxD=W_dec_FxD, **zeros)
    texts = {"a": "The cat near the dogs runs.", "b": "3 + 4 = 7"}
    found = read_features(lm, dictionary, texts, np.arange(32.0), np.zeros((0, 32)))
    found.save(tmp_path / "features.npz")
    again = ItemFeatures.load(tmp_path / "features.npz")
    assert again.ids == ("a", "b") and (again.activity.f_NxF != found.activity.f_NxF).nnz == 0
    assert again.end_N[again.text_N == 0].max() == len(texts["a"])
    last = lm(lm.tokenize([texts["b"]]), capture=["resid_post.1"]).sites["resid_post.1"][0, -1]
    wanted_F = np.maximum(np.asarray(last) @ W_dec_FxD.T, 0)
    np.testing.assert_allclose(again.activity.f_NxF[[-1]].toarray()[0], wanted_F, rtol=1e-3, atol=1e-3)
    kept = (tmp_path / "features.npz").read_bytes()
    monkeypatch.setattr(np, "savez", lambda file, **arrays: runs.write_half(file))
    with pytest.raises(OSError, match="No space left"):  # what was there stays, and nothing beside it
        found.save(tmp_path / "features.npz")
    assert (tmp_path / "features.npz").read_bytes() == kept and len([*tmp_path.iterdir()]) == 1
