"""Causal tests of a dictionary's features on prompts with two answers: ablation, patching, steering, probes."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saejax.arguments import as_numbers, check_classes
from saejax.dictionaries import Dictionary
from saejax.dictionaries.bos import follow_bos
from saejax.errors import UserError, file_errors, one_of
from saejax.interventions.ablation import (
    TEXT_LENGTH,
    begin_ablation,
    check_prompts,
    describe_top,
    measure_behaviour,
    verdict_config,
)
from saejax.interventions.answers import CausalVerdict, FeatureEffect
from saejax.interventions.edits import mask
from saejax.interventions.engine import run_edits
from saejax.interventions.importance import Importance, measure_importance
from saejax.interventions.patching import EACH, PatchEffects, fitting_pairs, patch_sites
from saejax.interventions.probing import ProbedLabel, ablation_of, correct, label_all, probe_inputs, probe_label
from saejax.interventions.settings import BASES, AblateConfig, ProbeConfig, SteerConfig
from saejax.interventions.several_sites import join_saes, place_at_sites
from saejax.interventions.split_model import SplitModel, parse_positions
from saejax.interventions.steering import BehaviourSteering, SteeringTest, judge
from saejax.interventions.table import TESTED, EffectsTable, merge_tables
from saejax.interventions.text import LENGTH, HeldOutText
from saejax.interventions.verdict import verdict
from saejax.models.language_model import LanguageModel
from saejax.models.split import Readout
from saejax.progress import show_progress
from saejax.settings_from_keywords import lists_settings, make_config
from saejax.short_reprs import has_short_repr
from saejax.tasks import draw
from saejax.tasks.behaviours import Prompt
from saejax.tasks.own_prompts import read_own_prompts
from saejax.tasks.recipes import ioi_recipe
from saejax.tasks.settings import TaskConfig


@has_short_repr
@dataclasses.dataclass(frozen=True)
class Ablation:
    """Effects of ablating a dictionary's features on behaviours."""

    table: EffectsTable  #: every measured value; ``table.values(edits, prompts, readout)`` gives ``[E, P]``
    verdict: CausalVerdict  #: answers by dictionary ("tested", "untrained", names of repeats) and behaviour
    top: Mapping[str, tuple[FeatureEffect, ...]]  #: the top features of each behaviour, with their effects alone
    #: of all live features, by behaviour; None without ``effects="all"``.
    importance: Mapping[str, Importance] | None = None

    def summary(self) -> str:
        """Return the answers in sentences; see ``CausalVerdict.summary``."""
        return self.verdict.summary()


@check_classes
def make_prompts(
    lm: LanguageModel,
    behaviour: str,
    train: int = 80,
    test: int = 20,
    seed: int = 42,
    ioi: Mapping[str, Sequence[str]] | None = None,
) -> list[Prompt]:
    """Draw the prompts of a behaviour that comes with saejax, as the stage ``baseline`` does.

    Args:
      lm: the model, whose tokenizer must keep the answers apart from the text and from each other.
      behaviour: one of ``saejax.tasks.settings.BEHAVIOURS``; ``load_prompts`` reads your own.
      train: number of train prompts.
      test: number of test prompts.
      seed: seed of the choice.
      ioi: words of one's own for the behaviour ioi: any of "templates" (with {one}, {two} and {giver}, and perhaps
        {place} and {object}; the last is for test prompts), "names", "places" and "objects".

    Raises:
      UserError: the behaviour is unknown, or its words or the tokenizer give too few prompts.
    """
    if ioi is not None and behaviour != "ioi":
        raise UserError(f"words of ioi were given for {behaviour!r}: expected behaviour='ioi'")
    recipe = ioi_recipe(ioi) if ioi is not None else None
    return draw.make_prompts(behaviour, train, test, seed, lm.tokenizer, recipe).prompts


@check_classes
@file_errors()
def load_prompts(lm: LanguageModel, path: str | Path, train: int = 80, test: int = 20, seed: int = 42) -> list[Prompt]:
    """Read prompts of your own from a file, as the stage ``baseline`` does with ``--task.prompts``.

    Args:
      lm: the model, whose tokenizer must keep the answers apart from the text and from each other.
      path: a file of lines such as {"behaviour": "plural", "text": "Two", "correct": " cats", "wrong": " cat"}.
      train: number of train prompts of each behaviour whose lines name no split.
      test: number of their test prompts.
      seed: seed of the choice.

    Returns:
      The prompts of all behaviours of the file, in its order, of each the train prompts first.

    Raises:
      UserError: the file cannot be read, lines are no prompts, which are all named, or a behaviour has too few.
    """
    task = TaskConfig(prompts=str(path), train_prompts=train, test_prompts=test, seed=seed)
    return [prompt for prompts in read_own_prompts(task, lm.tokenizer).values() for prompt in prompts]


