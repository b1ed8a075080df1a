"""Measured links of a text: what a feature does to one of a higher layer, and that one to the answer, with controls.

1. Feature a of the lower dictionary is set to zero at one position: its activation times its decoder row is taken away.
   The link's effect is the share of the activation of feature b, in the dictionary above, that is lost there.
2. The control takes away as much (in norm) along the decoder rows of five random features that are active at the same
   position of the lower dictionary.
3. In the same way b is set to zero, and the loss of the answer's log-probability is measured.
4. A link holds if its effect is above that of each of the five: by chance, one link in six.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from saejax.dictionaries import Dictionary
from saejax.matching.track.firings import LayerFirings, activations
from saejax.matching.track.links import GEOMETRY, FeatureLinks, Node
from saejax.matching.track.results import MeasuredLink
from saejax.matching.track.stack import Stack
from saejax.models.edits import SiteEdit
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import pad

LINKS, CONTROLS = 6, 5  # links that are measured, the strongest; random features of each


def measure_links(
    lm: LanguageModel,
    stack: Stack,
    ids_T: np.ndarray,
    answer: int,
    links: FeatureLinks,
    firings: Sequence[LayerFirings],
    as_text: Callable[[int], str],
    seed: int,
) -> tuple[MeasuredLink, ...]:
    """Return the strongest links between consecutive dictionaries, each with its effects and their controls.

    Args:
      lm: the language model.
      stack: its dictionaries.
      ids_T: the text, up to where the answer is predicted.
      answer: the answer's token.
      links: of the text; those by attribution are effects already, and are not measured.
      firings: of each layer on the text.
      as_text: returns a token's text.
      seed: of the random features.
    """
    if links.kind != GEOMETRY:
        return ()
    usable = [link for link in links.links if link[0][1] < len(ids_T)]
    measured, run = [], _Ablation(lm, stack, ids_T, firings, seed)
    for source, target, weight in sorted(usable, key=lambda link: -abs(link[2]))[:LINKS]:
        upper, of_target = stack.layers[target[0]], run.dictionary(target[0])
        values_RxTxD, _ = run(source, str(upper.reads))
        clean, *edited = (
            float(activations(lm, of_target, value_TxD[None])[target[1], target[2]]) for value_TxD in values_RxTxD
        )
        lost = [1 - act / clean if clean else 0.0 for act in edited]
        _, logits_RxV = run(target, str(upper.reads))
        logp_RxV = logits_RxV - np.logaddexp.reduce(logits_RxV, axis=1, keepdims=True)
        drop = [float(logp_RxV[0, answer] - row_V[answer]) for row_V in logp_RxV[1:]]
        if len(lost) < 2 or len(drop) < 2:
            continue  # no other feature is active there
        measured.append(
            MeasuredLink(
                lower=str(stack.layers[source[0]].reads),
                source=source[2],
                upper=str(upper.reads),
                target=target[2],
                position=source[1],
                token=as_text(int(ids_T[source[1]])),
                weight=weight,
                lost=lost[0],
                random_lost=float(np.mean(lost[1:])),
                answer_drop=drop[0],
                random_drop=float(np.mean(drop[1:])),
                controls=len(lost) - 1,
                holds=len(lost) > CONTROLS and lost[0] > max(lost[1:]),
                reaches_answer=len(drop) > CONTROLS and drop[0] > max(drop[1:]),
            )
        )
    return tuple(measured)


class _Ablation:
    """Runs of a text without a feature at a position, and without as much along random active features.

    Args:
      lm: the language model.
      stack: its dictionaries.
      ids_T: the text.
      firings: of each layer on it.
      seed: of the random features.
    """

    def __init__(self, lm: LanguageModel, stack: Stack, ids_T: np.ndarray, firings: Sequence[LayerFirings], seed: int):
        self._lm, self._stack, self._firings, self._seed = lm, stack, firings, seed
        self._tokens = pad([ids_T.tolist()] * (2 + CONTROLS))
        self._last, self._dictionaries = len(ids_T) - 1, dict[int, Dictionary]()

    def dictionary(self, place: int) -> Dictionary:
        """Return the dictionary at a place of the stack, which is loaded once."""
        if place not in self._dictionaries:
            self._dictionaries[place] = self._stack.layers[place].load().with_sink_norms(self._lm.sink_norm)
        return self._dictionaries[place]

    def __call__(self, node: Node, capture: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a site's values [R, T, D] and the last logits [R, V]: clean, without the feature, and controls."""
        place, position, feature = node
        each, W_dec_FxD = self._stack.layers[place], np.asarray(self.dictionary(place).W_dec_FxD[...], np.float32)
        active = self._firings[place].at(position)
        of = dict(zip(active.feature_A.tolist(), active.value_A.tolist(), strict=True))
        change_D = of[feature] * W_dec_FxD[feature]
        others = np.array(sorted(set(of) - {feature}), np.int64)
        rng = np.random.default_rng([self._seed, *node])
        drawn = rng.choice(others, min(CONTROLS, len(others)), replace=False).tolist()
        changes = [np.zeros_like(change_D), change_D]
        for other in drawn:
            row_D = np.sign(of[other]) * W_dec_FxD[other]
            changes.append(row_D * np.linalg.norm(change_D) / max(float(np.linalg.norm(row_D)), 1e-30))
        site = each.config.target or each.config.site
        clean = self._lm(self._tokens, capture=[site], logits=False).sites[site]
        filled = changes + [changes[0]] * (2 + CONTROLS - len(changes))
        patched = clean.at[:, position].add(-jnp.asarray(np.stack(filled)).astype(clean.dtype))
        output = self._lm(self._tokens, capture=[capture], edits=[SiteEdit.patch(site, patched)])
        assert output.logits_BxTxV is not None
        logits_RxV = np.asarray(output.logits_BxTxV[: len(changes), self._last], np.float64)
        return np.asarray(output.sites[capture], np.float32)[: len(changes)], logits_RxV
