"""A planted circuit: "1 c 0 a 1 f b =" asks whether an odd number of the three bits is 1; letters mean nothing.

The transformer is trained so that its MLPs have the variables of one known circuit and nothing else matters (strict
interchange intervention training; Gupta et al., 2024, arXiv 2407.14494), all at the last position:

    first bit, second bit -> MLP of layer 0: whether they differ
    that, third bit       -> MLP of layer 1: the answer -> logits

Beside its answers three things are asked of it, with values from another question's run put in: with the other's
MLP 0 it must answer as if the first two bits differed as they do there (`interchange`), with the other's MLP 1 as the
other is answered (`answer`), and with the other's MLPs at all other positions as before (`alone`).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from saejax.ground_truth.algorithms.questions import START, Algorithm, Questions, kept_fresh
from saejax.ground_truth.algorithms.transformer import PLAIN, Answers, Params, answers
from saejax.models import decoder
from saejax.models.attention import Layer
from saejax.models.config import DecoderConfig
from saejax.models.decoder import run_layers
from saejax.tasks.behaviours import Prompt

_LETTERS = "abcdefghijklmnop"
_BITS, _LENGTH = (1, 3, 5), 9  # positions of the bits; words of a question, "<s>" and "=" among them
_LAST = _LENGTH - 1
LAYERS = 2

# Between (layer, position) as in ``circuits.edges``: words are of layer -1, the logit stands behind the last layer.
CIRCUIT = frozenset(
    {
        ((-1, _BITS[0]), (0, _LAST)),
        ((-1, _BITS[1]), (0, _LAST)),
        ((-1, _BITS[2]), (1, _LAST)),
        ((0, _LAST), (1, _LAST)),
        ((1, _LAST), (LAYERS, _LAST)),
    }
)


class Planted(Algorithm):
    """Questions about three bits."""

    wanted: ClassVar = {PLAIN: 0.99, "interchange": 0.99, "answer": 0.99, "alone": 0.99}
    words = (START, "0", "1", *_LETTERS, "=")
    behaviours = ("differ", "third")

    def draw(self, sort: str, count: int, rng: np.random.Generator) -> Questions:
        ids_BxT = rng.integers(3, 3 + len(_LETTERS), size=(count, _LENGTH))
        ids_BxT[:, 0], ids_BxT[:, _LAST] = 0, len(self.words) - 1
        ids_BxT[:, _BITS] = 1 + rng.integers(2, size=(count, 3))
        odd_B = (ids_BxT[:, _BITS] - 1).sum(1) % 2
        right_Bx1xV = np.arange(len(self.words))[None, None] == 1 + odd_B[:, None, None]
        key_B = ids_BxT[:, 1:_LAST] @ 32 ** np.arange(_LENGTH - 2)
        return Questions(ids_BxT.astype(np.int32), np.full((count, 1), _LAST, np.int32), right_Bx1xV, kept_fresh(key_B))

    def batch(self, count: int, rng: np.random.Generator) -> Questions:
        """Questions to train on; none is fresh, as each lends its variables to another."""
        drawn = self.draw(PLAIN, 2 * count, rng)
        old_N = np.flatnonzero(~drawn.fresh_B)[:count]
        return Questions(*(getattr(drawn, name)[old_N] for name in ("ids_BxT", "place_BxN", "right_BxNxV", "fresh_B")))

    def prompt(self, behaviour: str, split: str, rng: np.random.Generator) -> Prompt | None:
        drawn = self.draw(PLAIN, 1, rng)
        if not drawn.fresh_B[0]:
            return None
        own_T, bits_N = drawn.ids_BxT[0], drawn.ids_BxT[0, _BITS] - 1
        other_T, turned = own_T.copy(), _BITS[2] if behaviour == "third" else _BITS[rng.integers(2)]
        other_T[turned] = 3 - own_T[turned]
        right, wrong = (f" {(bits_N.sum() + more) % 2}" for more in (0, 1))
        text, other = (" ".join(self.words[word] for word in ids_T[1:]) for ids_T in (own_T, other_T))
        labels = (("differ", str(bits_N[0] ^ bits_N[1])), ("third", str(bits_N[2])))
        return Prompt(behaviour, split, text, right, wrong, other, wrong, labels=labels)


def tests(
    config: DecoderConfig, params: Params, ids_BxT: jax.Array, place_BxN: jax.Array, right_BxNxV: jax.Array
) -> Answers:
    """What is asked of the transformer, all in one run; each question's other one is that before it. See ``plain``."""
    start_BxTxD, batch = decoder.embed(config, params, ids_BxT), len(ids_BxT)
    mlp_LxBxTxD = run_layers(config, params, start_BxTxD, 0, LAYERS, collect=("mlp_out",)).collected["mlp_out"]
    bits_Bx3, words_V = ids_BxT[:, jnp.array(_BITS)] - 1, jnp.arange(config.vocab)
    differ_B = bits_Bx3[:, 0] ^ bits_Bx3[:, 1]
    moved_B = 1 + (jnp.roll(differ_B, 1) ^ bits_Bx3[:, 2])
    wanted = {
        PLAIN: right_BxNxV,
        "interchange": (words_V[None] == moved_B[:, None])[:, None],
        "answer": jnp.roll(right_BxNxV, 1, axis=0),
        "alone": right_BxNxV,
    }
    count = len(wanted)
    lent_LxExTxD = jnp.tile(jnp.roll(mlp_LxBxTxD, 1, axis=1), (1, count, 1, 1))
    put_ExLxT = jnp.repeat(_put(), batch, axis=0)

    def hook(kind: str, layer: Layer, value_ExTxD: jax.Array) -> jax.Array:
        if kind != "mlp_out":
            return value_ExTxD
        return jnp.where(put_ExLxT[:, layer, :, None], lent_LxExTxD[layer], value_ExTxD)

    logits_ExNxV = answers(config, params, jnp.tile(ids_BxT, (count, 1)), jnp.tile(place_BxN, (count, 1)), hook)
    return {name: (logits_ExNxV[i * batch : (i + 1) * batch], own) for i, (name, own) in enumerate(wanted.items())}


def _put() -> jax.Array:
    """Where each test puts another question's values in, bool [tests, layers, positions]."""
    put_ExLxT = np.zeros((4, LAYERS, _LENGTH), bool)
    put_ExLxT[1, 0, _LAST] = put_ExLxT[2, 1, _LAST] = True
    put_ExLxT[3, :, :_LAST] = True
    return jnp.asarray(put_ExLxT)
