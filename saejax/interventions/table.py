"""The effects table: what a run measured, one row for each edit, prompt and readout.

A run saves it as three files: ``effects.parquet`` with the columns behaviour, edit, prompt, readout and value;
``edits.json`` with the definition of every edit; ``prompts.json`` with the metadata of every prompt. Everything that
the verdict says is computed from these (``saejax.interventions.verdict``), so it can be recomputed in a notebook:

    table = saejax.load_effects("runs/demo/ablate/topk")
    saejax.verdict(table)

Vocabulary:

- An **edit** belongs to the behaviour whose answers chose its features (``behaviour``). It is run on test prompts of
  that behaviour; the edit of the top features is also run on the prompts of the other behaviours and on held-out text,
  and so are a few random lists and placebo sets (``SPARING``), on every eighth document.
- The **group** of an edit says what it is compared as: see ``GROUPS`` and ``BASIS``.
- The **fraction** a of an edit is how much of it was applied: each activation f becomes f + a (r - f), where r is the
  replacement (0 for zero ablation). An edit with several fractions has one definition per fraction. Placebo sets may
  have fractions above 1.
- A **readout** is one number per prompt; see ``READOUTS``.
- The **dose** of an edit is the root mean square over prompts of the readout ``change_norm``.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.arguments import suggests_names
from saejax.errors import UserError, file_errors
from saejax.files import read_json, whole_file, write_json
from saejax.links import resolve_links
from saejax.short_reprs import has_short_repr

#: ``clean``: no edit. ``top``: the tested features together (index 0). ``single``: one feature alone (index is its
#: rank). ``random``: random lists to the dose of the top features. ``placebo``: the top features of a placebo target,
#: scaled to that dose. ``trained`` and ``untrained``: the list to that dose of the tested dictionary, and of each
#: untrained one (index). ``uncentred``: the same of the first untrained ones, with their centre at zero. ``pool``: the
#: features of which random lists are made; it is not run. ``every``: any live feature alone (index is the feature).
#: ``resample``: the top features, each at every position where it fires with an activation from another such position.
GROUPS = (
    *("clean", "top", "single", "random", "placebo", "trained", "untrained", "uncentred", "pool", "every", "resample"),
)
#: The groups whose first sets are also run on the prompts of other behaviours and on some held-out text.
SPARING = ("random", "placebo")
#: Groups named ``kept:<group>`` hold the features that alone are kept, all others at their means: of ``top``,
#: ``placebo`` or ``untrained``; groups that end in ``NO_ERROR`` are without the error term. The index counts sets and
#: sizes.
KEPT, NO_ERROR = "kept:", ":no_error"
KEPT_CONTROLS = ("placebo", "untrained")
#: Groups named ``basis:<name>`` hold directions of another basis: neurons, pca, diff_means, or a folder's.
BASIS = "basis:"
#: ``logit_diff``: logit of the correct minus the wrong answer's first token. ``log_prob``: log-probability of the
#: correct answer's first token, nats. ``top1``: 1 where the correct token is the argmax. ``two_way``: 1 where the logit
#: difference is positive. ``kl``: KL(clean || edited) of the next-token distribution, nats. ``ce``: cross-entropy of
#: held-out text, nats per token. ``change_norm``: norm of the change at the site, over all edited positions of the
#: prompt together. Of benchmark items: ``answer_log_prob``, the teacher-forced
#: log-likelihood of the whole reference answer, nats; ``answer_margin``, the log-probability of the final answer after
#: the solution up to it, minus that of a corrupted answer of the same form, nats; ``accuracy``, 1 where the model's
#: answer is right, ``strict``, 1 where it is right by the strict rule, ``formatted``, 1 where that rule finds an answer
#: at all, and ``cut``, 1 where the generated answer was cut off. ``rank_1`` to ``rank_20``: the logit of the token that
#: is so many-th without an edit, answers left out. ``readout``: a readout of the user's.
RANKS = tuple(f"rank_{rank}" for rank in range(1, 21))
READOUTS = (
    *("logit_diff", "log_prob", "top1", "two_way", "kl", "ce", "change_norm"),
    *("answer_log_prob", "accuracy", "strict", "formatted", "cut"),
    *RANKS,
    "answer_margin",
    "readout",
)
#: The behaviour of held-out documents.
TEXT = "text"
#: The value of ``EditDefinition.dictionary`` for the tested dictionary and for edits that need none.
TESTED = "tested"

_FILES = ("effects.parquet", "edits.json", "prompts.json")


@dataclasses.dataclass(frozen=True)
class EditDefinition:
    """An edit: what was changed, and how far."""

    #: behaviour whose answers chose the features, or whose prompts a clean run reads (``TEXT``: documents).
    behaviour: str
    group: str  #: see ``GROUPS`` and ``BASIS``
    index: int = 0  #: index of the set within its group
    features: tuple[int, ...] = ()  #: the indices of the ablated features, or of the directions of the basis
    fraction: float = 1.0  #: share of the edit that is applied, at least 0
    #: dictionary of its features: ``TESTED``, or the name of a dictionary of another seed.
    dictionary: str = TESTED
    target: tuple[str, str] | None = None  #: the two placebo tokens (right, wrong), as text; None for other groups
    site: str = ""  #: that its features read; "" where it is the tested dictionary's, or a simpler basis's

    @property
    def id(self) -> str:
        """The name of the edit, unique within its behaviour, such as ``random/3@0.5`` or ``topk/seed43:top/0@1.0``."""
        owner = "" if self.dictionary == TESTED else f"{self.dictionary}:"
        return f"{owner}{self.group}/{self.index}@{float(self.fraction)!r}"


@dataclasses.dataclass(frozen=True)
class PromptDefinition:
    """A prompt, or a held-out document."""

    id: str  #: unique within the run
    behaviour: str  #: it belongs to; ``TEXT`` for a held-out document
    template: str = ""  #: the words around the content; "" if unknown
    held_out: bool = False  #: whether no train prompt has this template
    split: str = "test"  #: "train" or "test"
    #: text, correct, wrong: the prompt and its answers; "" for documents.
    text: str = ""
    correct: str = ""
    wrong: str = ""


@suggests_names
@has_short_repr
@dataclasses.dataclass(frozen=True)
class EffectsTable:
    """Measured values, with the definitions of their edits and prompts.

    Rows may stand in any order. What was not measured has no row.
    """

    edits: tuple[EditDefinition, ...]  #: edits of the run; ids are unique within a behaviour
    prompts: tuple[PromptDefinition, ...]  #: prompts of the run; ids are unique
    #: edit_N and prompt_N: position of each row's edit in ``edits`` and of its prompt in ``prompts``, int.
    edit_N: np.ndarray
    prompt_N: np.ndarray
    readout_N: np.ndarray  #: position of each row's readout in ``READOUTS``, int
    value_N: np.ndarray  #: the readout's value, float64, finite

    @classmethod
    def block(
        cls,
        edits: Sequence[EditDefinition],
        prompts: Sequence[PromptDefinition],
        values: Mapping[str, np.ndarray],
        defined: Sequence[PromptDefinition] = (),
    ) -> "EffectsTable":
        """Return the table of some edits on some prompts.

        Args:
          edits: E edits.
          prompts: P prompts.
          values: ``[E, P]`` of each readout; NaN marks what was not measured, and gets no row.
          defined: prompts that have no row here.
        """
        whole = cls(tuple(edits), tuple(dict.fromkeys([*defined, *prompts])), *np.zeros((4, 0)))
        value_ExPxJ = np.stack(list(values.values()), axis=-1).astype(np.float64)
        e_K, p_K, j_K = np.nonzero(~np.isnan(value_ExPxJ))
        edit_E, prompt_P = whole.positions(edits, prompts)
        readout_J = np.array([READOUTS.index(readout) for readout in values], np.int8)
        rows = edit_E[e_K], prompt_P[p_K], readout_J[j_K], value_ExPxJ[e_K, p_K, j_K]
        return cls(whole.edits, whole.prompts, *rows)

    def select_edits(self, behaviour: str, group: str, dictionary: str = TESTED) -> list[EditDefinition]:
        """Return the edits of one ``behaviour``, ``group`` and ``dictionary``, ordered by index and fraction."""
        return list(self._edits_by_group.get((behaviour, group, dictionary), []))

    def select_whole_edits(self, behaviour: str, group: str) -> list[EditDefinition]:
        """Return a ``behaviour``'s edits of a group, of the tested dictionary, by index; of fractions the largest."""
        return list({edit.index: edit for edit in self.select_edits(behaviour, group)}.values())

    def select_prompts(self, behaviour: str) -> list[PromptDefinition]:
        """Return the test prompts of a behaviour (documents for ``TEXT``), ordered by id."""
        chosen = [prompt for prompt in self.prompts if prompt.behaviour == behaviour and prompt.split == "test"]
        return sorted(chosen, key=lambda prompt: prompt.id)

    def values(self, edits: Sequence[EditDefinition], prompts: Sequence[PromptDefinition], readout: str) -> np.ndarray:
        """Return one readout of some edits on some prompts.

        Args:
          edits: E of the table's edits.
          prompts: P of the table's prompts.
          readout: one of ``READOUTS``.

        Returns:
          Float64 array ``[E, P]``, NaN where nothing was measured.
        """
        key_N, order_N = self._sorted_keys
        edit_E, prompt_P = self.positions(edits, prompts)
        wanted_ExP = self._keys(edit_E[:, None], prompt_P[None, :], np.array(READOUTS.index(readout)))
        if not len(key_N):
            return np.full(wanted_ExP.shape, np.nan)
        # A key beyond the last has no place of its own; the comparison below finds that the last is another.
        place_ExP = np.minimum(np.searchsorted(key_N, wanted_ExP), len(key_N) - 1)
        return np.where(key_N[place_ExP] == wanted_ExP, self.value_N[order_N[place_ExP]], np.nan)

    def positions(
        self, edits: Sequence[EditDefinition], prompts: Sequence[PromptDefinition]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of some edits and prompts in the table."""
        edit_of, prompt_of = self._positions
        edit_E = np.array([edit_of[edit.behaviour, edit.id] for edit in edits], np.int32)
        return edit_E, np.array([prompt_of[prompt.id] for prompt in prompts], np.int32)

    def clean_values(self, prompts: Sequence[PromptDefinition], readout: str) -> np.ndarray:
        """Return one readout of the unedited model on prompts of one behaviour, ``[P]``; NaN where not measured."""
        behaviour = prompts[0].behaviour
        clean = self.select_edits(behaviour, "clean")[:1]
        return self.values(clean, prompts, readout)[0] if clean else np.full(len(prompts), np.nan)

    def drops(self, edits: Sequence[EditDefinition], prompts: Sequence[PromptDefinition], readout: str) -> np.ndarray:
        """Return by how much each edit lowers a readout on prompts of one behaviour, ``[E, P]``; NaN: not measured."""
        return self.clean_values(prompts, readout) - self.values(edits, prompts, readout)

    def doses(self, edits: Sequence[EditDefinition], prompts: Sequence[PromptDefinition]) -> np.ndarray:
        """Return the dose of each edit on prompts, ``[E]``; NaN where it was not measured on all of them."""
        # Root mean square: this is the norm of the changes of all prompts together, but for their number.
        return np.sqrt(np.mean(np.square(self.values(edits, prompts, "change_norm")), axis=1))

    def reaching(
        self, edits: Sequence[EditDefinition], prompts: Sequence[PromptDefinition], dose: float
    ) -> list[EditDefinition]:
        """Return those edits that change the site on prompts by at least 99 % of a ``dose``."""
        doses = self.doses(edits, prompts)
        return [edit for edit, reached in zip(edits, doses, strict=True) if reached >= 0.99 * dose]

    def objective(self, behaviour: str) -> str:
        """Return the readout whose drop is the effect: the logit difference, a benchmark's, or the user's."""
        prompts = self.select_prompts(behaviour)
        # Items of benchmarks have answers of several tokens, and no wrong answer to compare the right one with.
        for name in ("answer_log_prob", "readout"):
            if prompts and np.isfinite(self.clean_values(prompts, name)).all():
                return name
        return "logit_diff"

    def has_row_twice(self) -> bool:
        """Return whether an edit, prompt and readout have several values."""
        key_N, _ = self._sorted_keys
        return bool((key_N[1:] == key_N[:-1]).any())

    @functools.cached_property
    def behaviours(self) -> tuple[str, ...]:
        """The behaviours with tested features, in the order of their edits."""
        return tuple(dict.fromkeys(edit.behaviour for edit in self.edits if edit.group == "top"))

    @functools.cached_property
    def untested(self) -> tuple[str, ...]:
        """The behaviours without tested features: of these the unedited model alone was measured."""
        measured = dict.fromkeys(edit.behaviour for edit in self.edits if edit.group == "clean")
        return tuple(name for name in measured if name not in (TEXT, *self.behaviours))

    @functools.cached_property
    def dictionaries(self) -> tuple[str, ...]:
        """The dictionaries with tested features: ``TESTED`` first, in the order of their edits."""
        return tuple(dict.fromkeys(edit.dictionary for edit in self.edits if edit.group == "top"))

    @functools.cached_property
    def _edits_by_group(self) -> dict[tuple[str, str, str], list[EditDefinition]]:
        groups: dict[tuple[str, str, str], list[EditDefinition]] = {}
        for edit in sorted(self.edits, key=lambda edit: (edit.index, edit.fraction)):
            groups.setdefault((edit.behaviour, edit.group, edit.dictionary), []).append(edit)
        return groups

    @functools.cached_property
    def _positions(self) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        edit_of = {(edit.behaviour, edit.id): e for e, edit in enumerate(self.edits)}
        return edit_of, {prompt.id: p for p, prompt in enumerate(self.prompts)}

    def _keys(self, edit: np.ndarray, prompt: np.ndarray, readout: np.ndarray) -> np.ndarray:
        """Return one integer for each edit, prompt and readout, to find rows by."""
        return (edit.astype(np.int64) * len(self.prompts) + prompt) * len(READOUTS) + readout

    @functools.cached_property
    def _sorted_keys(self) -> tuple[np.ndarray, np.ndarray]:
        key_N = self._keys(self.edit_N, self.prompt_N, self.readout_N)
        order_N = np.argsort(key_N, kind="stable")
        return key_N[order_N], order_N


def merge_tables(tables: Sequence[EffectsTable]) -> EffectsTable:
    """Return the rows of several tables as one; an edit, prompt or row that several have is the same."""
    edits = tuple({(edit.behaviour, edit.id): edit for table in tables for edit in table.edits}.values())
    prompts = tuple({prompt.id: prompt for table in tables for prompt in table.prompts}.values())
    whole = EffectsTable(edits, prompts, *np.zeros((4, 0)))  # which knows the positions of all edits and prompts
    rows = []
    for table in tables:
        edit_E, prompt_P = whole.positions(table.edits, table.prompts)
        rows.append((edit_E[table.edit_N], prompt_P[table.prompt_N], table.readout_N, table.value_N))
    edit_N, prompt_N, readout_N, value_N = (np.concatenate(column) for column in zip(*rows, strict=True))
    # The clean run is measured with every batch of edits: the first values stand.
    first_K = np.sort(np.unique(whole._keys(edit_N, prompt_N, readout_N), return_index=True)[1])
    return EffectsTable(edits, prompts, edit_N[first_K], prompt_N[first_K], readout_N[first_K], value_N[first_K])


def has_effects(folder: str | Path) -> bool:
    """Return whether a folder holds a whole table: ``save_effects`` writes its last file last."""
    return (Path(folder) / _FILES[-1]).exists()


def save_effects(folder: str | Path, table: EffectsTable) -> None:
    """Write a table into a folder as ``effects.parquet``, ``edits.json`` and, last, ``prompts.json``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = dict(
        behaviour=(table.edit_N, [edit.behaviour for edit in table.edits]),
        edit=(table.edit_N, [edit.id for edit in table.edits]),
        prompt=(table.prompt_N, [prompt.id for prompt in table.prompts]),
        readout=(table.readout_N, list(READOUTS)),
    )
    columns: dict[str, Any] = {}
    for name, (place_N, texts) in words.items():
        # A name repeats in thousands of rows; dictionary columns store it once.
        names, index_X = np.unique(np.array(texts, object), return_inverse=True)
        indices = pa.array(index_X[place_N].astype(np.int32))
        columns[name] = pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))
    columns["value"] = pa.array(table.value_N)
    with whole_file(folder / _FILES[0]) as unfinished:
        pq.write_table(pa.table(columns), unfinished)
    write_json(folder / _FILES[1], [dict(id=edit.id, **dataclasses.asdict(edit)) for edit in table.edits])
    write_json(folder / _FILES[2], [dataclasses.asdict(prompt) for prompt in table.prompts])


