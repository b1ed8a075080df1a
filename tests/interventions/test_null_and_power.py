"""The verdict in worlds whose truth is known: how often it says yes where nothing is true, and where something is.

Every world differs from the others in features, prompts, templates, dictionary and answers, and its features differ in
scale by a factor of ten. Of 400 worlds without an effect a test at 5 % says yes in 32 or fewer with a probability of
99 %, of 800 in 55 or fewer, of 40 in 6 or fewer; the seeds are fixed. Rates are of p-values before correction; they are
printed (pytest -s). Most worlds are linear; in the last ones a tiny random model is measured by the engine, with four
behaviours each. Answers about means over prompts are tried on tables of drawn numbers.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from effect_worlds import (
    World,
    attribution,
    encode,
    planted_world,
    pool,
    random_world,
    top_features,
    with_dictionary,
    world_table,
)

from saejax.dictionaries import Dictionary
from saejax.interventions import ablation, bases
from saejax.interventions.ablation import begin_ablation, measure_behaviour
from saejax.interventions.answers import BehaviourVerdict, VerdictConfig
from saejax.interventions.settings import AblateConfig
from saejax.interventions.slopes import slopes
from saejax.interventions.table import (
    BASIS,
    RANKS,
    TESTED,
    TEXT,
    EditDefinition,
    EffectsTable,
    PromptDefinition,
    merge_tables,
)
from saejax.interventions.verdict import verdict
from saejax.tasks.behaviours import Prompt

K, M = 5, 79
COUNTS = pytest.mark.parametrize("worlds", [14, pytest.param(400, marks=pytest.mark.slow)])


def judge(world: World, top: tuple[int, ...], seed: int, **options) -> BehaviourVerdict:
    table = world_table(world, top, seed=seed, **dict(random_sets=M, placebo_sets=M) | options)
    return verdict(table, VerdictConfig(resamples=400)).dictionaries[TESTED]["b"]


def rate(name: str, verdicts: list[BehaviourVerdict], question: str) -> float:
    """Return how often a question's p-value, where it has one, is at most 5 %; print it."""
    p_values = [answer.p_value for each in verdicts if (answer := getattr(each, question)).p_value is not None]
    share = sum(p_value <= 0.05 for p_value in p_values) / len(p_values)
    print(
        f"{name}: {question} yes in {100 * share:.1f} % of the {len(p_values)} worlds of {len(verdicts)} that test it"
    )
    assert len(p_values) >= 0.5 * len(verdicts)
    return share


def assert_level(share: float, worlds: int) -> None:
    assert share <= (0.08 if worlds >= 200 else 0.15)


def selected_by_attribution(world: World) -> tuple[int, ...]:
    return top_features(attribution(world, world.answers_Px2), K)


def drawn(world: World, seed: int, stream: int) -> tuple[int, ...]:
    """Return features drawn at random from those that may be in a list."""
    return tuple(np.random.default_rng([seed, stream]).choice(pool(world), K, replace=False).tolist())


# With 400 seeds 9.0 % were seen for question 2, with the next 400 seeds 3.8 %: more worlds tell them apart from 8 %.
# The first 60 worlds with answers of the test prompts drawn 200 times in each give 5.6 % (standard error 0.2); lists
# hardly overlap there (the mean cosine of two lists' changes is 0.03).
# Statement 10 of WORKSPACE.md, what must hold.
@pytest.mark.parametrize("worlds", [24, pytest.param(800, marks=pytest.mark.slow)])
def test_features_selected_for_random_answers_pass_no_more_than_the_level(worlds):
    """Train answers say nothing about test answers, so selection by attribution finds nothing."""
    some, untrained = [(random_world(seed), seed) for seed in range(worlds)], 19 if worlds >= 200 else 0
    verdicts = [judge(world, selected_by_attribution(world), seed, untrained=untrained) for world, seed in some]
    for question in ("random", "placebo", "trained")[: 3 if untrained else 2]:
        assert_level(rate("attribution for random answers", verdicts, question), worlds)
    assert sum(each.ablation["logit_diff"].answer == "yes" for each in verdicts) <= 0.08 * worlds


