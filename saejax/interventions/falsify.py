"""A test that tries to refute features of reasoning: do they fire on words alone?

Published work put a few tokens into ordinary text and found that most features claimed for reasoning fire on them (Ma
et al., Do Sparse Autoencoders Identify Reasoning Features in Language Models?, 2026). For each feature:

1. Training texts give the tokens that excite it most, and the short contexts before its strongest activations.
2. These are inserted into ordinary text at random places; the control is the same text with random tokens there.
3. Test texts give the level that the feature reaches on real text. A text's activation is its largest one; so that it
   is the largest of as many, ordinary texts are cut to the median length of test texts. These are read whole.
4. The feature is driven by tokens if the injection brings it more than half of the way from the control to that level,
   by context if it brings it less than half, and undecided if the interval of the difference includes zero, or if there
   are too few texts.

Features drawn at random, and features of a random dictionary, are tested in the same way.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from saejax.arguments import check_classes
from saejax.dictionaries import Dictionary
from saejax.dictionaries.bos import follow_bos
from saejax.errors import UserError
from saejax.interventions.answers import LEAST_PROMPTS, mean_interval
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import round_length
from saejax.models.tokens import Tokens, token_piece
from saejax.progress import OnProgress, show_progress
from saejax.results import Interval
from saejax.short_reprs import has_short_repr
from saejax.statistics.bootstrap import percentile_interval, resampling_weights
from saejax.statistics.intervals import wilson
from saejax.unicode import show_bytes

Driver = Literal["tokens", "context", "undecided"]

CONTROL_GROUPS = ("random features", "random dictionary")
TOKENS, CONTEXT = 4, 3  # tokens, and contexts, that are inserted; tokens of a context
HALFWAY = 0.5  # share of the way to the real level that decides
LEAST_TEXTS = LEAST_PROMPTS  # fewer decide nothing
LIVE = 0.05  # share of the training texts on which a feature drawn at random fires
RULE = (
    f"The {TOKENS} tokens that excite a feature most, or {TOKENS} contexts of {CONTEXT} tokens, whichever excites it "
    "more, are inserted into ordinary text. The feature is driven by tokens if this brings its largest activation more "
    f"than {100 * HALFWAY:g} % of the way from text with random tokens to real text, by context if less, and undecided "
    "if the 95 % bootstrap interval over texts includes both, if no token of the training texts excites it, if it is "
    f"not more active on real text, or with fewer than {LEAST_TEXTS} texts."
)
_RESAMPLES = 2000  # bootstrap samples of texts
_BATCH_TOKENS = 2048  # tokens that are run and encoded at once, unless one text has more
_MULTIPLE = 64  # batches are padded to a multiple of this many tokens, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class InjectionTest:
    """The effect of injected tokens on one feature."""

    driver: Driver  #: by the rule
    #: share of the way from random tokens to real text; None: not more active there, or nothing was inserted
    reach: Interval | None


_UNDECIDED = InjectionTest("undecided", None)


@dataclasses.dataclass(frozen=True)
class FalsifiedFeature:
    """A feature under injection; activations are means over texts of the largest one of each."""

    group: str  #: tested, or one of ``CONTROL_GROUPS``
    feature: int  #: its index
    tokens: tuple[str, ...]  #: the tokens that excite it most
    contexts: tuple[str, ...]  #: the contexts before its strongest activations
    injected: Literal["tokens", "contexts"]  #: the kind of these two that excites it more
    ordinary: Interval  #: activation on ordinary text
    random: Interval  #: with random tokens inserted
    activation: Interval  #: with its tokens or contexts inserted
    real: Interval  #: on real text
    test: InjectionTest  #: its class


@dataclasses.dataclass(frozen=True)
class DriverShares:
    """Shares of a group of features by what drives them, with Wilson's interval over features."""

    group: str  #: the group of features
    features: int  #: number of features
    tokens: Interval  #: driven by tokens
    context: Interval  #: driven by context
    undecided: Interval  #: neither is shown


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Falsification:
    """Do features fire on words alone?"""

    rule: str  #: the rule in words
    texts: int  #: number of texts that give the level on real text
    ordinary: int  #: number of ordinary texts, into which tokens are inserted
    features: tuple[FalsifiedFeature, ...]  #: all tested features
    shares: tuple[DriverShares, ...]  #: shares by group of features


