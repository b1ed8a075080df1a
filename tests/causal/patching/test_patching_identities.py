"""Patching everything gives the other run: whole sites at all positions, and all features with the error term."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.causal.clustered import of_prompts
from saejax.causal.patching.features import FeaturePatching, patch_parts
from saejax.causal.patching.run import differences
from saejax.causal.patching.sites import patch_sites
from saejax.dictionaries import Dictionary
from saejax.interventions.engine import ablate_sets
from saejax.interventions.replacement import ActivationReplacement
from saejax.interventions.split_model import SplitModel
from saejax.models.edits import SiteEdit
from saejax.settings import PatchConfig

CONFIG = PatchConfig(dictionary="topk", top=2, draws=2, matches=3, bootstrap=100, batch_rows=16)


@pytest.fixture(scope="module")
def pairs(tiny, prompts):
    """Test prompts with another text of as many tokens as their counterpart."""
    lengths = tiny.tokenize([prompt.text for prompt in prompts]).lengths_B.tolist()
    others = {length: prompt.text for prompt, length in zip(prompts, lengths, strict=True)}
    paired = [
        dataclasses.replace(prompt, split="test", counterpart=others[length])
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    different = [pair for pair in paired if pair.counterpart != pair.text]
    assert len(different) >= 4
    return different[:5]


@pytest.fixture(scope="module")
def without_sinks(make_dictionary):
    """A dictionary that reads every position: sinks are no feature's and no error term's."""

    def make(site):
        dictionary = make_dictionary(site)
        return Dictionary(dataclasses.replace(dictionary.config, max_norm=3.4e38), **dictionary.arrays)

    return make


@pytest.fixture(scope="module")
def exact(without_sinks):
    """A dictionary that explains everything: a feature for each dimension."""
    config = dataclasses.replace(without_sinks("resid_post.2").config, kind="linear", n_features=64, centred=False)
    eye_DxD, zeros_D = jnp.eye(64), jnp.zeros(64)
    return Dictionary(config, W_enc_DxF=eye_DxD, b_enc_F=zeros_D, W_dec_FxD=eye_DxD, b_dec_D=zeros_D)


def last_diffs(lm, pairs, side, edits=()):
    tokens = lm.tokenize([getattr(pair, side) for pair in pairs])
    logits_BxTxV = np.asarray(lm(tokens, edits=list(edits)).logits_BxTxV)
    last_BxV = logits_BxTxV[np.arange(len(pairs)), tokens.last_B]
    answers = np.array([[lm.token_id(pair.correct), lm.token_id(pair.wrong)] for pair in pairs])
    return last_BxV[np.arange(len(pairs)), answers[:, 0]] - last_BxV[np.arange(len(pairs)), answers[:, 1]]


@pytest.mark.parametrize(
    "site", ["resid_post.1", *(pytest.param(site, marks=pytest.mark.slow) for site in ("resid_pre.0", "resid_post.3"))]
)
def test_everything_at_all_positions_gives_the_other_run(tiny, pairs, without_sinks, site):
    split = SplitModel(tiny, without_sinks(site))
    sides = split.run(pairs), split.run_counterparts(pairs)
    clean_P, corrupted_P = (ablate_sets(split, side, []).clean_P for side in sides)
    assert np.abs(clean_P - corrupted_P).min() > 1e-3
    for (base, source), wanted_P in ((sides, corrupted_P), (sides[::-1], clean_P)):
        # The same program on the source's own value: equal to the bit. The clean run goes another way, through a cache.
        np.testing.assert_array_equal(
            patch_parts(split, base, source, "site"), patch_parts(split, source, source, "site")
        )
        np.testing.assert_allclose(patch_parts(split, base, source, "site"), wanted_P, atol=1e-5)
        # So do features and error term together, and neither alone.
        np.testing.assert_allclose(patch_parts(split, base, source, "both"), wanted_P, atol=1e-4)
        if site != "resid_pre.0":  # there half of the pairs' values are the same
            for part in ("features", "error"):
                assert np.abs(patch_parts(split, base, source, part) - wanted_P).max() > 1e-2
    # It is the run whose single cells ``patch_sites`` replaces.
    if site == "resid_post.1":
        patched = patch_sites(tiny, "resid_post", pairs)
        np.testing.assert_allclose(patch_parts(split, *sides, "site"), patched.corrupted_P, atol=1e-5)
        np.testing.assert_allclose(patch_parts(split, *sides[::-1], "site"), patched.clean_P, atol=1e-5)


def test_parts_are_those_of_the_experiment(tiny, pairs, make_dictionary):
    """Sinks stay; all features as the exact ablation replaces them, and what both leave is the sinks' doing."""
    dictionary = make_dictionary("resid_post.1")
    split = SplitModel(tiny, dictionary)
    sides = split.run(pairs), split.run_counterparts(pairs)
    every = [list(range(dictionary.config.n_features))]
    diffs = ablate_sets(split, sides[0], every, source=ActivationReplacement("counterpart"), counterparts=sides[1])
    np.testing.assert_allclose(patch_parts(split, *sides, "features"), diffs.ablated_SxP[0], atol=1e-4)
    assert not all(np.asarray(run.domain_BxT)[p, : run.last_B[p] + 1].all() for run in sides[0] for p in range(5))


