"""Crosscoders of two models with known shared and private features: found again, and the artefact of L1 shown."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import Mesh
from small_stacks import first_device, train

from saejax.activations.joined import with_joined
from saejax.activations.manifest import CapturedModel
from saejax.dictionaries import Dictionary
from saejax.dictionaries.joined import part_norms
from saejax.evaluation.latent_scaling import scale_latents
from saejax.evaluation.parts import private_part, relative_norms
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.training.members import make_members
from saejax.training.scales import estimate_scales
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack, describe_stack
from saejax.training.state import finish_dictionary
from saejax.training.thresholds import Calibration

SITE = "resid_post.0+other:resid_post.0"
WIDTHS = (24, 16)
SHARED, WEAK, PRIVATE, RATE = 24, 8, 6, 0.06  # features; of the shared ones, those that the first model has at 0.3
LABELS = np.array([-1] * SHARED + [0] * PRIVATE + [1] * PRIVATE)  # whose each feature is; -1: both models'
STEPS, BATCH = 1000, 256


class PlantedStore:
    """Both models on the same tokens, as a store; 51,200 tokens to learn from and 20,000 held out."""

    def __init__(self, widths: tuple[int, int] = WIDTHS, tuned: bool = False):
        """Make both models; a tuned one has the directions of the first."""
        self.sites = ("resid_post.0", "other:resid_post.0")
        self.model = CapturedModel("planted", "", "planted")
        rng = np.random.default_rng(0)
        rows = [rng.normal(size=(len(LABELS), width)) for width in widths]
        rows = [rows[1], rows[1].copy()] if tuned else rows
        rows = [directions / np.linalg.norm(directions, axis=1, keepdims=True) for directions in rows]
        rows[0][:WEAK] *= 0.3
        for part in (0, 1):
            rows[part][1 - part == LABELS] = 0
        shape = (200 * BATCH + 20_000, len(LABELS))
        self.truth = ((0.5 + rng.exponential(size=shape)) * (rng.random(shape) < RATE)).astype(np.float32)
        values = [(self.truth @ directions).astype(np.float32) for directions in rows]
        self._values = dict(zip(self.sites, values, strict=True))

    def d(self, site):
        return self._values[site].shape[1]

    def max_norm(self, site):
        return 1e9

    def rows(self, split, *sites):
        return np.arange(200 * BATCH) if split == "train" else np.arange(200 * BATCH, len(self.truth))

    def read(self, site, rows):
        return self._values[site][rows]


@pytest.fixture(scope="module")
def store():
    """Joined values of both models."""
    return with_joined(PlantedStore(), [SITE])


def trained(store, kind: str, steps: int = STEPS, mesh: Mesh | None = None, **changes) -> Dictionary:
    """A crosscoder of the planted models."""
    usual = dict(sites=(SITE,), batch=BATCH, learning_rate=(3e-3,), k=(2,), clip=0.0, dead_tokens=50_000)
    config = TrainConfig(expansion=(1,), **usual | changes)
    members = make_members(config, kind, config.sites)
    dictionary = dataclasses.replace(describe_stack(config, store, members), n_features=48)
    scales = estimate_scales(store, config, [(SITE, SITE)] * len(members))
    stack = TrainStack(config, dictionary, members, scales, steps, mesh or first_device())
    batch = lambda step: (store.read(SITE, np.arange(BATCH) + BATCH * (step % 200))[None],)  # noqa: E731
    state, _ = train(stack, map(batch, range(steps)))
    return finish_dictionary(stack, state, 0, Calibration(stack)(state, SimpleNamespace(batch=batch), steps))


def f1(chosen_F: np.ndarray, correlation_FxJ: np.ndarray, label: int) -> float:
    """Return the F1 of features that are chosen as one model's: right if they correlate above 0.9 with such a one."""
    right = (chosen_F[:, None] & (correlation_FxJ > 0.9))[:, label == LABELS]
    precision, recall = right.any(1).sum() / max(chosen_F.sum(), 1), right.any(0).mean()
    return 2 * precision * recall / max(precision + recall, 1e-9)


