"""Other bases of a site at equal dose: planted worlds, the areas by hand, the bases themselves, and what cannot be."""

import dataclasses

import jax
import numpy as np
import pytest
from linear_experiment import LinearExperiment

from saejax import workplan
from saejax.causal.ablate import bases, dose, grades, verdict
from saejax.causal.ablate import text as ablate_text
from saejax.causal.ablate.experiment import ModelExperiment
from saejax.causal.ablate.report import _as_well
from saejax.causal.ablate.results import DoseCurve, UncomparedBasis
from saejax.causal.ablate.text import HeldOutText
from saejax.dictionaries import save_dictionary
from saejax.errors import UserError
from saejax.interventions import engine as ablation
from saejax.interventions.replacement import ActivationSource
from saejax.interventions.split_model import SplitModel
from saejax.models.sites import Site
from saejax.models.tokens import Tokens
from saejax.registry import default_configs
from saejax.results import Interval
from saejax.settings import AblateConfig


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


def test_removing_neurons_equals_zeros_in_front_of_the_down_projection(tiny, tiny_torch, prompts):
    import torch

    few, chosen = prompts[:4], [3, 17, 40]
    split = SplitModel(tiny, bases.Neurons(tiny, 1))
    assert split.point.site == Site("mlp_out", 1) and split.point.reads == Site("mlp_in", 1)
    diffs = ablation.ablate_sets(split, split.run(few), [chosen])

    def without(module, args):
        hidden = args[0].clone()
        hidden[:, 1:, chosen] = 0  # first tokens are left alone
        return (hidden,)

    handle = tiny_torch.model.layers[1].mlp.down_proj.register_forward_pre_hook(without)
    try:
        for p, prompt in enumerate(few):
            ids = torch.tensor([tiny.tokenize([prompt.text]).ids_BxT[0].tolist()])
            logits_V = tiny_torch(ids).logits[0, -1]
            wanted = logits_V[tiny.token_id(prompt.correct)] - logits_V[tiny.token_id(prompt.wrong)]
            np.testing.assert_allclose(diffs.ablated_SxP[0, p], wanted.item(), atol=1e-4)
    finally:
        handle.remove()
    assert (np.abs(diffs.drop_SxP) > 1e-4).all()


def test_components_are_orthonormal_ordered_and_rebuild_the_values(dictionary):
    values_NxD = np.random.default_rng(0).normal(size=(30, 64)) * np.linspace(3, 0.1, 64)[None, :] + 2.0
    basis = bases.components(dictionary, values_NxD)
    W_dec_FxD = np.asarray(basis.W_dec_FxD[...])
    np.testing.assert_allclose(W_dec_FxD @ W_dec_FxD.T, np.eye(29), atol=1e-5)  # the mean takes one dimension
    f_NxF = np.asarray(basis.encode(values_NxD.astype(np.float32)))
    assert (np.diff(f_NxF.std(axis=0)) < 1e-4).all()
    np.testing.assert_allclose(basis.decode(f_NxF), values_NxD, atol=1e-3)


def test_an_untrained_dictionary_is_as_sparse_as_asked(dictionary):
    basis = bases.untrained(dictionary, 9, seed=1)
    x_NxD = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) + np.asarray(dictionary.b_dec_D[...])
    assert ((np.asarray(basis.encode(x_NxD)) > 0).sum(axis=1) == 9).all()
    assert basis.config.n_features == dictionary.config.n_features
    np.testing.assert_array_equal(basis.b_dec_D[...], dictionary.b_dec_D[...])


def test_differences_of_means_of_two_answers_are_one_direction(dictionary):
    means_GxD = np.random.default_rng(0).normal(size=(2, 64))
    basis = bases.directions(dictionary, means_GxD - means_GxD.mean(axis=0), np.zeros(64))
    apart_D = means_GxD[0] - means_GxD[1]
    (direction_D,) = np.asarray(basis.W_dec_FxD[...])
    assert abs(direction_D @ apart_D) == pytest.approx(np.linalg.norm(apart_D), rel=1e-5)


