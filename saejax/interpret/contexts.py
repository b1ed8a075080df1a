"""The contexts in which a feature fires: the strongest, chosen to differ, and the tokens around any firing."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from saejax.activations.store import Store
from saejax.dictionaries import Dictionary
from saejax.interpret.feature_record import FeatureContext
from saejax.interpret.firings import Block, blocks, record, used_rows
from saejax.interpret.text import CodedText
from saejax.progress import OnProgress, silent
from saejax.unicode import join_pieces

BEFORE, AFTER = 10, 5  # tokens of a context before and after the firing
_SPARE = 4  # candidates for each wanted context, because repeated contexts are passed over
_BATCH = 4096


def top_contexts(
    store: Store,
    dictionary: Dictionary,
    features: Sequence[int],
    count: int,
    pieces: Sequence[str],
    mesh: Mesh,
    on_progress: OnProgress = silent,
) -> dict[int, list[FeatureContext]]:
    """Return the contexts of the strongest firings of some features on a store's training text, strongest first.

    The search is exact: all rows are encoded, and the firings of these features are read back from a temporary file.

    Args:
      store: activations of the dictionary's site; tokens that are attention sinks there or, where the store has it, at
        a transcoder's target are left out.
      dictionary: the dictionary.
      features: indices of features.
      count: contexts of each.
      pieces: text of every token id, as ``saejax.models.tokens.token_piece`` gives it.
      mesh: devices that encode.
      on_progress: called with the tokens that are encoded and all.
    """
    done, total = 0, len(used_rows(store, "train", dictionary.site, dictionary.config.target))

    def on_tokens(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    coded, is_stored = CodedText(store.documents, pieces), np.zeros(len(store.documents.ids_T), bool)
    contexts_of: dict[int, list[FeatureContext]] = {feature: [] for feature in features}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        is_stored[
            record(store, "train", {folder: dictionary}, mesh, _BATCH, features=features, on_tokens=on_tokens)
        ] = True
        for block in blocks(folder, dictionary.config.n_features):
            for feature in contexts_of.keys() & set(range(block.first, block.first + block.size)):
                index = feature - block.first
                places = strongest(block, coded, index, count)
                contexts_of[feature] = contexts(block, coded, is_stored, index, places)
    return contexts_of


def strongest(block: Block, text: CodedText, feature: int, count: int) -> list[int]:
    """Return the places of a feature's strongest firings in contexts that differ, strongest first.

    Contexts come from distinct groups of documents (openings or templates of the corpus) as long as there are enough,
    then from distinct documents, then from further places of these. A context that repeats another token for token, or
    lies within one already chosen, is passed over, so that fewer than ``count`` may remain.

    Args:
      block: firings.
      text: text of the store.
      feature: index of the feature in the block.
      count: number of contexts.
    """
    firings = block.of(feature)
    order = np.argsort(-block.value[firings], kind="stable")  # equal activations in the order of the text
    place_A = block.place[firings][order]  # of all firings; the candidates are N of them
    document_A = text.document(place_A)
    group_A = text.documents.column("group")[document_A]
    # More candidates than are shown, as some repeat others.
    candidates = [_first_of_each(key_A, _SPARE * count) for key_A in (group_A, document_A, np.arange(len(place_A)))]
    kept_N = np.unique(np.concatenate(candidates))
    place_N, document_N, group_N = place_A[kept_N], document_A[kept_N], group_A[kept_N]
    start_N = place_N - np.minimum(text.position(place_N), BEFORE)
    stop_N = place_N + np.minimum(text.left(place_N), AFTER) + 1
    chosen: list[int] = []
    shown: set[tuple[int, ...]] = set()
    # Different groups first: texts of a template resemble each other and would hide what else a feature fires on.
    for key_N in (group_N, document_N, None):
        for i, place in enumerate(place_N):
            if len(chosen) == count:
                break
            if key_N is not None and key_N[i] in key_N[chosen]:
                continue
            context = tuple(text.documents.ids_T[start_N[i] : stop_N[i]].tolist())
            if context not in shown and not any(start_N[j] <= place < stop_N[j] for j in chosen):
                shown.add(context)
                chosen.append(i)
    return [int(place_N[i]) for i in sorted(chosen)]


def _first_of_each(key_A: np.ndarray, count: int) -> np.ndarray:
    """Return where the first ``count`` distinct keys come first."""
    return np.sort(np.unique(key_A, return_index=True)[1])[:count]


def surroundings(text: CodedText, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places around some places, and which lie in the document, both [places, BEFORE + 1 + AFTER].

    Places outside of the document are replaced by the place itself.
    """
    steps = np.arange(-BEFORE, AFTER + 1)
    inside = (text.position(place)[:, None] + steps >= 0) & (steps <= text.left(place)[:, None])
    return np.where(inside, place[:, None] + steps, place[:, None]), inside


def contexts(
    block: Block, text: CodedText, is_stored: np.ndarray, feature: int, places: Sequence[int] | np.ndarray
) -> list[FeatureContext]:
    """Return the contexts of a feature's firings.

    Args:
      block: firings.
      text: text of the documents.
      is_stored: whether the store has an activation, for every place.
      feature: index of the feature in the block.
      places: places of the firings.
    """
    place = np.asarray(places, np.int64)
    position, (around, inside) = text.position(place), surroundings(text, place)
    acts = np.where(is_stored[around], block.at(np.full(around.shape, feature), around), np.nan)
    ids = text.back(around.reshape(-1), 0).reshape(around.shape)
    feature_contexts = []
    for n, document in enumerate(text.document(place)):
        tokens, firsts = join_pieces([text.pieces[i] for i in ids[n][inside[n]]])
        # A character that several tokens spell is as active as the most active of these.
        values = np.fmax.reduceat(acts[n][inside[n]], firsts)
        feature_contexts.append(
            FeatureContext(
                tokens=tokens,
                acts=[None if np.isnan(act) else float(f"{act:.3g}") for act in values],
                peak=int(np.searchsorted(firsts, inside[n][:BEFORE].sum(), side="right")) - 1,
                document=int(document),
                position=int(position[n]),
            )
        )
    return feature_contexts
