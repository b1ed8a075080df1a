"""Rows that match the features of dictionaries, and rows that share nothing with them.

Rows are dense where they are directions. Rows of activations, ``CentredRows``, stay sparse: at 131,072 features and
32,768 tokens dense ones take 17 GB, and 64 active features per token 17 MB.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from saejax.dictionaries import Dictionary, rescale

_PRODUCTS = 2**24  # products in memory at once


@dataclasses.dataclass(frozen=True)
class CentredRows:
    """Centred activations of unit length, whose products are Pearson's correlations.

    Row i is ``scaled_FxN[i] - shift_F[i] / sqrt(N)``, so the product of two rows is their sparse parts' product minus
    their shifts'. No shift is below 0: rows that never fire on the same token have no product above 0.
    """

    scaled_FxN: sparse.csr_array  #: activations divided by the length of the centred row, fp32; 0 for rows left out
    shift_F: np.ndarray  #: mean times sqrt(N), divided by the same length, fp32

    @classmethod
    def of(cls, f_NxF: sparse.csr_array, compared_F: np.ndarray) -> "CentredRows":
        """Return the rows of features.

        Args:
          f_NxF: activations on N tokens.
          compared_F: features to compare; the rows of others, and of features that do not vary, are 0.
        """
        tokens, f_FxN = max(f_NxF.shape[0], 1), sparse.csr_array(f_NxF.T, dtype=np.float64)
        mean_F, square_F = f_FxN.sum(axis=1) / tokens, f_FxN.power(2).sum(axis=1)
        variance_F = square_F - tokens * mean_F**2
        # A row that hardly varies leaves rounding errors after its mean is subtracted: it counts as not varying.
        varies_F = compared_F & (variance_F > 1e-10 * square_F)
        scale_F = np.where(varies_F, 1 / np.sqrt(np.where(varies_F, variance_F, 1)), 0)
        # Activations of some kinds may be below 0. Rows with such a mean are kept dense, without a shift.
        below = np.flatnonzero(varies_F & (mean_F < 0))
        if len(below):
            others = np.flatnonzero(~(varies_F & (mean_F < 0)))
            centred_BxN = f_FxN[below].toarray() - mean_F[below, None]
            joined = sparse.vstack([f_FxN[others], sparse.csr_array(centred_BxN)], format="csr")
            f_FxN, mean_F[below] = joined[np.argsort(np.concatenate([others, below]))], 0
        kept_FxN = sparse.csr_array(f_FxN.multiply(scale_F[:, None]), dtype=np.float32)
        kept_FxN.eliminate_zeros()
        return cls(kept_FxN, (mean_F * scale_F * tokens**0.5).astype(np.float32))

    def __len__(self) -> int:
        return len(self.shift_F)

    @functools.cached_property
    def _scaled_NxF(self) -> sparse.csr_array:
        return sparse.csr_array(self.scaled_FxN.T)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, transposed rows included."""
        return 2 * (self.scaled_FxN.data.nbytes + self.scaled_FxN.indices.nbytes)

    def bound_products(self, other: "CentredRows", row_N: np.ndarray) -> np.ndarray:
        """Return a bound of the number of products that each of some rows has in ``products``, [N]."""
        # On each of its tokens with every row that fires there.
        return np.minimum(abs(self.scaled_FxN[row_N]).sign() @ np.diff(other._scaled_NxF.indptr), len(other))

    def products(self, other: "CentredRows", row_N: np.ndarray) -> Iterator[sparse.csr_array]:
        """Yield the products of some rows with all rows of another dictionary that fire on a common token.

        Args:
          other: G rows on the same tokens.
          row_N: indices of the rows.

        Yields:
          Products of successive rows of ``row_N``, sparse [rows, G]; no product that is left out is above 0.
        """
        part_N = np.cumsum(self.bound_products(other, row_N)) // _PRODUCTS
        for part in np.unique(part_N):
            rows = row_N[part_N == part]
            product = sparse.csr_array(self.scaled_FxN[rows] @ other._scaled_NxF)
            shift_X = np.repeat(self.shift_F[rows], np.diff(product.indptr))
            product.data -= shift_X * other.shift_F[product.indices]
            yield product


Rows = np.ndarray | CentredRows