@pytest.mark.parametrize("worlds", [24, pytest.param(400, marks=pytest.mark.slow)])
def test_random_features_planted_as_top_pass_no_more_than_the_level(worlds):
    """A fixed pair of answers, which some features carry; the tested set is drawn from the pool."""
    verdicts = []
    for seed in range(worlds):
        world = planted_world(seed, planted=8)
        verdicts.append(judge(world, drawn(world, seed, 1), seed))
    for question in ("random", "placebo"):
        assert_level(rate("T drawn at random", verdicts, question), worlds)


@COUNTS
@pytest.mark.parametrize("planted", [K, 1])
def test_an_effect_is_found_whether_it_is_spread_or_concentrated(planted, worlds):
    verdicts = []
    for seed in range(worlds):
        world = planted_world(seed, planted)
        verdicts.append(judge(world, selected_by_attribution(world), seed, placebo_sets=0))
    assert rate(f"an effect in {planted} features", verdicts, "random") >= 0.95
    assert sum(each.ablation["logit_diff"].answer == "yes" for each in verdicts) >= 0.95 * worlds


@COUNTS
def test_an_effect_on_one_answer_is_specific_to_it(worlds):
    verdicts = []
    for seed in range(worlds):
        world = planted_world(seed, K, drop=3.0)
        verdicts.append(judge(world, selected_by_attribution(world), seed, random_sets=1))
    assert rate("an effect on one answer", verdicts, "placebo") >= 0.8


@COUNTS
def test_a_larger_dose_alone_is_no_effect(worlds):
    """Features that change the site five times as much as others, along directions as random as theirs."""
    verdicts = []
    for seed in range(worlds):
        world = random_world(seed)
        top = drawn(world, seed, 2)
        acts_PxF = world.acts_PxF.copy()
        acts_PxF[:, list(top)] *= 5
        louder = dataclasses.replace(world, acts_PxF=acts_PxF)
        verdicts.append(judge(louder, top, seed, placebo_sets=0))
    assert_level(rate("louder features", verdicts, "random"), worlds)


@COUNTS
@pytest.mark.parametrize("are_true", [False, True])
def test_training_mattered_where_the_directions_are_true_and_not_where_they_are_random(worlds, are_true):
    verdicts = []
    for seed in range(worlds):
        world, features = planted_world(seed, K), None
        if not are_true:
            acts_PxF, decoder_FxD = encode(world, 10**6 + seed)
            world, features = with_dictionary(world, acts_PxF, decoder_FxD), acts_PxF.shape[1]
        top = top_features(attribution(world, world.answers_Px2)[:features], K)
        options = dict(random_sets=0, placebo_sets=0, untrained=M if worlds >= 200 else 39, features=features)
        verdicts.append(judge(world, top, seed, **options))
    share = rate("true directions" if are_true else "random directions", verdicts, "trained")
    if are_true:
        assert share >= 0.9
    else:
        assert_level(share, worlds)


def damaged_table(seed: int) -> EffectsTable:
    """Return a table in which T shrinks all logit differences by one share, controls by a third of it, with noise."""
    rng, count = np.random.default_rng([seed, 3]), 20
    share, clean_P = rng.uniform(0.3, 0.6), rng.gamma(4.0, 1.0, count)
    logit_SxP = np.sort(rng.gamma(2.0, 2.0, (len(RANKS), count)), axis=0)[::-1]
    prompts = [PromptDefinition(f"b/{p:02d}", "b", "xy"[p % 2]) for p in range(count)]
    clean, top = EditDefinition("b", "clean"), EditDefinition("b", "top", 0, tuple(range(K)))
    noise = 0.2 * clean_P.mean()

    def lose(part: float) -> np.ndarray:
        return clean_P * (1 - part) + noise * rng.normal(size=count)

    edited_SxP = logit_SxP * (1 - share) + noise / 2**0.5 * rng.normal(size=logit_SxP.shape)
    values = dict(logit_diff=np.stack([clean_P, lose(share)]), change_norm=np.array([[0.0], [1.0]]) * np.ones(count))
    values |= {name: np.stack(pair) for name, *pair in zip(RANKS, logit_SxP, edited_SxP, strict=True)}
    blocks = [EffectsTable.block([clean, top], prompts, values)]
    for group in ("random", "placebo"):
        edits = [EditDefinition("b", group, index, (100 + index,)) for index in range(M)]
        drops = dict(logit_diff=np.stack([lose(share / 3) for _ in edits]), change_norm=np.ones((M, count)))
        blocks.append(EffectsTable.block(edits, prompts, drops))
    return merge_tables(blocks)


