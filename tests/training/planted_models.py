"""Activations of two models in which it is known which features they share, and crosscoders trained on them."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from saejax.activations.joined import with_joined
from saejax.activations.manifest import CapturedModel
from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import split
from saejax.interventions.activity import FeatureStatistics
from saejax.parallel.mesh import AXES
from saejax.settings import TrainConfig
from saejax.training.members import make_members
from saejax.training.scales import estimate_scales
from saejax.training.stack import TrainStack, describe_stack
from saejax.training.state import finish_dictionary, init_state
from saejax.training.step import compile_step

SITE = "resid_post.0+other:resid_post.0"
WIDTHS = (24, 16)
SHARED, WEAK, OWN, RATE = 24, 8, 6, 0.06  # features; of the shared ones, those that the first model has at 0.3
LABELS = np.array([-1] * SHARED + [0] * OWN + [1] * OWN)  # whose each feature is; -1: both models'
STEPS, BATCH = 1000, 256


class PlantedStore:
    """Both models on the same tokens, as a store; 51,200 tokens to learn from and 20,000 held out."""

    def __init__(self, seed: int = 0):
        self.sites = ("resid_post.0", "other:resid_post.0")
        self.model = CapturedModel("planted", "", "planted")
        rng = np.random.default_rng(seed)
        rows = [rng.normal(size=(len(LABELS), width)) for width in WIDTHS]
        rows = [own / np.linalg.norm(own, axis=1, keepdims=True) for own in rows]
        rows[0][:WEAK] *= 0.3
        for part in (0, 1):
            rows[part][1 - part == LABELS] = 0
        shape = (200 * BATCH + 20_000, len(LABELS))
        self.truth = ((0.5 + rng.exponential(size=shape)) * (rng.random(shape) < RATE)).astype(np.float32)
        self._values = dict(zip(self.sites, ((self.truth @ own).astype(np.float32) for own in rows), strict=True))

    def d(self, site):
        return self._values[site].shape[1]

    def max_norm(self, site):
        return 1e9

    def rows(self, split, *sites):
        return np.arange(200 * BATCH) if split == "train" else np.arange(200 * BATCH, len(self.truth))

    def read(self, site, rows):
        return self._values[site][rows]


def trained(kind: str, steps: int = STEPS, mesh: Mesh | None = None, **changes) -> tuple[Dictionary, PlantedStore]:
    """A crosscoder of the planted models, and the store with joined values."""
    usual = dict(sites=(SITE,), batch=BATCH, learning_rate=(3e-3,), k=(2,), clip=0.0, expansion=1, dead_tokens=50_000)
    config = TrainConfig(**usual | changes)
    store = with_joined(PlantedStore(), [SITE])
    members = make_members(config, kind, config.sites)
    dictionary = dataclasses.replace(describe_stack(config, kind, store, members), n_features=48)
    mesh = mesh or Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    scales = estimate_scales(store, config, [(SITE, SITE)] * len(members))
    stack = TrainStack(config, dictionary, members, scales, steps, mesh)
    train_step, state = compile_step(stack), init_state(stack)
    for step in range(steps):
        rows = np.arange(BATCH) + BATCH * (step % 200)
        raw = jax.device_put(store.read(SITE, rows)[None], stack.batch_sharding)
        state, metrics = train_step(state, stack.hyperparams, (raw,))
        jax.block_until_ready(metrics)
    return finish_dictionary(stack, state, 0), store


def held_out(dictionary: Dictionary, store) -> tuple[FeatureStatistics, np.ndarray]:
    """Statistics of the features on the held-out tokens, and their correlation with the planted ones, [F, J]."""
    rows = store.rows("held_out", SITE)
    x_NxD = store.read(SITE, rows)
    f_NxF = np.asarray(dictionary.encode(x_NxD))
    with np.errstate(invalid="ignore"):  # of features that never fire
        alike_FxJ = np.corrcoef(f_NxF.T, store.truth[rows].T)[: f_NxF.shape[1], f_NxF.shape[1] :]
    statistics = FeatureStatistics(len(rows), (f_NxF > 0).sum(0), f_NxF.sum(0, dtype=np.float64))
    return statistics, np.nan_to_num(alike_FxJ)


def lengths(dictionary: Dictionary) -> np.ndarray:
    """The sum of the norms of each row's parts, by a plain loop."""
    return sum(np.linalg.norm(part, axis=1) for part in split(np.asarray(dictionary.W_dec_FxD[...]), WIDTHS))
