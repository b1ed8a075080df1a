"""The stage ``ground_truth``: trains dictionaries on a synthetic world and compares them with what is known of it.

Each kind of ``--train.kinds`` is a unit, trained by the same code as on a model's activations. One more, ``controls``,
has dictionaries of the first kind that learn no directions, because their random decoder is frozen.
Vectors are drawn from the number of their batch alone, so a resumed run needs only its step.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from scipy.stats import t

from saejax.activations.manifest import CapturedModel
from saejax.config import identity
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.errors import Interrupted, UserError
from saejax.files import fingerprint, write_json
from saejax.ground_truth.results import FoundFeatures, JudgedDictionary, TruthResults, WorldFacts
from saejax.ground_truth.scores import FREQUENT, Counts, Matching, count, scores
from saejax.ground_truth.settings import CONTROLS, TruthConfig
from saejax.ground_truth.world import TRAIN, World, batch_key, make_world, sample
from saejax.models.sinks import NO_SINKS
from saejax.parallel.mesh import fitting_sharding
from saejax.results import Interval
from saejax.runner.workspace import Run
from saejax.stages.train.run import for_expansion, train_stack
from saejax.training.inputs import Source
from saejax.training.members import Member, make_members
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack

SITE = "synthetic.0"
_SCALE_VECTORS = 65_536  # for the trainer's estimates of scales
_NOT_OF_THE_WORLD = ("samples", "held_out")  # settings of training and scoring
_SHARE_RANGE = (0.0, 1.0)  # of shares and absolute cosines
_RANGES = {"l0": (0.0, np.inf), "explained_variance": (-np.inf, 1.0), "best_explained_variance": (-np.inf, 1.0)}


class SyntheticRows:
    """Vectors from which the trainer estimates scales and means; see ``scales.ScaledRows``."""

    sites = (SITE,)

    def __init__(self, config: TruthConfig, world: World, batch: int):
        self._world, self._batch = world, batch
        self._key = functools.partial(batch_key, config.seed, TRAIN)
        self._count = max(min(config.samples, _SCALE_VECTORS) // batch, 1) * batch
        settings = {name: value for name, value in identity(config).items() if name not in _NOT_OF_THE_WORLD}
        self.model = CapturedModel("synthetic", "", fingerprint(settings))

    def d(self, site: str) -> int:
        """Return the width of a vector."""
        return self._world.directions_JxD.shape[1]

    def max_norm(self, site: str) -> float:
        """Return a norm that no vector reaches: there are no attention sinks."""
        return NO_SINKS

    def rows(self, split: str, *sites: str) -> np.ndarray:
        """Return the numbers of the first training vectors."""
        return np.arange(self._count)

    def read(self, site: str, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of these numbers, [n, d]."""
        batches = [
            np.asarray(sample(self._world, self._key(number), self._batch)[0])
            for number in range(self._count // self._batch)
        ]
        return np.concatenate(batches)[rows]


class Sampled:
    """Batches of a synthetic world, drawn on the devices step by step; see ``inputs.Batches``.

    Every epoch has the same batches; from the second on in a new order.
    """

    def __init__(self, stack: TrainStack, config: TruthConfig, world: World):
        batch = stack.config.batch
        self._config, self._world, self._per_epoch = stack.config, world, config.samples // batch
        self._key = functools.partial(batch_key, config.seed, TRAIN)
        self._rows = fitting_sharding(stack.mesh, (batch, 1), "data", None)

    def batch(self, step: int) -> tuple[jax.Array, ...]:
        """Return the batch of a step."""
        key = self._key(np.int32(self._number(step)))
        return (sample(self._world, key, self._config.batch, self._rows)[0][None],)

    def _number(self, step: int) -> int:
        epoch, index = divmod(step, self._per_epoch)
        return int(_batch_order(self._config.seed[0], epoch, self._per_epoch)[index])


@functools.lru_cache(maxsize=2)
def _batch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the numbers of an epoch's batches in the order of training."""
    # The vectors are drawn at random, so the first pass needs no other order.
    return np.random.default_rng([seed, epoch]).permutation(count) if epoch else np.arange(count)


def synthetic_source(config: TruthConfig, world: World, batch: int) -> Source:
    """Return the vectors of a world as a source for ``train.train_stack``."""
    rows = SyntheticRows(config, world, batch)
    return Source(rows, config.samples // batch, lambda stack: Sampled(stack, config, world))


def run_ground_truth(run: Run) -> TruthResults:
    """Train the members of kind ``run.name``, or the controls, and score them.

    This writes the files of the stage ``train``, and ``scores.json`` beside each dictionary. An interrupted run
    continues at its newest checkpoint and ends with the same bits.

    Raises:
      UserError: no world can have these settings, or the trainer refuses its own.
      Interrupted: asked to stop; finished work is saved.
    """
    truth, train = run.configs[TruthConfig], run.configs[TrainConfig]
    if train.form != "sae":
        raise UserError(f"--train.form={train.form}: a synthetic world has one site: use --train.form=sae")
    world = make_world(truth)
    kind, control = run.name, ""
    if kind == CONTROLS:
        kind, control = train.kinds[0], "frozen"
        # Resampling would write directions of the data into the decoder that is to stay random.
        train = dataclasses.replace(train, freeze="decoder", resample_every=0)
    judged = _judge(run, world, kind, control, train)
    dictionary, counts = judged[0][1:]
    dictionaries = tuple(scored for scored, _, _ in judged)
    for scored in dictionaries:
        run.say(_line(scored))
    return TruthResults(
        kind=kind,
        features=dictionary.config.n_features,
        samples=truth.samples // train.batch * train.batch * train.epochs,
        held_out=counts.tokens,
        world=WorldFacts(
            features=truth.features,
            frequent=int(np.sum(counts.active_J > FREQUENT * counts.tokens)),
            dimensions=truth.dimensions,
            l0=float(counts.active_J.sum() / counts.tokens),
        ),
        dictionaries=dictionaries,
    )


def _judge(
    run: Run, world: World, kind: str, control: str, train: TrainConfig
) -> list[tuple[JudgedDictionary, Dictionary, Counts]]:
    """Train a stack and score its members; members that differ only in their seed are scored together."""
    truth = run.configs[TruthConfig]
    folder = run.folder / control
    folder.mkdir(exist_ok=True)
    stack: list[Member] = []
    for config in train.each_expansion():
        members = make_members(config, kind, [SITE])
        inner = for_expansion(dataclasses.replace(run, name=kind, folder=folder), config)
        train_stack(inner, members, synthetic_source(truth, world, train.batch))
        stack += members
    groups: dict[str, list[Member]] = {}
    for member in stack:
        groups.setdefault(_without_seed(member), []).append(member)
    judged = []
    for name, members in groups.items():
        seed_scores = []
        for member in members:
            if run.stopping():
                raise Interrupted("stopped while dictionaries were scored: run the same command again to continue")
            dictionary = load_dictionary(folder / member.name / "dictionary")
            matching = Matching.of(np.asarray(dictionary.W_dec_FxD[...]), np.asarray(world.directions_JxD))
            counts = count(dictionary, world, truth, matching)
            seed_scores.append(scores(counts, matching, world))
            write_json(folder / member.name / "scores.json", seed_scores[-1])
        seeds = tuple(member.settings["seed"] for member in members)
        ends = {score: _RANGES.get(score, _SHARE_RANGE) for score in seed_scores[0]}
        spread = FoundFeatures(
            **{score: over_seeds([by_score[score] for by_score in seed_scores], ends[score]) for score in ends}
        )
        judged.append((JudgedDictionary(name, control, seeds, spread), dictionary, counts))
    return judged


def _without_seed(member: Member) -> str:
    return "-".join(part for part in member.name.split("-") if not part.startswith("seed"))


def over_seeds(values: Sequence[float], ends: tuple[float, float] = _SHARE_RANGE) -> Interval:
    """Return the mean and its 95 % t interval, clipped to the range of values; one value has an interval of length 0.

    Args:
      values: values of seeds or prompts.
      ends: smallest and largest possible value.
    """
    mean, count = float(np.mean(values)), len(values)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else 0.0
    return Interval(mean, max(mean - half, ends[0]), min(mean + half, ends[1]))


def _line(judged: JudgedDictionary) -> str:
    name = " ".join(filter(None, (judged.control, judged.name)))
    return f"{name + ': ' if name else ''}" + ", ".join(
        f"{field} {getattr(judged.scores, field).mean:.3f}"
        for field in ("recovered", "mcc", "f1", "l0", "explained_variance", "best_explained_variance")
    )