@COUNTS
def test_general_damage_is_more_than_random_and_not_specific(worlds):
    tables = [damaged_table(seed) for seed in range(worlds)]
    verdicts = [verdict(table, VerdictConfig(resamples=1000)).dictionaries[TESTED]["b"] for table in tables]
    assert rate("general damage", verdicts, "random") >= 0.95
    assert all(each.placebo.numbers["p_controls"] <= 0.05 for each in verdicts), (
        "other sets do less: this side says yes"
    )
    assert_level(rate("general damage", verdicts, "placebo"), worlds)


# Questions 1 and 5, simpler bases and other seeds: tables of numbers that are drawn for 20 prompts of two templates.

EDITS = np.array([[0.0], [1.0]])  # whether it is one: the clean run, T
READOUTS_OF_PROMPTS = ("logit_diff", "log_prob", "two_way", "top1")
READOUTS_OF_ITEMS = ("answer_log_prob", "answer_margin", "accuracy")


def block(edits: list[EditDefinition], on: str = "b", **values: np.ndarray) -> EffectsTable:
    """Return values of edits, ``[E, P]``, on prompts of a behaviour, or on text."""
    prompts = [PromptDefinition(f"{on}/{p:02d}", on, "xy"[p % 2]) for p in range(next(iter(values.values())).shape[1])]
    return EffectsTable.block(edits, prompts, values)


def edit_of(group: str, index: int = 0, dictionary: str = TESTED) -> EditDefinition:
    return EditDefinition("b", group, index, (100 * len(group) + index,), dictionary=dictionary)


def effect_world(seed: int, lost: float, prompts: int = 20, names: Sequence[str] = READOUTS_OF_PROMPTS) -> EffectsTable:
    """T changes the numbers of each prompt at random and draws three of ten answers anew, or lowers both."""
    rng = np.random.default_rng([seed, 20])
    number_2xP = 3 + rng.normal(size=(2, prompts)) - lost * EDITS
    right_P, wrong_P, is_new_P = rng.random((3, prompts)) < np.array(
        [[0.7], [0.2 if lost else 0.7], [1 if lost else 0.3]]
    )
    right_2xP = np.stack([right_P, np.where(is_new_P, wrong_P, right_P)])
    numbers, rights = dict.fromkeys(names[:2], number_2xP), dict.fromkeys(names[2:], right_2xP)
    return block([edit_of("clean"), edit_of("top")], **numbers, **rights, change_norm=EDITS * np.ones(prompts))


def others_world(seed: int, is_true: bool) -> EffectsTable:
    """T changes another behaviour, or text, by the margin in the mean of all prompts, or both by a third of it."""
    rng = np.random.default_rng([seed, 21])
    tables = [effect_world(seed, 1.5)]
    for place, (on, readout, clean_P) in enumerate(
        (("c", "logit_diff", 1 + rng.gamma(4, 1, 20)), (TEXT, "ce", 3 + 0 * rng.random(20)))
    ):
        margin = 0.05 if on == TEXT else 0.1 * 5
        size = margin if not is_true and seed % 2 == place else margin / 3
        change_P = size * rng.normal(size=20) * (np.pi / 2) ** 0.5  # whose mean size is that
        clean = EditDefinition(on, "clean", 0, (5, 100))
        tables += [
            block([clean], on, **{readout: clean_P[None]}),
            block([edit_of("top")], on, **{readout: (clean_P - change_P)[None]}),
        ]
    return merge_tables(tables)


