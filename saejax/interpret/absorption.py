"""Feature absorption: a feature for a property is silent where a more specific one stands in for it.

Chanin et al. (2024, arXiv 2409.14507) ask it of first letters, as SAEBench does (Karvonen et al., 2025, arXiv
2503.09532):

1. Words of one token are read in a prompt that spells others; activations are read at the word's token.
2. A linear probe of the activations for each letter gives its direction p.
3. The letter's *split features*: by an L1 probe on the features the best one, and further ones while each raises the F1
   score of a logistic regression on them by more than 0.03.
4. On the test words of the letter that its probe gets right: with c_i = f_i <W_dec_i, p> / |p|, what feature i adds
   along p, the sum over split features S falls short of <x, p> / |p|, and others make up for it:

       absorbed = sum of the three largest c_i > 0 outside of S with a cosine of W_dec_i and p of at least 0.1
       fraction = absorbed' / (absorbed' + sum_S c_i),   absorbed' = min(absorbed, <x, p> / |p| - sum_S c_i)

   which is 1 where sum_S c_i <= 0, and 0 where nothing falls short or ``absorbed`` is below 0.4 <x, p> / |p|. It is
   *full* where no split feature fires and the feature of the largest c_i has a cosine of at least 0.025 and at least
   0.4 <x, p> / |p|.

Probes are the optimum of a balanced cross-entropy in place of some epochs of Adam (the L1 probe after 300 steps of
FISTA); features are scaled to a maximum of 1 for the L1 probe. A dictionary of random directions is measured beside it,
because the score is about a dictionary only where random ones have another.
"""

import dataclasses
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from saejax.arguments import check_classes
from saejax.dictionaries import Dictionary
from saejax.dictionaries.bos import follow_bos
from saejax.dictionaries.rescale import to_output_units
from saejax.errors import UserError
from saejax.interventions.bases import untrained
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import Tokens, continuation_ids, is_known, token_text
from saejax.progress import OnProgress, show_progress, silent
from saejax.short_reprs import has_short_repr

_F1_JUMP, _MOST_SPLIT = 0.03, 10
_ABSORBERS, _ABSORBER_COSINE, _FULL_COSINE, _SHARE = 3, 0.1, 0.025, 0.4
_SILENT = 1e-8
_L1, _L2, _ITERATIONS = 0.01, 1e-3, 300  # of the probes
_EXAMPLES, _BATCH = 5, 64
_TEST_SHARE = 0.2
_LEAST_WORDS = 5  # test words of a letter: of fewer no rate is given


@dataclasses.dataclass(frozen=True)
class LetterAbsorption:
    """Absorption of one first letter."""

    letter: str
    words: int  #: test words that the letter's probe gets right
    split_features: tuple[int, ...]  #: the letter's features, best first
    f1: float  #: F1 score of a logistic regression on them, on test words
    fraction: float  #: absorption fraction, mean over these words
    full: float  #: share of these words with full absorption


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Absorption:
    """Absorption of first letters by the features of a dictionary, and of a random one of its size."""

    letters: tuple[LetterAbsorption, ...]  #: letters with at least 5 such words
    random: tuple[LetterAbsorption, ...]  #: the same for random directions, as many active per token

    @property
    def fraction(self) -> float:
        """Mean absorption fraction over letters."""
        return float(np.mean([letter.fraction for letter in self.letters]))

    @property
    def full(self) -> float:
        """Mean rate of full absorption over letters."""
        return float(np.mean([letter.full for letter in self.letters]))

    @property
    def random_fraction(self) -> float:
        """``fraction`` of the random dictionary."""
        return float(np.mean([letter.fraction for letter in self.random]))


