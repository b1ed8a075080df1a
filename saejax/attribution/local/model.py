"""``LocalModel``: the local replacement model of a prompt, and what can be done with it.

    local = saejax.LocalModel(lm, transcoders, "The capital of France is")
    local.run([[saejax.Change(layer=3, position=4, feature=17, value=0.0)]])    # the prompt with features edited
    local.pullback(layer_R, position_R, vector_RxD)                             # what each source adds to each target

Attention patterns and norm scales are those of the prompt, so ``pullback`` is linear; it goes from targets down to all
sources. ``run`` computes the model again, with as much of it frozen as is asked for.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from saejax.arguments import as_index, check_classes, suggests_names
from saejax.attribution.local.dictionaries import LayerTranscoders, open_transcoders
from saejax.attribution.local.edits import (
    TOGETHER,
    Change,
    ChangeEdits,
    Readings,
    as_rows,
    has_begun,
    place_in_texts,
    plan_edits,
)
from saejax.attribution.local.rows import Readouts, RowTracer, Sources
from saejax.attribution.local.state import (
    FIXED,
    FREEZE_MODES,
    TEXT_MODES,
    LocalRun,
    LocalState,
    check_finite,
    embed,
    padded,
    prompt_ids,
    read_logits,
    run_layer,
)
from saejax.dictionaries import Dictionary
from saejax.dictionaries.bos import follow_bos
from saejax.errors import UserError
from saejax.models.generation import eos_ids
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row
from saejax.progress import OnProgress
from saejax.short_reprs import has_short_repr
from saejax.wording import counted

AnySet = LayerTranscoders | Sequence[Dictionary] | str | Path


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Continuation:
    """A continuation: the new tokens, int32 [N], and the logits from which each was taken, fp32 [N, V].

    It has no token that ends a text; ``finished`` says why it ended: "eos" (the model ended it) or "length".
    """

    ids_N: np.ndarray
    logits_NxV: np.ndarray
    finished: str


@suggests_names
class LocalModel(LocalState):
    """The local replacement model of one prompt; ``LocalState`` has its attributes.

    Args:
      lm: the language model.
      transcoders: an open set, dictionaries of all layers in memory, or what ``open_transcoders`` opens.
      prompt: a text, or its token ids, which are taken as they are; see ``prompt_ids``.
      chat: put a text into the tokenizer's chat template, as a user's turn.

    Raises:
      UserError: the set does not belong to the model, or the prompt cannot be run; see ``LocalState``.
    """

    def __init__(
        self,
        lm: LanguageModel,
        transcoders: AnySet,
        prompt: str | Sequence[int] | np.ndarray,
        *,
        chat: bool = False,
    ):
        opened = open_set(transcoders)
        lm = follow_bos(lm, opened.configs)
        super().__init__(lm, opened, prompt_ids(lm, prompt, chat))

    def __repr__(self) -> str:
        return (
            f"<LocalModel of {self.model.source.name} and {self.dictionaries.name}: "
            f"{counted(len(self.ids_P), 'token')}, {counted(len(self.active), 'active feature')}>"
        )

    @functools.cached_property
    def sources(self) -> Sources:
        """The sources of the graph, biases among them."""
        return Sources.of(self)

    def run(
        self,
        edits: Change | Sequence[Sequence[Change]],
        freeze: str = "none",
        *,
        readouts: Readouts | None = None,
        features: Sequence[int] | np.ndarray = (),
        freeze_until: int | None = None,
        logits: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> LocalRun:
        """Run the prompt with each row of edits.

        Args:
          edits: rows of changes that are made together (an empty row is the prompt itself); a change alone is a row of
            its own.
          freeze: what stays as in the prompt: "none"; "attention", the attention patterns; "all", norm scales and MLP
            outputs too, so that all is linear and a change has the effect that the graph's edges say; "constrained",
            circuit-tracer's mode, which freezes attention patterns and MLP outputs up to ``freeze_until``.
          readouts: what is read at the end, from ``read_targets``; None: nothing.
          features: active features, as indices into ``active``, whose pre-activations are read.
          freeze_until: the layer from which on the model runs freely; the number of layers: only the final norm does.
            None: ``freeze`` applies to all.
          logits: whether to compute all logits at the last position.
          on_progress: called with the layers run, of all chunks, and their total; may raise to stop. None: nothing is.

        Raises:
          UserError: a feature does not exist or is changed twice in a row, there is no such mode, or what is read is
            not finite.
        """
        n_layers, length, last = self.model.config.n_layers, self.stream_LxTxD.shape[1], len(self.ids_P) - 1
        edits = as_rows(edits)
        modes, plans = _freeze_by_layer(freeze, freeze_until, n_layers), plan_edits(self, edits)
        changed = {layer for _, plan in plans for layer in plan.layers}
        if freeze == "constrained" and any(modes[layer] not in FIXED for layer in changed):
            raise UserError(
                f"a feature of layer {max(changed)} is changed, and layers below {freeze_until} are constrained"
            )
        readings = Readings(self, len(edits), readouts, features, logits)
        # Of cross-layer transcoders, what features wrote waits for all later layers, too.
        waiting = 1 + self.dictionaries.cross_layer * n_layers
        most_numbers = max((plan.rows for _, plan in plans), default=1) * math.prod(self.stream_LxTxD.shape[1:])
        together = max(TOGETHER // (waiting * most_numbers), 1)
        for start in range(0, len(plans), together):
            group, states = plans[start : start + together], dict[int, jax.Array]()
            lowest = [min(plan.layers, default=n_layers) for _, plan in group]
            # All chunks of a group pass a layer before the next one: each encoder may have to be read from disk.
            for layer, (number, (rows, plan)) in itertools.product(range(n_layers), enumerate(group)):
                if layer < lowest[number]:
                    continue  # below all changes the rows are the prompt
                if number not in states:
                    tiled = jnp.tile(self.stream_LxTxD[layer][None], (plan.rows, 1, 1))
                    (states[number],) = by_row(self.model.mesh, tiled)
                streams = jnp.concatenate([self.stream_LxTxD[layer][None], states[number]])
                leaving, read = self._run_layer(layer, modes[layer], streams, plan, length)
                states[number] = leaving[1:]
                readings.read_layer(rows, layer, read)
                if on_progress:
                    on_progress(start * n_layers + layer * len(group) + number + 1, len(plans) * n_layers)
            for number, state in states.items():
                rows = group[number][0]
                end = self.frozen, modes[-1], self.last_D, state[:, last]
                readings.read_last(rows, *end)
                if readings.logits_RxV is not None:
                    readings.logits_RxV[rows] = to_host(read_logits(*end))[: rows.stop - rows.start]
        return readings.checked()

    def _run_layer(
        self, layer: int, mode: str, x_BxTxD: jax.Array, plan: ChangeEdits, frozen_until: int
    ) -> tuple[jax.Array, jax.Array]:
        """Run a layer on the prompt, from which what is frozen is taken, and on edited rows after it.

        Returns:
          The streams leaving the layer, and what its transcoder reads, each [B, T, D].
        """
        leaving, read, _ = run_layer(self.frozen, mode, np.int32(layer), x_BxTxD, frozen_until)
        difference = plan.difference(layer, mode, read[1:])
        return leaving if difference is None else leaving.at[1:].add(difference), read

    def generate(
        self,
        changes: Change | Sequence[Change],
        max_new_tokens: int,
        freeze: str = "none",
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Continuation:
        """Continue the prompt with changes; see ``generate_rows``."""
        row = [changes] if isinstance(changes, Change) else changes
        return self.generate_rows([row], max_new_tokens, freeze, temperature=temperature, seed=seed)[0]

    def generate_rows(
        self,
        edits: Change | Sequence[Sequence[Change]],
        max_new_tokens: int,
        freeze: str = "none",
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> list[Continuation]:
        """Continue the prompt with each row of changes, up to a token that ends a text.

        A change at a position is made there in every pass; one at a slice without an end goes on at the new tokens.
        With frozen attention, the prompt's own tokens attend as in the prompt, new ones as in the changed run. The
        prompt is run again for each token, so this is for tens of tokens. All rows sample with the same random
        numbers, so that they differ only where the changes make them.

        Args:
          edits: rows of changes that are made together (an empty row: nothing is changed); a slice without an end,
            such as ``slice(3, None)``, also means the new tokens.
          max_new_tokens: 1 or more; fewer are made where the text or the model's context ends.
          freeze: "none" or "attention".
          temperature: of the distribution from which tokens are sampled, 0 or above; 0: the most probable one is taken.
          seed: of the sample, 0 or above.
          on_progress: called with the tokens done and of all; may raise to stop. None: nothing is.

        Raises:
          UserError: a feature or position does not exist, there is no such mode, or a number is out of its range.
        """
        edits = as_rows(edits)
        if freeze not in TEXT_MODES or not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
            raise UserError(
                f"freeze is {freeze!r} and max_new_tokens {max_new_tokens}: expected none or attention, and 1 or more"
            )
        if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
            raise UserError(f"temperature is {temperature!r}: expected a number, 0 or above")
        if not isinstance(seed, Integral) or seed < 0:
            raise UserError(f"seed is {seed!r}: expected a whole number, 0 or above")
        length, rng = len(self.ids_P), np.random.default_rng(seed)
        most = min(max_new_tokens, self.model.config.context - length)
        placed = [[place_in_texts(change, length) for change in changes] for changes in edits]
        ChangeEdits(self, placed, length + most).warn_of_sinks()  # refuses what no pass could make
        ends = eos_ids(self.model.source.folder, self.model.tokenizer)
        ids, logits = [self.ids_P.tolist() for _ in edits], [list[np.ndarray]() for _ in edits]
        open_rows = set(range(len(edits)))
        for step in range(most):
            if on_progress:
                on_progress(step, most)
            count = length + step
            plan = ChangeEdits(self, [[change for change in row if has_begun(change, count)] for row in placed], count)
            # Padded, so that a program serves several lengths. Rows that have ended go along.
            ids_BxT = np.zeros((1 + len(edits), padded(count)), np.int32)
            for row, row_ids in enumerate([self.ids_P, *ids]):  # the first row is the prompt
                ids_BxT[row, : len(row_ids)] = row_ids
            x_BxTxD = embed(self.frozen, ids_BxT)
            for layer in range(self.model.config.n_layers):
                x_BxTxD, _ = self._run_layer(layer, freeze, x_BxTxD, plan, length)
            last_BxD = x_BxTxD[:, count - 1]
            logits_RxV = check_finite(to_host(read_logits(self.frozen, "none", last_BxD[0], last_BxD[1:])))
            score_RxV = logits_RxV
            if temperature:  # Gumbel-max sampling; a tiny temperature as a divisor would make all logits infinite
                score_RxV = logits_RxV + temperature * rng.gumbel(size=logits_RxV.shape[1])
            for row in sorted(open_rows):
                best = int(score_RxV[row].argmax())
                if best in ends:
                    open_rows.remove(row)
                else:
                    ids[row].append(best)
                    logits[row].append(logits_RxV[row])
            if not open_rows:
                break
        none = np.empty((0, self.model.config.vocab), np.float32)
        return [
            Continuation(
                np.array(ids[row][length:], np.int32),
                np.stack(logits[row]) if logits[row] else none,
                "length" if row in open_rows else "eos",
            )
            for row in range(len(edits))
        ]

    def pullback(
        self,
        layer_R: np.ndarray,
        position_R: np.ndarray,
        vector_RxD: np.ndarray,
        in_stream: bool = False,
    ) -> np.ndarray:
        """Return what each source adds to each target: the rows of a graph, fp32 [R, S].

        Args:
          layer_R: int32 layer whose transcoder reads; or, of directions of the stream, the layer that it enters.
          position_R: int32 positions.
          vector_RxD: the directions that are read.
          in_stream: whether the directions are of the stream.
        """
        row_RxS = np.zeros((len(layer_R), len(self.sources.nodes)), np.float32)
        rows = RowTracer(self, self.sources, len(layer_R))
        rows(layer_R, position_R, vector_RxD, row_RxS.__setitem__, in_stream)
        return row_RxS


def open_set(transcoders: AnySet) -> LayerTranscoders:
    """Return an open set of transcoders of a path, of dictionaries in memory, or of itself."""
    if isinstance(transcoders, str | Path):
        return open_transcoders(transcoders)
    return transcoders if isinstance(transcoders, LayerTranscoders) else LayerTranscoders.of(transcoders)


@check_classes
def intervene(local: LocalModel, edits: Change | Sequence[Sequence[Change]], freeze: str = "none") -> np.ndarray:
    """Return the logits at a prompt's last position with each row of changes, fp32 [R, V]; see ``LocalModel.run``."""
    logits_RxV = local.run(edits, freeze).logits_RxV
    assert logits_RxV is not None
    return logits_RxV


def _freeze_by_layer(freeze: str, freeze_until: int | None, n_layers: int) -> list[str]:
    """Return what each layer keeps of the prompt, and after them the final norm.

    Raises:
      UserError: there is no such mode, or no such layer.
    """
    if freeze not in FREEZE_MODES:
        raise UserError(f"freeze is {freeze!r}: expected one of {', '.join(FREEZE_MODES)}")
    if freeze_until is not None and not 0 <= as_index(freeze_until) <= n_layers:
        raise UserError(f"freeze_until is {freeze_until}: expected a layer, 0 to {n_layers - 1}, or {n_layers}")
    until = n_layers + 1 if freeze_until is None else freeze_until
    after = "none"
    if freeze == "constrained":
        freeze, after = ("all", "all") if until >= n_layers else (freeze, "attention")
    return [freeze if layer < until else after for layer in range(n_layers + 1)]
