"""Small linear worlds that produce effects tables: a site, a dictionary, prompts and answers, in numpy.

The value at the site is a sum of features, x_P = acts_PxF @ decoder_FxD, read by one unembedding row per token.
Ablating a set S by the fraction a lowers x by a acts_S @ decoder_S, at one position. saejax's engine is not used.
"""

import dataclasses

import numpy as np

from saejax.interventions.table import EditDefinition, EffectsTable, PromptDefinition
from saejax.statistics.partition import disjoint_sets

GRID = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
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


def random_world(seed: int, features: int = 400, vocab: int = 200) -> World:
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
    acts_PxF = fires_PxF * rng.lognormal(0, 0.4, (prompts, features)) * rng.lognormal(0, 0.7, features)
    decoder_FxD = rng.normal(size=(features, width))
    decoder_FxD /= np.linalg.norm(decoder_FxD, axis=1, keepdims=True)
    answers_Px2 = np.array([rng.choice(vocab * 3 // 4, 2, replace=False) for _ in range(prompts)])
    names = tuple(f"template {t}" for t in template_P)
    return World(acts_PxF, decoder_FxD, 0.1 * rng.normal(size=(vocab, width)), answers_Px2, names, train)


def planted_world(seed: int, planted: int, drop: float = 3.0) -> World:
    """Return a world with one pair of answers, of whose logit difference some features carry ``drop`` logits.

    The planted features are the first of those that fire on half of the prompts or more.
    """
    world = random_world(seed)
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


def world_table(
    world: World,
    top: tuple[int, ...],
    *,
    behaviour: str = "b",
    random_sets: int = 39,
    placebo_sets: int = 39,
    seed: int = 0,
    equalise: bool = True,
) -> EffectsTable:
    """Return the table that a run would measure in a world, of the tested features ``top`` and at most so many sets.

    With ``equalise=False`` the dose is recorded as the fraction: against the rule, sets are compared as they are.
    """
    rng, k, no_answers = np.random.default_rng(seed), len(top), len(world.unembed_VxD) * 3 // 4
    sets = disjoint_sets(np.setdiff1d(pool(world), top), k, random_sets, seed)
    placebo, mean_act_F = [], world.acts_PxF[: world.train].mean(axis=0)
    for _ in range(placebo_sets):
        target_2 = no_answers + rng.choice(len(world.unembed_VxD) - no_answers, 2, replace=False)
        direction_D = world.unembed_VxD[target_2[0]] - world.unembed_VxD[target_2[1]]
        placebo.append(top_features(mean_act_F * (world.decoder_FxD @ direction_D), k))
    edits = [EditDefinition(behaviour, "clean", fraction=0.0)]
    edits += [EditDefinition(behaviour, "top", 0, top, a) for a in GRID]
    for group, chosen in (("random", sets), ("placebo", placebo)):
        edits += [EditDefinition(behaviour, group, i, tuple(map(int, each))) for i, each in enumerate(chosen)]
    values = measure(world, edits)
    dose_E = np.sqrt(np.mean(np.square(values[:, :, READOUTS.index("change_norm")]), axis=1))
    tested_dose = dose_E[len(GRID)]
    again = [
        dataclasses.replace(edit, fraction=float(tested_dose / dose))
        for edit, dose in zip(edits, dose_E, strict=True)
        if edit.group in ("random", "placebo") and dose > tested_dose
    ]
    if again:
        values = np.concatenate([values, measure(world, again)])
        edits += again
    if not equalise:
        fraction_E = np.array([edit.fraction for edit in edits])
        values[:, :, READOUTS.index("change_norm")] = fraction_E[:, None]
    names = world.templates[world.test]
    words = [(f"<{correct}>", f"<{wrong}>") for correct, wrong in world.answers_Px2[world.test].tolist()]
    prompts = [
        PromptDefinition(f"{behaviour}/{p:03d}", behaviour, name, correct=correct, wrong=wrong)
        for p, (name, (correct, wrong)) in enumerate(zip(names, words, strict=True))
    ]
    return EffectsTable.block(edits, prompts, dict(zip(READOUTS, np.moveaxis(values, -1, 0), strict=True)))