@lists_settings(AblateConfig, but=("joined", "text_documents"))
@check_classes
def ablate(
    lm: LanguageModel,
    dictionary: Dictionary | Sequence[Dictionary],
    prompts: Sequence[Prompt],
    *,
    features: Sequence[int] | int | None = None,
    documents: Sequence[str] = (),
    repeats: Mapping[str, Dictionary] | None = None,
    readout: Callable[[Any], jax.Array] | None = None,
    readout_positions: int = 1,
    readout_layers: Sequence[int] = (),
    placebo_readouts: Sequence[Callable[[Any], jax.Array]] = (),
    **settings: Any,
) -> Ablation:
    """Ablate features on the prompts of one or more behaviours, with controls, and draw the verdict.

    Nothing is written to disk. Several behaviours are each other's test of selectivity.

    Args:
      lm: the model that the dictionary was trained on.
      dictionary: whose features are ablated. Of several SAEs of different sites the tested features are of all sites
        together; they are numbered on from one SAE to the next, in the order of the sites. The dose is then the root of
        the sum over sites of the squared changes, each relative to the size of the site's values
        (``saejax.interventions.several_sites``); there are no simpler bases and no question 6. The same holds of a
        crosscoder of one model's sites, whose features are ablated at all of these.
      prompts: "train" prompts choose features, "test" prompts judge them.
      features: which to ablate, or one, of one behaviour. None: the first ``top`` by attribution on the train prompts.
      documents: held-out texts, on which cross-entropy is measured.
      repeats: dictionaries of other seeds, by name, tested in the same way.
      readout: what is measured in place of the logit difference: a pure JAX function of the logits of the next token
        after B prompts, fp32 ``[B, V]``, that returns a number for each, ``[B]``. It should be large where the model
        does what the features are asked for; its drop is the effect, and features are ranked by its slope. Prompts need
        no answers then. Question 3 is asked where ``placebo_readouts`` are given, and compares with their top features;
        question 6 takes 0 for nothing.
      readout_positions: number C of last positions of each prompt whose logits the readout takes, ``[B, C, V]``; 1:
        those at the last one, ``[B, V]``.
      readout_layers: layers whose attention patterns the readout reads. It then takes an ``output`` in place of the
        logits, with ``output.logits`` and ``output.attention(layer, head, query, key)``, the share ``[B]`` of a head's
        attention from one token to another; the query is one of the last C tokens, counted from the end, -1, and the
        key is counted from the first token, 0, or from the end.
      placebo_readouts: functions like ``readout`` that ask for something else, 19 or more for a single behaviour.
      **settings: fields of ``saejax.interventions.settings.AblateConfig``, such as top=10, random_sets=99 and
        replacement="mean".

    Returns:
      The table of effects, and the verdict on it. Behaviours on which no feature has an attribution above zero are
      named in ``verdict.untested``.

    Raises:
      UserError: a setting is unknown or out of range, a behaviour has no train prompt or fewer than 2 test prompts, a
        readout does not return a number for each prompt, or no behaviour has a feature with an attribution above
        zero.
    """
    by_behaviour = _group(prompts)
    check_prompts(by_behaviour)
    readouts = _readouts(readout, readout_positions, readout_layers, placebo_readouts)
    dictionaries = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    if not dictionaries:
        raise UserError("there is no dictionary: give one, or SAEs of several sites")
    lm = follow_bos(lm, [dictionary.config for dictionary in (*dictionaries, *(repeats or {}).values())])
    if features is not None:
        if len(by_behaviour) > 1:
            raise UserError(f"features were named for {len(by_behaviour)} behaviours: give the prompts of one")
        if "top" in settings:
            raise UserError(f"features were named, and top is {settings['top']}: leave top out")
        settings["top"] = int(np.size(features))
    config = make_config(AblateConfig, **settings)
    parse_positions(config.positions)
    if TESTED in (repeats or {}):
        raise UserError(f"a repeat is called {TESTED!r}, as the tested dictionary is: give it another name")
    if readout and config.effects == "all":
        raise UserError("effects='all' ranks features by the logit difference: leave it out with a readout")
    tested = dictionaries[0]
    if len(dictionaries) > 1 or tested.config.widths:
        if repeats or config.error == "drop":
            raise UserError("features of several sites go with neither repeats nor error='drop'")
        texts = [prompt.text for prompt in prompts if prompt.split == "train"]
        tested = join_saes(lm, dictionaries, texts) if len(dictionaries) > 1 else place_at_sites(lm, tested, prompts)
    named = tested.feature_indices(features).tolist() if features is not None else None
    for name in config.baselines:
        if "/" not in name:
            one_of(name, BASES, "basis, and no folder of a dictionary:")
    text, tested_and_repeats = _held_out_text(lm, documents, TEXT_LENGTH), {TESTED: tested, **(repeats or {})}
    tables, top, importance = [], {}, {}
    for name in by_behaviour:
        with show_progress(f"ablate {name}") as on_progress:
            count = len(documents)
            ablations = begin_ablation(
                lm, tested_and_repeats, name, by_behaviour, config, on_progress, count, features=named, **readouts
            )
            table = measure_behaviour(ablations, by_behaviour, text)
        tables.append(table)
        if not table.behaviours:  # without top features, as the verdict says
            continue
        top[name] = describe_top(table, ablations[TESTED])
        if config.effects == "all":
            importance[name] = measure_importance(table, ablations[TESTED])
    table = merge_tables(tables)
    return Ablation(table, verdict(table, verdict_config(config)), top, importance or None)


