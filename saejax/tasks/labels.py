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

and the labels that the user's own prompts have in their ``labels``, among prompts of one behaviour.

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
    """A label of some prompts."""

    label: str  #: its name
    behaviour: str  #: the behaviour of the prompts; "" for prompts of all behaviours
    #: class -> its numbers of train and test prompts, most frequent first; empty where ``reason`` is set.
    classes: Mapping[str, tuple[int, int]]
    #: the prompts to probe: those passed in, or for the label ``number`` every second one ``congruent``.
    prompts: tuple[Prompt, ...]
    #: train_N and test_M: indices of the labelled train and test prompts in ``prompts``.
    train_N: np.ndarray
    test_M: np.ndarray
    #: train_class_N and test_class_M: their classes, as indices into ``classes``.
    train_class_N: np.ndarray
    test_class_M: np.ndarray
    left_out: Mapping[str, int]  #: class -> its number of prompts, for classes with fewer than ``LEAST`` train prompts
    unlabelled: int  #: number of prompts to which the label does not apply
    congruent: int  #: number of labelled prompts that were changed to congruent ones
    reason: str = ""  #: why no probe can be fitted; "" where one can

    @property
    def name(self) -> str:
        """The label and its behaviour: "behaviour", "answer-addition"."""
        return f"{self.label}-{self.behaviour}" if self.behaviour else self.label


def congruent(prompt: Prompt) -> Prompt | None:
    """Return an agreement prompt with the noun before the verb in the subject's number; None for other behaviours."""
    plurals: dict[str, str] = dict(recipes()["agreement"].pools["nouns"])
    attractor = prompt.items[1] if len(prompt.items) == 2 else ""  # the noun between subject and verb
    if attractor not in plurals or prompt.correct.strip() not in _NUMBERS:
        return None
    forms = (attractor, plurals[attractor])
    wanted = forms[_NUMBERS[prompt.correct.strip()] == "plural"]
    return dataclasses.replace(prompt, text=re.sub(rf"\b({'|'.join(forms)})\b", wanted, prompt.text))


def balanced(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Return the prompts with every second one of each split, template and number made congruent.

    In the result, the noun before the verb carries no information on the subject's number.
    """
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    balanced_prompts = list(prompts)
    for index, prompt in enumerate(prompts):
        if same_number := congruent(prompt):
            group = (prompt.behaviour, prompt.split, prompt.template, prompt.correct)
            # Counted within split, template and number, so that none of them goes with the noun's number either.
            balanced_prompts[index] = same_number if counts[group] % 2 else prompt
            counts[group] += 1
    return tuple(balanced_prompts)


def label_prompts(label: str, prompts: Sequence[Prompt], logit_diffs: Sequence[float]) -> list[Labelled]:
    """Label the prompts of each behaviour separately, or of all together where the behaviour is the label.

    Args:
      label: one of ``settings.PROBE_LABELS``, or a label that some prompts have.
      prompts: prompts of all behaviours and both splits.
      logit_diffs: the model's logit difference on each prompt.

    Raises:
      UserError: there is no such label.
    """
    one_of(label, dict.fromkeys([*LABELS, *(name for prompt in prompts for name, _ in prompt.labels)]), "label")
    behaviours = [""] if label == "behaviour" else list(dict.fromkeys(prompt.behaviour for prompt in prompts))
    read = balanced(prompts) if label == "number" else tuple(prompts)
    changed = {index for index, pair in enumerate(zip(read, prompts, strict=True)) if pair[0] != pair[1]}
    # The prompts had these logit differences before: no label of congruent prompts reads them.
    labelled = [_labelled(label, behaviour, read, logit_diffs) for behaviour in behaviours]
    return [
        dataclasses.replace(group, congruent=len(changed & {*group.train_N.tolist(), *group.test_M.tolist()}))
        for group in labelled
    ]


def _labelled(label: str, behaviour: str, prompts: tuple[Prompt, ...], logit_diffs: Sequence[float]) -> Labelled:
    indices = [index for index, prompt in enumerate(prompts) if behaviour in ("", prompt.behaviour)]
    read = LABELS.get(label, lambda prompt, logit_diff: dict(prompt.labels).get(label))
    labels = {index: read(prompts[index], logit_diffs[index]) for index in indices}
    class_of = {index: name for index, name in labels.items() if name is not None}
    of_split = {split: [index for index in class_of if prompts[index].split == split] for split in SPLITS}
    train, test = (Counter(class_of[index] for index in of_split[split]) for split in SPLITS)
    # Then by name: classes of equal size would otherwise come in the order of prompts.
    every = sorted(train | test, key=lambda name: (-train[name], name))
    learned = [name for name in every if train[name] >= LEAST]
    kept = {split: [index for index in of_split[split] if class_of[index] in learned] for split in SPLITS}
    reason = ""
    if not every:
        reason = "no prompt has such a label"
    elif len(learned) < 2:
        shown = ", ".join(f"{name} {train[name]}" for name in every[:_SHOWN])
        more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
        reason = f"fewer than two classes with {LEAST} train prompts: {shown}{more}"
    elif not kept["test"]:
        reason = f"no test prompt is of a class with {LEAST} train prompts"
    class_index = {name: index for index, name in enumerate(learned)}
    rows = {split: [] if reason else kept[split] for split in SPLITS}
    classes = {split: np.array([class_index[class_of[row]] for row in rows[split]], np.int64) for split in SPLITS}
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
        unlabelled=len(labels) - len(class_of),
        congruent=0,
        reason=reason,
    )