def basis_world(seed: int, difference: float, noise: float = 1.0) -> EffectsTable:
    """T costs 3 logits, and a basis ``difference`` less in the mean of all prompts."""
    rng = np.random.default_rng([seed, 22])
    lost_P = 3 + rng.normal(size=20)
    lost_3xP = np.stack([np.zeros(20), lost_P, lost_P - difference + noise * rng.normal(size=20)])
    edits = [edit_of(group) for group in ("clean", "top", f"{BASIS}pca")]
    return block(edits, logit_diff=5 - lost_3xP, change_norm=np.ones((3, 20)))


def seeds_world(seed: int, is_true: bool) -> EffectsTable:
    """T costs more than 19 random lists in the tested dictionary; in those of two other seeds, too, or as much."""
    rng = np.random.default_rng([seed, 23])
    tables = [block([edit_of("clean")], logit_diff=np.full((1, 20), 5.0), change_norm=np.zeros((1, 20)))]
    for name in (TESTED, "seed1", "seed2"):
        edits = [edit_of("top", 0, name), *(edit_of("random", index, name) for index in range(19))]
        lost_20x1 = 0.5 * rng.normal(size=(20, 1))
        lost_20x1[0] += 4 * (is_true or name == TESTED)
        tables.append(block(edits, logit_diff=5 - lost_20x1 - rng.normal(size=(20, 20)), change_norm=np.ones((20, 20))))
    return merge_tables(tables)


@pytest.mark.parametrize(
    ("question", "null", "true"),
    [
        *((f"an effect on {name}", (effect_world, 0), (effect_world, 1.5)) for name in READOUTS_OF_PROMPTS),
        ("an effect on logit_diff of 6 prompts", (effect_world, 0, 6), (effect_world, 3, 6)),
        *(
            (f"an effect on {name}", *((effect_world, lost, 20, READOUTS_OF_ITEMS) for lost in (0, 1.5)))
            for name in READOUTS_OF_ITEMS[::2]
        ),
        ("selective", (others_world, False), (others_world, True)),
        ("more", (basis_world, 0.0), (basis_world, 1.5)),
        ("less", (basis_world, 0.0), (basis_world, -1.5)),
        ("equivalent", (basis_world, 0.3, 0.3), (basis_world, 0.0, 0.3)),
        ("replicates", (seeds_world, False), (seeds_world, True)),
    ],
)  # fmt: skip
def test_answers_about_means_over_prompts(question, null, true):
    """100 worlds where nothing is true, or as much as what denies it (a margin), and 100 where it is true."""

    def is_yes(make, *options):
        found = verdict(make(*options), VerdictConfig(resamples=1000)).dictionaries[TESTED]["b"]
        if question.startswith("an effect on "):
            return found.ablation[question.split()[3]].answer == "yes"
        if question in ("selective", "replicates"):
            return dict(selective=found.selective, replicates=found.replication)[question].answer == "yes"
        return found.bases["pca"].answer == question

    rates = [sum(is_yes(make, seed, *options) for seed in range(100)) for make, *options in (null, true)]
    print(f"{question}: yes in {rates[0]} of 100 null and {rates[1]} of 100 true worlds")
    assert rates[0] <= 8 and rates[1] >= 80


# A tiny model through attribution, lists, doses, engine and the correction over four behaviours, with 79 controls.

SITE, TOP, TRAIN, TEST, DROP = "resid_post.1", 3, 10, 12, 3.0  # logits that planted features carry
BEHAVIOURS, FEATURES = 4, 640  # from fewer features ten lists could rarely be made
CONFIG = AblateConfig(top=TOP, random_sets=M, placebo_targets=M, untrained_dictionaries=0, baselines=(), bootstrap=200)
TEMPLATES = ("The {} near the {}", "One day the {} and the {}", "She said that {} was {}", "If the {} is not {}")
WORDS = (" the", " runs", " far", " way", " was", " and", " near", " cat", " war", " year", " went", " said")
SUBJECTS = ("cat", "dogs", "water", "year", "war", "capital", "way", "she", "France", "Paris", "went", "far")


