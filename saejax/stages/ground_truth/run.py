"""The stage ``ground_truth``: trains dictionaries on a synthetic world and compares them with what is known of it.

Each kind of ``--train.kinds`` is a unit, trained by the same code as on a model's activations. One more, ``controls``,
has dictionaries of the first kind that learn no directions, because their random decoder is frozen.
"""

import dataclasses

import numpy as np

from saejax.dictionaries import Dictionary, load_dictionary
from saejax.errors import Interrupted, UserError
from saejax.files import write_json
from saejax.ground_truth.results import FoundFeatures, JudgedDictionary, TruthResults, WorldFacts
from saejax.ground_truth.scores import FREQUENT, SHARE_RANGE, Counts, Matching, count, over_seeds, scores
from saejax.ground_truth.settings import CONTROLS, TruthConfig
from saejax.ground_truth.source import SITE, synthetic_source
from saejax.ground_truth.world import World, make_world
from saejax.runner.workspace import Run
from saejax.stages.train.run import train_members
from saejax.training.members import Member, make_members
from saejax.training.settings import TrainConfig

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
    for size, config in train.each_size().items():
        members = make_members(config, kind, [SITE], size)
        inner = dataclasses.replace(run, name=kind, folder=folder)
        train_members(inner, config, members, synthetic_source(truth, world, train.batch), size)
        stack += members
    groups: dict[str, list[Member]] = {}
    for member in stack:
        without_seed = [part for part in member.name.split("-") if not part.startswith("seed")]
        groups.setdefault("-".join(without_seed), []).append(member)
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
        ends = {score: _RANGES.get(score, SHARE_RANGE) for score in seed_scores[0]}
        spread = FoundFeatures(
            **{score: over_seeds([by_score[score] for by_score in seed_scores], ends[score]) for score in ends}
        )
        judged.append((JudgedDictionary(name, control, seeds, spread), dictionary, counts))
    return judged


def _line(judged: JudgedDictionary) -> str:
    name = " ".join(filter(None, (judged.control, judged.name)))
    return f"{name + ': ' if name else ''}" + ", ".join(
        f"{field} {getattr(judged.scores, field).mean:.3f}"
        for field in ("recovered", "mcc", "f1", "l0", "explained_variance", "best_explained_variance")
    )
