"""Graphs that circuit-tracer saved with ``Graph.to_pt``: a dictionary of arrays and of two objects of its classes.

They are read by ``torch.load(weights_only=True)``, to which the classes are named: so they have to be installed, and no
other code of the file runs. The rows and columns of its matrix are features, errors, tokens and logits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saejax.attribution.graph.data import ERROR, FEATURE, LOGIT, TOKEN, Nodes
from saejax.errors import UserError
from saejax.models.checkpoint import read_pickled_tensors
from saejax.models.hub import hub_errors
from saejax.models.tokens import token_text

_CLASSES = (
    "circuit_tracer.attribution.targets.LogitTarget",
    "circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig",
    "transformer_lens.HookedTransformerConfig.HookedTransformerConfig",
    "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig",
)


def read_fields(path: Path, tokenizer: Any = None) -> dict[str, Any]:
    """Return the fields of ``GraphData`` that a file of circuit-tracer holds, which is a whole graph.

    It has neither logits nor biases: ``logit_K`` are log-probabilities, the value of a feature is its activation, and
    that of a logit the sum of its row.

    Args:
      path: the file, which ends in .pt.
      tokenizer: that reads the prompt's ids; None: the one that the file names.

    Raises:
      UserError: it is no such file, or damaged; circuit-tracer's classes are not installed; there is no tokenizer.
    """
    return _read(path, lambda saved: _fields(saved, tokenizer))


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what a list of graphs says of a file, as metadata of a document; its matrix and tokenizer are not read.

    Raises:
      UserError: as of ``read_fields``.
    """
    return _read(
        path,
        lambda saved: dict(
            slug=path.stem,
            scan=_scan(saved),
            prompt=str(saved["input_string"]),
            prompt_tokens=[""] * np.size(saved["input_tokens"]),
            generation_settings=dict(model=str(saved["cfg"].model_name)),
        ),
    )


def _read(path: Path, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    remedy = (
        "install circuit-tracer here, or where it is installed run: from circuit_tracer.utils import "
        f"create_graph_files; create_graph_files(graph_or_path={str(path)!r}, slug={path.stem!r}, output_path='graphs')"
    )
    saved = read_pickled_tensors(path, _CLASSES, remedy)
    try:
        return convert(saved)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no graph of circuit-tracer, or damaged ({error!r}): save it again") from None


def _scan(saved: dict[str, Any]) -> str:
    scan = saved.get("scan_name", saved.get("scan")) or ""
    return scan if isinstance(scan, str) else ",".join(map(str, scan))


def _fields(saved: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    config, ids_P = saved["cfg"], np.asarray(saved["input_tokens"], np.int32).reshape(-1)
    layers, positions = int(config.n_layers), len(ids_P)
    active_Ax3, chosen_F = np.asarray(saved["active_features"], np.int32), np.asarray(saved["selected_features"])
    value_F = np.asarray(saved["activation_values"], np.float32)
    if len(value_F) != len(chosen_F):  # of all active features, as earlier versions have them
        value_F = value_F[chosen_F]
    layer_F, position_F, index_F = active_Ax3[chosen_F].T
    order_F = np.lexsort((index_F, position_F, layer_F))
    layer_E, position_E = np.divmod(np.arange(layers * positions), positions)
    probability_K = np.asarray(saved["logit_probabilities"], np.float32)
    named = saved["logit_targets"] if "logit_targets" in saved else saved["logit_tokens"]
    # Of earlier versions ids alone.
    targets = [target if isinstance(target, list) else ["", target] for target in list(named)]
    index_K = np.array([int(index) for _, index in targets], np.int32)
    # A target of another vector than a token's has an index behind the vocabulary: it is a direction.
    index_K[index_K >= getattr(config, "d_vocab", np.inf)] = -1
    nodes = Nodes.joined(
        Nodes.of(FEATURE, layer_F, position_F, index_F, value_F)[order_F],
        Nodes.of(ERROR, layer_E, position_E),
        Nodes.of(TOKEN, -1, np.arange(positions), ids_P),
        Nodes.of(LOGIT, layers, positions - 1, index_K, probability_K),
    )
    features, logits = len(order_F), len(index_K)
    matrix_NxN = np.asarray(saved["adjacency_matrix"])
    if matrix_NxN.shape != (len(nodes), len(nodes)):
        raise ValueError(f"a matrix of {matrix_NxN.shape} for {len(nodes)} nodes")
    rows = np.concatenate([order_F, np.arange(len(nodes) - logits, len(nodes))])
    columns = np.concatenate([order_F, np.arange(features, len(nodes) - logits)])
    adjacency_RxS = np.ascontiguousarray(matrix_NxN[np.ix_(rows, columns)], np.float32)
    text = token_text(tokenizer or _tokenizer(config.tokenizer_name))
    nothing_R = np.zeros(len(rows), np.float32)
    return dict(
        adjacency_RxS=adjacency_RxS,
        nodes=nodes,
        value_R=np.concatenate([value_F[order_F], adjacency_RxS[features:].sum(axis=1)]),
        constant_R=nothing_R,
        untraced_R=nothing_R,
        ids_P=ids_P,
        tokens=tuple(text(int(token)) for token in ids_P),
        logit_K=np.log(np.maximum(probability_K, np.finfo(np.float32).tiny)),
        labels=tuple(str(name) or text(int(index)) for name, index in targets),
        prompt=str(saved["input_string"]),
        n_layers=layers,
        model=dict(name=str(config.model_name)),
        transcoders=dict(name=_scan(saved)),
        settings=dict(
            active_features=len(active_Ax3), traced_features=features, targets=[[int(index), -1] for index in index_K]
        ),
    )


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    with hub_errors(name, "main", "tokenizer", "tokenizer.json", "a tokenizer"):
        return AutoTokenizer.from_pretrained(name)
