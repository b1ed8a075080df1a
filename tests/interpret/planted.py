"""A store whose vectors are planted: dimension c of a token's vector says whether concept c holds there."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from saejax.activations.chunker import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.store import Store
from saejax.activations.writer import write_store
from saejax.config import Configs
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.interpret import neighbours
from saejax.interpret.firings import blocks, record
from saejax.interpret.records import Describer
from saejax.interpret.text import CodeCounts, CodedText
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run
from saejax.stages.interpret.run import Interpreter
from saejax.stages.interpret.settings import InterpretConfig

SITE, WIDTH, VOCABULARY = "resid_post.1", 64, 384
WORDS = [f" {a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]  # 100 words after a space
TEXTS = WORDS + [str(i) for i in range(30)] + [word.strip().title() for word in WORDS] + [f"x{i}-" for i in range(154)]
CONCEPTS = ("token", "shape", "previous", "pair", "triple", "position", "next")


def concepts(ids: np.ndarray) -> np.ndarray:
    """Which concepts hold at the positions of a document, bool [T, concepts]."""
    n = len(ids)
    before, before2 = np.r_[-1, ids[:-1]], np.r_[-1, -1, ids[:-2]]
    return np.stack(
        [
            np.isin(ids, [17, 21, 25]),
            (ids >= 100) & (ids < 130),
            before == 3,
            (before == 1) & (ids == 2),
            (before2 == 4) & (before == 5) & (ids == 6),
            np.isin(np.arange(n), [5, 6, 7]),
            np.r_[ids[1:], -1] == 8,
        ],
        axis=1,
    )


def make_store(folder: Path, documents: int = 240, length: int = 40, held_out_seed: int = 0) -> Store:
    """A store of documents in which small token ids, of which the concepts are made, are common.

    Args:
      folder: where to.
      documents, length: of the text; the last fourth of the documents is held out.
      held_out_seed: 0: held-out vectors are planted like the others; else they are random.
    """
    rng = np.random.default_rng(5)
    ids = np.where(rng.random((documents, length)) < 0.6, rng.integers(0, 30, (documents, length)), 0)
    ids = np.where(ids == 0, rng.integers(0, VOCABULARY, ids.shape), ids).astype(np.int32)
    for phrase in ([1, 2], [4, 5, 6]):  # often enough to be learnt
        for row, start in zip(rng.integers(0, documents, 400), rng.integers(0, length - 3, 400), strict=True):
            ids[row, start : start + len(phrase)] = phrase
    table = np.zeros((documents, len(COLUMNS)), np.int32)
    table[documents - documents // 4 :, COLUMNS.index("split")] = SPLITS.index("held_out")
    table[:, COLUMNS.index("group")] = np.arange(documents)
    vectors = rng.normal(0, 0.1, (documents, length, WIDTH)).astype(np.float32)
    vectors[:, :, len(CONCEPTS) + 1 :] *= 10
    for i in range(documents):
        holds = concepts(ids[i])
        vectors[i, :, : len(CONCEPTS)] += holds * rng.uniform(1, 2, holds.shape)
    if held_out_seed:
        random_vectors = np.random.default_rng(held_out_seed).normal(0, 1, vectors.shape).astype(np.float32)
        vectors[3::4] = random_vectors[3::4]
    order = np.argsort(np.arange(documents) % 4 == 3, kind="stable")  # every fourth is held out and comes last
    names = tuple(map(str, range(documents)))
    made = Documents.contiguous(ids[order].reshape(-1), np.full(documents, length), table, names)
    return written(folder, made, vectors[order])


def written(folder: Path, documents: Documents, vectors: np.ndarray) -> Store:
    model = CapturedModel("planted/model", "", "0123456789abcdef", "float32")
    write_store(folder, documents, {SITE: vectors.reshape(-1, WIDTH)}, model, shard_rows=1000, seed=5)
    return Store.open(folder)


def dictionary(features: int, seed: int = 0) -> Dictionary:
    """The concepts' own directions, one that never fires, and random directions of the rest."""
    rng = np.random.default_rng(seed)
    W_enc_DxF = rng.normal(size=(WIDTH, features)).astype(np.float32)
    W_enc_DxF[: len(CONCEPTS) + 1] = 0
    W_enc_DxF /= np.linalg.norm(W_enc_DxF, axis=0)
    b_enc_F = -rng.uniform(0.8, 2.0, features).astype(np.float32)
    own = len(CONCEPTS) + 1
    W_enc_DxF[:, :own] = np.eye(WIDTH, own)
    b_enc_F[:own] = -0.6
    b_enc_F[own - 1] = -100
    config = DictionaryConfig(kind="standard", site=SITE, d_in=WIDTH, n_features=features, centred=False)
    arrays = dict(W_enc_DxF=W_enc_DxF, W_dec_FxD=W_enc_DxF.T, b_enc_F=b_enc_F, b_dec_D=np.zeros(WIDTH))
    return Dictionary(config, **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def interpreter(folder: Path, store: Store, lm, of: Dictionary, **settings) -> Interpreter:
    """What interprets a dictionary of the store."""
    config = dataclasses.replace(InterpretConfig(), batch_tokens=500, attention_tokens=0, **settings)
    run = Run("interpret", "standard", folder, Configs(config), {}, say=lambda line: None)
    return Interpreter(run, store, CodedText(store.documents, TEXTS), lm, make_mesh(MeshConfig()), "", of)


class Dense:
    """The firings on a split as an array [places, features], made without the code that is tested."""

    def __init__(self, store: Store, of: Dictionary, split: str = "train"):
        rows = store.rows(split, SITE)
        document, position, token = store.tokens(rows)
        place = store.documents.starts_N[document] + position
        order = np.argsort(place)
        f_BxF = np.maximum(np.asarray(of.encode(store.read(SITE, rows)), np.float64), 0)
        self.f, self.place, self.token = f_BxF[order], place[order], token[order]
        self.document, self.position = document[order], position[order]


def describe(folder: Path, store: Store, of: Dictionary, examples: int, draws: int) -> list[dict]:
    """The records of all features, which fit in one block."""
    text, features = CodedText(store.documents, TEXTS), of.config.n_features
    place = record(store, "train", {folder: of}, make_mesh(MeshConfig()), 320)
    nearest = neighbours.nearest_rows(of.W_dec_FxD[...], 3)
    counts = CodeCounts(text.code("token", place))
    describer = Describer(text, place, counts, examples, draws, None, nearest)
    (block,) = blocks(folder, features)
    return describer.records(block)
