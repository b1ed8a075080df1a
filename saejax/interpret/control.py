"""The control of labels: random directions of the same space, which fire as often as features do."""

import jax.numpy as jnp
import numpy as np

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, DictionaryConfig

MOST = 1024  # directions
_ROWS = 32_768  # of the store, from which thresholds are taken


def random_directions(store: Store, dictionary: Dictionary, rate_F: np.ndarray, seed: int) -> Dictionary:
    """A dictionary of random directions, uniform on the sphere, each with a threshold that gives it a firing rate.

    Args:
      store: activations of the dictionary's site.
      dictionary: whose features it is compared with.
      rate_F: how often these fire; the directions' rates are spread evenly over the ranks of those above 0.
      seed: of the directions.
    """
    live = np.sort(rate_F[rate_F > 0])
    count = min(MOST, len(live))
    rate = live[np.linspace(0, len(live) - 1, count).round().astype(np.int64)]
    rows = store.rows("train", dictionary.site)
    rows = rows[:: -(-len(rows) // _ROWS)]
    x_NxD = store.read(dictionary.site, rows).astype(np.float32)
    W_enc_DxF = np.random.default_rng(seed).standard_normal((x_NxD.shape[1], count), np.float32)
    W_enc_DxF /= np.linalg.norm(W_enc_DxF, axis=0)
    pre_FxN = np.sort((x_NxD @ W_enc_DxF).T, axis=1)
    above = np.clip(np.round(rate * len(rows)).astype(np.int64), 1, len(rows))
    threshold_F = pre_FxN[np.arange(count), np.maximum(len(rows) - above - 1, 0)]
    config = DictionaryConfig(
        kind="standard", site=dictionary.site, d_in=x_NxD.shape[1], n_features=count, centred=False
    )
    zeros = jnp.zeros(x_NxD.shape[1])
    arrays = dict(W_enc_DxF=W_enc_DxF, W_dec_FxD=W_enc_DxF.T, b_enc_F=-threshold_F, b_dec_D=zeros)
    return Dictionary(config, **{name: jnp.asarray(array) for name, array in arrays.items()})
