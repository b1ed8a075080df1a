"""The stage ``ground_truth``: trains dictionaries on a synthetic world and compares them with what is known of it.

Each kind of ``--train.kinds`` is a unit, trained by the same code as on a model's activations. One more, ``controls``,
has dictionaries of the first kind that have learned no directions: with a frozen random decoder, and without training.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from scipy.stats import t

from saejax.dictionaries import Dictionary, load_dictionary
from saejax.errors import Interrupted, UserError
from saejax.files import write_json
from saejax.ground_truth.matching import Matching
from saejax.ground_truth.results import FoundFeatures, JudgedDictionary, TruthResults, WorldFacts
from saejax.ground_truth.rows import SITE, synthetic_source
from saejax.ground_truth.scores import FREQUENT, Counts, count, scores
from saejax.ground_truth.world import World, make_world
from saejax.results import Interval, to_json
from saejax.runner.workspace import Run
from saejax.settings import TrainConfig
from saejax.stages.ground_truth import CONTROLS, TruthConfig
from saejax.training.members import Member, make_members
from saejax.training.train import for_expansion, train_stack

_SHARE_RANGE = (0.0, 1.0)  # of shares and absolute cosines
_RANGES = {"l0": (0.0, np.inf), "explained_variance": (-np.inf, 1.0), "best_explained_variance": (-np.inf, 1.0)}


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
    kind, judged = run.name, []
    if kind == CONTROLS:
        kind = train.kinds[0]
        for control, settings in _controls(train).items():
            judged += _judge(run, world, kind, control, settings)
    else:
        judged = _judge(run, world, kind, "", train)
    dictionary, counts = judged[0][1:]
    dictionaries = tuple(scored for scored, _, _ in judged)
    for scored in dictionaries:
        run.say(_line(scored))
    return TruthResults(
        kind=kind,
        features=dictionary.config.n_features,
        samples=truth.samples // train.batch * train.batch * train.epochs,
        held_out=counts.tokens,
        world=_facts(world, counts),
        dictionaries=dictionaries,
    )


def _controls(train: TrainConfig) -> dict[str, TrainConfig]:
    """Return the training settings of the controls by name. At learning rate 0 only BatchTopK's threshold changes."""
    # Resampling would write directions of the data into the decoder that is to stay random.
    frozen = dataclasses.replace(train, freeze="decoder", resample_every=0)
    # Some steps, though nothing is learned: BatchTopK's threshold is a mean over batches.
    return dict(frozen=frozen, untrained=dataclasses.replace(frozen, learning_rate=(0.0,), max_steps=10))


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


def _facts(world: World, counts: Counts) -> WorldFacts:
    directions_JxD = world.directions_JxD
    count, dimensions = directions_JxD.shape
    nearest = jax.jit(lambda some_BxD: jax.numpy.sort(abs(some_BxD @ directions_JxD.T), axis=1)[:, -2])  # [-1]: itself
    return WorldFacts(
        features=count,
        frequent=int(np.sum(counts.active_J > FREQUENT * counts.tokens)),
        dimensions=dimensions,
        l0=float(counts.active_J.sum() / counts.tokens),
        nearest_cosine=float(np.mean(nearest(directions_JxD[:: max(count // 1024, 1)]))),
    )


def _line(judged: JudgedDictionary) -> str:
    score = to_json(judged.scores)
    name = " ".join(filter(None, (judged.control, judged.name)))
    return f"{name + ': ' if name else ''}" + ", ".join(
        f"{field} {score[field]['mean']:.3f}"
        for field in ("recovered", "mcc", "f1", "l0", "explained_variance", "best_explained_variance")
    )
