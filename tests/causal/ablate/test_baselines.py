"""Other bases of a site: neurons, principal components, random directions, in the same experiment."""

import numpy as np
import pytest
from linear_experiment import LinearExperiment

from saejax import pipeline
from saejax.causal import ablation
from saejax.causal.ablate import baselines, bases
from saejax.causal.ablate.experiment import ModelExperiment
from saejax.causal.ablate.results import ComparedBasis, UncomparedBasis
from saejax.causal.split import SplitModel
from saejax.dictionaries import save_dictionary
from saejax.errors import UserError
from saejax.models.sites import Site
from saejax.registry import GROUPS
from saejax.settings import AblateConfig


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


def test_removing_neurons_equals_zeros_in_front_of_the_down_projection(tiny, tiny_torch, prompts):
    import torch

    few, chosen = prompts[:4], [3, 17, 40]
    split = SplitModel(tiny, bases.neurons(tiny, "resid_post.1"))
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
    np.testing.assert_allclose(W_dec_FxD @ W_dec_FxD.T, np.eye(30), atol=1e-5)
    f_NxF = np.asarray(basis.encode(values_NxD.astype(np.float32)))
    assert (np.diff(f_NxF.std(axis=0)) < 1e-4).all()
    np.testing.assert_allclose(basis.decode(f_NxF), values_NxD, atol=1e-3)


def test_an_untrained_dictionary_is_as_sparse_as_asked(dictionary):
    basis = bases.untrained(dictionary, 9, seed=1)
    x_NxD = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) + np.asarray(dictionary.b_dec_D[...])
    assert ((np.asarray(basis.encode(x_NxD)) > 0).sum(axis=1) == 9).all()
    assert basis.config.n_features == dictionary.config.n_features
    np.testing.assert_array_equal(basis.b_dec_D[...], dictionary.b_dec_D[...])


@pytest.mark.slow
def test_every_basis_goes_through_the_same_experiment(tiny, prompts, dictionary):
    config = AblateConfig(top=3, draws=4, matches=2, bootstrap=100, baselines=("neurons", "components", "random"))
    experiment = ModelExperiment(SplitModel(tiny, dictionary), "tiny", prompts, config)
    found = baselines.compare(experiment, tiny, dictionary, config)
    assert list(found) == ["neurons", "components", "random"]
    for name, entry in found.items():
        assert len(entry.top) == 3 == entry.joint.n and entry.size >= 60, name
        assert entry.joint.clean_logit_diff == pytest.approx(float(experiment.ablate([]).clean_P.mean()), abs=1e-5)
    many = AblateConfig(top=40, matches=2, bootstrap=100, baselines=("components",))
    assert "too few" in baselines.compare(experiment, tiny, dictionary, many)["components"].reason


class Few(LinearExperiment):
    """A behaviour in whose other bases few directions fire, and whose train prompts lend no values."""

    name = "few"

    def on(self, split, basis):
        firing = 5 if basis == "neurons" else 40
        return LinearExperiment(np.ones(60), attribution_F=np.linspace(2, 1, 60), dead=range(firing, 60))

    def train_values(self):
        return np.zeros((0, 64), np.float32)


def test_a_basis_that_cannot_be_compared_says_why_and_the_others_go_on(tiny, dictionary):
    config = AblateConfig(top=3, draws=4, matches=4, bootstrap=100, baselines=("neurons", "components", "random"))
    found = baselines.compare(Few(np.ones(160)), tiny, dictionary, config)
    assert found["neurons"].reason == (
        "only 2 features besides the 3 under test fire on the test prompts, but matched controls need 6"
    )
    assert found["components"] == UncomparedBasis(
        reason="no train prompt has a position at which features may change, so there is nothing to decompose"
    )
    assert isinstance(found["random"], ComparedBasis) and found["random"].joint.n == 3
    with pytest.raises(ValueError, match="no values"):
        bases.components(dictionary, np.zeros((0, 64)))


def test_bases_are_checked_before_any_work():
    baselines.check(AblateConfig(baselines=("neurons", "random")))
    with pytest.raises(UserError, match="neuron holds no dictionary"):
        baselines.check(AblateConfig(baselines=("neuron",)))
    with pytest.raises(UserError, match="error=drop has no meaning for other bases"):
        baselines.check(AblateConfig(baselines=("neurons",), error="drop"))


def test_a_basis_that_changed_is_compared_anew(dictionary, tmp_path):
    configs = {name: group() for name, group in GROUPS.items()}
    configs["ablate"] = AblateConfig(baselines=(str(tmp_path / "other"),))

    def mark():
        plan = pipeline.Workplan(configs)
        plan._marks |= {"<model>": "m", "<corpus>": "c", "<prompts>": "p"}
        return plan.mark("ablate/topk")

    save_dictionary(tmp_path / "other", dictionary)
    before = mark()
    assert mark() == before
    save_dictionary(tmp_path / "other2", bases.untrained(dictionary, 3, seed=5))
    (tmp_path / "other").rename(tmp_path / "gone")
    (tmp_path / "other2").rename(tmp_path / "other")
    assert mark() != before
