"""Prompt categories: features that fire more on prompts of one behaviour or benchmark, or where answers are right.

1. The model runs the prompts of ``baseline``, and the questions of ``benchmark`` without worked examples, which all of
   its prompts share. A feature is active on a prompt if it fires at any
   position but attention sinks, of a transcoder those at its target, too.
2. Each feature and each category (a behaviour or a benchmark) is a test: is the feature active on more of the
   category's prompts than of all others? Within a category, right answers are compared with wrong ones in the same way.
   The test is Fisher's exact one, one-sided.
3. Benjamini and Hochberg's correction (1995) is over all tests of a dictionary.
4. The control: the same with the prompts' categories, and right and wrong answers within a category, permuted.

Prompts of a behaviour share words, so an association says what a feature fires on, not what it does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.dictionaries import Dictionary
from saejax.files import read_lines
from saejax.interpret.feature_record import FeatureCategory
from saejax.interpret.firings import encode_tokens
from saejax.interpret.results import CategoryCounts
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import pad

LEVEL = 0.05  # of the false discovery rate
LISTED = 5  # associations of a feature that are kept
_LEAST = 5  # prompts of either side, and prompts on which a feature is active: fewer can show nothing
_BATCH, _TOKENS = 32, 256  # prompts that run together, tokens that are encoded together


@dataclasses.dataclass(frozen=True)
class CategorisedPrompt:
    """A prompt with its category and whether the model's answer is right; None: no answer was judged."""

    text: str
    category: str
    right: bool | None


#: Name -> prompts on one side, and those on the other that they are compared with, bool [P] each.
CategoryTests = dict[str, tuple[np.ndarray, np.ndarray]]


def read_prompts(inputs: Mapping[str, Path]) -> list[CategorisedPrompt]:
    """Return the prompts of the baseline and benchmark units among a run's inputs."""
    prompts = []
    for unit, folder in inputs.items():
        stage, _, name = unit.partition("/")
        if stage == "baseline":
            for line in read_lines(folder / "prompts.jsonl"):
                prompts.append(CategorisedPrompt(line["text"], line["behaviour"], line["logit_diff"] > 0))
        elif stage == "benchmark":
            for line in read_lines(folder / "items.jsonl"):
                verdict = line.get("flexible") or line.get("raw")
                prompts.append(CategorisedPrompt(line["question"], name, verdict["correct"] if verdict else None))
    return prompts


def active_on_prompts(lm: LanguageModel, dictionary: Dictionary, texts: Sequence[str]) -> np.ndarray:
    """Return on which prompts each feature fires at any position but attention sinks, bool [P, F].

    Raises:
      UserError: a prompt is empty or longer than the context.
    """
    ids = [lm.tokenize([text]).ids_BxT[0].tolist() for text in texts]
    active_PxF = np.zeros((len(texts), dictionary.config.n_features), bool)
    sites = dictionary.site, dictionary.config.target or dictionary.site
    # Prompts of similar length share a batch, which keeps padding small.
    order = np.argsort([len(prompt_ids) for prompt_ids in ids], kind="stable")
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        # The last batch is filled up, so that few programs are compiled.
        tokens = pad([*(ids[i] for i in chosen), *[[0]] * (_BATCH - len(chosen))])
        values = lm(tokens, capture=[*dict.fromkeys(sites)], logits=False).sites
        x_BxTxD, y_BxTxO = (np.asarray(values[site], np.float32) for site in sites)
        for row, i in enumerate(chosen):  # one by one: activations of a batch of wide dictionaries take gigabytes
            here = row, slice(len(ids[i]))
            firings, _ = encode_tokens(dictionary, x_BxTxD[here], _TOKENS, y_BxTxO[here])
            active_PxF[i, firings.indices] = True
    return active_PxF


