"""A behaviour whose effects are known by construction."""

import numpy as np

from saejax.interventions.engine import LogitDiffs
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.interventions.replacement import ActivationSource


class LinearExperiment:
    """The logit difference is known: base_p + sum_i gain_pi f_pi, one position per prompt."""

    def __init__(self, gain_F, base=0.0, attribution_F=None, dead=(), seed=0, prompts=20):
        rng = np.random.default_rng(seed)
        features = np.shape(gain_F)[-1]
        rate_F = np.exp(rng.uniform(np.log(0.1), np.log(0.9), features))
        size_F = np.exp(rng.normal(0, 0.3, features))
        self.f_PxF = (rng.random((prompts, features)) < rate_F[None, :]) * size_F[None, :]
        self.f_PxF *= rng.uniform(0.8, 1.2, self.f_PxF.shape)
        self.f_PxF[0, ~self.f_PxF.any(axis=0)] = 1.0  # all fire somewhere, but for
        self.f_PxF[:, list(dead)] = 0.0
        self.gain_PxF = np.broadcast_to(gain_F, self.f_PxF.shape).astype(np.float64)
        self.base_P = np.full(prompts, base, np.float64)
        self.templates = [""] * prompts
        self.attribution_F = rate_F * size_F * gain_F if attribution_F is None else np.asarray(attribution_F)

    replacement = ActivationSource()

    def attribution(self):
        return self.attribution_F

    def test_attribution(self, estimate):
        return self.attribution_F

    def statistics(self):
        return FeatureStatistics(len(self.f_PxF), (self.f_PxF > 0).sum(axis=0), self.f_PxF.sum(axis=0))

    def drop(self, features):
        return (self.f_PxF * self.gain_PxF)[:, list(features)].sum(axis=1)

    def clean(self):
        return self.base_P + (self.f_PxF * self.gain_PxF).sum(axis=1)

    def max_activations(self):
        return self.f_PxF

    def skip(self, rows):
        self.skipped = rows

    def ablate_train(self, sets):
        return self.ablate(sets)  # the same prompts: what is learnt on them holds on them

    def changes(self, features):
        f_PxK = self.f_PxF[:, list(features)]  # every feature has a direction of its own, of length 1
        return np.diag(np.square(f_PxK).mean(axis=0))

    def ablate(self, sets, prompts=None):
        drop_SxP = np.array([self.drop(s) for s in sets]).reshape(len(sets), len(self.f_PxF))
        chosen = slice(None) if prompts is None else prompts
        clean_P, drop_SxP = self.clean()[chosen], drop_SxP[:, chosen]
        return LogitDiffs(clean_P, clean_P[None, :] - drop_SxP, 0 * clean_P, drop_SxP.size, drop_SxP.size)