def test_values_that_are_all_the_same_have_no_directions(dictionary):
    same_NxD = np.repeat(np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32), 7, axis=0)
    assert bases.components(dictionary, same_NxD) is None
    assert bases.directions(dictionary, np.zeros((2, 64)), same_NxD[0]) is None
    basis = dose._basis("components", Alike(np.ones(160)), None, dictionary, AblateConfig())
    assert basis == "all values of the train prompts are the same"
    assert dose._basis("difference", Alike(np.ones(160)), None, dictionary, AblateConfig()) == (
        "the means of all answers are the same"
    )


def test_bases_that_are_joined_are_themselves(dictionary):
    members = [dictionary, bases.untrained(dictionary, 9, seed=1)]
    joined = bases.Joined(members)
    x_NxD = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) + np.asarray(dictionary.b_dec_D[...])
    x_NxD[3] *= 1e4  # a sink of both
    f_NxF = np.asarray(joined.encode(x_NxD))
    for member, own in zip(members, (slice(0, 160), slice(160, 320)), strict=True):
        np.testing.assert_array_equal(f_NxF[:3, own], member.encode(x_NxD)[:3])
        np.testing.assert_array_equal(joined.W_dec_FxD[...][own], member.W_dec_FxD[...])
    assert not f_NxF[3].any() and joined.is_not_sink(x_NxD).tolist() == [True, True, True, False, True]


def over(values_P):
    return Interval(float(np.mean(values_P)), float(np.mean(values_P)), float(np.mean(values_P)))


def test_areas_equal_those_by_hand():
    # Effects 2 at dose 1 and 3 at dose 3: up to dose 2 the area is 1 + (2 + 2.5) / 2, by 2.
    dose_S, effect_SxP = np.array([3.0, 1.0]), np.array([[3.0, 6.0], [2.0, 0.0]])
    np.testing.assert_allclose(dose.mean_effect(dose_S, effect_SxP, 2.0), [1.625, 0.75])
    found = dose.equal_dose((dose_S, effect_SxP), (np.array([2.0]), np.array([[1.0, 1.0]])), over)
    assert (found.reach, found.features, found.basis) == (2.0, pytest.approx(1.1875), 0.5)
    assert found.difference.mean == pytest.approx(0.6875)
    assert dose.equal_dose((dose_S, effect_SxP), (np.zeros(1), np.zeros((1, 2))), over) is None


class World:
    """A linear readout of a site: the logit difference of a prompt is base + gain . x, one position per prompt.

    A basis is an orthonormal or unit-row [F, D] and the coefficients [P, F] that are removed.
    """

    name = "world"

    def __init__(self, x_PxD, gain_D, f_PxF, W_dec_FxD, base=0.0):
        self.x_PxD, self.gain_D, self.f_PxF, self.W_dec_FxD, self.base = x_PxD, gain_D, f_PxF, W_dec_FxD, base
        self.templates = [""] * len(x_PxD)

    def order(self, count):
        attribution_F = (self.f_PxF * (self.W_dec_FxD @ self.gain_D)).mean(axis=0)
        return np.argsort(-attribution_F)[: min(count, int((attribution_F > 0).sum()))].tolist()

    def changes(self, features):
        f_PxK, W_KxD = self.f_PxF[:, features], self.W_dec_FxD[features]
        return (f_PxK.T @ f_PxK) * (W_KxD @ W_KxD.T) / len(f_PxK)

    def ablate(self, sets, prompts=None):
        clean_P = self.base + self.x_PxD @ self.gain_D
        drop_SxP = np.stack([(self.f_PxF[:, one] @ self.W_dec_FxD[one]) @ self.gain_D for one in sets])
        return ablation.LogitDiffs(clean_P, clean_P[None] - drop_SxP, 0 * clean_P, 1, 1)