@check_classes
def measure_absorption(
    lm: LanguageModel, dictionary: Dictionary, *, words: Sequence[str] | None = None, seed: int = 0
) -> Absorption:
    """Measure how far features of first letters are absorbed by others; see the top of this module.

    Args:
      lm: the model.
      dictionary: an SAE of one of its sites.
      words: lower-case words, of which those that are one token with a space in front are used; None: 5,000 of the
        tokenizer's.
      seed: draws the words, the split into train and test words, and the random dictionary.

    Raises:
      UserError: the dictionary is no SAE of one site of the model, which has no tokenizer, or too few words of a letter
        are one token.
    """
    if dictionary.config.target or dictionary.config.widths:
        raise UserError(f"absorption is measured along one site, and {dictionary!r} is no SAE of one: give an SAE")
    if lm.tokenizer is None:
        raise UserError(f"{lm.source.name} has no tokenizer, which absorption of first letters needs")
    # Activations and what they add along the probe have to be in the units of the site.
    lm, dictionary = follow_bos(lm, [dictionary.config]), to_output_units(dictionary)
    ids_N, letter_N = draw_words(lm, words, seed)
    with show_progress("measure_absorption") as on_progress:
        x_NxD = _read_words(lm, dictionary.site, ids_N, letter_N, on_progress)
    if x_NxD.shape[1] != dictionary.config.d_in:
        raise UserError(
            f"{dictionary!r} reads {dictionary.config.d_in} values, and {dictionary.site} of {lm.source.name} has "
            f"{x_NxD.shape[1]}: give a dictionary of this model"
        )
    f_NxF = _encode(dictionary, x_NxD)
    # As many as are active per token: a random dictionary has no threshold that training has set.
    active = max(round(float((f_NxF != 0).sum(1).mean())), 1)
    random = untrained(dictionary, active, seed)
    is_test_N = np.random.default_rng(seed).random(len(ids_N)) < _TEST_SHARE
    both = [
        score_letters(basis_NxF, np.asarray(basis.W_dec_FxD[...], np.float64), x_NxD, letter_N, is_test_N)
        for basis, basis_NxF in ((dictionary, f_NxF), (random, _encode(random, x_NxD)))
    ]
    return Absorption(*both)


def score_letters(
    f_NxF: np.ndarray, W_dec_FxD: np.ndarray, x_NxD: np.ndarray, letter_N: np.ndarray, is_test_N: np.ndarray
) -> tuple[LetterAbsorption, ...]:
    """Return the absorption of each letter, given features and activations of words.

    Args:
      f_NxF: feature activations.
      W_dec_FxD: decoder rows.
      x_NxD: activations at the site.
      letter_N: index of each word's first letter, 0 to 25.
      is_test_N: whether a word is a test word; the others train the probes.
    """
    train_N = ~is_test_N
    is_letter_NxC = letter_N[:, None] == np.arange(26)
    std_D = x_NxD.std(axis=0)
    std_D = np.where(std_D > 0, std_D, 1.0)
    mean_D = x_NxD[train_N].mean(axis=0)
    probe_DxC, bias_C = fit_probes((x_NxD[train_N] - mean_D) / std_D, is_letter_NxC[train_N], _L2)
    is_found_NxC = (x_NxD - mean_D) / std_D @ probe_DxC + bias_C > 0
    largest_F = np.abs(f_NxF[train_N]).max(axis=0)
    scaled_NxF = f_NxF / np.where(largest_F > 0, largest_F, 1.0)
    weight_FxC = fit_sparse_probes(scaled_NxF[train_N], is_letter_NxC[train_N], _L1)
    scored = []
    for index, letter in enumerate(string.ascii_lowercase):
        judged_N = is_test_N & is_letter_NxC[:, index] & is_found_NxC[:, index]
        if judged_N.sum() < _LEAST_WORDS:
            continue
        order_K = np.argsort(-weight_FxC[:, index], kind="stable")[:_MOST_SPLIT]
        split, f1 = choose_split_features(scaled_NxF, is_letter_NxC[:, index], is_test_N, order_K)
        direction_D = probe_DxC[:, index] / std_D  # of the probe on activations that are not standardised
        fraction_M, is_full_M = absorption_of_words(
            f_NxF[judged_N].astype(np.float64), x_NxD[judged_N], W_dec_FxD, direction_D, split
        )
        scored.append(
            LetterAbsorption(letter, int(judged_N.sum()), split, f1, float(fraction_M.mean()), float(is_full_M.mean()))
        )
    if not scored:
        raise UserError(f"no letter has {_LEAST_WORDS} test words that its probe gets right: give more words")
    return tuple(scored)