def make_tests(prompts: Sequence[CategorisedPrompt], rng: np.random.Generator | None = None) -> CategoryTests:
    """Return the tests of all categories that have enough prompts on both sides.

    Args:
      prompts: of all categories.
      rng: permutes categories, and answers within a category, for the control; None: they stay.
    """
    category_P = np.array([prompt.category for prompt in prompts])
    right_P = np.array([{None: -1, False: 0, True: 1}[prompt.right] for prompt in prompts])
    moved_P = category_P if rng is None else rng.permutation(category_P)
    tests: CategoryTests = {}
    for category in dict.fromkeys(category_P.tolist()):
        # Answers are permuted within their category: the model is right more often in some categories than others.
        judged = np.flatnonzero((category_P == category) & (right_P >= 0))
        answers = right_P[judged] if rng is None else rng.permutation(right_P[judged])
        right, wrong = (np.isin(np.arange(len(prompts)), judged[answers == verdict]) for verdict in (1, 0))
        tests[category] = moved_P == category, moved_P != category
        tests[f"{category}: right answers"], tests[f"{category}: wrong answers"] = (right, wrong), (wrong, right)
    # With fewer prompts on a side, Fisher's test has no small p-value to offer.
    return {name: sides for name, sides in tests.items() if min(side.sum() for side in sides) >= _LEAST}


def associate(active_PxF: np.ndarray, tests: CategoryTests) -> dict[int, list[FeatureCategory]]:
    """Return the associations at a false discovery rate of ``LEVEL``, by feature, the smallest q first.

    Args:
      active_PxF: on which prompts each feature fires.
      tests: of the categories.
    """
    from scipy.stats import false_discovery_control, hypergeom

    live = np.flatnonzero(active_PxF.sum(axis=0) >= _LEAST)
    if not (len(live) and tests):
        return {}
    sizes = [(int(inside_P.sum()), int(outside_P.sum())) for inside_P, outside_P in tests.values()]
    counts = [[active_PxF[side_P][:, live].sum(axis=0) for side_P in sides] for sides in tests.values()]
    # ``sf`` is the chance of more than its argument; the p-value is the chance of at least as many.
    p_MxA = np.stack(
        [
            hypergeom.sf(inside_A - 1, n_in + n_out, inside_A + outside_A, n_in)
            for (n_in, n_out), (inside_A, outside_A) in zip(sizes, counts, strict=True)
        ]
    )
    # All tests of a dictionary are corrected together: tens of thousands of features are looked at, not one.
    q_MxA = false_discovery_control(p_MxA.reshape(-1)).reshape(p_MxA.shape)
    names, categories = list(tests), dict[int, list[FeatureCategory]]()
    for a in np.flatnonzero((q_MxA <= LEVEL).any(axis=0)):
        smallest = np.argsort(q_MxA[:, a], kind="stable")[:LISTED]
        categories[int(live[a])] = [
            FeatureCategory(
                category=names[m],
                active=int(counts[m][0][a]),
                prompts=sizes[m][0],
                active_elsewhere=int(counts[m][1][a]),
                prompts_elsewhere=sizes[m][1],
                q=float(f"{q_MxA[m, a]:.4g}"),
            )
            for m in smallest[q_MxA[smallest, a] <= LEVEL]
        ]
    return categories


def categorise(
    lm: LanguageModel, dictionary: Dictionary, prompts: Sequence[CategorisedPrompt], seed: int
) -> tuple[dict[int, list[FeatureCategory]], CategoryCounts]:
    """Return the prompt categories with which a dictionary's features are associated, and counts with the control's."""
    active_PxF = active_on_prompts(lm, dictionary.with_sink_norms(lm.sink_norm), [prompt.text for prompt in prompts])
    tests, shuffled = make_tests(prompts), make_tests(prompts, np.random.default_rng(seed))
    associations, control = associate(active_PxF, tests), associate(active_PxF, shuffled)
    live = int((active_PxF.sum(axis=0) >= _LEAST).sum())
    return associations, CategoryCounts(len(prompts), len(tests), live, len(associations), len(control))
