"""Descriptions of the features of a pruned graph that are made for its page, and written beside it.

Features without a name are searched in texts, and a Jacobian lens says which tokens each raises and lowers. A graph in
a notebook is described by ``describe_graph``.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution.forms.document import GraphDocument
from saejax.attribution.forms.features import FEATURES, Feature, FeatureDetails, open_folder, write_details
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import FEATURE
from saejax.attribution.local.contexts import ContextSearch
from saejax.attribution.settings import GraphConfig
from saejax.errors import UserError
from saejax.interpret.jacobian_lens import load_jacobian_lens
from saejax.interpret.neighbours import tokens_through_lens
from saejax.models.language_model import LanguageModel
from saejax.page.graph.page import kept_features
from saejax.parallel.collectives import from_first_process, is_first_process
from saejax.progress import OnProgress, silent
from saejax.runner.workspace import Run
from saejax.stages.attribute.outputs import details_of_features, write_lens
from saejax.stages.attribute.requests import read_labels
from saejax.stages.attribute.traces import add_searched, copy_contexts, searched_features
from saejax.tasks.corpora import read_corpus
from saejax.tasks.settings import CorpusConfig

# Gives the model and the dictionaries, which are opened at the first call.
Parts = Callable[[], tuple[LanguageModel, Any]]


class Descriptions:
    """Contexts of features, and tokens by a lens; the texts and the lens are read once for all prompts of a run.

    Args:
      run: of the stage.
      parts: gives the model and the dictionaries.

    Raises:
      UserError: the folder of feature files, or the file of a lens, is none, or is of another model.
    """

    def __init__(self, run: Run, parts: Parts):
        self._run, self._parts, self._config = run, parts, run.configs[GraphConfig]
        # Before hours are spent on a trace.
        if self._config.features:
            open_folder(self._config.features)
        self._lens = load_jacobian_lens(parts()[0], self._config.lens) if self._config.lens else None

    @functools.cached_property
    def _search(self) -> ContextSearch:
        texts = [document.text for document in read_corpus(CorpusConfig())[: self._config.contexts]]
        return ContextSearch(*self._parts(), texts)

    def write(self, document: GraphDocument, saved: Path | None, on_progress: OnProgress) -> None:
        """Find out what the configuration asks for, and write it beside the graph.

        Args:
          document: the pruned graph.
          saved: the trace that an earlier unit holds, whose contexts are taken; None: there is none.
          on_progress: called with the work done and of all; may raise to stop.
        """
        if self._config.contexts and self._config.transcoders:
            self._search_contexts(document, saved, on_progress)
        if self._lens:
            # Every process reads, as the devices of all hold the unembedding.
            read = tokens_through_lens(*self._parts(), kept_features(document), self._lens.jacobians)
            if is_first_process():
                write_lens(self._run.folder, read)

    def _search_contexts(self, document: GraphDocument, saved: Path | None, on_progress: OnProgress) -> None:
        """Search contexts of features without a name; those that an earlier unit searched are taken from there."""
        run, features = self._run, kept_features(document)
        if is_first_process():
            copy_contexts(run, saved and saved.parent)
        # Every process searches, as the devices of all run the texts; the first one says what is missing.
        details, done = details_of_features(self._config, features), searched_features(run)
        is_named = [feature in done or (feature in details and bool(details[feature].name)) for feature in features]
        is_named_F = from_first_process(np.array(is_named, np.int32))
        missing = [feature for feature, named in zip(features, is_named_F, strict=True) if not named]
        if not missing:
            return
        searched = search_details(self._search, missing, on_progress)
        if is_first_process():
            write_details(run.folder / FEATURES, searched)
            add_searched(run, set(missing))


def search_details(
    search: ContextSearch, features: Collection[Feature], on_progress: OnProgress = silent
) -> dict[Feature, FeatureDetails]:
    """Return what texts tell of features; for ``on_progress`` see ``ContextSearch.firings``."""
    return {
        feature: FeatureDetails(fired.contexts, quantiles=fired.quantiles, histogram=fired.histogram)
        for feature, fired in search.firings(features, on_progress).items()
    }


def describe_graph(graph: Graph, features: str, search: ContextSearch | None) -> dict[Feature, FeatureDetails]:
    """Return what is known of the features of a pruned graph, as the stage shows it.

    It is in the folder of feature files, in a local set's own folder, and in the workdir that trained the set. Nothing
    of a set on the hub is fetched, unless the folder is there.

    Args:
      graph: the pruned graph.
      features: a folder of feature files, here or on the hub; "": none.
      search: searches the features that have no name after that; None: they stay without.

    Raises:
      UserError: there is no such folder, or a file is damaged; or the search has the features of another set.
    """
    name = str(graph.transcoders.get("name", ""))
    names = [name] if Path(name).is_dir() else name.split(",")  # of SAEs several
    local = tuple(place for place in names if place and Path(place).is_dir())
    config = GraphConfig(dictionaries=local, features=features)
    assert graph.pruning
    nodes, order = graph.nodes, np.argsort(graph.pruning.influence_N, kind="stable")  # the most influential first
    order = order[nodes.kind_N[order] == FEATURE]
    shown = list(dict.fromkeys(zip(nodes.layer_N[order].tolist(), nodes.index_N[order].tolist(), strict=True)))
    details = details_of_features(config, shown)
    if search is not None:
        if not isinstance(search, ContextSearch):
            raise UserError(
                f"contexts is a {type(search).__name__}: expected saejax.ContextSearch(lm, transcoders, texts)"
            )
        missing = [feature for feature in shown if not details.get(feature, FeatureDetails()).name]
        search.transcoders.check_features(missing, "the graph")
        details |= search_details(search, missing)
    labels = read_labels(config) if local else {}
    for feature in labels.keys() & set(shown):
        details[feature] = dataclasses.replace(details.get(feature, FeatureDetails()), label=labels[feature])
    return details
