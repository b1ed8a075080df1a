"""Behaviours of the user's own, from a file with a prompt in each line.

    {"behaviour": "plural", "text": "Two", "correct": " cats", "wrong": " cat", "counterpart": "One", "split": "test"}

"counterpart" (the same text with other content, to which the wrong answer is the better one), "split", "template"
(a name of the words around the content: prompts that share it are not independent) and "labels" ({"carry": "yes"}: what
else is known of the prompt, for probes) may be left out. Of a behaviour whose lines have no split, train and test
prompts are drawn at random, as many as were asked for; a prompt and the one that turns it around, whose text is its
counterpart, are of one split. No text stands in a behaviour twice; that the two splits share no content beyond that is
up to the user.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.errors import Faults, UserError
from saejax.files import explain_bad_name
from saejax.tasks.answer_tokens import fault
from saejax.tasks.behaviours import SPLITS, Prompt
from saejax.tasks.files import decode, read_bytes, read_lines, shown
from saejax.tasks.recipes import Recipe, ioi_recipe
from saejax.tasks.settings import BEHAVIOURS, PROBE_LABELS, TaskConfig
from saejax.wording import counted

_FLAG = "--task.prompts"
# Behaviours of our own, files of every stage, and what tables of effects call held-out text.
_TAKEN = (*BEHAVIOURS, "started", "summary", "index", "text")
_NEEDED, _OPTIONAL = ("behaviour", "text", "correct", "wrong"), ("counterpart", "split", "template", "labels")
_EXAMPLE = '{"behaviour": "plural", "text": "Two", "correct": " cats", "wrong": " cat"}'
_IOI_EXAMPLE = '{"names": ["Mary", "John", ...]}'


def read_own_prompts(task: TaskConfig, tokenizer: Any | None) -> dict[str, list[Prompt]]:
    """Return the prompts of each behaviour of ``task.prompts``, train prompts first; none if no file is named.

    Args:
      task: names the file; its seed draws the splits of behaviours that have none.
      tokenizer: the model's tokenizer; None: what takes one is not checked.

    Raises:
      UserError: the file cannot be read; lines are not prompts or repeat others, all of which are named; a behaviour
        has too few lines, a reserved name, or splits on some lines only; or prompts' answers merge with their text or
        start with the same token.
    """
    prompts, faults = dict[str, list[Prompt]](), Faults(task.prompts, "cannot be tested", "behaviours")
    for name, of_behaviour in _read_lines(task, tokenizer).items():
        with faults.collect(name):
            prompts[name] = _prompts(name, of_behaviour, task)
    faults.refuse()
    return prompts


def _read_lines(task: TaskConfig, tokenizer: Any | None) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of each behaviour, checked with a tokenizer if one is given; none if no file is named."""
    lines: dict[str, list[dict[str, Any]]] = {}
    if not task.prompts:
        return lines
    path, texts, names = Path(task.prompts), set(), dict[str, str]()

    def read(record: Any, where: str) -> None:
        """Keep a line if it is a prompt."""
        fields = _checked(record, where)
        text = fields["behaviour"], fields["text"]
        if text in texts:
            raise UserError(f"{where} has the text of an earlier line of {text[0]!r}: remove one of them")
        texts.add(text)
        if (other := names.setdefault(text[0].lower(), text[0])) != text[0]:
            raise UserError(
                f"{where} has the behaviour {text[0]!r}, and an earlier line {other!r}: some disks take their files "
                "for the same; give it another name"
            )
        try:
            why = fault(tokenizer, _prompt("train", fields)) if tokenizer is not None else ""
        except UserError as error:  # of a text that the tokenizer cannot read
            raise UserError(f"{where}: {error}") from None
        if why:
            raise UserError(
                f"{where}: {fields['text']!r} with {fields['correct']!r} or {fields['wrong']!r}: {why}, "
                "as this model's tokenizer cuts them: write it otherwise, or take it out"
            )
        lines.setdefault(fields["behaviour"], []).append(fields)

    read_lines(decode(_content(path), path), path, _EXAMPLE, read)
    if not lines:
        raise UserError(f"{_FLAG}={path} holds no prompts: expected lines such as {_EXAMPLE}")
    return lines


def read_ioi(task: TaskConfig) -> Recipe | None:
    """Return the recipe of indirect object identification with the words of ``task.ioi``; None if no file is named.

    Raises:
      UserError: the file cannot be read or is no object of lists of words, or nothing asks for the behaviour.
    """
    if not task.ioi:
        return None
    path, flag = Path(task.ioi), f"--task.ioi={task.ioi}"
    if "ioi" not in task.behaviours:
        raise UserError(f"{flag} is set, but ioi is not among --task.behaviours: add it there")
    content = decode(read_bytes(path, "--task.ioi", "name a .json file, or leave it empty"), path)
    try:
        words = json.loads(content)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, dict):
        raise UserError(f"{flag} holds no JSON object: expected one such as {_IOI_EXAMPLE}")
    try:
        return ioi_recipe(words)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def as_line(prompt: Prompt) -> str:
    """Return a prompt as a line of such a file."""
    fields = {name: getattr(prompt, name) for name in (*_NEEDED, *_OPTIONAL, "split") if getattr(prompt, name)}
    return json.dumps(fields | (dict(labels=dict(prompt.labels)) if prompt.labels else {}), ensure_ascii=False) + "\n"