@check_classes
def patch(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    kind: str = "resid_post",
    positions: str = EACH,
    layers: Sequence[int] | None = None,
    split: str = "test",
) -> PatchEffects:
    """Patch a kind of site between prompts and their counterparts, in every layer and in both directions.

    Args:
      lm: the model.
      prompts: the prompts of ``split`` with a counterpart of as many tokens are used.
      kind: a kind of site, such as resid_post; of attn_q, attn_k, attn_v and attn_z every head by itself.
      positions: "each" for every position by itself, or positions that are patched together: all, last, or a slice such
        as 1:4 or -3:.
      layers: the layers; None: all.
      split: "train" or "test".

    Returns:
      The logit differences with each patch; ``effect_DxLxHxPxC`` has the effects.

    Raises:
      UserError: no prompt has such a counterpart, or there is no such site.
    """
    pairs, left_out = fitting_pairs(lm, prompts, split)
    if not pairs:
        reasons = ", ".join(f"{count} for {reason}" for reason, count in left_out.items())
        raise UserError(
            f"no {split} prompt has a counterpart of as many tokens (left out: {reasons}): give prompts a counterpart, "
            "as those of make_prompts have"
        )
    with show_progress("patch") as on_progress:
        return patch_sites(lm, kind, pairs, positions, layers, on_progress=on_progress)


@lists_settings(SteerConfig)
@check_classes
def steer(
    lm: LanguageModel,
    dictionary: Dictionary,
    prompts: Sequence[Prompt],
    *,
    documents: Sequence[str] = (),
    **settings: Any,
) -> dict[str, BehaviourSteering]:
    """Steer prompts to the answers of their counterparts, and compare with controls of equal dose.

    Features are added or clamped, or the difference between the site's mean values is added. Nothing is written.

    Args:
      lm: the model that the dictionary was trained on.
      dictionary: the dictionary whose features, and at whose site, prompts are steered; of a crosscoder of one model's
        sites, at all of them, each change relative to the size of the site's values.
      prompts: "train" prompts give the directions and choose the strength, "test" prompts judge it.
      documents: held-out texts, whose cross-entropy limits the strength.
      **settings: fields of ``saejax.interventions.settings.SteerConfig``, such as top=10, doses=(0.2, 0.4) and
        random_sets=99.

    Returns:
      The results of each behaviour, by name.

    Raises:
      UserError: a setting is unknown or out of range, or there are no prompts.
    """
    config = make_config(SteerConfig, **settings)
    lm = follow_bos(lm, [dictionary.config])
    text, by_behaviour, measured = _held_out_text(lm, documents, LENGTH), _group(prompts), {}
    dictionary = place_at_sites(lm, dictionary, prompts)
    for name, behaviour_prompts in by_behaviour.items():
        with show_progress(f"steer {name}") as on_progress:
            steering = SteeringTest(lm, dictionary, behaviour_prompts, text, config, on_progress=on_progress)
            measured[name] = steering.results()
    return judge(measured)


