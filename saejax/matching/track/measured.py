"""Measured chains of a text: what a feature does to one of a higher layer, that one to the next, and on to the answer.

1. Feature a of the lower dictionary is set to zero at one position: its activation times its decoder row is taken away.
   The link's effect is the share of the activation of feature b, in the dictionary above, that is lost there.
2. The controls take away as much (in norm) along the decoder rows of 19 random features that are active at the same
   position of the lower dictionary.
3. In the same way b is set to zero, and the loss of the answer's log-probability is measured; and that without the
   lowest feature of the chain.
4. A link holds if its effect is above 0 and each control's: by chance, at most one link in twenty. A chain holds if
   all of its links do, and its lowest and its highest feature reach the answer. Where fewer than 19 other features are
   active, as in a TopK dictionary with k = 16, a link cannot be tested, and a chain neither unless another link fails.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.matching.track.firings import LayerFirings, activations
from saejax.matching.track.links import Link, Node, strongest_chains
from saejax.matching.track.results import MeasuredChain, MeasuredLink
from saejax.matching.track.stack import Stack
from saejax.models import decoder
from saejax.models.edits import SiteEdit
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import pad

CHAINS, LINKS = 3, 3  # chains that are measured, links of each at most
CONTROLS = 19  # random features of each link: the fewest with which an effect above all of them has p = 0.05


def measure_chains(
    lm: LanguageModel,
    stack: Stack,
    ids_T: np.ndarray,
    answer: int,
    links: Sequence[Link],
    firings: Sequence[LayerFirings],
    as_text: Callable[[int], str],
    seed: int,
) -> tuple[tuple[MeasuredChain, ...], int]:
    """Return the strongest chains of links between consecutive dictionaries, with effects and their controls.

    Args:
      lm: the language model.
      stack: its dictionaries.
      ids_T: the text, up to where the answer is predicted.
      answer: the answer's token.
      links: of the text.
      firings: of each layer on the text.
      as_text: returns a token's text.
      seed: of the random features.

    Returns:
      The chains, and how many others of the strongest are left out: at their position a dictionary has no other active
      feature, so there is no control.
    """
    # What comes after the answer's position cannot act on the answer.
    usable = [link for link in links if link[0][1] < len(ids_T)]
    run = _Ablation(lm, stack, ids_T, firings, seed)
    measured, left_out = list[MeasuredChain](), 0
    for chain in strongest_chains(usable, CHAINS, LINKS):
        nodes = [chain[0][0], *(target for _, target, _ in chain)]
        # Of each the first is the effect, and the rest are the controls' effects.
        effects = [run.effects(*pair, answer) for pair in zip(nodes, [*nodes[1:], None], strict=True)]
        if min(len(drop) for _, drop in effects) < 2:
            left_out += 1
            continue
        losses, drops = [loss for loss, _ in effects[:-1]], [drop for _, drop in effects]
        parts = [
            MeasuredLink(
                lower=run.site(source),
                source=source[2],
                upper=run.site(target),
                target=target[2],
                position=source[1],
                token=as_text(int(ids_T[source[1]])),
                lost=lost[0],
                random_lost=float(np.mean(lost[1:])),
                answer_drop=drop[0],
                random_drop=float(np.mean(drop[1:])),
                holds=_exceeds_controls(lost),
                reaches_answer=_exceeds_controls(drop),
            )
            for (source, target, _), lost, drop in zip(chain, losses, drops[1:], strict=True)
        ]
        reaches = _exceeds_controls(drops[0])
        measured.append(
            MeasuredChain(
                links=tuple(parts),
                answer_drop=drops[0][0],
                random_drop=float(np.mean(drops[0][1:])),
                reaches_answer=reaches,
                holds=_all([reaches, parts[-1].reaches_answer, *(part.holds for part in parts)]),
            )
        )
    return tuple(measured), left_out


def _exceeds_controls(effects: Sequence[float]) -> bool | None:
    """Return whether the first effect is above 0 and the controls'; None: controls are fewer than there should be."""
    return effects[0] > max(0.0, *effects[1:]) if len(effects) > CONTROLS else None


def _all(answers: Sequence[bool | None]) -> bool | None:
    """Return whether all answers are yes; None if none is no, and some could not be given."""
    return False if False in answers else None if None in answers else True


