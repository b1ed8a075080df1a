"""Small linear worlds that produce effects tables: a site, a dictionary, prompts and answers, in numpy.

The value at the site is a sum of features, x_P = acts_PxF @ decoder_FxD, read by one unembedding row per token.
Features differ in scale by a factor of ten. Ablating a set S by the fraction a lowers x by a acts_S @ decoder_S, at one
position. saejax's engine is not used; its control lists are.
"""

import dataclasses

import numpy as np

from saejax.interventions.controls import Changes, choose_pool, random_lists, scaled_sets, token_pairs
from saejax.interventions.table import RANKS, EditDefinition, EffectsTable, PromptDefinition, merge_tables

GRID = (0.2, 0.6, 1.0)
READOUTS = ("logit_diff", "log_prob", "top1", "two_way", "change_norm")


@dataclasses.dataclass(frozen=True)
class World:
    """Activations, directions and answers; the first ``train`` prompts choose features."""

    acts_PxF: np.ndarray
    decoder_FxD: np.ndarray
    unembed_VxD: np.ndarray
    answers_Px2: np.ndarray
    templates: tuple[str, ...]
    train: int

    @property
    def test(self) -> slice:
        return slice(self.train, len(self.acts_PxF))


def random_world(seed: int, features: int = 1200, vocab: int = 200) -> World:
    """Return a world with sparse log-normal activations, and answers drawn for each prompt independently: a null.

    Worlds of different seeds differ in everything: prompts, templates, dictionary, activations and answers. The last
    quarter of the vocabulary is no answer.
    """
    rng = np.random.default_rng(seed)
    width, templates, train, test = (int(rng.integers(*between)) for between in ((24, 48), (1, 6), (16, 40), (16, 40)))
    prompts = train + test
    template_P = rng.integers(templates, size=prompts)
    rate_F = rng.uniform(0.02, 0.6, features)
    # What fires depends on the template, too: prompts of one template are not independent.
    rate_GxF = np.clip(rate_F * rng.lognormal(0, 0.5, (templates, features)), 0, 1)
    fires_PxF = rng.random((prompts, features)) < rate_GxF[template_P]
    acts_PxF = fires_PxF * rng.lognormal(0, 0.4, (prompts, features)) * 10 ** rng.uniform(-0.5, 0.5, features)
    decoder_FxD = rng.normal(size=(features, width))
    decoder_FxD /= np.linalg.norm(decoder_FxD, axis=1, keepdims=True)
    answers_Px2 = np.array([rng.choice(vocab * 3 // 4, 2, replace=False) for _ in range(prompts)])
    names = tuple(f"template {t}" for t in template_P)
    return World(acts_PxF, decoder_FxD, 0.1 * rng.normal(size=(vocab, width)), answers_Px2, names, train)


def planted_world(seed: int, planted: int, drop: float = 1.5, features: int = 1200) -> World:
    """Return a world with one pair of answers, of whose logit difference some features carry ``drop`` logits.

    The planted features are the first of those that fire on half of the prompts or more.
    """
    world = random_world(seed, features)
    answers_Px2 = np.broadcast_to([0, 1], world.answers_Px2.shape)
    direction_D = world.unembed_VxD[0] - world.unembed_VxD[1]
    often = np.flatnonzero((world.acts_PxF > 0).mean(axis=0) >= 0.5)[:planted]
    decoder_FxD = world.decoder_FxD.copy()
    for feature in often:
        share = drop / len(often) / world.acts_PxF[:, feature].mean()
        decoder_FxD[feature] += direction_D * share / np.square(direction_D).sum()
    return dataclasses.replace(world, decoder_FxD=decoder_FxD, answers_Px2=answers_Px2)


def attribution(world: World, answers_Px2: np.ndarray) -> np.ndarray:
    """Return the mean effect of each feature on the train prompts, ``[F]``: in a linear world it is exact."""
    some = slice(0, world.train)
    direction_PxD = world.unembed_VxD[answers_Px2[some, 0]] - world.unembed_VxD[answers_Px2[some, 1]]
    return np.mean(world.acts_PxF[some] * (direction_PxD @ world.decoder_FxD.T), axis=0)


def top_features(attribution_F: np.ndarray, k: int) -> tuple[int, ...]:
    return tuple(int(f) for f in np.argsort(-attribution_F)[:k])


def pool(world: World) -> np.ndarray:
    """Return the features that fire on at least 5 % of the test prompts."""
    return np.flatnonzero((world.acts_PxF[world.test] > 0).mean(axis=0) >= 0.05)


def measure(world: World, edits: list[EditDefinition]) -> np.ndarray:
    """Return every readout of every edit on the test prompts, ``[E, P, J]`` in the order of ``READOUTS``."""
    acts_PxF, (correct_P, wrong_P) = world.acts_PxF[world.test], world.answers_Px2[world.test].T
    clean_PxD, place_P = acts_PxF @ world.decoder_FxD, np.arange(len(acts_PxF))
    readouts = []
    for edit in edits:
        chosen = list(edit.features)
        change_PxD = -edit.fraction * acts_PxF[:, chosen] @ world.decoder_FxD[chosen] if chosen else 0 * clean_PxD
        logit_PxV = (clean_PxD + change_PxD) @ world.unembed_VxD.T
        diff_P = logit_PxV[place_P, correct_P] - logit_PxV[place_P, wrong_P]
        log_P = logit_PxV[place_P, correct_P] - np.logaddexp.reduce(logit_PxV, axis=1)
        top1_P = logit_PxV.argmax(axis=1) == correct_P
        readouts.append([diff_P, log_P, top1_P, diff_P > 0, np.linalg.norm(change_PxD, axis=1)])
    return np.array(readouts, np.float64).transpose(0, 2, 1)


def encode(world: World, seed: int, active: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return activations and directions of an untrained dictionary: the largest projections on random directions."""
    value_PxD = world.acts_PxF @ world.decoder_FxD
    direction_FxD = np.random.default_rng([seed, 77]).normal(size=world.decoder_FxD.shape)
    direction_FxD /= np.linalg.norm(direction_FxD, axis=1, keepdims=True)
    pre_PxF = np.maximum((value_PxD - value_PxD[: world.train].mean(axis=0)) @ direction_FxD.T, 0.0)
    limit_Px1 = np.partition(pre_PxF, -active, axis=1)[:, -active][:, None]
    return np.where(pre_PxF >= limit_Px1, pre_PxF, 0.0), direction_FxD


def with_dictionary(world: World, acts_PxF: np.ndarray, decoder_FxD: np.ndarray) -> World:
    """Return the world read through another dictionary, whose error is kept: the last feature, in no set."""
    error_PxD = world.acts_PxF @ world.decoder_FxD - acts_PxF @ decoder_FxD
    # One direction a prompt: the error differs between prompts.
    acts_PxX = np.concatenate([acts_PxF, np.eye(len(error_PxD))], axis=1)
    return dataclasses.replace(world, acts_PxF=acts_PxX, decoder_FxD=np.concatenate([decoder_FxD, error_PxD]))


def changes(world: World, features: np.ndarray) -> Changes:
    acts_PxK, decoder_KxD = world.acts_PxF[world.test][:, features], world.decoder_FxD[features]
    return Changes(features, (acts_PxK.T @ acts_PxK) * (decoder_KxD @ decoder_KxD.T) / len(acts_PxK))


def list_to_dose(world: World, features: int, dose: float) -> tuple[tuple[int, ...], float]:
    """Return the beginning of the first ``features`` features, by attribution, that reaches a dose."""
    attribution_F = attribution(world, world.answers_Px2)[:features]
    order = np.argsort(-attribution_F)[: int((attribution_F > 0).sum())]
    return changes(world, np.sort(order)).beginning(order, dose)


def rank_values(world: World, top: EditDefinition) -> dict[str, np.ndarray]:
    """Return the logits of the likeliest tokens that are no answers, without an edit and with T ablated, by readout."""
    acts_PxF = world.acts_PxF[world.test]
    chosen, answers = list(top.features), np.unique(world.answers_Px2)
    clean_PxV = acts_PxF @ world.decoder_FxD @ world.unembed_VxD.T
    edited_PxV = clean_PxV - acts_PxF[:, chosen] @ world.decoder_FxD[chosen] @ world.unembed_VxD.T
    others = np.setdiff1d(np.arange(clean_PxV.shape[1]), answers)
    order_PxS = others[np.argsort(-clean_PxV[:, others], axis=1)[:, : len(RANKS)]]
    pair = [np.take_along_axis(each, order_PxS, axis=1).T for each in (clean_PxV, edited_PxV)]
    return {name: np.stack(values) for name, *values in zip(RANKS, *pair, strict=False)}


def world_table(
    world: World,
    top: tuple[int, ...],
    *,
    behaviour: str = "b",
    random_sets: int = 39,
    placebo_sets: int = 39,
    untrained: int = 0,
    features: int | None = None,
    seed: int = 0,
) -> EffectsTable:
    """Return the table that a run would measure in a world, of the tested features ``top``.

    ``features`` of the dictionary are features, what follows is its error; by default all are.
    """
    rng, k = np.random.default_rng(seed), len(top)
    dose = changes(world, np.sort(top)).dose(top)
    firing_F = (world.acts_PxF[world.test] > 0).sum(axis=0)[:features]
    pool = choose_pool(firing_F, len(world.acts_PxF[world.test]), top, 0.05, seed)
    tokens = rng.permutation(np.setdiff1d(np.arange(len(world.unembed_VxD)), np.unique(world.answers_Px2)))[:80]
    placebo, mean_act_F = [], world.acts_PxF[: world.train].mean(axis=0)[:features]
    for right, wrong in token_pairs(tokens, seed) if placebo_sets else ():
        direction_D = world.unembed_VxD[right] - world.unembed_VxD[wrong]
        placebo.append(top_features(mean_act_F * (world.decoder_FxD[:features] @ direction_D), k))
    lists = random_lists(changes(world, pool), pool, dose, random_sets, seed)
    every = changes(world, np.unique(np.array(placebo))) if placebo else None
    scaled = scaled_sets(every, placebo, dose, placebo_sets) if every else []
    tested = [EditDefinition(behaviour, "top", 0, top, a) for a in GRID]
    edits = [EditDefinition(behaviour, "clean", fraction=0.0), *tested]
    edits += [EditDefinition(behaviour, "random", i, *each) for i, each in enumerate(lists)]
    edits += [EditDefinition(behaviour, "placebo", i, placebo[n], a) for i, (n, a) in enumerate(scaled)]
    blocks = [(edits, measure(world, edits))]
    if untrained and dose:
        own = EditDefinition(behaviour, "trained", 0, *list_to_dose(world, features or len(mean_act_F), dose))
        blocks.append(([own], measure(world, [own])))
    for number in range(untrained if dose else 0):
        acts_PxF, decoder_FxD = encode(world, 1000 * seed + number)
        other = with_dictionary(world, acts_PxF, decoder_FxD)
        edit = EditDefinition(behaviour, "untrained", number, *list_to_dose(other, len(decoder_FxD), dose))
        blocks.append(([edit], measure(other, [edit])))
    names = world.templates[world.test]
    words = [(f"<{correct}>", f"<{wrong}>") for correct, wrong in world.answers_Px2[world.test].tolist()]
    prompts = [
        PromptDefinition(f"{behaviour}/{p:03d}", behaviour, name, correct=correct, wrong=wrong)
        for p, (name, (correct, wrong)) in enumerate(zip(names, words, strict=True))
    ]
    tables = [
        EffectsTable.block(some, prompts, dict(zip(READOUTS, np.moveaxis(values, -1, 0), strict=True)))
        for some, values in blocks
    ]
    tables.append(EffectsTable.block([edits[0], tested[-1]], prompts, rank_values(world, tested[-1])))
    tables.append(
        EffectsTable((EditDefinition(behaviour, "pool", 0, tuple(pool.tolist())),), (), *np.zeros((4, 0), int))
    )
    return merge_tables(tables)
