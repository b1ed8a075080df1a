"""Single features of a benchmark: removed as an edit of the whole model removes them; what drops say; nothing true."""

import numpy as np
import pytest

from saejax.causal.study.references import Reference, References
from saejax.causal.study.removal import log_likelihoods
from saejax.causal.study.results import SingleEffects
from saejax.causal.study.single import judge_single
from saejax.interventions.split_model import SplitModel
from saejax.results import from_json, to_json
from saejax.settings import StudyConfig
from saejax.tasks.likelihood import loglikelihoods

SITE = "resid_post.1"
CONFIG = StudyConfig(bootstrap=200)


class Stopped(Exception):
    pass


def test_one_feature_less_is_an_edit_of_the_whole_model(tiny, make_dictionary, tmp_path):
    dictionary, rng = make_dictionary(SITE, dead=8), np.random.default_rng(4)
    sizes = [(0, 9, 3), (1, 30, 5), (2, 6, 1), (3, 9, 2)]
    references = [
        Reference(item, rng.integers(1, 384, n).tolist(), rng.integers(1, 384, m).tolist()) for item, n, m in sizes
    ]
    split = SplitModel(tiny, dictionary)
    made = References(split, references, 64)
    often = np.argsort(-made.statistics().fires_F)[[0, 1, 30, 60]].tolist()
    features = sorted({*often, *range(3, 20), 159})  # of two parts; the last one never fires

    def stop(done, total):
        if done >= total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        log_likelihoods(split, made, 4, features, tmp_path / "kept", stop)
    left = []
    clean_R, without_KxR = log_likelihoods(
        split, made, 4, features, tmp_path / "kept", lambda done, total: left.append(done / total)
    )
    assert left[0] >= 0.5, "what was measured before is not measured again"
    pairs = [one.context for one in references], [one.answer for one in references]
    np.testing.assert_allclose(clean_R, [one.total for one in loglikelihoods(tiny, *pairs)], rtol=1e-5)
    for feature, found_R in zip(features, without_KxR, strict=True):
        wanted = loglikelihoods(tiny, *pairs, [dictionary.ablate([feature])])
        np.testing.assert_allclose(found_R, [one.total for one in wanted], rtol=1e-4, atol=1e-4)
    assert (without_KxR[features.index(159)] == clean_R).all()
    assert np.abs(without_KxR[features.index(often[0])] - clean_R).max() > 1e-3


def judged(drop_KxN, controls=20, top=10, lost_KxN=None):
    """The first ``top`` features beside draws from the others, each from those of its own place and of all."""
    rng, count = np.random.default_rng(1), len(drop_KxN)
    draws_DxC = np.stack([rng.permutation(count)[:top] for _ in range(controls)])
    return judge_single(list(range(top)), list(range(count)), draws_DxC, drop_KxN, lost_KxN, CONFIG)


def test_features_that_are_like_all_others_are_not_found():
    """All features have effects, or none: the top ones are no more often discoveries than those of draws."""
    rng, small = np.random.default_rng(0), []
    for world in range(60):
        size_K = rng.exponential(0.02, 60) if world % 2 else np.zeros(60)
        drop_KxN = rng.normal(size_K[:, None], 0.03, (60, 12))
        found = judged(drop_KxN)
        small.append(found.p_value <= 0.05)
        if not world % 2:
            assert found.discoveries <= 2
    assert np.mean(small) <= 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5


def test_planted_features_are_found():
    rng = np.random.default_rng(2)
    drop_KxN = rng.normal(0, 0.01, (60, 12))
    drop_KxN[:4] += 0.5
    drop_KxN[5] = 0.0  # never fires on these items
    lost_KxN = np.zeros((60, 12))
    lost_KxN[0, :6] = 1.0
    found = judged(drop_KxN, lost_KxN=lost_KxN)
    assert found.discoveries == 4 and {one.feature for one in found.features[:4]} == {0, 1, 2, 3}
    assert np.mean(found.control_discoveries) < 2 and found.p_value <= 0.1
    first = next(one for one in found.features if one.feature == 0)
    assert first.control_percentile >= 0.8 and first.q_value == pytest.approx(10 * 2 / 2**12 / 4)
    assert first.accuracy_drop.mean == 0.5 and first.control_accuracy_drop < 0.1
    assert next(one for one in found.features if one.feature == 5).p_value == 1.0
    assert found.least_p == 2 / 2**12
    assert from_json(SingleEffects, to_json(found), "") == found


def test_one_feature_and_one_draw():
    found = judge_single([3], [3], np.array([[3]]), np.ones((1, 5)), None, CONFIG)
    (only,) = found.features
    assert (only.controls, only.control_drop, only.control_percentile) == (0, None, None)
    assert found.p_value == 1.0 and only.p_value == 2 / 2**5
