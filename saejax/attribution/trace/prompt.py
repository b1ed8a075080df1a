"""From a prompt to its attribution graph."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import GraphSettings
from saejax.attribution.local.replacement import Replacement
from saejax.attribution.local.transcoders import LayerTranscoders, open_transcoders
from saejax.attribution.trace.memory import GraphSize, certain_active
from saejax.attribution.trace.room import check_room, fits
from saejax.attribution.trace.rounds import attributed, graph_of
from saejax.attribution.trace.row_store import Put
from saejax.attribution.trace.rows import RowTracer
from saejax.attribution.trace.sources import Sources
from saejax.attribution.trace.targets import Readouts, Target, read_targets
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import Tokens
from saejax.runner.parts import OnProgress, silent


class Traced(NamedTuple):
    """A graph, the replacement model that it is of, and what it explains."""

    graph: Graph
    replacement: Replacement
    readouts: Readouts


def trace(
    model: LanguageModel,
    transcoders: LayerTranscoders | Sequence[Dictionary] | str | Path,
    prompt: str | Sequence[int],
    **options: Any,
) -> Graph:
    """The attribution graph of a prompt: that of ``trace_prompt``, which has the same arguments."""
    return trace_prompt(model, transcoders, prompt, **options).graph


def trace_prompt(
    model: LanguageModel,
    transcoders: LayerTranscoders | Sequence[Dictionary] | str | Path,
    prompt: str | Sequence[int],
    *,
    targets: Sequence[Target] = (),
    max_logits: int = 10,
    logit_mass: float = 0.95,
    max_features: int | None = None,
    bias_nodes: bool = True,
    prepend: bool = True,
    chat: bool = False,
    round_rows: int | None = None,
    on_progress: OnProgress = silent,
) -> Traced:
    """Traces a prompt.

    Args:
      model: the language model.
      transcoders: one for each layer: an open set, dictionaries in memory, or what ``open_transcoders`` opens.
      prompt: the text, or its token ids, which are taken as they are.
      targets: what is explained: tokens, as ids or texts of one token; pairs of them, for the difference of their
        logits; ``Direction``s. None: the most probable next tokens.
      max_logits: most tokens that are explained, if no targets are named; 1 or more.
      logit_mass: of the most probable tokens as few as have this probability together, 0 to 1.
      max_features: most features that get nodes, the most influential ones; None: all active ones.
      bias_nodes: whether biases, and the MLP's output at the first position, get nodes, so that sums are complete.
      prepend: put the tokenizer's first special token before a text that begins with none. At the first position no
        feature is used.
      chat: put a text into the tokenizer's chat template, as what a user says.
      round_rows: with ``max_features``, features that are attributed between two rankings; None: a
        quarter of them, at most 2,048.
      on_progress: called with the rows of the graph that are done and of all; may raise to stop.

    Returns:
      The whole graph, its local replacement model, and the targets.

    Raises:
      UserError: set, model, prompt or targets do not go together, or the graph does not fit into the free memory; the
        message says why.
    """
    dictionaries = _opened(transcoders)
    check_max_features(max_features)
    ids_P = prompt_ids(model, prompt, prepend, chat)
    replacement = _run(model, dictionaries, ids_P, max_features, len(targets) or max_logits)
    readouts = read_targets(replacement, targets, max_logits, logit_mass)
    sources = Sources.of(replacement, bias_nodes)
    active = replacement.active
    count = min(max_features or len(active), len(active))
    rows = RowTracer(replacement, sources, count + len(readouts.labels))

    def fill(new_F: np.ndarray | None, put: Put) -> None:
        if new_F is None:
            rows(readouts.layer_K, readouts.position_K, readouts.vector_KxD, put, in_stream=True)
        else:
            rows(active.layer_A[new_F], active.position_A[new_F], replacement.encoder_rows(new_F), put)

    chosen_F, store = attributed(replacement, sources.nodes, readouts, fill, count, round_rows, on_progress)
    settings = GraphSettings(max_logits=max_logits, logit_mass=logit_mass, max_features=max_features)
    graph = graph_of(replacement, sources.nodes, readouts, chosen_F, store, prompt, settings)
    return Traced(graph, replacement, readouts)


def _opened(transcoders: LayerTranscoders | Sequence[Dictionary] | str | Path) -> LayerTranscoders:
    if isinstance(transcoders, str | Path):
        return open_transcoders(transcoders)
    return transcoders if isinstance(transcoders, LayerTranscoders) else LayerTranscoders.of(transcoders)


def _run(
    model: LanguageModel, dictionaries: LayerTranscoders, ids_P: np.ndarray, max_features: int | None, logits: int
) -> Replacement:
    """The local replacement model; memory is looked at before it is made, and again when its features are counted."""
    dictionaries.check(model)
    first = dictionaries.configs[0]
    size = GraphSize(model.config, first, certain_active(first), max_features, logits)
    size = dataclasses.replace(size, cross_layer=dictionaries.cross_layer)
    _make_room(size, dictionaries, len(ids_P), model.mesh)
    replacement = Replacement.of(model, dictionaries, ids_P)
    density = len(replacement.active) / (model.config.n_layers * (len(ids_P) - 1))
    _make_room(dataclasses.replace(size, active=density), dictionaries, len(ids_P), model.mesh)
    return replacement


def _make_room(size: GraphSize, dictionaries: LayerTranscoders, tokens: int, mesh: Mesh) -> None:
    """Gives up the transcoders that are in memory where the graph does not fit beside them."""
    if not fits(size, tokens, mesh):
        dictionaries.forget()
        check_room(size, tokens, mesh)


def prompt_ids(
    model: LanguageModel, prompt: str | Sequence[int], prepend: bool = True, chat: bool = False
) -> np.ndarray:
    """Token ids of a prompt, int32 [P].

    Args:
      model: whose tokenizer reads a text.
      prompt: the text, or its token ids, which are taken as they are.
      prepend: put the tokenizer's first special token before a text that begins with none.
      chat: put a text into the tokenizer's chat template.

    Raises:
      UserError: the tokenizer has no chat template, or there are no ids, more than the model reads, or one that it
        does not know.
    """
    if not len(prompt):
        raise UserError("the prompt is empty: expected a text, or token ids")
    if chat and isinstance(prompt, str):
        prompt = _in_template(model, prompt)
    if not isinstance(prompt, str):
        ids = np.asarray(prompt, np.int32).reshape(-1)
    else:
        ids = model.tokenize([prompt]).ids_BxT[0]
        tokenizer = model.tokenizer
        first = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
        first = [token for token in first if token is not None]
        if prepend and first and not set(ids[:1].tolist()) & set(tokenizer.all_special_ids):
            ids = np.concatenate([first[:1], ids]).astype(np.int32)
    Tokens(ids[None], np.array([len(ids)], np.int32)).check(model.config.vocab, model.config.context)
    return ids


def _in_template(model: LanguageModel, prompt: str) -> list[int]:
    """Token ids of what a user says and the beginning of the answer; the template writes special tokens itself."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {model.source.name} has no chat template: leave --graph.chat_template out")
    messages = [dict(role="user", content=prompt)]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def check_max_features(max_features: int | None) -> None:
    """A ``UserError`` unless it is None or a number of features."""
    if max_features is not None and max_features < 1:
        raise UserError(f"max_features is {max_features}: expected 1 or more")