@check_classes
def falsify(
    lm: LanguageModel,
    dictionary: Dictionary,
    features: Sequence[int] | int,
    texts: Sequence[str],
    ordinary: Sequence[str],
    *,
    test_texts: Sequence[str] = (),
    random_dictionary: Dictionary | None = None,
    seed: int = 456,
    on_progress: OnProgress | None = None,
) -> Falsification:
    """Test whether features that seem to reason fire on words alone, by injecting these into ordinary text.

    As many of the dictionary's other features, drawn at random, are tested as a control.

    Args:
      lm: the model that the dictionary was trained on.
      dictionary: whose features are tested.
      features: their indices, or one.
      texts: texts of the kind that the features are claimed for; they show which tokens excite a feature. Read whole,
        up to the model's context.
      ordinary: other text, half of which gives random tokens and half of which is injected; each is cut to the median
        length of the test texts.
      test_texts: texts of the same kind that show the activation on real text; empty: every second one of ``texts``.
      random_dictionary: a control at the same site, of which as many features are tested.
      seed: seed of places, random tokens, random features and the bootstrap.
      on_progress: takes the features that are injected and all; may raise to stop. None: a bar, where somebody looks
        on.

    Returns:
      The class of every feature, and the shares of each group.

    Raises:
      UserError: there are fewer than 4 texts of a kind, the dictionary does not fit the model, or a feature does not
        exist or appears twice.
    """
    tested: list[int] = dictionary.feature_indices(features).tolist()
    lm = follow_bos(lm, [dictionary.config])
    if not test_texts:
        # Tokens are chosen on other texts than test them: the largest of many is large by chance on its own texts.
        texts, test_texts = texts[::2], texts[1::2]
    kinds = [_encode_texts(lm, kind, lm.config.context) for kind in (texts, test_texts)]
    length = int(np.median([len(ids) for ids in kinds[1]])) if kinds[1] else 2
    length = max(2, min(length, lm.config.context - TOKENS * CONTEXT))
    kinds += [_encode_texts(lm, kind, length) for kind in (ordinary[::2], ordinary[1::2])]
    if min(map(len, kinds)) < 2:
        counts = ", ".join(str(len(kind)) for kind in kinds)
        raise UserError(f"falsify has {counts} texts to choose tokens, to test, and ordinary ones: expected 2 of each")
    count, rng = len(tested), np.random.default_rng(seed)
    groups = [
        ("tested", dictionary, tested),
        (CONTROL_GROUPS[0], dictionary, _draw_live(lm, dictionary, kinds[0], tested, count, rng)),
    ]
    if random_dictionary is not None:
        # Drawn among features that fire: features that never do would be undecided, all of them.
        drawn = _draw_live(lm, random_dictionary, kinds[0], (), count, rng)
        groups.append((CONTROL_GROUPS[1], random_dictionary, drawn))
    rows: list[FalsifiedFeature] = []
    # Each feature is injected twice, with its tokens and with its contexts.
    done, total = itertools.count(1), 2 * sum(len(members) for _, _, members in groups)
    with show_progress("falsify") as bar:

        def count_one() -> None:
            (on_progress or bar)(next(done), total)

        for group, owner, members in groups:
            rows += _test_group(lm, owner, group, members, kinds, seed, count_one) if members else []
    return Falsification(
        rule=RULE,
        texts=len(kinds[1]),
        ordinary=len(kinds[3]),
        features=tuple(rows),
        shares=tuple(_shares(group, [row for row in rows if row.group == group]) for group, _, some in groups if some),
    )


def judge_injection(random_N: np.ndarray, injected_N: np.ndarray, real_M: np.ndarray, seed: int = 456) -> InjectionTest:
    """Return what drives a feature.

    Args:
      random_N: its activation on N ordinary texts with random tokens, at least 2.
      injected_N: on the same texts with the tokens that excite it in the same places.
      real_M: on M texts of the kind that it is claimed for, at least 2.
      seed: seed of the bootstrap.
    """
    weight_RxN, weight_RxM = _weigh_texts((len(random_N), len(real_M)), seed)
    rise, way = float((injected_N - random_N).mean()), float(real_M.mean() - random_N.mean())
    rise_R, way_R = weight_RxN @ (injected_N - random_N), weight_RxM @ real_M - weight_RxN @ random_N
    # Without a level on real text above random tokens there is no way to measure a share of.
    if min(len(random_N), len(real_M)) < LEAST_TEXTS or percentile_interval(way_R)[0] <= 0:
        return _UNDECIDED
    # A difference, where a ratio would have no mean.
    low, high = percentile_interval(rise_R - HALFWAY * way_R)
    driver: Driver = "tokens" if low > 0 else "context" if high < 0 else "undecided"
    tiny = 1e-12 * way  # a bootstrap sample may have no way to go
    return InjectionTest(driver, Interval(rise / way, *percentile_interval(rise_R / np.maximum(way_R, tiny))))