def planted(dense):
    """200 features over 40 dimensions; the answer is read along one feature, or along the widest direction of all."""
    rng = np.random.default_rng(4)
    W_dec_FxD = rng.normal(size=(200, 40))
    W_dec_FxD /= np.linalg.norm(W_dec_FxD, axis=1, keepdims=True)
    f_PxF = (rng.random((100, 200)) < 0.05) * rng.uniform(0.5, 1.5, (100, 200))
    f_PxF[:, 7] = rng.uniform(0.8, 1.2, 100)  # the feature that carries the answer fires everywhere
    x_PxD = f_PxF @ W_dec_FxD
    if dense:  # a direction of its own, spread over many features that each write little of it
        wide_D = rng.normal(size=40)
        wide_D /= np.linalg.norm(wide_D)
        W_dec_FxD = W_dec_FxD - 0.8 * np.outer(W_dec_FxD @ wide_D, wide_D)
        W_dec_FxD += 0.15 * wide_D[None]
        W_dec_FxD /= np.linalg.norm(W_dec_FxD, axis=1, keepdims=True)
        f_PxF[:, 7] *= 0
        x_PxD = f_PxF @ W_dec_FxD + 3 * rng.normal(size=(100, 1)) * 0 + rng.uniform(2, 4, (100, 1)) * wide_D[None]
    gain_D = 2.0 * (wide_D if dense else W_dec_FxD[7])
    mean_D = x_PxD.mean(axis=0) * (0.0 if dense else 1.0)
    directions_FxD = np.linalg.svd(x_PxD - mean_D, full_matrices=False)[2]
    return World(x_PxD, gain_D, f_PxF, W_dec_FxD), World(
        x_PxD, gain_D, (x_PxD - mean_D) @ directions_FxD.T, directions_FxD
    )


def compared(dense):
    features, components = planted(dense)

    def divergence(world):
        # A stand-in for text: what the change leaves unread is a dose, too.
        return lambda sets: np.array([np.trace(world.changes(one)) for one in sets])

    top = features.order(20)
    own = dose.measure_curves(features, {"features": (200, top)}, np.inf, divergence(features))["features"]
    orders = {"components": (40, components.order(40))}
    other = dose.measure_curves(components, orders, own.norm_S.max(), divergence(components))["components"]
    interval_of = verdict.over_prompts(np.zeros(100), AblateConfig(bootstrap=500))
    return own, other, dict(features=own.beside(None, interval_of), components=other.beside(own, interval_of))


@pytest.mark.parametrize("dense", [False, True])
def test_at_equal_dose_the_basis_wins_in_which_the_answer_is_written(dense):
    own, other, curves = compared(dense)
    for measured, world in zip((own, other), planted(dense), strict=True):
        for size, norm, drop_P in zip(measured.sizes, measured.norm_S, measured.drop_SxP, strict=True):
            change_PxD = world.f_PxF[:, measured.top[:size]] @ world.W_dec_FxD[measured.top[:size]]
            assert norm == pytest.approx(np.sqrt(np.square(change_PxD).sum(axis=1).mean()))
            np.testing.assert_allclose(drop_P, change_PxD @ world.gain_D)
    at = curves["components"].by_norm
    assert (at.difference.high < 0) if dense else (at.difference.low > 0)
    result = partly_graded(curves)
    assert result.grades.beyond_bases.holds is not dense
    words = "more is lost along the top directions of" if dense else "less is lost along those of"
    assert result.grades.beyond_bases.reason == f"at equal dose {words}: components"
    assert result.grades.highest == ("beyond_matched" if dense else "beyond_bases")
    assert _as_well(result) == (["principal components"] if dense else [])


