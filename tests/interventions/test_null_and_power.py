"""The verdict in worlds whose truth is known: how often it says yes where nothing is true, and where something is.

Every world differs from the others in features, prompts, templates, dictionary and answers. Of 100 worlds without an
effect a test at 5 % says yes in 8 or fewer with a probability of 94 %; the seeds are fixed. Most worlds are linear; in
the last ones a tiny random model is measured by the engine, in a slow test as often.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from effect_worlds import World, attribution, planted_world, pool, random_world, top_features, world_table

from saejax.dictionaries import Dictionary
from saejax.interventions.ablation import measure_behaviour
from saejax.interventions.answers import BehaviourVerdict, VerdictConfig
from saejax.interventions.settings import AblateConfig
from saejax.interventions.slopes import slopes
from saejax.interventions.table import TESTED
from saejax.interventions.verdict import verdict
from saejax.tasks.behaviours import Prompt

WORLDS = range(100)
K = 5


def judge(world: World, top: tuple[int, ...], seed: int, **options) -> BehaviourVerdict:
    table = world_table(world, top, seed=seed, **options)
    return verdict(table, VerdictConfig(resamples=200)).dictionaries[TESTED]["b"]


def count_yes(verdicts: list[BehaviourVerdict], question: str) -> int:
    return sum(getattr(each, question).answer == "yes" for each in verdicts)


def selected_by_attribution(world: World) -> tuple[int, ...]:
    return top_features(attribution(world, world.answers_Px2), K)


def drawn(world: World, seed: int, stream: int) -> tuple[int, ...]:
    """Return features drawn at random from those that may be in a set."""
    return tuple(np.random.default_rng([seed, stream]).choice(pool(world), K, replace=False).tolist())


def test_features_selected_for_random_answers_pass_no_more_than_the_level():
    """Train answers say nothing about test answers, so selection by attribution finds nothing."""
    worlds = [(random_world(seed), seed) for seed in WORLDS]
    verdicts = [judge(world, selected_by_attribution(world), seed) for world, seed in worlds]
    assert count_yes(verdicts, "random") <= 8
    assert count_yes(verdicts, "placebo") <= 8
    assert sum(each.ablation["logit_diff"].answer == "yes" for each in verdicts) <= 8


def test_random_features_planted_as_top_pass_no_more_than_the_level():
    """A fixed pair of answers, which some features carry; the tested set is drawn from the pool."""
    verdicts = []
    for seed in WORLDS:
        world = planted_world(seed, planted=8)
        verdicts.append(judge(world, drawn(world, seed, 1), seed))
    assert count_yes(verdicts, "random") <= 8
    assert count_yes(verdicts, "placebo") <= 8


@pytest.mark.parametrize("planted", [K, 1])
def test_an_effect_is_found_whether_it_is_spread_or_concentrated(planted):
    verdicts = []
    for seed in WORLDS:
        world = planted_world(seed, planted)
        verdicts.append(judge(world, selected_by_attribution(world), seed, placebo_sets=0))
    assert count_yes(verdicts, "random") >= 95
    assert sum(each.ablation["logit_diff"].answer == "yes" for each in verdicts) >= 95


def test_a_larger_dose_alone_is_no_effect():
    """Features that change the site five times as much as others, along directions as random as theirs.

    Compared as they are, they lose much more or gain much more than random sets; at equal dose they are like them.
    """
    answers = {True: [], False: []}
    for seed in WORLDS:
        world = random_world(seed)
        top = drawn(world, seed, 2)
        acts_PxF = world.acts_PxF.copy()
        acts_PxF[:, list(top)] *= 5
        louder = dataclasses.replace(world, acts_PxF=acts_PxF)
        for equalise, verdicts in answers.items():
            verdicts.append(judge(louder, top, seed, equalise=equalise, placebo_sets=0))
    assert count_yes(answers[True], "random") <= 8
    assert count_yes(answers[False], "random") > 20, "without equal doses the same features pass: the test can see it"


SITE, TOP, TRAIN, TEST, DROP = "resid_post.1", 3, 10, 12, 3.0  # logits that planted features carry
CONFIG = AblateConfig(top=TOP, random_sets=39, placebo_targets=39, untrained=False, baselines=(), bootstrap=200)
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


def measure_and_judge(tiny, dictionary, prompts, features=None, placebos=39) -> BehaviourVerdict:
    config = dataclasses.replace(CONFIG, placebo_targets=placebos)
    table, _ = measure_behaviour(tiny, dictionary, "b", {"b": prompts}, config, features=features)
    return verdict(table, VerdictConfig(resamples=200)).dictionaries[TESTED]["b"]


@pytest.mark.slow
@pytest.mark.parametrize("selected", [True, False])
def test_where_nothing_is_true_few_worlds_say_yes(tiny, make_dictionary, selected):
    """Features are selected for answers that are noise, or drawn at random."""
    verdicts = []
    for seed in WORLDS:
        drawn = np.random.default_rng([seed, 12]).choice(140, TOP, replace=False).tolist()
        prompts = random_prompts(tiny, seed, fixed=not selected)
        verdicts.append(measure_and_judge(tiny, make_dictionary(SITE, seed=seed), prompts, None if selected else drawn))
    for question in ("random", "placebo"):
        answers = [getattr(each, question).answer for each in verdicts]
        assert set(answers) <= {"yes", "no"}, "enough disjoint sets"
        assert answers.count("yes") <= 8


@pytest.mark.parametrize("planted", [TOP, 1])
@pytest.mark.parametrize("worlds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_planted_effect_is_found_whether_spread_or_concentrated(tiny, make_dictionary, worlds, planted):
    answers = []
    for seed in range(worlds):
        prompts = random_prompts(tiny, seed, fixed=True)
        dictionary = with_planted(tiny, make_dictionary(SITE, seed=seed), prompts, planted, seed)
        answers.append(measure_and_judge(tiny, dictionary, prompts, placebos=0).random.answer)
    assert answers.count("yes") >= 0.95 * worlds