def _weigh_texts(counts: Sequence[int], seed: int) -> list[np.ndarray]:
    """Return the weights of texts in bootstrap samples, for each kind of text, of which ``counts`` are the numbers."""
    return [resampling_weights(np.zeros(count), _RESAMPLES, seed + number) for number, count in enumerate(counts)]


def _test_group(
    lm: LanguageModel,
    dictionary: Dictionary,
    group: str,
    features: Sequence[int],
    kinds: Sequence[Sequence[list[int]]],
    seed: int,
    count_one: Callable[[], None],
) -> Iterator[FalsifiedFeature]:
    """Yield the test of K features of one dictionary.

    ``kinds`` are token ids of training texts, test texts, ordinary texts that give random tokens, and ordinary ones.
    ``count_one`` is called whenever a feature was injected.
    """
    train, test, drawn_from, ordinary = kinds
    read = functools.partial(_activations, lm, dictionary, np.asarray(features, np.int32))
    excited = list(read(train))
    snippets = [_exciting_snippets(train, [acts_TxK[:, k] for acts_TxK in excited]) for k in range(len(features))]
    # Random tokens are as frequent as in ordinary text; first tokens are often special.
    pool = np.concatenate([ids[1:] for ids in drawn_from])
    real_MxK = np.stack([acts_TxK.max(axis=0) for acts_TxK in read(test)])
    plain_NxK = np.stack([acts_TxK.max(axis=0) for acts_TxK in read(ordinary)])
    # [kind of snippet, text, feature]: random tokens are the same for all features, and read once.
    random_2xNxK, injected_2xNxK = np.zeros((2, *plain_NxK.shape)), np.zeros((2, *plain_NxK.shape))
    for kind, size in enumerate((1, CONTEXT)):
        # The same places and random tokens for all features and groups, which makes their shares comparable.
        rng = np.random.default_rng([seed, kind])
        places = [np.sort(rng.integers(1, len(ids) + 1, TOKENS)) for ids in ordinary]
        random = [rng.choice(pool, (TOKENS, size)).tolist() for _ in ordinary]
        mixed = [_insert(*row) for row in zip(ordinary, random, places, strict=True)]
        random_2xNxK[kind] = [acts_TxK.max(axis=0) for acts_TxK in read(mixed)]
        for k, feature in enumerate(features):
            mixed = [_insert(ids, snippets[k][kind], at) for ids, at in zip(ordinary, places, strict=True)]
            alone = _activations(lm, dictionary, np.array([feature], np.int32), mixed)
            injected_2xNxK[kind, :, k] = [acts_Tx1.max() for acts_Tx1 in alone]
            count_one()
    weight_RxN, weight_RxM = _weigh_texts((len(ordinary), len(test)), seed)
    piece = token_piece(lm.tokenizer)
    for k, feature in enumerate(features):
        # The kind that excites it more is the harder test for a feature of reasoning.
        kind = int(np.argmax(injected_2xNxK[:, :, k].mean(axis=1)))
        random_N, injected_N = random_2xNxK[kind, :, k], injected_2xNxK[kind, :, k]
        yield FalsifiedFeature(
            group=group,
            feature=int(feature),
            tokens=tuple(show_bytes(piece(ids[0])) for ids in snippets[k][0]),
            contexts=tuple(show_bytes("".join(map(piece, ids))) for ids in snippets[k][1]),
            injected=("tokens", "contexts")[kind],
            ordinary=mean_interval(plain_NxK[:, k], weight_RxN),
            random=mean_interval(random_N, weight_RxN),
            activation=mean_interval(injected_N, weight_RxN),
            real=mean_interval(real_MxK[:, k], weight_RxM),
            # Of a feature that is silent on the training texts there is nothing to insert.
            test=judge_injection(random_N, injected_N, real_MxK[:, k], seed) if snippets[k][0] else _UNDECIDED,
        )


def _exciting_snippets(texts: Sequence[list[int]], acts: Sequence[np.ndarray]) -> tuple[list[list[int]], ...]:
    """Return the tokens that excite a feature most, and the contexts of its strongest activations, best first."""
    ids_A, act_A = np.concatenate(texts), np.concatenate(acts).astype(np.float64)
    token_V, index_A, count_V = np.unique(ids_A, return_inverse=True, return_counts=True)
    # One more in the count: the mean of a token that was seen once says little.
    score_V = np.bincount(index_A, act_A) / (count_V + 1)
    best = np.argsort(-score_V, kind="stable")[:TOKENS]
    tokens = [[int(token_V[v])] for v in best if score_V[v] > 0]
    places = [(n, t) for n, ids in enumerate(texts) for t in range(len(ids))]
    contexts: dict[tuple[int, ...], None] = {}
    for a in np.argsort(-act_A, kind="stable").tolist():
        if act_A[a] <= 0 or len(contexts) == TOKENS:
            break
        n, t = places[a]
        contexts[tuple(texts[n][max(t - CONTEXT + 1, 0) : t + 1])] = None
    return tokens, [list(context) for context in contexts]


