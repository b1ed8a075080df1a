"""The whole procedure on a tiny random model whose truth is known: measured by the engine, judged by the verdict.

In every world the dictionary, the prompts, their templates and their answers differ. Where nothing is true, a test at
5 % says yes in 8 or fewer of 100 worlds with a probability of 94 %; the seeds are fixed. The slow test runs 100 worlds
of each kind, the other one the first few.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.dictionaries import Dictionary
from saejax.interventions.ablation import measure_behaviour
from saejax.interventions.answers import BehaviourVerdict, VerdictConfig
from saejax.interventions.slopes import slopes
from saejax.interventions.table import TESTED
from saejax.interventions.verdict import verdict
from saejax.settings import AblateConfig
from saejax.tasks.behaviours import Prompt

SITE, K, TRAIN, TEST, DROP = "resid_post.1", 3, 10, 12, 3.0  # logits that planted features carry
CONFIG = AblateConfig(top=K, random_sets=39, placebo_targets=39, untrained=False, baselines=(), bootstrap=200)
TEMPLATES = ("The {} near the {}", "One day the {} and the {}", "She said that {} was {}", "If the {} is not {}")
WORDS = (" the", " runs", " far", " way", " was", " and", " near", " cat", " war", " year", " went", " said")
SUBJECTS = ("cat", "dogs", "water", "year", "war", "capital", "way", "she", "France", "Paris", "went", "far")


def random_prompts(tiny, seed: int, fixed: bool) -> list[Prompt]:
    """Return prompts of templates and subjects drawn at random; each has answers of its own, unless they are fixed."""
    rng = np.random.default_rng([seed, 10])
    answers = [word for word in WORDS if len(tiny.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]
    templates = rng.permutation(TEMPLATES)[: rng.integers(2, 5)]
    pair = rng.choice(answers, 2, replace=False)
    prompts = []
    for number in range(TRAIN + TEST):
        template, split = str(rng.choice(templates)), "train" if number < TRAIN else "test"
        correct, wrong = map(str, pair if fixed else rng.choice(answers, 2, replace=False))
        text = template.format(*rng.choice(SUBJECTS, 2))
        prompts.append(Prompt("b", split, text, correct, wrong, template=template))
    return prompts


def with_planted(tiny, dictionary: Dictionary, prompts, planted: int, seed: int) -> Dictionary:
    """Return the dictionary with the directions of some features turned to where the answers are sensitive.

    The planted features fire on at least half of the prompts. Together they lower the logit difference by as much
    whether they are many or one.
    """
    rng = np.random.default_rng([seed, 11])
    slope_PxTxD = np.asarray(slopes(tiny, prompts, "logit_diff", SITE), np.float64)
    direction_D = slope_PxTxD.sum(axis=(0, 1))
    arrays = {name: np.asarray(array).copy() for name, array in dictionary.arrays.items()}
    tokens = tiny.tokenize([prompt.text for prompt in prompts])
    x_BxTxD = tiny(tokens, capture=[SITE], logits=False).sites[SITE]
    f_BxTxF = np.asarray(dictionary.encode(x_BxTxD), np.float64) * np.asarray(tokens.mask_BxT)[:, :, None]
    f_BxTxF *= np.asarray(dictionary.is_not_sink(x_BxTxD))[:, :, None]
    unit_D = direction_D / np.linalg.norm(direction_D)
    effect_PxF = np.einsum("btf,bt->bf", f_BxTxF, slope_PxTxD @ unit_D)  # logits for a direction of length 1
    fires_F = (f_BxTxF > 0).any(axis=1).mean(axis=0) >= 0.5
    often = np.flatnonzero(fires_F & (effect_PxF.mean(axis=0) > 0) & ((effect_PxF > 0).mean(axis=0) >= 0.5))
    for feature in rng.choice(often, planted, replace=False):
        arrays["W_dec_FxD"][feature] += DROP / planted / effect_PxF[:, feature].mean() * unit_D
    return Dictionary(dictionary.config, **{name: jnp.asarray(array) for name, array in arrays.items()})


def judge(tiny, dictionary, prompts, features=None, placebos=39) -> BehaviourVerdict:
    config = dataclasses.replace(CONFIG, placebo_targets=placebos)
    table, _ = measure_behaviour(tiny, dictionary, "b", {"b": prompts}, config, features=features)
    return verdict(table, VerdictConfig(resamples=200)).dictionaries[TESTED]["b"]


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize(("worlds", "most"), [(3, 1), pytest.param(100, 8, marks=pytest.mark.slow)])
def test_where_nothing_is_true_few_worlds_say_yes(tiny, make_dictionary, worlds, most, selected):
    """Features are selected for answers that are noise, or drawn at random."""
    verdicts = []
    for seed in range(worlds):
        drawn = np.random.default_rng([seed, 12]).choice(140, K, replace=False).tolist()
        prompts = random_prompts(tiny, seed, fixed=not selected)
        verdicts.append(judge(tiny, make_dictionary(SITE, seed=seed), prompts, None if selected else drawn))
    for question in ("random", "placebo"):
        answers = [getattr(each, question).answer for each in verdicts]
        assert set(answers) <= {"yes", "no"}, "enough disjoint sets"
        assert answers.count("yes") <= most


@pytest.mark.parametrize("planted", [K, 1])
@pytest.mark.parametrize("worlds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_planted_effect_is_found_whether_spread_or_concentrated(tiny, make_dictionary, worlds, planted):
    answers = []
    for seed in range(worlds):
        prompts = random_prompts(tiny, seed, fixed=True)
        dictionary = with_planted(tiny, make_dictionary(SITE, seed=seed), prompts, planted, seed)
        answers.append(judge(tiny, dictionary, prompts, placebos=0).random.answer)
    assert answers.count("yes") >= 0.95 * worlds