def random_prompts(tiny, seed: int, fixed: bool) -> dict[str, list[Prompt]]:
    """Return prompts of behaviours, of templates and subjects drawn at random; one pair of answers each if fixed."""
    prompts = {}
    for name in "bcde"[:BEHAVIOURS]:
        rng = np.random.default_rng([seed, ord(name)])
        answers = [word for word in WORDS if len(tiny.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]
        templates = rng.permutation(TEMPLATES)[: rng.integers(2, 5)]
        pair = rng.choice(answers, 2, replace=False)
        prompts[name] = []
        for number in range(TRAIN + TEST):
            template, split = str(rng.choice(templates)), "train" if number < TRAIN else "test"
            correct, wrong = map(str, pair if fixed else rng.choice(answers, 2, replace=False))
            text = template.format(*rng.choice(SUBJECTS, 2))
            prompts[name].append(Prompt(name, split, text, correct, wrong, template=template))
    return prompts


def with_planted(tiny, dictionary: Dictionary, behaviours, planted: int, seed: int) -> Dictionary:
    """Return the dictionary with the directions of some features turned to where behaviours' answers are sensitive.

    The planted features fire on at least half of the prompts, mostly where answers are sensitive, and are others for
    each behaviour. Together they lower the logit difference by as much whether they are many or one.
    """
    rng, arrays = (
        np.random.default_rng([seed, 11]),
        {name: np.asarray(a).copy() for name, a in dictionary.arrays.items()},
    )
    is_free_F = np.ones(len(arrays["W_dec_FxD"]), bool)
    for prompts in behaviours.values():
        slope_PxTxD = np.asarray(slopes(tiny, prompts, "logit_diff", SITE), np.float64)
        direction_D = slope_PxTxD.sum(axis=(0, 1))
        tokens = tiny.tokenize([prompt.text for prompt in prompts])
        x_BxTxD = tiny(tokens, capture=[SITE], logits=False).sites[SITE]
        f_BxTxF = np.asarray(dictionary.encode(x_BxTxD), np.float64) * np.asarray(tokens.mask_BxT)[:, :, None]
        f_BxTxF *= np.asarray(dictionary.is_not_sink(x_BxTxD))[:, :, None]
        unit_D = direction_D / np.linalg.norm(direction_D)
        effect_PxF = np.einsum("btf,bt->bf", f_BxTxF, slope_PxTxD @ unit_D)  # logits for a direction of length 1
        fires_F = (f_BxTxF > 0).any(axis=1).mean(axis=0) >= 0.5
        often_F = fires_F & (effect_PxF.mean(axis=0) > 0) & ((effect_PxF > 0).mean(axis=0) >= 0.5) & is_free_F
        # What fires where answers are not sensitive changes the site for nothing.
        size_F = np.sqrt((f_BxTxF**2).sum(axis=(0, 1))) + 1e-9
        best = np.argsort(-np.where(often_F, effect_PxF.mean(axis=0) / size_F, -1.0))[:10]
        for feature in rng.choice(best, planted, replace=False):
            arrays["W_dec_FxD"][feature] += DROP / planted / effect_PxF[:, feature].mean() * unit_D
            is_free_F[feature] = False
    return Dictionary(dictionary.config, **{name: jnp.asarray(array) for name, array in arrays.items()})


def judge_four(tiny, dictionary, prompts, features=None, **settings) -> list[BehaviourVerdict]:
    config, tables = dataclasses.replace(CONFIG, **settings), []
    for name in prompts:
        ablations = begin_ablation(tiny, {TESTED: dictionary}, name, prompts, config, features=features)
        tables.append(measure_behaviour(ablations))
    return [*verdict(merge_tables(tables), VerdictConfig(resamples=200)).dictionaries[TESTED].values()]


def rates_of_four(name: str, worlds: list[list[BehaviourVerdict]], question: str) -> tuple[float, float]:
    """Return and print how often p is at most 5 %, and in what share of worlds any answer, corrected, is yes."""
    some = sum(any(getattr(each, question).answer == "yes" for each in verdicts) for verdicts in worlds)
    print(f"{name}: {question} answered yes, corrected over {BEHAVIOURS} behaviours, in {some} of {len(worlds)} worlds")
    return rate(name, [each for verdicts in worlds for each in verdicts], question), some / len(worlds)


@pytest.fixture
def wide(make_dictionary):
    """A dictionary whose features differ in scale by a factor of ten."""
    return lambda seed, features=FEATURES: make_dictionary(SITE, 0, seed, features, 10.0)


NULL_WORLDS, WORLDS = 200, 50  # of four behaviours each


@pytest.fixture(autouse=True)
def only_what_decides(monkeypatch):
    """Question 6, and parts of the top features' ablation, are shown beside the answers: they are not measured here."""
    monkeypatch.setattr(ablation, "_measure_kept", lambda *args, **options: [])
    monkeypatch.setattr(ablation, "FRACTIONS", (1.0,))


@pytest.mark.slow
@pytest.mark.parametrize("selected", [True, False])
def test_where_nothing_is_true_few_worlds_say_yes(tiny, wide, selected):
    """Features are selected for answers that are noise, or drawn at random.

    Seen for question 2: selected 6.4 % of 800 cases, and any yes after correction in 17 of 200 worlds, in 2 of the
    first 50; drawn 5.3 % and 11. For question 3 in no world.
    """
    found = []
    for seed in range(NULL_WORLDS):
        drawn = np.random.default_rng([seed, 12]).choice(FEATURES, TOP, replace=False).tolist()
        prompts = random_prompts(tiny, seed, fixed=not selected)
        found.append(judge_four(tiny, wide(seed), prompts, None if selected else drawn))
    for question in ("random", "placebo"):
        share, corrected = rates_of_four("attribution" if selected else "drawn", found, question)
        assert share <= 0.08
        # Of 200 worlds with a rate of 5 % more than 18 say yes in one case of a hundred.
        assert corrected <= 18 / NULL_WORLDS


@pytest.mark.slow
@pytest.mark.parametrize("are_true", [False, True])
def test_training_mattered_in_a_tiny_model_where_directions_are_turned_to_the_answers(tiny, wide, are_true):
    """Otherwise the tested dictionary is drawn as its controls are, which the engine measures by the same function."""
    found = []
    for seed in range(WORLDS // 2):  # 79 dictionaries for each behaviour of each
        prompts = random_prompts(tiny, seed, fixed=True)
        dictionary = bases.untrained(wide(seed, 160), 16, 10**6 + seed)
        if are_true:
            dictionary = with_planted(tiny, wide(seed, 160), prompts, TOP, seed)
        settings = dict(random_sets=1, placebo_targets=0, untrained_dictionaries=M)
        found.append(judge_four(tiny, dictionary, prompts, **settings))
    share, _ = rates_of_four("turned directions" if are_true else "an untrained dictionary", found, "trained")
    assert share >= 0.9 if are_true else share <= 0.08


@pytest.mark.slow  # the fast suite finds effects in linear worlds, above
@pytest.mark.parametrize("planted", [TOP, 1])
def test_a_planted_effect_is_found_whether_spread_or_concentrated(tiny, wide, planted):
    found = []
    for seed in range(WORLDS):
        prompts = random_prompts(tiny, seed, fixed=True)
        found.append(judge_four(tiny, with_planted(tiny, wide(seed), prompts, planted, seed), prompts))
    name = f"an effect in {planted} of {TOP} features of a tiny model"
    assert rates_of_four(name, found, "random")[0] >= 0.95
