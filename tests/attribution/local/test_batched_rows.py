"""Rows that are computed in batches of chunks, against one target at a time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_graphs import IDS, make_transcoders
from torch_sites import relative_error

from saejax import LocalModel
from saejax.attribution.local import rows
from saejax.models.attention import whole_prompt_tables


@pytest.fixture(scope="module")
def local(tiny_model):
    lm = tiny_model("llama")
    return LocalModel(lm, make_transcoders(lm.config, "standard", skip=True), IDS)


@pytest.fixture(scope="module")
def pulls(local):
    """For each layer a program: cotangents of what leaves it and of what is read there to the one that enters it."""
    tables = whole_prompt_tables(local.model.config, local.stream_LxTxD.shape[1])

    def pull(layer, cotangents):
        _, pull_back = jax.vjp(lambda x_TxD: local.frozen.layer(layer, tables, x_TxD), local.stream_LxTxD[layer])
        return pull_back(cotangents)[0]

    return [jax.jit(functools.partial(pull, layer)) for layer in range(local.model.config.n_layers)]


def test_no_weight_is_copied_for_a_chunk_of_targets(local):
    """Copies of the projections for each chunk would take a tenth to a fifth of the time of rows."""
    frozen, x_TxD, config = local.frozen, local.stream_LxTxD[1], local.model.config
    tables = whole_prompt_tables(config, len(x_TxD))

    def pull_chunks(frozen, x_TxD, cotangent_NxRxTxD):
        _, pull = jax.vjp(lambda x_TxD: frozen.layer(1, tables, x_TxD), x_TxD)
        return jax.lax.map(jax.vmap(lambda cotangent_TxD: pull((cotangent_TxD, cotangent_TxD))[0]), cotangent_NxRxTxD)

    program = jax.jit(pull_chunks).lower(frozen, x_TxD, jnp.zeros((4, 5, *x_TxD.shape))).compile().as_text()
    heads = {(count, config.d_head, config.d_model) for count in (config.n_heads, config.n_kv_heads)}
    moved = [tuple(map(int, shape)) for shape in re.findall(r"\[(\d+),(\d+),(\d+)\]\S* (?:transpose|copy)\(", program)]
    assert not {tuple(sorted(shape)) for shape in moved} & {tuple(sorted(shape)) for shape in heads}


def plain_row(local, pulls, layer, position, vector_D, in_stream):
    """What each source adds to a target: its cotangent, layer by layer, and products with the sources' directions."""
    sources, (_, length, width) = local.sources, local.stream_LxTxD.shape
    read_TxD = jnp.zeros((length, width)).at[position].set(vector_D)
    cotangents = {layer: read_TxD} if in_stream else {layer + 1: jnp.zeros_like(read_TxD)}
    for below in reversed(range(layer + (not in_stream))):
        here = read_TxD if below == layer else jnp.zeros_like(read_TxD)
        cotangents[below] = pulls[below]((cotangents[below + 1], here))
    table_UxD, read_BxW = np.asarray(sources.bank.table_UxD), np.zeros(sources.bank.row_BxW.shape, np.float32)
    for place, cotangent_TxD in cotangents.items():
        for block in range(sources.first_X[place], sources.stop_X(length)[place]):
            position = int(sources.bank.position_B[block])
            read_BxW[block] = table_UxD[np.asarray(sources.bank.row_BxW[block])] @ np.asarray(cotangent_TxD[position])
    return sources.collect(read_BxW[:, None])[0]


@pytest.mark.parametrize("in_stream", [False, True])
def test_batches_of_chunks_give_what_one_target_at_a_time_does(local, pulls, in_stream, monkeypatch):
    """Chunks begin at different layers, and are filled up; the last batch has fewer."""
    monkeypatch.setattr(rows, "TOKENS", dict(cpu=24))
    monkeypatch.setattr(rows, "CHUNKS", 2)
    rng, layers = np.random.default_rng(0), local.model.config.n_layers
    layer_R = rng.integers(0, layers + in_stream, 13).astype(np.int32)
    position_R = rng.integers(0, len(IDS), 13).astype(np.int32)
    vector_RxD = rng.normal(size=(13, local.model.config.d_model)).astype(np.float32)
    row_RxS = local.pullback(layer_R, position_R, vector_RxD, in_stream)
    targets = zip(layer_R.tolist(), position_R.tolist(), vector_RxD, row_RxS, strict=True)
    for layer, position, vector_D, row_S in targets:
        assert relative_error(row_S, plain_row(local, pulls, layer, position, vector_D, in_stream)) < 1e-5
    assert np.abs(row_RxS).max() > 0.1


def test_batches_of_short_targets_take_no_more_memory(local, monkeypatch):
    """A batch takes its products with all sources, so as many targets go together at every length."""
    shapes, plain = list[tuple[int, ...]](), rows.contributions
    monkeypatch.setattr(rows, "contributions", lambda *args: shapes.append(args[-1].layer_NxR.shape) or plain(*args))
    count = 3000
    position_R = np.arange(count, dtype=np.int32) % len(IDS)
    local.pullback(np.zeros(count, np.int32), position_R, np.ones((count, local.model.config.d_model), np.float32))
    targets = {np.prod(shape) for shape in shapes}
    assert len({size for _, size in shapes}) == 3 and max(targets) == rows.CHUNKS * min(size for _, size in shapes)
