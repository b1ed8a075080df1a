"""What a dictionary of another place saves in training: it goes on there, beside a random start.

Three dictionaries of one shape learn from the same batches of a site: one starts where another place's dictionary ended
(Ghilardi et al., 2024, BlackboxNLP, for neighbouring layers), one at random, and one where the other place's
dictionary would have ended, had it been turned by a random rotation: as good a dictionary, of nothing that is there.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary
from saejax.evaluation.reconstruction import reconstruct
from saejax.parallel.mesh import make_mesh
from saejax.settings import TrainConfig
from saejax.training.initial import state_of
from saejax.training.members import SiteScale, members
from saejax.training.step import Trainer
from saejax.transfer.compared import rotated
from saejax.transfer.reconstruction import DictionaryOnText, moved_to
from saejax.transfer.results import FineTuning

BATCH = 256


def can_be_tuned(moved: Dictionary, there: Dictionary) -> bool:
    """Whether a dictionary can go on at another's site: of one width, and of a kind that is told its k.

    The coefficient of a penalty is not part of a dictionary.
    """
    return moved.config.d_in == there.config.d_in and moved.config.k > 0


def fine_tuned(
    moved: Dictionary, place: DictionaryOnText, tokens: int, mesh: Mesh, batch_tokens: int, seed: Sequence[int]
) -> FineTuning:
    """Trains a dictionary on the half of the text that fits, and scores it on the other as it learns.

    Args:
      moved: an SAE with a k.
      place: where it is put.
      tokens: to train on; the text is gone through again where it has fewer.
      batch_tokens: encoded at a time when they are scored.
      seed: of the random start, the rotation and the order of tokens.
    """
    own = moved_to(moved, place.dictionary)
    trainer = _trainer(own, place, tokens, make_mesh(devices=list(mesh.devices.flat)), seed)
    state = state_of(trainer, [own, None, moved_to(rotated(moved, seed), place.dictionary)])
    steps = math.ceil(tokens / BATCH)
    looks = sorted({steps, *(2**power for power in range(steps.bit_length()))})
    rng, rows = np.random.default_rng(seed), np.zeros(0, np.int64)
    curves: list[list[float]] = []
    for step in range(1, steps + 1):
        while len(rows) < BATCH:
            rows = np.concatenate([rows, rng.permutation(len(place.fit_NxD))])
        batch_SxBxD, rows = place.fit_NxD[rows[:BATCH]][None], rows[BATCH:]
        state, _ = trainer.step(state, (jax.make_array_from_process_local_data(trainer.batch_sharding, batch_SxBxD),))
        if step in looks:
            learned = [trainer.finish(state, index) for index in range(len(trainer.members))]
            scores = reconstruct(learned, [(place.judge_NxD,)], mesh, batch_tokens)
            curves.append([score.explained_variance for score in scores])
    seen = tuple(step * BATCH for step in looks)
    tuned, scratch, turned = (tuple(curve) for curve in zip(*curves, strict=True))
    return FineTuning(seen, tuned, scratch, turned, saved(seen, tuned, scratch), saved(seen, turned, scratch))


def saved(seen: Sequence[int], curve: Sequence[float], scratch: Sequence[float]) -> float:
    """Share of a random start's tokens that another start needs not, to explain as much as that does in the end.

    Args:
      seen: tokens, ascending, at which both were scored.
      curve: explained variance of the other start; between two scores it is taken to grow evenly in the logarithm of
        tokens.
      scratch: of the random start.

    Returns:
      At most 1 - seen[0] / seen[-1]; 0 where the other start never explains as much.
    """
    goal = scratch[-1]
    for place, value in enumerate(curve):
        if value >= goal:
            if place == 0:
                return 1 - seen[0] / seen[-1]
            share = (goal - curve[place - 1]) / (value - curve[place - 1])
            return 1 - seen[place - 1] * (seen[place] / seen[place - 1]) ** share / seen[-1]
    return 0.0


def _trainer(own: Dictionary, place: DictionaryOnText, tokens: int, mesh: Mesh, seed: Sequence[int]) -> Trainer:
    """Of three members at one site, whose learning rate does not fall, so that every step can be the last."""
    config, kind = own.config, own.config.kind
    seeds = tuple(int(one) for one in np.random.default_rng(seed).integers(2**31 - 1, size=3))
    train = TrainConfig(
        kinds=(kind,), sites=(config.site,), k=(config.k,), batch=BATCH, seed=seeds, auxk=1 / 32, decay=0.0
    )
    scale = math.sqrt(config.d_in) / float(np.linalg.norm(place.fit_NxD, axis=1).mean(dtype=np.float64))
    known = SiteScale(scale, scale, place.fit_NxD.mean(axis=0, dtype=np.float64), config.max_norm)
    stack = members(train, kind, train.sites)
    return Trainer(train, config, stack, mesh, math.ceil(tokens / BATCH), [known] * len(stack))