def _insert(ids: list[int], snippets: Sequence[list[int]], places: np.ndarray) -> list[int]:
    """Return a text with a snippet inserted before each of some positions, which ascend."""
    parts, last = [], 0
    # A feature may have fewer snippets than places: they return, so that it gets as many insertions as its control.
    for snippet, place in zip(itertools.cycle(snippets), places.tolist(), strict=False):
        parts += [*ids[last:place], *snippet]
        last = place
    return [*parts, *ids[last:]]


def _draw_live(
    lm: LanguageModel,
    dictionary: Dictionary,
    texts: Sequence[list[int]],
    without: Sequence[int],
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """Return random features that fire on at least ``LIVE`` of the texts."""
    if not count:
        return []
    every_F = np.arange(dictionary.config.n_features, dtype=np.int32)
    fires_F = sum((acts_TxF.max(axis=0) > 0).astype(int) for acts_TxF in _activations(lm, dictionary, every_F, texts))
    pool = np.setdiff1d(np.flatnonzero(fires_F >= LIVE * len(texts)), np.asarray(without, int))
    return np.sort(rng.choice(pool, min(count, len(pool)), replace=False)).tolist()


def _encode_texts(lm: LanguageModel, texts: Sequence[str], length: int) -> list[list[int]]:
    """Return the token ids of texts, cut to ``length`` tokens; texts of one token are left out."""
    # A token has fewer than 16 characters in the mean: the rest of a long document need not be tokenised.
    ids = [lm.encode(text[: 16 * length])[:length] for text in texts]
    return [some for some in ids if len(some) > 1]


def _activations(
    lm: LanguageModel, dictionary: Dictionary, features_K: np.ndarray, texts: Sequence[list[int]]
) -> Iterator[np.ndarray]:
    """Yield the sizes of the activations of K features at every token of each text, [T, K]; 0 at attention sinks.

    Of a transcoder, those at its target are sinks, too: injected tokens could make one that no edit would touch.
    """
    dictionary.config.check_model(lm.source.name, lm.source.fingerprint)
    dictionary = dictionary.with_sink_norms(lm.sink_norm)
    sites = dictionary.site, dictionary.config.target or dictionary.site
    width = min(round_length(max(map(len, texts)), _MULTIPLE), lm.config.context)
    rows = max(_BATCH_TOKENS // width, 1)
    for first in range(0, len(texts), rows):
        batch = texts[first : first + rows]
        ids_BxT = np.zeros((rows, width), np.int32)  # one shape, so that one program is compiled
        for row, ids in enumerate(batch):
            ids_BxT[row, : len(ids)] = ids
        lengths_B = np.array([len(ids) for ids in batch] + [1] * (rows - len(batch)), np.int32)
        values = lm(Tokens(ids_BxT, lengths_B), capture=[*dict.fromkeys(sites)], logits=False).sites
        # Of a long text some tokens at a time, since a dictionary may have a hundred times as many features as D.
        parts = (slice(start, start + _BATCH_TOKENS) for start in range(0, width, _BATCH_TOKENS))
        encoded = [_encode(dictionary, *(values[site][:, part] for site in sites), features_K) for part in parts]
        acts_BxTxK = np.concatenate(encoded, axis=1)
        for row, ids in enumerate(batch):
            if not np.isfinite(acts_BxTxK[row, : len(ids)]).all():
                raise UserError(
                    "an activation is not finite: the dictionary or the model holds NaN or overflows; try "
                    "--model.dtype=float32, or train the dictionary again"
                )
            yield acts_BxTxK[row, : len(ids)]


@jax.jit
def _encode(dictionary: Dictionary, x_BxTxD: jax.Array, y_BxTxO: jax.Array, features_K: jax.Array) -> jax.Array:
    acts_BxTxK = jnp.abs(dictionary.encode_features(x_BxTxD, features_K))  # a signed dictionary fires below 0, too
    return jnp.where(dictionary.is_not_sink(x_BxTxD, y_BxTxO)[..., None], acts_BxTxK, 0.0)


def _shares(group: str, rows: Sequence[FalsifiedFeature]) -> DriverShares:
    shares = {
        driver: wilson(np.array([row.test.driver == driver for row in rows]))
        for driver in ("tokens", "context", "undecided")
    }
    return DriverShares(group, len(rows), **shares)