def identity(task: TaskConfig) -> str:
    """Return a hash of the content of both files; "" if none is named."""
    # With a word, as prompts were once drawn whatever their counterparts.
    prompts = b"pairs " + _content(Path(task.prompts)) if task.prompts else b""
    words = read_bytes(Path(task.ioi), "--task.ioi", "name a .json file, or leave it empty") if task.ioi else b""
    return hashlib.sha256(prompts).hexdigest() * bool(prompts) + hashlib.sha256(words).hexdigest() * bool(words)


def _content(path: Path) -> bytes:
    return read_bytes(path, _FLAG, "name a .jsonl or .jsonl.gz file, or leave it empty")


def _checked(record: Any, where: str) -> dict[str, Any]:
    """Return the fields of a line."""
    if not isinstance(record, dict) or set(_NEEDED) - set(record):
        missing = ", ".join(name for name in _NEEDED if not isinstance(record, dict) or name not in record)
        raise UserError(f"{where} lacks {missing}: expected an object such as {_EXAMPLE}")
    unknown = sorted(set(record) - {*_NEEDED, *_OPTIONAL})
    if unknown:
        raise UserError(f"{where} has the unknown field {unknown[0]!r}: expected {', '.join((*_NEEDED, *_OPTIONAL))}")
    labels = record.get("labels", {})
    if not isinstance(labels, dict):
        raise UserError(f'{where}: \'labels\' is {shown(labels)}: expected an object such as {{"carry": "yes"}}')
    for name, value in {**record, "labels": "-", **labels}.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {name!r} is {shown(value)}: expected a string that is not blank")
    for name in labels:
        if name in PROBE_LABELS or explain_bad_name(name, "_"):
            raise UserError(
                f"{where}: the label {shown(name)} names files: {explain_bad_name('', '_')}, and none of "
                f"{', '.join(PROBE_LABELS)}"
            )
    if wanted := explain_bad_name(record["behaviour"], "_-"):
        raise UserError(f"{where}: the behaviour {shown(record['behaviour'])} names files: {wanted}")
    if record["behaviour"].lower() in _TAKEN:
        raise UserError(
            f"{where}: the name {shown(record['behaviour'])} is taken: expected none of {', '.join(_TAKEN)}"
        )
    if record.get("counterpart") == record["text"]:
        raise UserError(f"{where}: 'counterpart' is the text itself: expected one with other content, or none")
    if record.get("split", "train") not in SPLITS:
        raise UserError(f"{where}: 'split' is {shown(record['split'])}: expected train or test")
    return record


def _prompts(name: str, lines: Sequence[Mapping[str, Any]], task: TaskConfig) -> list[Prompt]:
    """Return a behaviour's prompts, train prompts first."""
    path = task.prompts
    has_split = [bool(line.get("split")) for line in lines]
    if any(has_split) and not all(has_split):
        raise UserError(f"{path}: only some prompts of {name!r} have a 'split': give it to all of them, or to none")
    if all(has_split):
        chosen = {split: [line for line in lines if line["split"] == split] for split in SPLITS}
        for split, split_lines in chosen.items():
            if len(split_lines) < 2:
                count = counted(len(split_lines), f"{split} prompt")
                raise UserError(f"{path} has {count} of {name!r}: expected at least 2")
    else:
        wanted = dict(train=task.train_prompts, test=task.test_prompts)
        if len(lines) < sum(wanted.values()):
            raise UserError(
                f"{path} has {counted(len(lines), 'prompt')} of {name!r}, but {wanted['train']} train and "
                f"{wanted['test']} test prompts were asked for: lower --task.train_prompts or --task.test_prompts"
            )
        pairs: dict[frozenset[str], list[Mapping[str, Any]]] = {}
        order = np.random.default_rng((task.seed, zlib.crc32(name.encode()))).permutation(len(lines))
        for line in (lines[place] for place in order):
            pairs.setdefault(frozenset((line["text"], line.get("counterpart", ""))), []).append(line)
        chosen, left = {split: list[Mapping[str, Any]]() for split in SPLITS}, list[Mapping[str, Any]]()
        for pair in pairs.values():
            fits = (some for split, some in chosen.items() if len(some) + len(pair) <= wanted[split])
            next(fits, left).extend(pair)
        for split, some in chosen.items():
            # Where numbers are odd, a pair may have to be taken apart.
            some += [left.pop() for _ in range(wanted[split] - len(some))]
    return [_prompt(split, line) for split in SPLITS for line in chosen[split]]


def _prompt(split: str, line: Mapping[str, Any]) -> Prompt:
    counterpart = line.get("counterpart", "")
    return Prompt(
        behaviour=line["behaviour"],
        split=split,
        text=line["text"],
        correct=line["correct"],
        wrong=line["wrong"],
        counterpart=counterpart,
        counterpart_correct=line["wrong"] if counterpart else "",
        template=line.get("template", ""),
        labels=tuple(line.get("labels", {}).items()),
    )
