"""Crosscoders of two models with known shared and private features: found again, and the artefact of L1 shown."""

import jax
import numpy as np
import planted_models
from jax.sharding import AxisType, Mesh
from planted_models import LABELS, RATE, SITE, WEAK

from saejax.dictionaries.joined import part_norms
from saejax.evaluation.parts import private_part, relative_norms
from saejax.parallel.mesh import AXES


def _f1(chosen_F: np.ndarray, correlation_FxJ: np.ndarray, label: int) -> float:
    """Return the F1 of features that are chosen as one model's: right if they correlate above 0.9 with such a one."""
    right = (chosen_F[:, None] & (correlation_FxJ > 0.9))[:, label == LABELS]
    precision, recall = right.any(1).sum() / max(chosen_F.sum(), 1), right.any(0).mean()
    return 2 * precision * recall / max(precision + recall, 1e-9)


def test_batchtopk_separates_shared_and_private_features_and_l1_makes_private_ones_of_weak_shared_ones():
    """Complete shrinkage: what the first model has at 0.3 costs the penalty more than it is worth."""
    private_of_shared = {}
    for kind, changes in (("batchtopk", {}), ("standard", dict(l1=(4.0,)))):
        dictionary, store = planted_models.trained(kind, **changes)
        np.testing.assert_allclose(planted_models.lengths(dictionary), 1, rtol=1e-5)
        statistics, correlation_FxJ = planted_models.held_out(dictionary, store)
        norm_PxF = part_norms(np.asarray(dictionary.W_dec_FxD[...]), planted_models.WIDTHS)
        part_F = np.where(statistics.fires_F > 0, private_part(relative_norms(norm_PxF)), -1)
        private_of_shared[kind] = int(((part_F >= 0) & (LABELS[correlation_FxJ.argmax(1)] == -1)).sum())
        if kind == "batchtopk":
            for part in (0, 1):
                assert _f1(part_F == part, correlation_FxJ, part) > 0.95
            # Spare features, of 48 for 36 planted ones, fire on a token in hundreds.
            assert _f1((statistics.firing_rate_F > RATE / 4) & (part_F == -1), correlation_FxJ, -1) > 0.95
    assert private_of_shared["batchtopk"] == 0 and private_of_shared["standard"] >= WEAK // 2


def test_on_eight_devices_it_is_the_same():
    mesh = Mesh(np.array(jax.devices()).reshape(1, 4, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    for kind in ("batchtopk", "standard"):
        alone, _ = planted_models.trained(kind, steps=12)
        spread, _ = planted_models.trained(kind, steps=12, mesh=mesh)
        for name, array in alone.arrays.items():
            np.testing.assert_allclose(np.asarray(spread.arrays[name]), array, atol=2e-5, err_msg=f"{kind} {name}")


def test_what_is_trained_on_joined_values():
    """Parts come to one mean norm, and a feature's activations are those of all parts."""
    dictionary, store = planted_models.trained("batchtopk", steps=2)
    x_NxD = store.read(SITE, store.rows("train", SITE))
    parts = np.split(x_NxD, [planted_models.WIDTHS[0]], axis=1)
    norms = [np.linalg.norm(part, axis=1).mean() for part in parts]
    np.testing.assert_allclose(norms, np.sqrt(sum(planted_models.WIDTHS) / 2), rtol=1e-4)
    assert dictionary.config.widths == planted_models.WIDTHS and len(dictionary.config.scales) == 2
