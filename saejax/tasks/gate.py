"""Filter of behaviours: the causal tests leave out those on which the model is not above chance.

A behaviour passes where the model is right on more of its train prompts than guessing between the two answers would be:
an exact binomial test of accuracy <= 1/2, one-sided, at the level ``--task.gate``. Train prompts decide, so that the
test prompts, which judge, are not chosen by what the model makes of them. The stage ``baseline`` writes what is left
out, and what is tested though it is weak, to ``gate.json``; the stages that test behaviours ask ``read_tested``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from saejax.errors import UserError, one_of
from saejax.files import read_object, write_json
from saejax.tasks.behaviours import Prompt, read_prompts

_FILE = "gate.json"


class Tested(NamedTuple):
    """The prompts of the behaviours that the causal tests take, by behaviour, and why others are left out."""

    prompts: dict[str, list[Prompt]]
    left_out: dict[str, str]
    weak: dict[str, str]  #: weak points of behaviours that are tested, in words

    def mark(self, name: str) -> str:
        """Return what a line about a behaviour says behind its name: " (weak: ...)", or "" if it is not weak."""
        return f" (weak: {self.weak[name]})" if name in self.weak else ""


def gate(right: int, n: int, level: float) -> tuple[float, str]:
    """Return the p-value of the test, and the reason why the behaviour is left out; "" if it passes.

    Args:
      right: number of train prompts whose correct answer has the higher logit.
      n: number of train prompts, at least 1.
      level: 0 to 1; 1 lets every behaviour pass.
    """
    from scipy.stats import binomtest

    # Against 1/2, as a prompt offers two answers and one of them is right.
    p = float(binomtest(right, n, alternative="greater").pvalue)
    if p <= level:
        return p, ""
    return p, (
        f"the model does not have it: right on {right} of {n} train prompts ({100 * right / n:.0f} %), where guessing "
        f"gives half (p = {p:.2g}, above --task.gate={level:g})"
    )


def write_gate(folder: Path, left_out: Mapping[str, str], weak: Mapping[str, str]) -> None:
    """Write the reason for each behaviour that is left out, and weak points of the others, to the baseline's folder."""
    write_json(folder / _FILE, dict(left_out=left_out, weak=weak))


def read_tested(folder: Path, named: Sequence[str] = (), flag: str = "") -> Tested:
    """Return the behaviours of a baseline that the causal tests take.

    Args:
      folder: folder of the unit "baseline"; without a file of the gate, all are taken.
      named: names of the behaviours to take; empty: all.
      flag: the flag that names them, for messages.

    Raises:
      UserError: a file is damaged, a name is unknown, or no behaviour is left.
    """
    prompts: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(folder / "prompts.jsonl"):
        prompts.setdefault(prompt.behaviour, []).append(prompt)
    written = read_object(folder / _FILE, "left_out", "weak") if (folder / _FILE).exists() else {}
    left_out, weak = written.get("left_out", {}), written.get("weak", {})
    names = [one_of(name, prompts | left_out, f"behaviour ({flag})") for name in named] or list(prompts | left_out)
    kept = {name: prompts[name] for name in names if name not in left_out}
    if names and not kept:
        raise UserError(none_left({name: left_out[name] for name in names}))
    of_named = ({name: words[name] for name in names if name in words} for words in (left_out, weak))
    return Tested(kept, *of_named)


def none_left(left_out: Mapping[str, str]) -> str:
    """Return the message for a run in which every behaviour is left out."""
    reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
    return f"no behaviour is left to test: {reasons}; name others in --task.behaviours or --task.prompts"
