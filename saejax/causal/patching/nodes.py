"""Nodes of attention heads: estimates of all from train pairs, beside exact patches of some on test pairs.

AtP and AtP* (``heads``) are made on train prompts. The nodes that each puts first, and random ones, are then patched
exactly on test prompts, so that no figure is chosen and judged on the same prompts. Three things keep it honest:

- a third order, by the mean length of the *change* of a node's vector, asks no gradient: what an estimate is worth is
  what it adds to that;
- the rank correlation of an estimate with the size of the effect is taken over random nodes alone, as those that were
  put first are chosen;
- if an estimate says nothing, the nodes that it puts first are one more random set: the Mann-Whitney test of their
  effects' sizes against those of the random nodes keeps its level then, however effects depend on each other.

Nodes whose vector is the same in both runs of every train pair (before the first token that differs) are not counted.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import mannwhitneyu

from saejax.causal.clustered import Resampling, of_prompts
from saejax.causal.patching.atp import estimate_nodes
from saejax.causal.patching.heads import NODES
from saejax.causal.patching.node_patches import NodePlaces, patch_exactly
from saejax.causal.patching.pairs import describe_columns
from saejax.causal.patching.path_table import PathTable, judge_paths
from saejax.causal.patching.paths import LOGITS, Receiver
from saejax.causal.patching.results import EstimatedNodes, NodeEffect, PatchedHeads, PatchedPairs, PathReceiver
from saejax.causal.statistics import rank_correlations
from saejax.interventions.columns import Columns
from saejax.models.language_model import LanguageModel
from saejax.results import Interval
from saejax.runner.parts import OnProgress, silent
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import interval_ends, middle

RANDOM = 100  # nodes, drawn from all that change
ESTIMATES = ("atp_star", "atp", "change")
_RESAMPLES = 1000  # of nodes


@dataclasses.dataclass(frozen=True)
class NodeTable(Columns):
    """Every node that changes; arrays [N].

    Attributes:
      node: one of ``heads.NODES``.
      layer, head: where it is; keys and values have as many heads as the model has of them.
      position: from the end, -1 is the last token.
      atp, atp_star: estimated on train prompts, mean over those that have the position; of ``atp_star`` the size.
      change: the mean length of the change of its vector on these.
      effect, low, high: exact, by how much the logit difference falls on test prompts, mean over those that have the
        position, and its 95 % bootstrap interval; NaN where it was not measured, null in the file.
      drawn: whether it is one of the random nodes.
    """

    kind = "nodes"

    node: np.ndarray
    layer: np.ndarray
    head: np.ndarray
    position: np.ndarray
    atp: np.ndarray
    atp_star: np.ndarray
    change: np.ndarray
    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    drawn: np.ndarray

    def first(self, estimate: str, top: int) -> np.ndarray:
        """The ``top`` nodes of largest size by an estimate, largest first."""
        return np.argsort(-np.abs(getattr(self, estimate)), kind="stable")[:top]

    def put(self, nodes_N: np.ndarray, effect_NxP: np.ndarray, resampling: Resampling) -> None:
        """Puts the effects of some nodes on prompts, NaN where they have no such position, into the table."""
        for position in np.unique(self.position[nodes_N]):
            own_N = self.position[nodes_N] == position
            has_P = ~np.isnan(effect_NxP[own_N][0])
            own_MxQ, nodes = effect_NxP[own_N][:, has_P], nodes_N[own_N]
            self.effect[nodes] = own_MxQ.mean(axis=1)
            self.low[nodes], self.high[nodes] = interval_ends(own_MxQ, resampling.among(has_P).share_RxP)


class HeadPatching:
    """The nodes of one behaviour.

    Args:
      name: of the behaviour; with the seed it decides the random nodes.
      train: prompts with counterparts of as many tokens, which estimate.
      pairs: test prompts of that sort, which judge.
      config: of the stage; ``top`` nodes of each estimate are patched.
      on_progress: called with the rows done and to do; may raise to stop.

    Attributes:
      clean_P, corrupted_P: logit differences of the test prompts and of their counterparts, float64.
      table: all nodes.
      paths, path_table: what tells the logits and the first ``config.paths`` queries, keys and values; none if 0.

    Raises:
      UserError: something is not finite.
    """

    def __init__(
        self,
        model: LanguageModel,
        name: str,
        train: Sequence[Prompt],
        pairs: Sequence[Prompt],
        config: PatchConfig,
        on_progress: OnProgress = silent,
    ):
        self._top, self._seed = config.top, [config.seed, *name.encode()]
        self._described = describe_columns(model, pairs)
        table = estimated(model, train, len(self._described), on_progress)
        drawn = np.random.default_rng(self._seed).permutation(len(table.node))[:RANDOM]
        table.drawn[drawn] = True
        measured = np.unique([*drawn, *(n for name in ESTIMATES for n in table.first(name, config.top))]).astype(int)
        places = NodePlaces(*(getattr(table, name)[measured] for name in NodePlaces._fields))
        found = patch_exactly(model, pairs, places, config.batch_rows, on_progress)
        self.clean_P, self.corrupted_P, effect_NxP = found
        resampling = of_prompts(pairs, config.bootstrap, config.seed)
        table.put(measured, effect_NxP, resampling)
        self.table = table
        self.paths: tuple[PathReceiver, ...] = ()
        self.path_table: PathTable | None = None
        if config.paths:
            receivers = self._receivers(model, resampling, config.paths)
            found_paths = judge_paths(model, pairs, receivers, resampling, config.batch_rows, on_progress)
            self.paths, self.path_table = found_paths

    def _receivers(self, model: LanguageModel, resampling: Resampling, count: int) -> list[tuple[Receiver, Interval]]:
        """The logits and the first so many queries, keys and values, each with the effect of patching it whole."""
        first = map(self._effect, self.table.first("atp_star", self._top))
        nodes = [one for one in first if one.node != "output" and one.layer][:count]
        whole = resampling.mean(self.clean_P - self.corrupted_P)
        found = [(Receiver(LOGITS, model.config.n_layers, 0, -1), whole)]
        return found + [(Receiver(one.node, one.layer, one.head, one.position), one.effect) for one in nodes]

    def results(self, pairs: PatchedPairs) -> PatchedHeads:
        """How well each estimate orders nodes, and the effects of those that AtP* puts first."""
        table, random_N = self.table, np.abs(self.table.effect[self.table.drawn])
        return PatchedHeads(
            **vars(pairs),
            columns=self._described,
            nodes=len(table.node),
            measured=int((~np.isnan(table.effect)).sum()),
            random=_over_nodes(lambda some_RxN: random_N[some_RxN].mean(axis=1), len(random_N), self._seed),
            estimates={name: judge(table, name, self._top, self._seed) for name in ESTIMATES if len(random_N)},
            strongest=tuple(self._effect(n) for n in table.first("atp_star", self._top)),
            paths=self.paths,
        )

    def _effect(self, n: int) -> NodeEffect:
        table = self.table
        return NodeEffect(
            node=str(table.node[n]),
            layer=int(table.layer[n]),
            head=int(table.head[n]),
            position=int(table.position[n]),
            effect=Interval(float(table.effect[n]), float(table.low[n]), float(table.high[n])),
            atp=float(table.atp[n]),
            atp_star=float(table.atp_star[n]),
        )


def estimated(model: LanguageModel, train: Sequence[Prompt], columns: int, on_progress: OnProgress) -> NodeTable:
    """All nodes that change, at the last ``columns`` positions at most, with no effects yet."""
    found = estimate_nodes(model, train, on_progress)
    parts: dict[str, list[np.ndarray]] = {}
    for node in NODES:
        change_LxTxH = found.change[node][:, -columns:]
        places = np.nonzero(change_LxTxH)
        parts.setdefault("node", []).append(np.full(len(places[0]), node, object))
        position_N = places[1] - change_LxTxH.shape[1]
        for name, values_N in dict(layer=places[0], head=places[2], position=position_N).items():
            parts.setdefault(name, []).append(values_N)
        for name in ESTIMATES:
            parts.setdefault(name, []).append(getattr(found, name)[node][:, -columns:][places])
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    unknown = {name: np.full(len(joined["node"]), np.nan) for name in ("effect", "low", "high")}
    return NodeTable(**joined, **unknown, drawn=np.zeros(len(joined["node"]), bool))


def judge(table: NodeTable, estimate: str, top: int, seed: Sequence[int]) -> EstimatedNodes:
    """How an estimate orders the random nodes, and whether those that it puts first have larger effects.

    Args:
      table: with the effects of both; at least one random node.
      estimate: one of ``ESTIMATES``.
      top: how many it puts first.
      seed: of the bootstrap over nodes.
    """
    drawn, first = np.flatnonzero(table.drawn), table.first(estimate, top)
    guess_N, size_N = np.abs(getattr(table, estimate)[drawn]), np.abs(table.effect[drawn])
    correlation = None
    if np.ptp(guess_N) > 0 and np.ptp(size_N) > 0:
        correlation = _over_nodes(
            lambda some_RxN: np.nan_to_num(rank_correlations(guess_N[some_RxN], size_N[some_RxN])), len(drawn), seed
        )
    top_K = np.abs(table.effect[first])
    others_M = np.abs(table.effect[np.setdiff1d(drawn, first)])  # random ones of those that were not put first
    p_value = float(mannwhitneyu(top_K, others_M, alternative="greater").pvalue) if len(others_M) else None
    return EstimatedNodes(correlation, top=float(top_K.mean()), p_value=p_value)


def said(results: PatchedHeads) -> str:
    """The result in a line."""
    if results.random is None:
        return "no head's vector differs between prompts and counterparts"
    best = results.estimates["atp_star"]
    order = "not defined" if best.correlation is None else f"{best.correlation.mean:.2f}"
    return (
        f"{results.measured:,} of {results.nodes:,} nodes patched: rank correlation of AtP* with the effect {order}; "
        f"its first {len(results.strongest)} move {best.top:.2f} logits on average, random ones "
        f"{results.random.mean:.2f}"
    )


def _over_nodes(statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: Sequence[int]) -> Interval | None:
    """A statistic of nodes and its 95 % bootstrap interval over them; None of no nodes."""
    if not count:
        return None
    some_RxN = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    return middle(statistic(some_RxN), float(statistic(np.arange(count)[None])[0]))
