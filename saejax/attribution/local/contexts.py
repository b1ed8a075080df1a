"""Contexts in which features of transcoders fire, searched in texts by their encoders alone."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.attribution.local import layers
from saejax.attribution.local.layers import FrozenModel
from saejax.attribution.local.prompt_run import AT_ONCE, encode_used
from saejax.attribution.local.readouts import padded
from saejax.attribution.local.state import first_used
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import encode, token_text
from saejax.parallel.collectives import to_host
from saejax.progress import OnProgress, silent

_BEFORE, _AFTER = 10, 3  # tokens of a context around its strongest one
_TOKENS = 64  # of each text that are read
_TEXTS = 64  # that run at once
_CONTEXTS = 5  # of a feature, the strongest ones
_FEATURES = 16  # least size to which those of a layer are padded
Context = dict[str, Any]  # ``tokens`` and ``activations``, of equal length


@dataclasses.dataclass(frozen=True)
class ContextSearch:
    """Searches texts."""

    model: LanguageModel
    transcoders: LayerTranscoders
    texts: Sequence[str]

    def contexts(
        self, features: Collection[tuple[int, int]], on_progress: OnProgress = silent
    ) -> dict[tuple[int, int], tuple[Context, ...]]:
        """Return the strongest firings of features, one of each text at most; none of those that do not fire.

        Args:
          features: layer and index of each.
          on_progress: called with the layers run, of all texts, and their total; may raise to stop.

        Raises:
          UserError: an activation is not finite.
        """
        contexts: dict[tuple[int, int], list[Context]] = {feature: [] for feature in features}
        if not contexts:
            return {}
        model, as_text = self.model, token_text(self.model.tokenizer)
        self.transcoders.check(model)
        frozen, count = FrozenModel(model.config, model.params, self.transcoders.reads), 1 + max(contexts)[0]
        starts = range(0, len(self.texts), _TEXTS)
        for start in starts:
            some = [encode(model.tokenizer, text) for text in self.texts[start : start + _TEXTS]]
            some = [ids[: min(_TOKENS, model.config.context)] for ids in some]
            ids_RxT = np.zeros((len(some), padded(max(map(len, some)))), np.int32)
            is_used_RxT = np.zeros(ids_RxT.shape, bool)
            for row, ids in enumerate(some):
                ids_RxT[row, : len(ids)] = ids
                is_used_RxT[row, first_used(model.config, ids_RxT[row]) : len(ids)] = True
            x_RxTxD = jnp.stack([layers.embed(frozen, ids_T) for ids_T in ids_RxT])
            for layer in range(count):
                on_progress(start // _TEXTS * count + layer, len(starts) * count)
                x_RxTxD, read_RxTxD, _ = layers.run_layer(frozen, "none", np.int32(layer), x_RxTxD)
                wanted = sorted(index for at, index in contexts if at == layer)
                if not wanted:
                    continue
                encoder = self.transcoders.encoder(layer, model.mesh)
                value_RxTxU = _activations(encoder, np.array(wanted, np.int32), read_RxTxD, is_used_RxT)
                if not np.isfinite(value_RxTxU).all():
                    raise UserError(
                        f"activations of features in layer {layer} are not finite: the transcoder's or the model's "
                        "weights are damaged"
                    )
                for row, unit in np.argwhere(value_RxTxU.any(axis=1)):
                    value_P = value_RxTxU[row, : len(some[row]), unit]
                    peak = int(value_P.argmax())
                    near = slice(max(peak - _BEFORE, 0), peak + _AFTER + 1)
                    context = dict(tokens=list(map(as_text, some[row][near])), activations=value_P[near].tolist())
                    contexts[layer, wanted[unit]].append(context)
        return {
            feature: tuple(sorted(some, key=lambda context: -max(context["activations"]))[:_CONTEXTS])
            for feature, some in contexts.items()
        }


def _activations(
    encoder: Dictionary, feature_U: np.ndarray, read_RxTxD: jax.Array, is_used_RxT: np.ndarray
) -> np.ndarray:
    """Return activations of some features, 0 where features are not used, fp32 [R, T, U]."""
    column_U = feature_U
    if encoder.kind.is_elementwise():  # TopK compares features with each other, and needs all of them
        # Filled up with copies, so that layers share programs.
        room = padded(len(feature_U), _FEATURES) - len(feature_U)
        encoder, column_U = encoder.restrict(np.pad(feature_U, (0, room), mode="edge")), np.arange(len(feature_U))
    read_NxD, is_used_N = read_RxTxD.reshape(-1, read_RxTxD.shape[-1]), is_used_RxT.reshape(-1)
    size = max(AT_ONCE // encoder.config.n_features, 1)
    chunks = (slice(start, start + size) for start in range(0, len(is_used_N), size))
    value_NxU = np.concatenate(
        [to_host(encode_used(encoder, read_NxD[part], is_used_N[part]))[:, column_U] for part in chunks]
    )
    return value_NxU.reshape(*is_used_RxT.shape, -1)