@file_errors()
def load_effects(folder: str | Path) -> EffectsTable:
    """Read the effects table of a finished unit.

    Args:
      folder: folder of the unit, such as ``runs/demo/ablate/topk``.

    Returns:
      The table; its arrays are ``edit_N``, ``prompt_N``, ``readout_N`` and ``value_N``, and ``table.values(edits,
      prompts, readout)`` gives ``[E, P]``.

    Raises:
      UserError: a file is missing or damaged, a row names an edit or prompt without a definition, or one appears
        twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = resolve_links(folder)
    if not (folder / _FILES[2]).exists():  # it is written last
        raise UserError(
            f"{folder / _FILES[2]} does not exist: expected the folder of a unit of ablate, patch or study; run its "
            "stage to the end, or name another"
        )
    try:
        edits = tuple(_edit(entry) for entry in read_json(folder / _FILES[1]))
        prompts = tuple(PromptDefinition(**entry) for entry in read_json(folder / _FILES[2]))
        rows = pq.read_table(folder / _FILES[0])
        edit_of = {(edit.behaviour, edit.id): e for e, edit in enumerate(edits)}
        names = zip(rows["behaviour"].to_pylist(), rows["edit"].to_pylist(), strict=True)
        edit_N = np.array([edit_of[name] for name in names], np.int32)
        prompt_of = {prompt.id: p for p, prompt in enumerate(prompts)}
        prompt_N = np.array([prompt_of[name] for name in rows["prompt"].to_pylist()], np.int32)
        readout_N = np.array([READOUTS.index(name) for name in rows["readout"].to_pylist()], np.int8)
        value_N = rows["value"].to_numpy().astype(np.float64)
        table = EffectsTable(edits, prompts, edit_N, prompt_N, readout_N, value_N)
        # Of two values one would be taken, by the order of the rows.
        if len(edit_of) < len(edits) or len(prompt_of) < len(prompts) or table.has_row_twice():
            raise ValueError("an edit, a prompt or a row stands in it twice")
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the effects table in {folder} is missing or damaged ({error}): expected {', '.join(_FILES)}; delete the "
            "folder and run its stage again"
        ) from None
    return table


def _edit(entry: Mapping[str, Any]) -> EditDefinition:
    fields = {name: value for name, value in entry.items() if name != "id"}
    target = tuple(fields["target"]) if fields["target"] else None
    return EditDefinition(**fields | dict(features=tuple(fields["features"]), target=target))