def partly_graded(curves):
    """A behaviour that passes all but what its curves say."""
    gain_F = np.where(np.arange(400) // 20 == 0, 0.5, 0.0)
    config = AblateConfig(bootstrap=300, draws=79, matches=10)
    result = verdict.judge("planted", LinearExperiment(gain_F, base=-1.0), config)[0]
    return grades.graded(dataclasses.replace(result, doses=curves), result.claim, config)


def test_every_basis_goes_through_the_same_experiment(tiny, prompts, dictionary):
    config = AblateConfig(top=3, draws=4, bootstrap=100)
    split = SplitModel(tiny, dictionary)
    experiment = ModelExperiment(split, "tiny", prompts, config)
    text = HeldOutText([list(range(3, 20)), list(range(30, 60))])
    asked = split, tiny, dictionary, text
    top = [3, 5, 40]
    found = dose.compare(experiment, top, *asked, config)
    assert list(found) == ["features", "neurons", "components", "random", "difference"]
    if isinstance(found["difference"], UncomparedBasis):  # of two answers there is one direction, which may help
        assert found.pop("difference").reason == "none of its directions has an attribution above zero"
    for name, curve in found.items():
        assert isinstance(curve, DoseCurve) and curve.size >= len(curve.top) == curve.sizes[-1], name
        assert curve.by_norm is None if name == "features" else curve.by_norm.reach <= curve.dose[-1] + 1e-9
    # Against edits of the whole model: what is lost, and how far the site is moved.
    own, tokens = found["features"], tiny.tokenize([prompt.text for prompt in experiment.test])
    assert own.top == (3, 5, 40) and own.sizes == (1, 2, 3)
    x_BxTxD, moved_BxTxD = (
        np.asarray(tiny(tokens, edits=edits, capture=[dictionary.site]).sites[dictionary.site], np.float64)
        for edits in ([], [dictionary.ablate(top)])
    )
    moved_BxT = np.square(x_BxTxD - moved_BxTxD).sum(axis=2) * tokens.mask_BxT
    assert own.dose[-1] == pytest.approx(np.sqrt(moved_BxT.sum(axis=1).mean()), rel=1e-3)
    np.testing.assert_allclose(own.logit_diff_drop[-1], experiment.ablate([top]).drop_SxP.mean(), atol=1e-5)
    # A basis alone and among others are the same directions.
    alone = dose.compare(experiment, top, *asked, dataclasses.replace(config, baselines=("random",)))["random"]
    assert alone.top == found["random"].top
    np.testing.assert_allclose(alone.logit_diff_drop, found["random"].logit_diff_drop, atol=1e-5)


def test_text_without_directions_equals_edits_of_the_whole_model(tiny, dictionary):
    documents, sets = [list(range(3, 20)), list(range(30, 60))], [[3, 5, 40], []]
    split = SplitModel(tiny, dictionary)
    found = HeldOutText(documents).effects(split, ActivationSource(), sets)
    assert found.tokens_N.tolist() == [16, 29]
    np.testing.assert_allclose(found.rise_SxN[1], 0.0, atol=1e-4)
    np.testing.assert_allclose(found.kl_SxN[1], 0.0, atol=1e-4)
    for n, ids in enumerate(documents):
        logp = [
            np.asarray(jax.nn.log_softmax(tiny(tokens_of(ids), edits=edits).logits_BxTxV[0, :-1].astype(np.float32)))
            for edits in ([], [dictionary.ablate(sets[0])])
        ]
        clean, less = (-part[np.arange(len(ids) - 1), ids[1:]].sum() for part in logp)
        np.testing.assert_allclose(found.clean_N[n], clean, rtol=1e-4)
        np.testing.assert_allclose(found.rise_SxN[0, n], less - clean, atol=2e-3)
        np.testing.assert_allclose(found.kl_SxN[0, n], (np.exp(logp[0]) * (logp[0] - logp[1])).sum(), atol=2e-3)


def test_other_bases_lose_by_the_same_edit_on_text_as_on_prompts(tiny, prompts, dictionary):
    """With the mean in their place, too."""
    config = AblateConfig(top=3, draws=4, bootstrap=100, replacement="mean", baselines=("neurons",))
    split, text = SplitModel(tiny, dictionary), HeldOutText([list(range(3, 20)), list(range(30, 60))])
    experiment = ModelExperiment(split, "tiny", prompts, config)
    curve = dose.compare(experiment, [3, 5, 40], split, tiny, dictionary, text, config)["neurons"]
    on_neurons = SplitModel(tiny, bases.Neurons(tiny, Site.parse(dictionary.site).layer))
    means = experiment.on(on_neurons, "neurons").replacement
    assert means.kind == "mean"
    diffs = text.effects(on_neurons, means, [curve.top[:size] for size in curve.sizes])
    np.testing.assert_allclose(curve.kl, diffs.kl_SxN.sum(axis=1) / diffs.tokens_N.sum(), rtol=1e-5)


def test_what_fills_a_batch_of_text_lends_no_activation(tiny, dictionary, monkeypatch):
    """Two documents go through a program for four: a random activation in a feature's place is one of theirs."""
    seen, removed = [], ablate_text._removed

    def spy(point, basis, source, read, domain, features, *rest):
        found = removed(point, basis, source, read, domain, features, *rest)
        f = ablate_text.active_features(basis, read, domain)[:, :, features]
        seen.append((np.asarray(f), np.asarray(f) - np.asarray(found[0])))
        return found

    monkeypatch.setattr(ablate_text, "_removed", spy)
    source = ActivationSource("random", seed=np.uint32(3))
    every = list(range(dictionary.config.n_features))
    HeldOutText([list(range(3, 20)), list(range(30, 60))]).effects(SplitModel(tiny, dictionary), source, [every])
    ((f_BxTxK, left_BxTxK),) = seen
    assert len(f_BxTxK) == 4 and (f_BxTxK[2:] != 0).any()
    for k in range(f_BxTxK.shape[2]):
        own = f_BxTxK[:2, :, k]
        wrong = np.abs(left_BxTxK[:2, :, k][own != 0][:, None] - own[own != 0][None, :]).min(axis=1, initial=np.inf)
        assert (wrong < 1e-5).all(), k


def tokens_of(ids):
    return Tokens(np.array([ids], np.int32), np.array([len(ids)], np.int32))


class Few(LinearExperiment):
    """A behaviour with one answer, whose train prompts lend no values."""

    name = "few"

    def on(self, split, basis):
        return LinearExperiment(np.ones(1600), attribution_F=-np.ones(1600) if "neurons" in basis else np.ones(1600))

    def train_values(self):
        return np.zeros((0, 64), np.float32)


class Alike(LinearExperiment):
    """A behaviour whose train prompts all give the same value."""

    def train_values(self):
        return np.ones((7, 64), np.float32)

    def answer_means(self):
        return np.ones((2, 64))


def test_a_basis_that_cannot_be_compared_says_why_and_the_others_go_on(tiny, dictionary):
    config = AblateConfig(top=3, draws=4, matches=4, bootstrap=100)
    asked = SplitModel(tiny, dictionary), tiny, dictionary, None
    found = dose.compare(Few(np.ones(160)), [1, 2, 3], *asked, config)
    nothing = "no train prompt has a position at which features may change, so there is nothing to decompose"
    assert found["neurons"].reason == "none of its directions has an attribution above zero"
    assert found["components"] == found["difference"] == UncomparedBasis(nothing)
    assert found["random"].sizes[0] == 1 and found["random"].kl is None
    assert dose.compare(Few(np.ones(160)), [], *asked, config) == {}
    with pytest.raises(ValueError, match="no values"):
        bases.components(dictionary, np.zeros((0, 64)))
    dropped = dataclasses.replace(config, error="drop")
    found = dose.compare(Few(np.ones(160)), [1, 2, 3], *asked, dropped)
    assert "error=drop" in found["random"].reason and isinstance(found["features"], DoseCurve)
    assert "error=drop" in partly_graded(found).grades.beyond_bases.reason


def test_bases_are_checked_before_any_work():
    dose.check(AblateConfig(baselines=("neurons", "random")))
    with pytest.raises(UserError, match="neuron holds no dictionary"):
        dose.check(AblateConfig(baselines=("neuron",)))


def test_a_basis_that_changed_is_compared_anew(dictionary, tmp_path):
    configs = default_configs() | AblateConfig(baselines=(str(tmp_path / "other"),))

    def mark():
        plan = workplan.Workplan(configs)
        return plan.mark("ablate/topk")

    save_dictionary(tmp_path / "other", dictionary)
    before = mark()
    assert mark() == before
    save_dictionary(tmp_path / "other2", bases.untrained(dictionary, 3, seed=5))
    (tmp_path / "other").rename(tmp_path / "gone")
    (tmp_path / "other2").rename(tmp_path / "other")
    assert mark() != before