@pytest.mark.parametrize(("base", "source"), [("text", "counterpart"), ("counterpart", "text")])
def test_an_edit_of_a_whole_site_gives_the_other_run(tiny, pairs, base, source):
    tokens = tiny.tokenize([getattr(pair, source) for pair in pairs])
    for site in ("resid_pre.0", "resid_post.2"):
        x_BxTxD = tiny(tokens, capture=[site], logits=False).sites[site]
        got_P = last_diffs(tiny, pairs, base, [SiteEdit.patch(site, x_BxTxD)])
        np.testing.assert_allclose(got_P, last_diffs(tiny, pairs, source), atol=1e-5)


def test_draws_of_features_are_as_the_tested_set_would_be_drawn(tiny, pairs, exact):
    """They may hold tested features, and p is the share of sets, the tested one among them, that carry as much over."""
    config = dataclasses.replace(CONFIG, top=6, draws=30, matches=50)
    swapped = [dataclasses.replace(pair, correct=pair.wrong, wrong=pair.correct) for pair in pairs]
    diffs = [(last_diffs(tiny, some, "text"), last_diffs(tiny, some, "counterpart")) for some in (pairs, swapped)]
    turned = [
        pair
        for some, own in zip((pairs, swapped), diffs, strict=True)
        for pair, clean, corrupted in zip(some, *own, strict=True)
        if clean > 0 > corrupted
    ]
    assert turned
    patching = FeaturePatching(SplitModel(tiny, exact), "tiny", turned, turned, config)
    found = patching.results(differences(patching.clean_P, patching.corrupted_P, {}, of_prompts(turned, 100, 0)))
    assert np.isin(patching.drawn_NxK, patching.top).any() and found.interchange.prompts == len(turned)
    ks = [top.features for top in found.interchange.top]
    random_KxN = (patching._random_XxP < 0).mean(axis=1).reshape(len(ks), config.draws)
    for top, random_N in zip(found.interchange.top, random_KxN, strict=True):
        as_many = (random_N >= top.accuracy.mean - 1e-9).sum()
        assert top.p_value == pytest.approx((1 + as_many) / (1 + config.draws))


def test_all_features_of_a_dictionary_without_an_error_give_the_other_run(tiny, pairs, prompts, exact):
    train = [prompt for prompt in prompts if prompt.split == "train"]
    patching = FeaturePatching(SplitModel(tiny, exact), "tiny", train, pairs, CONFIG)
    whole_pairs = differences(patching.clean_P, patching.corrupted_P, {}, of_prompts(pairs, 100, 0))
    together = patching.results(whole_pairs).together[-1]
    assert together.features == "all"
    whole = float((patching.clean_P - patching.corrupted_P).mean())
    for one in (together.denoising, together.noising):
        assert one.effect.mean == pytest.approx(whole, abs=1e-4)
    sides = [last_diffs(tiny, pairs, side) for side in ("text", "counterpart")]
    np.testing.assert_allclose([patching.clean_P, patching.corrupted_P], sides, atol=1e-4)
