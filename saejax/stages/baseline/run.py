"""The stage ``baseline``: the prompts of every behaviour drawn, scored and written."""

import dataclasses
import functools
import shutil
from pathlib import Path

from saejax.errors import Interrupted, UserError
from saejax.files import read_json, write_json
from saejax.models.settings import ModelConfig
from saejax.models.source import load_tokenizer, resolve
from saejax.results import from_json, to_json
from saejax.runner.workspace import Run
from saejax.stages.inputs import load_run_model
from saejax.tasks.baseline import score_prompts, summarize
from saejax.tasks.behaviours import Prompt, PromptScore, write_prompts
from saejax.tasks.draw import Drawn, TooFewPrompts, make_prompts
from saejax.tasks.gate import none_left, write_gate
from saejax.tasks.own_prompts import read_ioi, read_own_prompts
from saejax.tasks.results import BaselineBehaviour, BaselineResults
from saejax.tasks.settings import TaskConfig

PARTS = "parts"  # folder of behaviours that are measured, until all are


def run_baseline(run: Run) -> BaselineResults:
    """Draw the prompts, score them, and write them with their scores to ``prompts.jsonl``.

    Raises:
      UserError: the model cannot be loaded, prompts cannot be made or are too long, or logits are not finite.
      Interrupted: asked to stop; behaviours that were measured are kept.
    """
    task = run.configs[TaskConfig]
    # The weights are loaded when prompts are there: bad prompts should not wait for a model.
    tokenizer, model = load_tokenizer(resolve(run.configs[ModelConfig])), functools.cache(lambda: load_run_model(run))
    own_prompts, ioi = read_own_prompts(task, tokenizer), read_ioi(task)
    names = (*task.behaviours, *own_prompts)

    def file(name: str) -> Path:
        return run.folder / PARTS / f"{name}.json"

    def measure(name: str) -> None:
        if run.stopping():
            raise Interrupted("baseline: stopped; behaviours that were measured are kept")
        try:
            if name in own_prompts:
                drawn = Drawn(own_prompts[name], {})
            else:
                counts, recipe = (task.train_prompts, task.test_prompts), ioi if name == "ioi" else None
                drawn = make_prompts(name, *counts, task.seed, tokenizer, recipe)
        except TooFewPrompts as error:
            run.say(f"{name}: not measured: {error}")
            measured = _Measured(str(error))
        else:
            scores = score_prompts(model(), drawn.prompts)
            result = summarize(drawn, scores, task)
            measured = _Measured(result.left_out, result, tuple(drawn.prompts), tuple(scores))
            run.say(_line(name, result))
        file(name).parent.mkdir(exist_ok=True)
        write_json(file(name), to_json(measured))

    run.make_each(names, file, measure)
    measured_by_name = {name: from_json(_Measured, read_json(file(name)), file(name)) for name in names}
    outcomes = list(measured_by_name.values())
    behaviours = {name: outcome.result for name, outcome in measured_by_name.items() if outcome.result}
    left_out = {name: outcome.left_out for name, outcome in measured_by_name.items() if outcome.left_out}
    if left_out and len(left_out) == len(names):
        if not behaviours:
            shutil.rmtree(run.folder / PARTS, ignore_errors=True)
            raise UserError(none_left(left_out))
        run.say(none_left(left_out))
    prompts, scores = ([entry for some in outcomes for entry in getattr(some, of)] for of in ("prompts", "scores"))
    write_prompts(run.folder / "prompts.jsonl", prompts, scores)
    # Before the parts are removed: a run that stops in between still finds them.
    weak = {name: "; ".join(result.flags) for name, result in behaviours.items() if result.flags}
    write_gate(run.folder, left_out, {name: flags for name, flags in weak.items() if name not in left_out})
    shutil.rmtree(run.folder / PARTS, ignore_errors=True)
    return BaselineResults(behaviours, left_out or None)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A behaviour as one process measured it; without a result there are too few prompts."""

    left_out: str | None
    result: BaselineBehaviour | None = None
    prompts: tuple[Prompt, ...] = ()
    scores: tuple[PromptScore, ...] = ()


def _line(name: str, result: BaselineBehaviour) -> str:
    test = result.test
    shares = (test.accuracy * 100, test.top1 * 100)
    percent = [f"{share.mean:.0f} % [{share.low:.0f}, {share.high:.0f}]" for share in shares]
    plain = [f"{score.mean:.2f} [{score.low:.2f}, {score.high:.2f}]" for score in (test.logit_diff, test.separation)]
    flags = f"; weak: {'; '.join(result.flags)}" if result.flags else ""
    flags += f"; left out of the causal tests: {result.left_out}" if result.left_out else ""
    flags += f"; {sum(result.replaced.values())} drafts were replaced" if result.replaced else ""
    return (
        f"{name}: on {test.n} test prompts accuracy {percent[0]}, top-1 {percent[1]}, "
        f"logit difference {plain[0]}, separation {plain[1]}{flags}"
    )
