"""The stage ``steer``: every behaviour's prompts turned to the answers of their counterparts."""

from saejax.interventions.settings import SteerConfig
from saejax.interventions.several_sites import place_at_sites
from saejax.interventions.steering import BehaviourSteering, SteeringTest, SteerResults, judge
from saejax.interventions.text import HeldOutText
from saejax.progress import OnProgress
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.stages import inputs as run_inputs
from saejax.tasks.gate import read_tested
from saejax.tasks.settings import CorpusConfig, TaskConfig

MAX_PROMPTS = 40  # test prompts of a behaviour that the stage steers: 99 controls at 9 strengths are run on each
TEXT_DOCUMENTS = 16  # held-out documents on which the rise of cross-entropy is measured


def run_steer(run: Run) -> SteerResults:
    """Steer every behaviour.

    Args:
      run: of the unit.

    Returns:
      The results of the unit.

    Raises:
      UserError: the dictionary belongs to another model, there are no doses, or a logit is not finite.
    """
    config = run.configs[SteerConfig]
    prompts, dictionary = run_inputs.read_behaviours(run), run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        lm = run_inputs.load_run_model(run, dictionary.config)
        text = HeldOutText.of(run.configs[CorpusConfig], run.configs[TaskConfig], lm, TEXT_DOCUMENTS)
        placed = place_at_sites(lm, dictionary, [prompt for some in prompts.values() for prompt in some])

        def measure(name: str, on_progress: OnProgress) -> parts.Measured:
            results = SteeringTest(lm, placed, prompts[name], text, config, MAX_PROMPTS, on_progress).results()
            return parts.Measured(results, _line(results))

        return measure

    mark = read_tested(run.inputs["baseline"]).mark
    measured = parts.each_part(run, list(prompts), begin, BehaviourSteering, "tokens", mark)
    site = dictionary.config.target or dictionary.site
    return SteerResults(config.dictionary, site, judge(measured))


def _line(result: BehaviourSteering) -> str:
    if result.reason:
        return f"not steered: {result.reason}"
    chosen = {name: curve.points[curve.chosen] for name, curve in result.methods.items()}
    listed = [f"{name} turns {100 * p.turned.mean:.0f} % at strength {p.strength:g}" for name, p in chosen.items()]
    return f"{result.prompts} test prompts: {', '.join(listed)}"
