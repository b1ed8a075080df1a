"""Subspaces against the whole value and a formula, learned ones against random ones; cause and isolate by hand."""

import dataclasses

import numpy as np
import pytest

from saejax.causal.patching.disentangle import PairsJudge, Sides, disentangle
from saejax.causal.patching.features import patch_parts
from saejax.causal.patching.subspace import learn_subspace, patch_subspace, random_subspace
from saejax.errors import UserError
from saejax.interventions.split_model import SplitModel
from saejax.settings import PatchConfig
from saejax.tasks.scoring import wilson_of

LAST = "resid_post.3"  # of the model's four layers: only the final norm and the unembedding follow


@pytest.fixture(scope="module")
def pairs(tiny, prompts):
    """Test prompts with another text of as many tokens as their counterpart."""
    lengths = tiny.tokenize([prompt.text for prompt in prompts]).lengths_B.tolist()
    others = {length: prompt.text for prompt, length in zip(prompts, lengths, strict=True)}
    paired = [
        dataclasses.replace(prompt, counterpart=others[length]) for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return [pair for pair in paired if pair.counterpart != pair.text]


def test_all_dimensions_are_the_whole_value(tiny, pairs, make_dictionary):
    split = SplitModel(tiny, make_dictionary("resid_post.1"))
    sides = Sides.of(split, pairs)
    every_DxD = random_subspace(64, 64, [0])
    np.testing.assert_allclose(
        patch_subspace(split, *sides, every_DxD), patch_parts(split, *sides, "both"), rtol=1e-4, atol=1e-5
    )


def test_a_subspace_by_the_formula(tiny, pairs, make_dictionary):
    """At the last layer the logit difference is a product with the normalised, patched stream."""
    split = SplitModel(tiny, make_dictionary(LAST))
    (base,), (source,) = sides = Sides.of(split, pairs)
    directions_DxK = random_subspace(64, 3, [1]).astype(np.float64)
    found_P = patch_subspace(split, *sides, directions_DxK.astype(np.float32))
    name = "embed_VxD" if tiny.config.tied else "unembed_DxV"
    unembed_VxD = np.asarray(tiny.params[name], np.float64)
    unembed_VxD = unembed_VxD if tiny.config.tied else unembed_VxD.T
    gain_D = np.asarray(tiny.params["final_norm_D"], np.float64)
    for row, place in enumerate(base.index_P):
        last = base.last_B[row]
        own_D, other_D = (np.asarray(run.value_BxTxD[row, last], np.float64) for run in (base, source))
        if base.domain_BxT[row, last]:
            own_D = own_D + directions_DxK @ (directions_DxK.T @ (other_D - own_D))
        normed_D = own_D / np.sqrt(np.mean(own_D**2) + tiny.config.norm_eps) * gain_D
        right, wrong = unembed_VxD[base.answers_Bx2[row]] @ normed_D
        np.testing.assert_allclose(found_P[place], right - wrong, rtol=1e-4, atol=1e-5)


def test_a_learned_subspace_carries_more_over_than_a_random_one(tiny, pairs, make_dictionary):
    split = SplitModel(tiny, make_dictionary(LAST))
    sides = Sides.of(split, pairs)
    learned_DxK = learn_subspace(split, *sides, 2, 60, [3])
    np.testing.assert_allclose(learned_DxK.T @ learned_DxK, np.eye(2), atol=1e-5)
    losses = [
        np.logaddexp(0, patch_subspace(split, *sides, directions_DxK)).mean()
        for directions_DxK in (learned_DxK, *(random_subspace(64, 2, [seed]) for seed in range(20)))
    ]
    assert losses[0] < min(losses[1:])
    np.testing.assert_array_equal(learned_DxK, learn_subspace(split, *sides, 2, 60, [3]))
    with pytest.raises(UserError, match=r"--patch.das=65: resid_post.3 has 64 dimensions"):
        learn_subspace(split, *sides, 65, 1, [0])


def test_a_judge_counts_the_pairs_that_the_model_has_right(tiny, pairs, make_dictionary):
    split = SplitModel(tiny, make_dictionary("resid_post.1"))
    judge = PairsJudge(split, pairs, PatchConfig(batch_rows=16, bootstrap=100))
    assert judge.site().all() and len(judge.site()) == judge.pairs > 0  # the counterpart's whole stream is its run
    assert not judge.sets([[]]).any()


class Counted:
    """Of ten pairs so many go over, whatever is put in."""

    pairs, width = 10, 64

    def __init__(self, **carried):
        self.carried = carried

    def sets(self, sets):
        return self.of([self.carried["features"] if chosen == [5] else self.carried["drawn"] for chosen in sets])

    def subspace(self, directions_DxK):
        return self.of([self.carried["subspace"]])

    def site(self):
        return self.of([self.pairs])

    def of(self, counts):
        return np.mean([np.arange(self.pairs) < count for count in counts], axis=0)

    def share(self, carried_P):
        return wilson_of(float(carried_P.mean()), len(carried_P))


def test_cause_and_isolate():
    own, other = Counted(features=8, drawn=1, subspace=9), Counted(features=2, drawn=3, subspace=6)
    nobody = Counted()
    nobody.pairs = 0
    rows = disentangle(own, dict(other=other, nobody=nobody), [5], [[1], [2]], dict(DAS=np.zeros((64, 4))))
    found = [(one.method, one.size, one.cause.mean, one.isolate["other"].mean) for one in rows]
    assert found == [
        ("features", 1, 0.8, 0.8),
        ("random features", 1, 0.1, 0.7),
        ("DAS", 4, 0.9, 0.4),
        ("whole site", 64, 1.0, 0.0),
    ]
    assert all(set(one.isolate) == {"other"} for one in rows)
    assert disentangle(nobody, {}, [5], [[1]], {})[-1].cause is None
