"""The stage ``steer``: prompts turned to the answers of their counterparts by features, means and examples.

Directions are learned on train prompts, which also choose how strongly each method steers (``directions``,
``measure``); test prompts judge it: how many answers turn, beside random directions at the same dose (``draws``), and
what that costs held-out text and what the model goes on with (``fluency``). Examples in front of the prompt stand
beside them (``prompting``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from saejax.causal.claims import SetEffects, claims
from saejax.causal.steer.draws import rule
from saejax.causal.steer.measure import Judged, SteeringTest
from saejax.causal.steer.results import BehaviourSteering, SteerResults
from saejax.errors import UserError
from saejax.files import read_lines, write_lines
from saejax.interventions.split_model import SplitModel
from saejax.interventions.text import HeldOutText
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, SteerConfig, TaskConfig
from saejax.tasks import run_inputs


def run_steer(run: Run) -> SteerResults:
    """Steers every behaviour.

    A behaviour is a part in the sense of ``parts``. The logit differences of its test prompts are in
    ``<behaviour>-prompts.jsonl``.

    Raises:
      UserError: the dictionary belongs to another model, there are no doses, or something is not finite.
    """
    config = run.configs[SteerConfig]
    if not config.doses:
        raise UserError("--steer.doses is empty: name at least one, such as 0.4")
    config = dataclasses.replace(config, doses=tuple(sorted(set(config.doses))))
    prompts, dictionary = run_inputs.read_behaviours(run), run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        model = run_inputs.load_run_model(run)
        split = SplitModel(model, dictionary, config.positions)
        text = HeldOutText.of(run.configs[CorpusConfig], run.configs[TaskConfig], model, config.text_documents)

        def measure(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            judged = SteeringTest(model, split, prompts[name], text, config, on_progress).judge()
            write_lines(parts.part_file(run, name, "-prompts.jsonl"), _rows(judged))
            return parts.Measured(judged.results, _line(judged.results))

        return measure

    found = parts.each_part(run, list(prompts), begin, BehaviourSteering, "prompts")
    return SteerResults(
        dictionary=config.dictionary,
        site=dictionary.config.target or dictionary.site,
        positions=config.positions,
        behaviours=_settled(run, found, config),
    )


def _settled(run: Run, found: Mapping[str, BehaviourSteering], config: SteerConfig) -> dict[str, BehaviourSteering]:
    """The behaviours with the answers of the run: each method of each behaviour is one of the claims that it makes."""
    effects = {}
    for name, result in found.items():
        drawn = [row for row in read_lines(parts.part_file(run, name, "-prompts.jsonl")) if row["draws"]]
        clean_Q, template_Q = (np.array([row[of] for row in drawn]) for of in ("clean", "template"))
        for method, own in result.methods.items():
            steered_Q = np.array([row["steered"][method][own.chosen] for row in drawn])
            draws_NxQ = np.array([row["draws"][method] for row in drawn]).T
            effects[name, method] = SetEffects.of(clean_Q, steered_Q, draws_NxQ, template_Q, None)
    judged = claims({" ".join(key): one for key, one in effects.items()}, rule(config))
    answers = dict(zip(effects, judged.values(), strict=True))
    return {
        name: dataclasses.replace(
            result,
            methods={
                method: dataclasses.replace(own, claim=answers[name, method]) for method, own in result.methods.items()
            },
        )
        for name, result in found.items()
    }


def _rows(judged: Judged) -> list[dict[str, Any]]:
    """The logit differences of every test prompt."""
    places = {int(place): q for q, place in enumerate(judged.chosen_Q)}
    return [
        dict(
            text=prompt.text,
            correct=prompt.correct,
            wrong=prompt.wrong,
            template=prompt.template,
            clean=float(judged.clean_P[p]),
            steered={name: diff_SxP[:, p].tolist() for name, diff_SxP in judged.steered.items()},
            draws={name: diff_NxQ[:, places[p]].tolist() for name, diff_NxQ in judged.draws.items()}
            if p in places
            else None,
        )
        for p, prompt in enumerate(judged.prompts)
    ]


def _line(result: BehaviourSteering) -> str:
    if result.reason:
        return f"not steered: {result.reason}"
    best = {name: own.points[own.chosen] for name, own in result.methods.items()}
    said = [f"{name} {100 * point.flipped.mean:.0f} % at dose {point.dose:.2g}" for name, point in best.items()]
    return f"answers turned on {result.prompts} test prompts: {', '.join(said)}"
