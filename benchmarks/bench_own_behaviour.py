"""Time that a user's own behaviour takes on an existing dictionary, with all answers.

Run: python -m benchmarks.bench_own_behaviour [--dictionary runs/demo/train/topk]
A file of 200 prompts is written (whether "she" or "he" follows a name, in five templates, one of which is in test
alone), and the stages baseline and ablate are run on it in a fresh workdir, as a user would. Prints the seconds by the
clock and of the processors of each, what was answered, and, last, one line of JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from saejax.interventions.table import TESTED
from saejax.runner.results import load_results

SHE = (
    "Mary Anna Emma Sarah Laura Alice Julia Helen Susan Linda Karen "
    "Lisa Nancy Emily Rachel Ruth Jane Kate Amy Rose Ellen Grace"
)
HE = (
    "John Peter David James Robert Thomas Paul Mark George Henry Frank "
    "Daniel Michael Steven Kevin Brian Eric Adam Tom Jack Andrew Simon"
)
TEMPLATES = dict(
    letter="When {} read the letter,",
    this="This is {} and",
    friend="My friend {} told me that",
    neighbour="This is my neighbour {} and",
    met="Yesterday I met {}. I think that",
)
TEST_ALONE = "met"
TRAIN_NAMES = 20  # of 44, whose prompts in the other four templates are the 80 train prompts


def own_prompts() -> list[dict[str, str]]:
    """Return the lines of the file: 80 train and 120 test prompts that share no name, and their counterparts."""
    sides = [(SHE.split(), HE.split(), " she", " he"), (HE.split(), SHE.split(), " he", " she")]
    lines = []
    for names, counterparts, correct, wrong in sides:
        for number, (name, counterpart) in enumerate(zip(names, counterparts, strict=True)):
            split = "train" if number < TRAIN_NAMES // 2 else "test"
            lines += [
                dict(
                    behaviour="pronoun",
                    split=split,
                    template=template,
                    text=text.format(name),
                    counterpart=text.format(counterpart),
                    correct=correct,
                    wrong=wrong,
                )
                for template, text in TEMPLATES.items()
                if split == "test" or template != TEST_ALONE
            ]
    return lines


def run_stage(stage: str, flags: list[str]) -> tuple[float, float]:
    """Return the seconds by the clock and of the processors in which a stage's binary ends."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", f"experiments.{stage}", *flags], check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dictionary", default="runs/demo/train/topk", help="of this model; make demo trains it")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts, workdir = Path(folder) / "prompts.jsonl", Path(folder) / "run"
        prompts.write_text("".join(json.dumps(line) + "\n" for line in own_prompts()))
        settings = {"model.path": args.model, "task.prompts": prompts, "task.behaviours": ""}
        settings["ablate.dictionary"] = args.dictionary
        shared = Path(folder) / "run.flags"  # a file, in which the baseline ignores the flags of ablate
        shared.write_text("\n".join([*(f"--{name}={value}" for name, value in settings.items()), *more]))
        flags = [f"--workdir={workdir}", f"--flagfile={shared}"]
        spent = {stage: run_stage(stage, flags) for stage in ("baseline", "ablate")}
        (unit,) = (workdir / "ablate").iterdir()
        (result,) = load_results(unit).verdict.dictionaries[TESTED].values()
    for stage, (seconds, processors) in spent.items():
        print(f"{stage:>10}: {seconds:6.1f} s by the clock, {processors:6.1f} s of processors")
    answers = dict(result.ablation, random=result.random, placebo=result.placebo, selective=result.selective)
    for name, answer in answers.items():
        print(f"{name:>15}: {answer.answer}: {answer.sentence}")
    totals = [round(sum(seconds), 1) for seconds in zip(*spent.values(), strict=True)]
    figures = dict(seconds=totals[0], processor_seconds=totals[1])
    answer_words = {name: answer.answer for name, answer in answers.items()}
    print(json.dumps(dict(bench="own_behaviour", **figures, **answer_words)))


if __name__ == "__main__":
    main()