def absorption_of_words(
    f_NxF: np.ndarray, x_NxD: np.ndarray, W_dec_FxD: np.ndarray, probe_D: np.ndarray, split: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the absorption fraction of each word, float64 [N], and whether it is full, bool [N]; see the module.

    Args:
      f_NxF: feature activations.
      x_NxD: activations at the site.
      W_dec_FxD: decoder rows.
      probe_D: direction of the probe, of any length.
      split: the split features, at least one.
    """
    direction_D = probe_D / np.linalg.norm(probe_D)
    along_F, split_K = W_dec_FxD @ direction_D, np.array(split)
    length_F = np.linalg.norm(W_dec_FxD, axis=1)
    cosine_F = along_F / np.where(length_F > 0, length_F, 1.0)
    projection_N, added_NxF = x_NxD @ direction_D, f_NxF * along_F
    is_absorber_F = cosine_F >= _ABSORBER_COSINE
    is_absorber_F[split_K] = False
    candidates_NxF = np.where(is_absorber_F & (added_NxF > 0), added_NxF, 0.0)
    absorbed_N = np.sort(candidates_NxF, axis=1)[:, -_ABSORBERS:].sum(axis=1)
    split_N = added_NxF[:, split_K].sum(axis=1)
    is_absorbed_N = (split_N < projection_N) & (projection_N > 0) & (absorbed_N >= _SHARE * projection_N)
    absorbed_N = np.minimum(absorbed_N, projection_N - split_N)
    is_whole_N = split_N <= 0
    fraction_N = np.where(is_whole_N, 1.0, absorbed_N / np.where(is_whole_N, 1.0, absorbed_N + split_N))
    top_N = added_NxF.argmax(axis=1)
    top_added_N = np.take_along_axis(added_NxF, top_N[:, None], axis=1)[:, 0]
    is_silent_N = (np.abs(f_NxF[:, split_K]) < _SILENT).all(axis=1)
    is_full_N = is_silent_N & (cosine_F[top_N] >= _FULL_COSINE) & (projection_N > 0)
    return np.where(is_absorbed_N, fraction_N, 0.0), is_full_N & (top_added_N >= _SHARE * projection_N)


def choose_split_features(
    f_NxF: np.ndarray, is_letter_N: np.ndarray, is_test_N: np.ndarray, order_K: np.ndarray
) -> tuple[tuple[int, ...], float]:
    """Return the features of a letter and the F1 score of a logistic regression on them, on test words.

    Args:
      f_NxF: feature activations.
      is_letter_N: whether a word begins with the letter.
      is_test_N: whether a word is a test word.
      order_K: candidates, best first; each is added while it raises the score by more than 0.03.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    score, split = 0.0, (int(order_K[0]),)
    for k in range(1, len(order_K) + 1):
        model = LogisticRegression(class_weight="balanced", max_iter=500)
        model.fit(f_NxF[~is_test_N][:, order_K[:k]], is_letter_N[~is_test_N])
        f1 = float(f1_score(is_letter_N[is_test_N], model.predict(f_NxF[is_test_N][:, order_K[:k]])))
        if k > 1 and f1 <= score + _F1_JUMP:
            break
        score, split = f1, tuple(order_K[:k].tolist())
    return split, score


def fit_probes(x_NxD: np.ndarray, is_class_NxK: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Return weights [D, K] and biases [K] of K logistic regressions, each class and its rest of half the weight.

        mean over classes' halves of the cross-entropy + l2 / 2 sum w^2     (not of biases)

    Args:
      x_NxD: inputs.
      is_class_NxK: whether each is of each class; a class without inputs, or without others, gets weights of 0.
      l2: coefficient of the penalty.
    """
    from scipy.optimize import minimize

    x_NxE = np.concatenate([np.asarray(x_NxD, np.float64), np.ones((len(x_NxD), 1))], axis=1)
    shape, weight_NxK = (x_NxE.shape[1], is_class_NxK.shape[1]), _balanced_weights(is_class_NxK)
    sign_NxK, l2_Ex1 = np.where(is_class_NxK, -1.0, 1.0), np.append(np.full(shape[0] - 1, l2), 0.0)[:, None]

    def loss(flat_X: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the sum over classes, and its gradient."""
        probe_ExK = flat_X.reshape(shape)
        margin_NxK = sign_NxK * (x_NxE @ probe_ExK)
        slope_NxK = weight_NxK * sign_NxK * expit(margin_NxK)
        value = (weight_NxK * np.logaddexp(0, margin_NxK)).sum() + (l2_Ex1 * probe_ExK**2).sum() / 2
        return float(value), (x_NxE.T @ slope_NxK + l2_Ex1 * probe_ExK).reshape(-1)

    # Not by steps of one size: sites have directions a hundred times as long as others, along which these take
    # thousands.
    options = dict(maxiter=5000, maxfun=10_000, maxcor=20, ftol=0.0, gtol=1e-6)
    fitted = minimize(loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options=options)
    probe_ExK = fitted.x.reshape(shape)
    return probe_ExK[:-1], probe_ExK[-1]


def _balanced_weights(is_class_NxK: np.ndarray) -> np.ndarray:
    """Return the weight of each input in each class: half for the class, half for the rest; 0 where either is empty."""
    count_K = is_class_NxK.sum(axis=0)
    rest_K = len(is_class_NxK) - count_K
    weight_NxK = np.where(is_class_NxK, 0.5 / np.maximum(count_K, 1), 0.5 / np.maximum(rest_K, 1))
    return weight_NxK * ((count_K > 0) & (rest_K > 0))


def fit_sparse_probes(f_NxF: np.ndarray, is_class_NxK: np.ndarray, l1: float) -> np.ndarray:
    """Return weights [F, K] of the same regressions with the penalty l1 sum |w|; see ``fit_probes``."""
    weights = _balanced_weights(is_class_NxK)
    arrays = (np.asarray(array, np.float32) for array in (f_NxF, is_class_NxK, weights))
    return np.asarray(_fit_by_fista(*arrays, np.float32(l1)), np.float64)


@jax.jit
def _fit_by_fista(f_NxF, is_class_NxK, weight_NxK, l1):
    """Minimise by FISTA (Beck and Teboulle, 2009), each class with its own step."""
    x_NxE = jnp.concatenate([f_NxF, jnp.ones_like(f_NxF[:, :1])], axis=1)
    penalised_Ex1 = jnp.ones((x_NxE.shape[1], 1)).at[-1].set(0.0)

    def power(vector_ExK, _):
        # The largest eigenvalue of X^T diag(weights) X bounds the curvature, a quarter of it.
        vector_ExK = x_NxE.T @ (weight_NxK * (x_NxE @ vector_ExK))
        norm_1xK = jnp.linalg.norm(vector_ExK, axis=0, keepdims=True)
        return vector_ExK / jnp.maximum(norm_1xK, 1e-30), norm_1xK

    start_ExK = jnp.ones((x_NxE.shape[1], is_class_NxK.shape[1]))
    _, norms = jax.lax.scan(power, start_ExK, None, length=30)
    step_1xK = 1 / (0.25 * 1.1 * norms[-1] + 1e-12)

    def update(carry, _):
        weights_ExK, ahead_ExK, momentum = carry
        error_NxK = weight_NxK * (jax.nn.sigmoid(x_NxE @ ahead_ExK) - is_class_NxK)
        moved_ExK = ahead_ExK - step_1xK * (x_NxE.T @ error_NxK)
        shrunk_ExK = jnp.sign(moved_ExK) * jnp.maximum(jnp.abs(moved_ExK) - step_1xK * l1 * penalised_Ex1, 0.0)
        following = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        ahead_ExK = shrunk_ExK + (momentum - 1) / following * (shrunk_ExK - weights_ExK)
        return (shrunk_ExK, ahead_ExK, following), None

    zeros_ExK = jnp.zeros_like(start_ExK)
    (weights_ExK, *_), _ = jax.lax.scan(update, (zeros_ExK, zeros_ExK, jnp.float32(1.0)), None, length=_ITERATIONS)
    return weights_ExK[:-1]


def draw_words(lm: LanguageModel, words: Sequence[str] | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of words, int [N], and the index of the first letter of each; see ``measure_absorption``."""
    if words is None:
        text_of = token_text(lm.tokenizer)
        texts = {index: text_of(index) for index in range(len(lm.tokenizer))}
    else:
        texts = {}
        for word in dict.fromkeys(words):
            ids = continuation_ids(lm.tokenizer, f" {word}")
            texts |= {ids[0]: f" {word}"} if len(ids) == 1 and is_known(lm.tokenizer, word, ids) else {}
    lower = set(string.ascii_lowercase)
    plain = [index for index, text in texts.items() if text[:1] == " " and len(text) > 3 and {*text[1:]} <= lower]
    drawn_N = np.sort(np.random.default_rng(seed).permutation(np.array(plain, np.int64))[:5000])
    if len(drawn_N) < 2 * _EXAMPLES:
        raise UserError(f"the tokenizer of {lm.source.name} has {len(drawn_N)} such words of one token: too few")
    letter_N = np.array([ord(texts[int(index)][1]) - ord("a") for index in drawn_N])
    if len(np.unique(letter_N)) < 2:
        raise UserError(f"all words begin with {texts[int(drawn_N[0])][1]!r}: give words of other letters, too")
    return drawn_N, letter_N


def _read_words(
    lm: LanguageModel, site: str, ids_N: np.ndarray, letter_N: np.ndarray, on_progress: OnProgress = silent
) -> np.ndarray:
    """Return activations [N, D] at the tokens of words, each after the same few words with their letters."""
    chosen = np.linspace(0, len(ids_N) - 1, _EXAMPLES).astype(int)
    text_of = token_text(lm.tokenizer)
    lines = [f"{text_of(int(ids_N[i]))} has the first letter: {chr(65 + letter_N[i])}\n" for i in chosen]
    prefix = lm.encode("".join(lines))
    read = []
    for first in range(0, len(ids_N), _BATCH):
        # All batches in one shape, which is compiled once.
        last_B = np.resize(ids_N[first : first + _BATCH], _BATCH)
        ids_BxT = np.concatenate([np.tile(np.array(prefix), (_BATCH, 1)), last_B[:, None]], axis=1).astype(np.int32)
        tokens = Tokens(ids_BxT, np.full(_BATCH, ids_BxT.shape[1], np.int32))
        value_BxTxD = lm(tokens, capture=site, logits=False).sites[site]
        read.append(np.asarray(value_BxTxD[:, -1], np.float32))
        on_progress(min(first + _BATCH, len(ids_N)), len(ids_N))
    return np.concatenate(read)[: len(ids_N)]


def _encode(dictionary: Dictionary, x_NxD: np.ndarray) -> np.ndarray:
    """Return feature activations, float32 [N, F], on the host."""
    encode_batch = jax.jit(lambda x_BxD: dictionary.encode(x_BxD).astype(jnp.float32))
    return np.concatenate(
        [np.asarray(encode_batch(x_NxD[first : first + 1024])) for first in range(0, len(x_NxD), 1024)]
    )