def paired_products(first: Rows, row_N: np.ndarray, second: Rows, second_N: np.ndarray) -> np.ndarray:
    """Return the products of rows of one dictionary with rows of another, pair by pair, float64 [N].

    Args:
      first: rows of a dictionary.
      row_N: indices of N of them.
      second: rows of another dictionary, of the same kind.
      second_N: indices of N of them.
    """
    if isinstance(first, CentredRows):
        assert isinstance(second, CentredRows)
        product_N = first.scaled_FxN[row_N].multiply(second.scaled_FxN[second_N]).sum(axis=1, dtype=np.float64)
        return product_N - first.shift_F[row_N].astype(np.float64) * second.shift_F[second_N]
    assert isinstance(second, np.ndarray)
    return np.einsum("fd,fd->f", first[row_N], second[second_N], dtype=np.float64)


def unit(rows_NxD: np.ndarray) -> np.ndarray:
    """Return rows divided by their length, fp32; rows of length 0 stay 0."""
    rows_NxD = np.asarray(rows_NxD, np.float32)
    length_Nx1 = np.linalg.norm(rows_NxD, axis=1, keepdims=True)
    return np.divide(rows_NxD, length_Nx1, out=np.zeros_like(rows_NxD), where=length_Nx1 > 0)


def weight_rows(measure: str, dictionary: Dictionary) -> np.ndarray:
    """Return the unit rows of a dictionary's features, fp32 [F, D]; their products are cosines."""
    return unit(np.asarray(dictionary.W_enc_DxF[...].T if measure == "encoder" else dictionary.W_dec_FxD[...]))


def independent_rows(rows_FxD: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Return random directions with the mean and covariance of some rows, each as long as its row.

    They are the null of a comparison of directions. Directions of a residual stream lie in few dimensions, so uniform
    directions would be too far from everything, and any two dictionaries would seem to share features. Rows of zeros,
    of features that are not compared, stay so, and do not count.
    """
    kept_NxD = rows_FxD[rows_FxD.any(axis=1)]
    if not len(kept_NxD):
        return np.zeros_like(rows_FxD)
    mean_D = kept_NxD.mean(axis=0)
    # float64, because small eigenvalues of a covariance in float32 are rounding errors.
    centred_NxD = (kept_NxD - mean_D[None]).astype(np.float64)
    rng = np.random.default_rng(seed)
    # An eigendecomposition, as a covariance of few rows is singular and has no Cholesky factor.
    value_D, vector_DxD = np.linalg.eigh(centred_NxD.T @ centred_NxD / len(centred_NxD))
    root_DxD = (vector_DxD * np.sqrt(np.maximum(value_D, 0))[None]).astype(np.float32)
    random_FxD = rng.standard_normal(rows_FxD.shape, np.float32) @ root_DxD.T + mean_D[None]
    return unit(random_FxD) * np.linalg.norm(rows_FxD, axis=1, keepdims=True)


def random_rotation(width: int, seed: Sequence[int]) -> np.ndarray:
    """Return a rotation drawn uniformly, fp32 [width, width]."""
    q_DxD, r_DxD = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return (q_DxD * np.sign(np.diag(r_DxD))[None]).astype(np.float32)  # the signs make the distribution uniform


def rotate(dictionary: Dictionary, seed: Sequence[int], centre_D: np.ndarray | None = None) -> Dictionary:
    """Return a dictionary whose features are rotated together by a random rotation, about the centre of what is read.

    It explains the rotated activations as well, and is as sparse, as the dictionary itself; what it explains of the
    unrotated ones is chance.

    Args:
      dictionary: an SAE, or a transcoder whose target is as wide as its site.
      seed: seed of the rotation.
      centre_D: mean of what the encoder reads, normalised where it normalises tokens; None: the decoder's bias, which
        is an SAE's. A transcoder's is the centre of its target, and says nothing of what is read.

    Raises:
      ValueError: a transcoder's centre is not given.
    """
    if centre_D is None and dictionary.config.target:
        raise ValueError("the decoder's bias of a transcoder is no centre of what it reads: give centre_D")
    # A rotation about the origin would move the activations' mean away from the centre.
    centred = rescale.centre(dictionary, centre_D is None)
    turn_DxD, arrays = random_rotation(dictionary.config.d_in, seed), centred.arrays
    rotated = dict(W_enc_DxF=turn_DxD @ arrays["W_enc_DxF"], W_dec_FxD=arrays["W_dec_FxD"] @ turn_DxD.T)
    if centre_D is not None:
        shift_F = np.asarray(centre_D, np.float32) @ (arrays["W_enc_DxF"] - rotated["W_enc_DxF"])
        arrays = centred.kind.move_bias(arrays, shift_F)
    return Dictionary(centred.config, centred.matmul_dtype, **arrays | rotated)
