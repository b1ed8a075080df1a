"""Labels of prompts that a probe may read off activations, and which prompts carry them.

=========  ==============================================================  ===================
label      of a prompt                                                     among prompts of
=========  ==============================================================  ===================
behaviour  the behaviour that it asks for                                  all behaviours
answer     its correct answer                                              one behaviour
parity     whether that answer, a whole number, is even or odd             one behaviour
correct    whether the model is right: its logit difference is above 0     one behaviour
number     the number of the subject, which the verb " is" or " are" says  one behaviour
=========  ==============================================================  ===================

and those that the user's own prompts have in their ``labels``, among prompts of one behaviour.

In agreement the noun beside the verb always has the other number, so whoever reads that noun knows the subject's. The
label ``number`` is therefore read off prompts of which every second has a noun of the same number (``congruent``).

A class needs ``LEAST`` train prompts to be learned from; prompts of rarer classes are left out, and counted.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saejax.errors import one_of
from saejax.tasks.behaviours import SPLITS, Prompt
from saejax.tasks.recipes import recipes

LEAST = 5  # train prompts of a class
_NUMBERS = dict(zip(("is", "are"), ("singular", "plural"), strict=True))
_SHOWN = 4  # classes that a reason names


def _parity(prompt: Prompt, logit_diff: float) -> str | None:
    answer = prompt.correct.strip()
    return ("even", "odd")[int(answer) % 2] if answer.isdecimal() else None


LABELS: Mapping[str, Callable[[Prompt, float], str | None]] = dict(
    behaviour=lambda prompt, logit_diff: prompt.behaviour,
    answer=lambda prompt, logit_diff: prompt.correct.strip(),
    parity=_parity,
    correct=lambda prompt, logit_diff: "right" if logit_diff > 0 else "wrong",
    number=lambda prompt, logit_diff: _NUMBERS.get(prompt.correct.strip()),
)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A label of some prompts.

    Attributes:
      label: its name.
      behaviour: whose prompts; "" for those of all.
      classes: class -> how many train and test prompts have it, most frequent first; none if ``reason`` says why.
      prompts: what is read: those that were given, or of ``number`` every second one ``congruent``.
      train_N, test_M: the places of these prompts.
      train_class_N, test_class_M: their classes, as places in ``classes``.
      left_out: class -> how many prompts have it, of classes with fewer than ``LEAST`` train prompts.
      unlabelled: prompts to which the label does not apply.
      congruent: how many of the labelled prompts are not as they were given.
      reason: why there is nothing to learn; "" where there is.
    """

    label: str
    behaviour: str
    classes: Mapping[str, tuple[int, int]]
    prompts: tuple[Prompt, ...]
    train_N: np.ndarray
    test_M: np.ndarray
    train_class_N: np.ndarray
    test_class_M: np.ndarray
    left_out: Mapping[str, int]
    unlabelled: int
    congruent: int
    reason: str = ""

    @property
    def name(self) -> str:
        """The label, and whose it is: "behaviour", "answer-addition"."""
        return f"{self.label}-{self.behaviour}" if self.behaviour else self.label


def congruent(prompt: Prompt) -> Prompt | None:
    """Return an agreement prompt whose noun beside the verb has the subject's number; None for another kind."""
    plurals: dict[str, str] = dict(recipes()["agreement"].pools["nouns"])
    beside = prompt.items[1] if len(prompt.items) == 2 else ""
    if beside not in plurals or prompt.correct.strip() not in _NUMBERS:
        return None
    forms = (beside, plurals[beside])
    wanted = forms[_NUMBERS[prompt.correct.strip()] == "plural"]
    return dataclasses.replace(prompt, text=re.sub(rf"\b({'|'.join(forms)})\b", wanted, prompt.text))


def balanced(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Return the prompts, every second one of each split, template and number congruent.

    In what results, the noun beside the verb says nothing of the subject's number.
    """
    seen: dict[tuple[str, ...], int] = defaultdict(int)
    balanced_prompts = list(prompts)
    for place, prompt in enumerate(prompts):
        if same := congruent(prompt):
            group = (prompt.behaviour, prompt.split, prompt.template, prompt.correct)
            balanced_prompts[place] = same if seen[group] % 2 else prompt
            seen[group] += 1
    return tuple(balanced_prompts)


def label_prompts(label: str, prompts: Sequence[Prompt], logit_diffs: Sequence[float]) -> list[Labelled]:
    """Label prompts: those of each behaviour by themselves, or, where the behaviour is the label, all together.

    Args:
      label: one of ``settings.PROBE_LABELS``, or a label that some prompts have.
      prompts: of all behaviours and both splits.
      logit_diffs: the model's on each of them.

    Raises:
      UserError: there is no such label.
    """
    one_of(label, dict.fromkeys([*LABELS, *(name for prompt in prompts for name, _ in prompt.labels)]), "label")
    behaviours = [""] if label == "behaviour" else list(dict.fromkeys(prompt.behaviour for prompt in prompts))
    read = balanced(prompts) if label == "number" else tuple(prompts)
    changed = {place for place, pair in enumerate(zip(read, prompts, strict=True)) if pair[0] != pair[1]}
    found = [_labelled(label, behaviour, read, logit_diffs) for behaviour in behaviours]
    return [
        dataclasses.replace(one, congruent=len(changed & {*one.train_N.tolist(), *one.test_M.tolist()}))
        for one in found
    ]


def _labelled(label: str, behaviour: str, prompts: tuple[Prompt, ...], logit_diffs: Sequence[float]) -> Labelled:
    own = [place for place, prompt in enumerate(prompts) if behaviour in ("", prompt.behaviour)]
    read = LABELS.get(label, lambda prompt, logit_diff: dict(prompt.labels).get(label))
    labels = {place: read(prompts[place], logit_diffs[place]) for place in own}
    of = {place: name for place, name in labels.items() if name is not None}
    of_split = {split: [place for place in of if prompts[place].split == split] for split in SPLITS}
    train, test = (Counter(of[place] for place in of_split[split]) for split in SPLITS)
    every = sorted(train | test, key=lambda name: (-train[name], name))
    learned = [name for name in every if train[name] >= LEAST]
    kept = {split: [place for place in of_split[split] if of[place] in learned] for split in SPLITS}
    reason = ""
    if not every:
        reason = "no prompt has such a label"
    elif len(learned) < 2:
        shown = ", ".join(f"{name} {train[name]}" for name in every[:_SHOWN])
        more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
        reason = f"fewer than two classes with {LEAST} train prompts: {shown}{more}"
    elif not kept["test"]:
        reason = f"no test prompt is of a class with {LEAST} train prompts"
    place_of = {name: place for place, name in enumerate(learned)}
    rows = {split: [] if reason else kept[split] for split in SPLITS}
    classes = {split: np.array([place_of[of[place]] for place in rows[split]], np.int64) for split in SPLITS}
    return Labelled(
        label=label,
        behaviour=behaviour,
        classes={} if reason else {name: (train[name], test[name]) for name in learned},
        prompts=prompts,
        train_N=np.array(rows["train"], np.int64),
        test_M=np.array(rows["test"], np.int64),
        train_class_N=classes["train"],
        test_class_M=classes["test"],
        left_out={name: train[name] + test[name] for name in every if name not in learned},
        unlabelled=len(labels) - len(of),
        congruent=0,
        reason=reason,
    )