class _Ablation:
    """Runs of a text without a feature at a position, and without as much along random active features."""

    def __init__(self, lm: LanguageModel, stack: Stack, ids_T: np.ndarray, firings: Sequence[LayerFirings], seed: int):
        self.ids_T, self._lm, self._stack, self._firings, self._seed = ids_T, lm, stack, firings, seed
        self._tokens = pad([ids_T.tolist()] * (2 + CONTROLS))
        self._clean: dict[str, jax.Array] = {}
        # Few dictionaries are in the measured chains, and each is used for several links.
        self._dictionary = functools.cache(lambda place: stack[place].load().with_sink_norms(lm.sink_norm))

    def site(self, node: Node) -> str:
        """Return the site that a node's dictionary reads."""
        return str(self._stack[node[0]].reads)

    def effects(self, node: Node, target: Node | None, answer: int) -> tuple[list[float], list[float]]:
        """Return what is lost without a feature, and with each control.

        Args:
          node: the feature.
          target: a feature of a higher dictionary; None: the answer's loss alone is wanted.
          answer: the answer's token.

        Returns:
          Shares of the target's activation; and losses of the answer's log-probability, in nats.
        """
        edit, count = self._edit(node)
        last = f"resid_post.{self._lm.config.n_layers - 1}"
        sites = {last, self.site(target)} if target else {last}
        values = self._lm(self._tokens, capture=sorted(sites), edits=[edit], logits=False).sites
        # At one position alone: logits of all positions of all rows may not fit.
        last_RxD = values[last][:count, len(self.ids_T) - 1]
        logits_RxV = np.asarray(decoder.unembed(self._lm.config, self._lm.params, last_RxD), np.float64)
        # In float64 from here on: effects on the answer are small differences of log-probabilities.
        logp_R = logits_RxV[:, answer] - np.logaddexp.reduce(logits_RxV, axis=1)
        drops = (logp_R[0] - logp_R[1:]).tolist()
        if not target:
            return [], drops
        # The rows in place of tokens: of each, only the target's position is encoded.
        value_1xRxD = values[self.site(target)][None, :count, target[1]]
        # Attention sinks are those of the text: a long change would make one, where no feature would be left.
        used_1xR = jnp.ones(value_1xRxD.shape[:2], bool)
        f_RxF = activations(self._lm, self._dictionary(target[0]), value_1xRxD, used_1xR)
        clean, *edited = f_RxF[:, target[2]].tolist()
        return [1 - act / clean if clean else 0.0 for act in edited], drops

    def _edit(self, node: Node) -> tuple[SiteEdit, int]:
        """Return an edit of R rows, and R: nothing, without the feature, and without as much along each control."""
        place, position, feature = node
        layer, active = self._stack[place], self._firings[place].at(position)
        of = dict(zip(active.feature_A.tolist(), active.value_A.tolist(), strict=True))
        candidates = np.array(sorted(set(of) - {feature}), np.int64)
        rng = np.random.default_rng([self._seed, *node])
        drawn = rng.choice(candidates, min(CONTROLS, len(candidates)), replace=False).tolist()
        used = self._dictionary(place).restrict(np.array([feature, *drawn]))
        row_D, *control_rows = np.asarray(used.W_dec_FxD[...], np.float32)
        change_D = of[feature] * row_D
        changes = [np.zeros_like(change_D), change_D]
        for control, control_row_D in zip(drawn, control_rows, strict=True):
            row_D = np.sign(of[control]) * control_row_D
            changes.append(row_D * np.linalg.norm(change_D) / max(float(np.linalg.norm(row_D)), 1e-30))
        site = layer.config.target or layer.config.site
        if site not in self._clean:
            # One row serves all: without an edit they are the same.
            one_row = pad([self.ids_T.tolist()])
            self._clean[site] = self._lm(one_row, capture=[site], logits=False).sites[site]
        clean = jnp.repeat(self._clean[site], 2 + CONTROLS, axis=0)
        filled = changes + [changes[0]] * (2 + CONTROLS - len(changes))
        patched = clean.at[:, position].add(-jnp.asarray(np.stack(filled)).astype(clean.dtype))
        return SiteEdit.patch(site, patched), len(changes)
