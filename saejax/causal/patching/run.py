"""The stage ``patch``: what moves a prompt's answer when it is carried over from the prompt's counterpart, or to it.

A unit for each kind of site patches it at every layer and position (``sites``); the unit of a dictionary patches
features (``features``). Test prompts judge; train prompts choose features.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.causal.patching.cells import cells_file, make_cells, measurable
from saejax.causal.patching.features import FeaturePatching
from saejax.causal.patching.pairs import describe_columns, fitting_pairs
from saejax.causal.patching.sites import patch_sites
from saejax.causal.split import SplitModel
from saejax.causal.stages import (
    Measure,
    Measured,
    Tick,
    each_part,
    load_run_dictionary,
    load_run_model,
    read_behaviours,
)
from saejax.dictionaries import Dictionary
from saejax.errors import UserError, one_of
from saejax.models.language_model import LanguageModel
from saejax.models.sites import KINDS
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import Prompt
from saejax.tasks.scoring import bootstrap_mean
from saejax.workspace import Run

AT_CHANCE = (
    "the model's logit difference does not clearly fall from the prompts to their counterparts: there is nothing to "
    "divide effects by"
)
MeasurePairs = Callable[[str, Sequence[Prompt], Sequence[Prompt], Tick], Measured]  # train prompts, test pairs


def run_patch(run: Run) -> dict:
    """Patches a kind of site, or features, of every behaviour.

    A behaviour is a part in the sense of ``stages``; of a kind of site every cell is in
    ``<behaviour>-patching.parquet``.

    Returns:
      The results; WORKSPACE.md describes them. A behaviour that cannot be patched is said, and the others go on.

    Raises:
      UserError: none can be patched.
    """
    config: PatchConfig = run.configs["patch"]
    prompts = read_behaviours(run)
    named = [one_of(name, prompts, "behaviour (--patch.behaviours)") for name in config.behaviours]
    dictionary = None if run.name in KINDS else load_run_dictionary(run)

    def begin() -> Measure:
        model = load_run_model(run)
        measure = _of_features(run, model, dictionary) if dictionary else _of_sites(run, model)

        def measure_pairs(name: str, tick: Tick) -> Measured:
            train, _ = fitting_pairs(model, prompts[name], "train")
            pairs, left_out = fitting_pairs(model, prompts[name])
            missing = _missing(train if dictionary else None, pairs, left_out)
            if missing:
                return Measured(dict(unpatched=missing), f"not patched: {missing}")
            results, said = measure(name, train, pairs, tick)
            return Measured(results | dict(left_out=left_out), said)

        return measure_pairs

    found = each_part(run, named or list(prompts), begin, "tokens" if dictionary else "rows")
    unpatched = {name: result["unpatched"] for name, result in found.items() if "unpatched" in result}
    if len(unpatched) == len(found):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unpatched.items())
        raise UserError(
            f"no behaviour can be patched ({reasons}): expected test prompts with counterparts of as many tokens, and "
            "for features train prompts, too; give them in --task.prompts, or name other behaviours with "
            "--patch.behaviours"
        )
    about: dict[str, Any] = dict(kind=run.name)
    if dictionary:
        about = dict(dictionary=config.dictionary, site=dictionary.site, top=config.top, draws=config.draws)
    behaviours = {name: result for name, result in found.items() if name not in unpatched}
    return about | dict(behaviours=behaviours, unpatched=unpatched)


def _missing(train: Sequence[Prompt] | None, pairs: Sequence[Prompt], left_out: Mapping[str, int]) -> str:
    """What a behaviour lacks to be patched; "" for nothing. Train pairs are None where none are needed."""
    if not pairs:
        return (
            f"of {sum(left_out.values())} test prompts {left_out['no counterpart']} have no counterpart and "
            f"{left_out['other length']} one of another number of tokens"
        )
    return "it has no train prompts with counterparts of as many tokens, which choose features" if train == [] else ""


def _of_sites(run: Run, model: LanguageModel) -> MeasurePairs:
    """What patches the unit's kind of site at every layer and position, and writes the cells."""
    config: PatchConfig = run.configs["patch"]

    def measure(name: str, train: Sequence[Prompt], pairs: Sequence[Prompt], tick: Tick) -> Measured:
        patched = patch_sites(model, run.name, pairs, config.batch_rows, tick)
        cells = make_cells(patched, config.bootstrap, config.seed)
        cells.save(cells_file(run.folder, name))
        results = dict(
            **differences(patched.clean_P, patched.corrupted_P, config),
            columns=describe_columns(model, pairs),
            strongest=cells.strongest(),
            rows=dict(run=patched.rows, all=patched.all_rows),
            work=dict(run=patched.work, all=patched.all_work),
        )
        found = results["strongest"]["denoising"]
        said = (
            f"{results['reason'] or 'most is restored'} at layer {found['layer']}, position {found['position']}: "
            f"{found['effect']:.2f} of {results['difference']['mean']:.2f} logits"
        )
        return Measured(results, said)

    return measure


def _of_features(run: Run, model: LanguageModel, dictionary: Dictionary) -> MeasurePairs:
    """What patches the top features of a dictionary."""
    config: PatchConfig = run.configs["patch"]
    split = SplitModel(model, dictionary)

    def measure(name: str, train: Sequence[Prompt], pairs: Sequence[Prompt], tick: Tick) -> Measured:
        patching = FeaturePatching(split, name, train, pairs, config, tick)
        results = differences(patching.clean_P, patching.corrupted_P, config) | patching.results()
        return Measured(results, results["interchange"]["said"])

    return measure


def differences(clean_P: np.ndarray, corrupted_P: np.ndarray, config: PatchConfig) -> dict[str, Any]:
    """The runs without a patch: intervals, and why there are no normalised effects, if there are none."""
    values = dict(clean=clean_P, corrupted=corrupted_P, difference=clean_P - corrupted_P)
    intervals = {
        name: dataclasses.asdict(bootstrap_mean(values_P, config.bootstrap, config.seed))
        for name, values_P in values.items()
    }
    above = measurable(clean_P, corrupted_P, config.bootstrap, config.seed)
    return dict(prompts=len(clean_P), **intervals, reason=None if above else AT_CHANCE)
