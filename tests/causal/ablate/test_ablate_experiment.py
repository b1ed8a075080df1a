"""One behaviour on a model: every feature with an effect has a matched control, whatever stands in its place."""

import dataclasses

import numpy as np
import pytest

from saejax.causal.ablate import verdict
from saejax.causal.ablate.experiment import ModelExperiment
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions import activity
from saejax.interventions import slopes as screening
from saejax.interventions.split_model import SplitModel
from saejax.settings import AblateConfig

CONFIG = AblateConfig(top=1, draws=4, matches=3, bootstrap=100)


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def split(tiny, dictionary):
    return SplitModel(tiny, dictionary)


def with_counterparts(prompts):
    """Every prompt's counterpart is the same text about something else, of as many tokens."""
    return [dataclasses.replace(prompt, counterpart=prompt.text.replace(" near ", " that ")) for prompt in prompts]


def only(experiment, feature):
    """The experiment with this one as its top feature."""
    attribution_F = np.zeros(160)
    attribution_F[feature] = 1.0
    experiment.attribution = lambda: attribution_F
    return experiment


@pytest.mark.parametrize("replacement", ["mean", "counterpart"])
def test_a_feature_that_fires_only_where_its_replacement_is_from_has_a_control(
    tiny, split, dictionary, prompts, replacement
):
    prompts = with_counterparts(prompts)
    tested = [prompt for prompt in prompts if prompt.split == "test"]
    train = [prompt for prompt in prompts if prompt.split == "train"]
    lenders = split.run(train) if replacement == "mean" else split.run_counterparts(tested)
    # The threshold of one feature rises above its largest activation on the test prompts.
    most_F, lent_F = (activity.maxima(split, runs).max(axis=0) for runs in (split.run(tested), lenders))
    feature = int(np.argmax((lent_F - most_F) * (most_F > 0)))
    arrays = dict(dictionary.arrays)
    arrays["b_enc_F"] = arrays["b_enc_F"].at[feature].add(-most_F[feature] - 0.1 * (lent_F - most_F)[feature])
    split = SplitModel(tiny, Dictionary(dictionary.config, **arrays))
    config = dataclasses.replace(CONFIG, replacement=replacement)
    experiment = only(ModelExperiment(split, "tiny", prompts, config), feature)
    results, measured = verdict.judge("tiny", experiment, config)
    (entry,) = results.top
    assert entry.feature == feature and entry.logit_diff_drop.mean != 0
    assert results.joint.firing == 1 and measured.controls_NxC.shape == (4, 1)
    assert entry.firing_rate > 0 and entry.control_drop is not None
    # Set to zero, the same feature has no effect and is said to have no control.
    config = dataclasses.replace(CONFIG, replacement="zero")
    experiment = only(ModelExperiment(split, "tiny", prompts, config), feature)
    results, measured = verdict.judge("tiny", experiment, config)
    (entry,) = results.top
    assert entry.logit_diff_drop.mean == 0 and entry.control_drop is None
    assert "1 of the features never fire on the test prompts" in results.grades.harms.reason


@pytest.mark.parametrize("replacement", ["mean", "random", "counterpart"])
def test_features_are_ranked_by_what_stands_in_their_place(split, prompts, replacement):
    """Activation x gradient would rank by what removing to zero costs, which is not what is measured then."""
    prompts, zero = with_counterparts(prompts[:24]), ModelExperiment(split, "tiny", prompts[:24], CONFIG)
    experiment = ModelExperiment(split, "tiny", prompts, dataclasses.replace(CONFIG, replacement=replacement))
    runs = split.run([prompt for prompt in prompts if prompt.split == "train"])
    others = split.run_counterparts([prompt for prompt in prompts if prompt.split == "train"])
    lent = others if replacement == "counterpart" else []
    wanted_NxF = screening.attribution(split, runs, "gradient", experiment.replacement, lent)
    np.testing.assert_allclose(experiment.attribution(), wanted_NxF.mean(axis=0), atol=1e-6)
    apart_F = experiment.attribution() - zero.attribution()
    assert np.abs(apart_F).max() > 0.05 * np.abs(zero.attribution()).max()


def test_prompts_of_one_split_only(split, make_prompt):
    with pytest.raises(UserError, match="behaviour tiny has 3 train and 0 test prompts"):
        ModelExperiment(split, "tiny", [make_prompt(i, "train") for i in range(3)], AblateConfig())