@lists_settings(ProbeConfig, but=("benchmarks",))
@check_classes
def probe(
    lm: LanguageModel, dictionary: Dictionary, prompts: Sequence[Prompt], labels: str | Sequence[str], **settings: Any
) -> tuple[ProbedLabel, ...]:
    """Fit linear probes of a dictionary's features and of raw activations, and compare with controls.

    The features that a sparse probe selects are ablated one by one. Nothing is written to disk.

    Args:
      lm: the model that the dictionary was trained on.
      dictionary: whose features, and the activations at whose site, are probed.
      prompts: "train" prompts fit the probes, "test" prompts judge them.
      labels: one or more of ``saejax.tasks.settings.PROBE_LABELS``, or labels that the prompts have.
      **settings: fields of ``saejax.interventions.settings.ProbeConfig``, such as sparse=(1, 5).

    Returns:
      The probes of each label, and of each behaviour.

    Raises:
      UserError: a setting or a label is unknown, or there are no prompts.
    """
    config, prompts = make_config(ProbeConfig, labels=labels, **settings), list(prompts)
    _group(prompts)
    lm = follow_bos(lm, [dictionary.config])
    split = SplitModel(lm, dictionary)
    diffs = [0.0] * len(prompts)
    if "correct" in config.labels:
        diffs = run_edits(split, split.run(prompts), mask(split.dictionary, [[]]))["logit_diff"][0].tolist()
    probed, fitted = [], itertools.count(1)
    with show_progress("probe") as on_progress:
        for labelled in label_all(config, (prompts, diffs)).values():
            ablation, inputs = functools.partial(ablation_of, split, labelled), probe_inputs(split, labelled.prompts)
            # How many probes there will be depends on the inputs and settings of each label.
            probed.append(probe_label(config, labelled, *inputs, ablation, lambda: on_progress(next(fitted), 0)))
    return correct(probed)


def _readouts(
    readout: Callable[[Any], jax.Array] | None,
    positions: int,
    layers: Sequence[int],
    placebos: Sequence[Callable[[Any], jax.Array]],
) -> dict[str, Readout | None]:
    """Return the user's readouts as fields of an ablation; raise a ``UserError`` if they cannot be used."""
    if readout is None:
        if placebos or positions != 1 or layers:
            raise UserError("placebo_readouts, readout_positions and readout_layers go with a readout: give one")
        return {}
    for function in (readout, *placebos):
        if not callable(function):
            raise UserError(f"a readout is {function!r:.60}: expected a function of the logits")
    if positions < 1:
        raise UserError(f"readout_positions is {positions}: expected 1 or more")
    if (numbers := as_numbers(layers, whole=True)) is None or numbers.ndim != 1:
        raise UserError(f"readout_layers is {layers!r:.60}: expected layers, such as [20]")
    rising = tuple(sorted(set(numbers.tolist())))
    placebo_readout = Readout(tuple(placebos), positions, rising) if placebos else None
    return dict(readout=Readout((readout,), positions, rising), placebo_readout=placebo_readout)


def _group(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Return the prompts of each behaviour; raise a ``UserError`` if there are none, or one appears twice."""
    by_behaviour: dict[str, list[Prompt]] = {}
    counts = collections.Counter((prompt.behaviour, prompt.text) for prompt in prompts)
    if twice := [f"{text!r} in {behaviour}" for (behaviour, text), count in counts.items() if count > 1]:
        # They would count as two in intervals, or judge the features that they chose.
        more = f" and {len(twice) - 20:,} more" if len(twice) > 20 else ""
        raise UserError(f"prompts appear twice or more often: {', '.join(twice[:20])}{more}: keep one of each")
    for prompt in prompts:
        by_behaviour.setdefault(prompt.behaviour, []).append(prompt)
    if not by_behaviour:
        raise UserError("there are no prompts: give train and test prompts of a behaviour, as from make_prompts")
    return by_behaviour


def _held_out_text(lm: LanguageModel, documents: Sequence[str], length: int) -> HeldOutText | None:
    """Return documents cut to ``length`` tokens; None if there are none."""
    length = min(length, lm.config.context)
    ids = [lm.encode(document)[:length] for document in documents]
    read = [document for document in ids if len(document) > 1]
    if ids and not read:
        raise UserError("none of the documents has two tokens, of which the second is predicted: give longer ones")
    return HeldOutText(read) if read else None
