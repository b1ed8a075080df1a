"""Path patching: what one head or MLP alone tells one query, key or value, or the logits, along the stream.

The *sender* is a head or an MLP at one position, the *receiver* a query, key or value of a later head at the same
position, or the logits at the last one. The sender's output is that of the counterpart's run, all other attention and
MLP outputs up to the receiver are those of the clean run, so that the receiver's input changes along the direct path
alone; with the receiver's vector that comes of it the rest of the model runs freely (Wang et al., 2022, arXiv
2211.00593; Goldowsky-Dill et al., 2023, arXiv 2304.05969; here MLPs between are frozen, too). The effect is by how much
the logit difference falls.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saejax.causal.parts import OnProgress, silent
from saejax.causal.patching.heads import NODES, NodePatch, answer_difference, patch_nodes, record_heads
from saejax.causal.patching.pairs import Pairs, few_pairs, filled_rows, measure_rows
from saejax.models import decoder
from saejax.models.attention import QKV, Attend, AttentionSpec, Layer, whole_prompt_tables
from saejax.models.config import DecoderConfig
from saejax.models.decoder import run_layers
from saejax.models.language_model import LanguageModel
from saejax.parallel.collectives import to_host
from saejax.parallel.mesh import by_row
from saejax.tasks.behaviours import Prompt

LOGITS, MLP = "logits", -1  # the receiver at the end; the "head" of a sender that is an MLP
_OUTPUTS = ("attn_out", "mlp_out")


class Receiver(NamedTuple):
    """Whose input is changed: ``node`` is query, key or value, or ``LOGITS`` after all layers.

    Attributes:
      node, layer, head: where it is; of the logits, the layer is the number of layers and the head 0.
      position: from the end, -1 is the last token.
    """

    node: str
    layer: int
    head: int
    position: int


class AddedOutputs(NamedTuple):
    """What attention and MLPs add to the stream in a run, each [L, B, T, D]."""

    attn_out: jax.Array
    mlp_out: jax.Array


class Senders(NamedTuple):
    """One sender of each of R rows, in the row's pair ``place_R``; layer -1: none.

    Attributes:
      head: what a head puts out, as ``heads.NodePatch``; its layer is -1 where the sender is an MLP.
      mlp_layer_R: that of an MLP, or -1.
      mlp_RxD: what it adds.
      place_R: which of the recorded pairs.
    """

    head: NodePatch
    mlp_layer_R: jax.Array
    mlp_RxD: jax.Array
    place_R: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def record_written(config: DecoderConfig, params: decoder.Params, ids_BxT: jax.Array) -> AddedOutputs:
    """What attention and MLPs add without a patch."""
    x_BxTxD = decoder.embed(config, params, ids_BxT)
    return AddedOutputs(**run_layers(config, params, x_BxTxD, 0, config.n_layers, collect=_OUTPUTS).collected)


@functools.partial(jax.jit, static_argnums=(0, 1))
def patch_paths(
    config: DecoderConfig,
    node: str,
    params: decoder.Params,
    receiver_layer: jax.Array,
    receiver_head: jax.Array,
    ids_RxT: jax.Array,
    last_R: jax.Array,
    answers_Rx2: jax.Array,
    clean: AddedOutputs,
    senders: Senders,
) -> jax.Array:
    """The logit difference of each row with the receiver told by its sender, fp32 [R].

    Args:
      node, receiver_layer, receiver_head: as ``Receiver`` says.
      ids_RxT, last_R, answers_Rx2: as ``Pairs`` has them.
      clean: what is added without a patch.
      senders: of each row.
    """
    here_RxT = jnp.arange(ids_RxT.shape[1])[None, :] == senders.head.position_R[:, None]

    def freeze(kind: str, layer: Layer, value_RxTxD: jax.Array) -> jax.Array:
        if kind not in _OUTPUTS:
            return value_RxTxD
        frozen_RxTxD = getattr(clean, kind)[layer, senders.place_R]
        if kind == "attn_out":  # with the sender's head the layer adds what it adds
            return jnp.where((senders.head.layer_R == layer)[:, None, None], value_RxTxD, frozen_RxTxD)
        sends_RxT = (senders.mlp_layer_R == layer)[:, None] & here_RxT
        return jnp.where(sends_RxT[..., None], senders.mlp_RxD[:, None, :], frozen_RxTxD)

    def listen(plain: Attend, layer: Layer, qkv: QKV, heard_RxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        if node != LOGITS:
            own_RxTxK = jnp.take(qkv[NODES.index(node)], receiver_head, axis=2)
            own_RxK = jnp.take_along_axis(own_RxTxK, senders.head.position_R[:, None, None], axis=1)[:, 0]
            heard_RxK = jnp.where(layer == receiver_layer, own_RxK.astype(heard_RxK.dtype), heard_RxK)
        return senders.head.put("output", layer, plain(*qkv)), heard_RxK

    x_RxTxD, nothing_RxK = decoder.embed(config, params, ids_RxT), jnp.zeros_like(senders.head.vector_RxK)
    attention = AttentionSpec(whole_prompt_tables(config, ids_RxT.shape[1]), listen, nothing_RxK)
    run = run_layers(config, params, x_RxTxD, 0, config.n_layers, freeze, None, attention=attention)
    if node == LOGITS:
        return answer_difference(config, params, run.x, last_R, answers_Rx2)
    every_R = jnp.ones_like(last_R)
    told = NodePatch(
        node_R=NODES.index(node) * every_R,
        layer_R=receiver_layer * every_R,
        head_R=receiver_head * every_R,
        position_R=senders.head.position_R,
        vector_RxK=run.carried,
    )
    return patch_nodes(config, params, ids_RxT, last_R, answers_Rx2, told)


def senders_of(config: DecoderConfig, receiver: Receiver) -> np.ndarray:
    """Layer and head (``MLP``) of all heads and MLPs before a receiver, [N, 2]."""
    heads = np.array([MLP, *range(config.n_heads)])
    layers = np.arange(receiver.layer)
    return np.stack([np.repeat(layers, len(heads)), np.tile(heads, len(layers))], axis=1).reshape(-1, 2)


def path_effects(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    receiver: Receiver,
    batch_rows: int = 64,
    on_progress: OnProgress = silent,
) -> np.ndarray:
    """By how much the logit difference falls along the direct path from each sender (``senders_of``), fp64 [N, P].

    NaN where a prompt does not have the position.

    Args:
      prompts: P of them, with counterparts of as many tokens, at least one.
      receiver: where the paths end.
      batch_rows: rows that run together; one row is a path in a prompt.
      on_progress: called at the start and after each batch with the rows done and of all; may raise to stop.

    Raises:
      UserError: a logit difference is not finite.
    """
    senders_Nx2, size = senders_of(model.config, receiver), filled_rows(batch_rows)
    entries_Ex2 = np.concatenate([[[-1, 0]], senders_Nx2])  # the first one sends nothing
    batches = []
    for pairs in few_pairs(model, prompts):
        has_P = np.flatnonzero(pairs.ends_P + receiver.position >= 0)
        batches.append((pairs, np.repeat(np.arange(len(entries_Ex2)), len(has_P)), np.tile(has_P, len(entries_Ex2))))
    total = sum(len(entry_R) for _, entry_R, _ in batches)

    def dispatched() -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array]]:
        for pairs, entry_R, place_R in batches:
            ids = [by_row(model.mesh, ids_BxT)[0] for ids_BxT in pairs.ids_2xBxT]
            clean = record_written(model.config, model.params, ids[0])
            lent = (
                to_host(record_heads(model.config, model.params, ids[1]).output),
                to_host(record_written(model.config, model.params, ids[1]).mlp_out),
            )
            for first in range(0, len(entry_R), size):
                entry_S, place_S = entry_R[first : first + size], place_R[first : first + size]
                filled = entries_Ex2[np.resize(entry_S, size)], np.resize(place_S, size)
                diff_R = _dispatch(model, pairs, receiver, clean, lent, *filled)
                yield entry_S, pairs.index_P[place_S], diff_R

    diff_ExP = measure_rows(dispatched(), (len(entries_Ex2), len(prompts)), total, "a path", on_progress)
    return diff_ExP[0] - diff_ExP[1:]


def _dispatch(
    model: LanguageModel,
    pairs: Pairs,
    receiver: Receiver,
    clean: AddedOutputs,
    lent: tuple[np.ndarray, np.ndarray],
    sent_Rx2: np.ndarray,
    place_R: np.ndarray,
) -> jax.Array:
    """Starts some rows; ``lent`` are the counterparts' heads [L, B, T, H, K] and MLPs [L, B, T, D]."""
    layer_R, head_R = sent_Rx2.astype(np.int32).T
    position_R = (pairs.ends_P[place_R] + receiver.position).astype(np.int32)
    is_mlp_R = head_R == MLP
    own = np.maximum(layer_R, 0), place_R, position_R
    patch = NodePatch(
        node_R=np.full(len(place_R), NODES.index("output"), np.int32),
        layer_R=np.where(is_mlp_R, -1, layer_R).astype(np.int32),
        head_R=np.maximum(head_R, 0),
        position_R=position_R,
        vector_RxK=lent[0][(*own, np.maximum(head_R, 0))],
    )
    arrays = (*patch, np.where(is_mlp_R, layer_R, -1).astype(np.int32), lent[1][own], place_R.astype(np.int32))
    *patch_rows, mlp_layer_R, mlp_RxD, rows_R = by_row(model.mesh, *arrays)
    senders = Senders(NodePatch(*patch_rows), mlp_layer_R, mlp_RxD, rows_R)
    ids_RxT = pairs.ids_2xBxT[0, place_R]
    rows = by_row(model.mesh, ids_RxT, pairs.last_B[place_R], pairs.answers_Bx2[place_R])
    place = jnp.int32(receiver.layer), jnp.int32(receiver.head)
    return patch_paths(model.config, receiver.node, model.params, *place, *rows, clean, senders)