@pytest.mark.slow
def test_batchtopk_separates_shared_and_private_features_and_l1_makes_private_ones_of_weak_shared_ones(store):
    """Complete shrinkage: what the first model has at 0.3 costs the penalty more than it is worth."""
    private_of_shared = {}
    for kind, changes in (("batchtopk", {}), ("standard", dict(l1=(4.0,)))):
        dictionary = trained(store, kind, **changes)
        norm_PxF = part_norms(np.asarray(dictionary.W_dec_FxD[...]), WIDTHS)
        np.testing.assert_allclose(norm_PxF.sum(0), 1, rtol=1e-5)
        rows = store.rows("held_out", SITE)
        f_NxF = np.asarray(dictionary.encode(store.read(SITE, rows)))
        with np.errstate(invalid="ignore"):  # of features that never fire
            correlation_FxJ = np.nan_to_num(np.corrcoef(f_NxF.T, store.truth[rows].T)[:48, 48:])
        rate_F = (f_NxF > 0).mean(0)
        part_F = np.where(rate_F > 0, private_part(relative_norms(norm_PxF)), -1)
        private_of_shared[kind] = int(((part_F >= 0) & (LABELS[correlation_FxJ.argmax(1)] == -1)).sum())
        if kind == "batchtopk":
            for part in (0, 1):
                assert f1(part_F == part, correlation_FxJ, part) > 0.95
            # Spare features, of 48 for 36 planted ones, fire on a token in hundreds.
            assert f1((rate_F > RATE / 4) & (part_F == -1), correlation_FxJ, -1) > 0.95
    assert private_of_shared["batchtopk"] == 0 and private_of_shared["standard"] >= WEAK // 2


@pytest.mark.slow
def test_latent_scaling_tells_weak_shared_features_from_private_ones():
    """Both seem private where an L1 penalty has shrunk the rows of what the first model has at 0.3."""
    store = with_joined(PlantedStore((24, 24), tuned=True), [SITE])
    dictionary = trained(store, "standard", l1=(4.0,))
    rows = store.rows("held_out", SITE)
    x_NxD = store.read(SITE, rows)
    f_NxF = np.asarray(dictionary.encode(x_NxD))
    with np.errstate(invalid="ignore"):  # of features that never fire
        correlation_FxJ = np.nan_to_num(np.corrcoef(f_NxF.T, store.truth[rows].T)[:48, 48:])
    norm_PxF = part_norms(np.asarray(dictionary.W_dec_FxD[...]), (24, 24))
    part_F = np.where((f_NxF > 0).any(0), private_part(relative_norms(norm_PxF)), -1)
    scaling = scale_latents(dictionary, part_F, lambda: ([block] for block in np.array_split(x_NxD, 5)))
    is_like_F, label_F = correlation_FxJ.max(1) > 0.9, LABELS[correlation_FxJ.argmax(1)]
    shrunk_F, private_F = ((part_F >= 0) & is_like_F & chosen for chosen in (label_F == -1, label_F == part_F))
    ratios = [np.round(scaling.error_F[some_F], 2).tolist() for some_F in (shrunk_F, private_F)]
    print(f"nu_error of shared features that seem private {ratios[0]}, of private ones {ratios[1]}")
    assert shrunk_F.sum() >= WEAK // 2 and private_F.sum() >= PRIVATE
    assert not scaling.is_specific()[shrunk_F].any() and scaling.is_specific()[private_F].mean() > 0.9


def test_parts_have_one_mean_norm_and_eight_devices_train_as_one(store):
    x_NxD = store.read(SITE, store.rows("train", SITE))
    norms = [np.linalg.norm(part, axis=1).mean() for part in np.split(x_NxD, [WIDTHS[0]], axis=1)]
    np.testing.assert_allclose(norms, np.sqrt(sum(WIDTHS) / 2), rtol=1e-4)
    alone = trained(store, "batchtopk", steps=12)
    spread = trained(store, "batchtopk", steps=12, mesh=make_mesh(MeshConfig(data=4, model=2)))
    assert alone.config.widths == WIDTHS and len(alone.config.scales) == 2
    for name, array in alone.arrays.items():
        np.testing.assert_allclose(np.asarray(spread.arrays[name]), array, atol=2e-5, err_msg=name)
