"""Latent scaling: whether a feature that seems to be one part's own is so in the activations, too.

An L1 penalty makes features look private that are not (Minder et al., 2025, arXiv 2504.02922): a shared one whose row
in one part is pushed to 0 (complete shrinkage), so that its content is left in that part's error; or one whose content
is spread over others there (latent decoupling). So the activations of feature j are fitted to the values y_p of each
part p, by least squares with an intercept,

    y_p ~ b_p f_j + constant,    b_p = cov(f_j, y_p) / var(f_j),

once where y_p is the part's error with what j itself writes there, once where it is the reconstruction. The share

    nu = size(b_q) / size(b_p)       p: the part whose own j seems to be; q: the other, of several the largest

is near 0 if q holds nothing of it; above 0.2 of errors or 0.5 of reconstructions, j is not private. Where the parts are
the same site of two models of one width, whose directions mean the same, size(b) is b along j's row in p, as published.
Elsewhere any direction counts: size(b)^2 = <b', b''> of two halves of the text, which is no larger by noise alone. The
published fit has no intercept; without one, features that seldom fire seem to be in whatever is always there.

Intervals are bootstrap ones over blocks of documents; the null has each feature's activations moved along the text.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import split

Y = ("error", "reconstruction", "moved")  # the last: the error, beside activations of other tokens


@dataclasses.dataclass(frozen=True)
class BlockSums:
    """Sums over the tokens of N blocks, of K features' activations f and the errors e and reconstructions r; fp64.

    Attributes:
      tokens_N: of each block.
      f_NxK, square_NxK: sums of f and of f^2; ``moved_NxK``: of f times f of another token.
      y_NxD, products: by name in ``Y``: sums of y and of f times y, [N, K, D]; in "moved" f is of another token.
    """

    tokens_N: np.ndarray
    f_NxK: np.ndarray
    square_NxK: np.ndarray
    moved_NxK: np.ndarray
    y: dict[str, np.ndarray]
    products: dict[str, np.ndarray]


def block_sums(dictionary: Dictionary, features: Sequence[int], blocks: Iterable[Sequence[np.ndarray]]) -> BlockSums:
    """The sums of every block.

    Args:
      features: K of its features.
      blocks: each as batches [B, D] of joined values, of at least one.
    """
    features_K = jnp.asarray(features, jnp.int32)
    names = ("tokens", "f", "square", "apart", *(f"sum {y}" for y in Y), *Y)
    rows = []
    for block in blocks:
        parts = [jax.device_get(_sums(dictionary, features_K, jnp.asarray(x_BxD))) for x_BxD in block]
        rows.append([np.sum([np.asarray(part[i], np.float64) for part in parts], axis=0) for i in range(len(names))])
    found = {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    y, products = {name: found[f"sum {name}"] for name in Y}, {name: found[name] for name in Y}
    return BlockSums(found["tokens"], found["f"], found["square"], found["apart"], y, products)


@jax.jit
def _sums(dictionary: Dictionary, features_K: jax.Array, x_BxD: jax.Array) -> tuple[jax.Array, ...]:
    f_BxF = dictionary.encode(x_BxD)
    reconstruction_BxD = dictionary.decode(f_BxF)
    error_BxD = x_BxD - reconstruction_BxD
    f_BxK = f_BxF[:, features_K]
    moved_BxK = jnp.roll(f_BxK, f_BxK.shape[0] // 2 or 1, axis=0)
    pairs = [(f_BxK, error_BxD), (f_BxK, reconstruction_BxD), (moved_BxK, error_BxD)]
    tokens = jnp.asarray(x_BxD.shape[0], jnp.float32)
    sums = [f_BxK.sum(0), jnp.square(f_BxK).sum(0), (f_BxK * moved_BxK).sum(0), *(y.sum(0) for _, y in pairs)]
    with jax.default_matmul_precision("float32"):
        return tokens, *sums, *(one_BxK.T @ y_BxD for one_BxK, y_BxD in pairs)


@dataclasses.dataclass(frozen=True)
class LatentScaling:
    """The shares of a feature; each [1 + R]: of all text, and of R bootstrap samples of its blocks.

    Attributes:
      error_R, reconstruction_R, moved_R: nu of each y; NaN where the feature does not fire.
    """

    error_R: np.ndarray
    reconstruction_R: np.ndarray
    moved_R: np.ndarray


def latent_scaling(
    sums: BlockSums,
    place: int,
    row_D: np.ndarray,
    own: int,
    widths: Sequence[int],
    same_space: bool,
    weights_RxN: np.ndarray,
) -> LatentScaling:
    """The shares of one feature.

    Args:
      sums: of all blocks, an even number of at least 2.
      place: of the feature among those of the sums.
      row_D: its decoder row.
      own: the part whose own it seems to be.
      widths: of the parts.
      same_space: whether directions mean the same in all parts.
      weights_RxN: how often each block counts, the first row 1 everywhere; see ``block_weights``.
    """
    fits = {name: [_fit(sums, name, place, row_D, half) for half in _halves(weights_RxN)] for name in Y}
    alone = split(row_D, widths)[own]
    direction_D = alone / max(np.linalg.norm(alone), 1e-30)

    def sizes(halves: list[np.ndarray]) -> list[np.ndarray]:
        parts = zip(*(split(half_RxD, widths) for half_RxD in halves), strict=True)
        if same_space:
            return [np.abs((first_RxD + second_RxD) @ direction_D) / 2 for first_RxD, second_RxD in parts]
        return [np.sqrt(np.maximum(np.einsum("rd,rd->r", *pair), 0.0)) for pair in parts]

    of = {name: sizes(halves) for name, halves in fits.items()}

    def share(name: str, beside: str) -> np.ndarray:
        other_R = np.max([size_R for part, size_R in enumerate(of[name]) if part != own], axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return other_R / of[beside][own]

    return LatentScaling(share("error", "error"), share("reconstruction", "reconstruction"), share("moved", "error"))


def block_weights(blocks: int, resamples: int, seed: int) -> np.ndarray:
    """How often each block counts in the text itself (the first row) and in bootstrap samples of each half, [1+R, N].

    Halves are the blocks of even and of odd number.
    """
    rng, halves = np.random.default_rng(seed), (range(0, blocks, 2), range(1, blocks, 2))
    found = np.ones((1 + resamples, blocks))
    for half in halves:
        found[1:, half] = rng.multinomial(len(half), np.full(len(half), 1 / len(half)), size=resamples)
    return found


def _halves(weights_RxN: np.ndarray) -> list[np.ndarray]:
    even_N = np.arange(weights_RxN.shape[1]) % 2 == 0
    return [weights_RxN * even_N, weights_RxN * ~even_N]


def _fit(sums: BlockSums, name: str, place: int, row_D: np.ndarray, weights_RxN: np.ndarray) -> np.ndarray:
    """b of all parts side by side, [R, D]."""
    tokens_Rx1, f_Rx1, square_Rx1 = (
        (weights_RxN @ values_N)[:, None]
        for values_N in (sums.tokens_N, sums.f_NxK[:, place], sums.square_NxK[:, place])
    )
    y_RxD, product_RxD = weights_RxN @ sums.y[name], weights_RxN @ sums.products[name][:, place]
    variance_Rx1 = square_Rx1 - f_Rx1**2 / tokens_Rx1
    covariance_RxD = product_RxD - f_Rx1 * y_RxD / tokens_Rx1
    if name != "reconstruction":  # with what the feature itself writes
        with_Rx1 = square_Rx1 if name == "error" else (weights_RxN @ sums.moved_NxK[:, place])[:, None]
        covariance_RxD += (with_Rx1 - f_Rx1**2 / tokens_Rx1) * row_D
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance_Rx1 > 0, covariance_RxD / variance_Rx1, np.nan)
