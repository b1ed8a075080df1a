"""Trace a prompt into an attribution graph.

1. The model is run once, and its local replacement model holds what is frozen (``LocalModel``).
2. The targets are chosen: logits, differences of logits, or other directions (``read_targets``).
3. Rows are computed by pulling targets back to all sources: first those of the readouts, then those of features, in
   rounds of the most influential ones so far (``attribute_in_rounds``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saejax.attribution.graph import Graph
from saejax.attribution.local.model import AnySet, LocalModel, open_set
from saejax.attribution.local.prompt_run import prompt_ids
from saejax.attribution.local.rows import Put
from saejax.attribution.local.transcoders import LayerTranscoders
from saejax.attribution.trace.memory import GraphSize, certain_active, check_memory, estimate_memory, free_memory
from saejax.attribution.trace.rounds import Traced, attribute_in_rounds, make_graph
from saejax.attribution.trace.targets import Target, read_targets
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.runner.parts import OnProgress, silent


def trace(model: LanguageModel, transcoders: AnySet, prompt: str | Sequence[int], **options: Any) -> Graph:
    """Return the attribution graph of a prompt: that of ``trace_prompt``, which has the same arguments."""
    return trace_prompt(model, transcoders, prompt, **options).graph


def trace_prompt(
    model: LanguageModel,
    transcoders: AnySet,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] = (),
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    chat: bool = False,
    on_progress: OnProgress = silent,
) -> Traced[LocalModel]:
    """Trace a prompt.

    Args:
      model: the language model.
      transcoders: one for each layer: an open set, dictionaries in memory, or what ``open_transcoders`` opens.
      prompt: the text, before which the tokenizer's first special token is put if it begins with none, or its token
        ids, which are taken as they are. At the first position no feature is used.
      targets: what is explained: tokens, as ids or texts of one token; pairs of them, for the difference of their
        logits; ``Direction``s. None: the most probable next tokens.
      max_logits: maximum number of tokens that are explained, if no targets are named; 1 or more.
      logit_mass: the smallest set of most probable tokens with this total probability is explained, 0 to 1.
      max_features: maximum number of features with nodes, the most influential ones; None: all active ones.
      chat: put a text into the tokenizer's chat template, as a user's turn.
      on_progress: called with the rows of the graph that are done and of all; may raise to stop.

    Returns:
      The whole graph, its local replacement model, and the targets.

    Raises:
      UserError: set, model, prompt or targets do not go together, or the graph does not fit into the free memory; the
        message says why.
    """
    dictionaries = open_set(transcoders)
    check_max_features(max_features)
    ids_P = prompt_ids(model, prompt, chat)
    local = _run(model, dictionaries, ids_P, max_features, len(targets) or max_logits)
    readouts = read_targets(local, targets, max_logits, logit_mass)
    active, nodes = local.active, local.sources.nodes
    count = min(max_features or len(active), len(active))
    rows = local.row_tracer(count + len(readouts.labels))

    def fill(new_F: np.ndarray | None, put: Put) -> None:
        if new_F is None:
            rows(readouts.layer_K, readouts.position_K, readouts.vector_KxD, put, in_stream=True)
        else:
            rows(active.layer_A[new_F], active.position_A[new_F], local.encoder_rows(new_F), put)

    chosen_F, store = attribute_in_rounds(local, nodes, readouts, fill, count, on_progress)
    settings = dict(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features)
    return Traced(make_graph(local, nodes, readouts, chosen_F, store, prompt, settings), local, readouts)


def _run(
    model: LanguageModel, dictionaries: LayerTranscoders, ids_P: np.ndarray, max_features: int | None, logits: int
) -> LocalModel:
    """Return the local model; memory is checked before it is made, and again when its features are counted."""
    dictionaries.check(model)
    first = dictionaries.configs[0]

    def make_room(active: float) -> None:
        """Free the encoders that are in memory where the graph does not fit beside them."""
        size = GraphSize(model.config, first, active, max_features, logits, dictionaries.cross_layer)
        if not estimate_memory(size, len(ids_P), model.mesh).fits(free_memory(model.mesh), model.mesh):
            dictionaries.forget()
            check_memory(size, len(ids_P), model.mesh)

    make_room(certain_active(first))
    local = LocalModel(model, dictionaries, ids_P)
    # The features of this prompt, counted, in place of those that were certain before.
    make_room(len(local.active) / (model.config.n_layers * (len(ids_P) - 1)))
    return local


def check_max_features(max_features: int | None) -> None:
    """Refuse, with a ``UserError``, what is neither None nor a number of features."""
    if max_features is not None and max_features < 1:
        raise UserError(f"max_features is {max_features}: expected 1 or more")
