"""The stage ``patch``: what moves a prompt's answer when it is carried over from the prompt's counterpart, or to it.

A unit for each kind of site patches it at every layer and position (``sites``); that of heads patches their queries,
keys, values and outputs (``nodes``), and the unit of a dictionary patches features (``features``). Test prompts judge;
train prompts choose features, nodes and the strongest place.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saejax.causal.clustered import Resampling, of_prompts
from saejax.causal.patching.disentangle import PairsJudge, compare
from saejax.causal.patching.features import FeaturePatching
from saejax.causal.patching.grid import make_grid, measurable
from saejax.causal.patching.nodes import RANDOM, HeadPatching, said
from saejax.causal.patching.pairs import describe_columns, fitting_pairs
from saejax.causal.patching.results import (
    Disentangled,
    FeaturePatchResults,
    HeadPatchResults,
    PatchedFeatures,
    PatchedHeads,
    PatchedPairs,
    PatchedSites,
    PatchResults,
    SitePatchResults,
    UnpatchedBehaviour,
    WorkShare,
)
from saejax.causal.patching.sites import patch_sites
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions.split_model import SplitModel
from saejax.models.language_model import LanguageModel
from saejax.models.sites import KINDS
from saejax.runner import parts
from saejax.runner.workspace import Run
from saejax.settings import HEADS, PatchConfig
from saejax.tasks import run_inputs
from saejax.tasks.behaviours import Prompt

AT_CHANCE = (
    "the model's logit difference does not clearly fall from the prompts to their counterparts: there is nothing to "
    "divide effects by"
)


class BehaviourPairs(NamedTuple):
    """The prompts of a behaviour that have counterparts of as many tokens.

    Attributes:
      name: of the behaviour.
      train, tests: those that choose and those that judge.
      left_out: how many test prompts are left out, by the reason.
    """

    name: str
    train: Sequence[Prompt]
    tests: Sequence[Prompt]
    left_out: Mapping[str, int]


MeasurePairs = Callable[[BehaviourPairs, parts.OnProgress], parts.Measured]


def run_patch(run: Run) -> PatchResults:
    """Patches a kind of site, heads, or features, on every behaviour.

    A behaviour is a part in the sense of ``stages``; of a kind of site every place is in
    ``<behaviour>-patching.parquet``, of heads every node in ``<behaviour>-nodes.parquet`` and every path in
    ``<behaviour>-paths.parquet``. A behaviour that cannot be patched is said, and the others go on.

    Raises:
      UserError: none can be patched.
    """
    config = run.configs[PatchConfig]
    prompts = run_inputs.read_behaviours(run, config.behaviours, "--patch.behaviours")
    heads, dictionary = run.name == HEADS, None if run.name in (*KINDS, HEADS) else run_inputs.load_run_dictionary(run)

    def begin() -> parts.Measure:
        model = run_inputs.load_run_model(run)
        if dictionary:
            measure = _of_features(run, model, dictionary, prompts)
        else:
            measure = _of_heads(run, model) if heads else _of_sites(run, model)

        def measure_pairs(name: str, on_progress: parts.OnProgress) -> parts.Measured:
            train, _ = fitting_pairs(model, prompts[name], "train")
            pairs, left_out = fitting_pairs(model, prompts[name])
            missing = _missing(train if dictionary or heads else None, pairs, left_out)
            if missing:
                return parts.Measured(UnpatchedBehaviour(missing), f"not patched: {missing}")
            return measure(BehaviourPairs(name, train, pairs, left_out), on_progress)

        return measure_pairs

    kind: Any = PatchedFeatures if dictionary else PatchedHeads if heads else PatchedSites
    found = parts.each_part(run, list(prompts), begin, kind | UnpatchedBehaviour, "tokens" if dictionary else "rows")
    unpatched = {name: one.unpatched for name, one in found.items() if isinstance(one, UnpatchedBehaviour)}
    _check_any_patched(found, unpatched)
    behaviours = {name: result for name, result in found.items() if name not in unpatched}
    if heads:
        return HeadPatchResults(config.top, RANDOM, behaviours, unpatched)
    if not dictionary:
        return SitePatchResults(run.name, behaviours, unpatched)
    return FeaturePatchResults(config.dictionary, dictionary.site, config.top, config.draws, behaviours, unpatched)


def _check_any_patched(found: Mapping[str, Any], unpatched: Mapping[str, str]) -> None:
    if len(unpatched) == len(found):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unpatched.items())
        raise UserError(
            f"no behaviour can be patched ({reasons}): expected test prompts with counterparts of as many tokens, and "
            "for features and heads train prompts, too; give them in --task.prompts, or name other behaviours with "
            "--patch.behaviours"
        )


def _missing(train: Sequence[Prompt] | None, pairs: Sequence[Prompt], left_out: Mapping[str, int]) -> str:
    """What a behaviour lacks to be patched; "" for nothing. Train pairs are None where none are needed."""
    if not pairs:
        return (
            f"of {sum(left_out.values())} test prompts {left_out['no counterpart']} have no counterpart and "
            f"{left_out['other length']} one of another number of tokens"
        )
    return "it has no train prompts with counterparts of as many tokens, which choose" if train == [] else ""


def _of_sites(run: Run, model: LanguageModel) -> MeasurePairs:
    """What patches the unit's kind of site at every layer and position, and writes the grid."""
    config = run.configs[PatchConfig]

    def measure(pairs: BehaviourPairs, on_progress: parts.OnProgress) -> parts.Measured:
        patched = patch_sites(model, run.name, pairs.tests, config.batch_rows, on_progress)
        resampling = of_prompts(pairs.tests, config.bootstrap, config.seed)
        grid = make_grid(patched, resampling)
        grid.save(grid.file(run.folder, pairs.name))
        some = pairs.train[: len(pairs.tests)]  # as many choose the strongest place as judge it
        choosing = [patch_sites(model, run.name, some, config.batch_rows, on_progress)] if some else []
        every = [patched, *choosing]
        results = PatchedSites(
            **vars(differences(patched.clean_P, patched.corrupted_P, pairs.left_out, resampling)),
            columns=describe_columns(model, pairs.tests),
            strongest=grid.strongest(choosing[0]) if choosing else {},
            rows=WorkShare(sum(one.rows for one in every), sum(one.all_rows for one in every)),
            work=WorkShare(sum(one.work for one in every), sum(one.all_work for one in every)),
        )
        return parts.Measured(results, _strongest_line(results))

    return measure


def _of_heads(run: Run, model: LanguageModel) -> MeasurePairs:
    """What patches heads, and writes the table of their nodes."""
    config = run.configs[PatchConfig]

    def measure(pairs: BehaviourPairs, on_progress: parts.OnProgress) -> parts.Measured:
        train = pairs.train[: len(pairs.tests)]
        patching = HeadPatching(model, pairs.name, train, pairs.tests, config, on_progress)
        patching.table.save(patching.table.file(run.folder, pairs.name))
        if patching.path_table is not None:
            patching.path_table.save(patching.path_table.file(run.folder, pairs.name))
        resampling = of_prompts(pairs.tests, config.bootstrap, config.seed)
        results = patching.results(differences(patching.clean_P, patching.corrupted_P, pairs.left_out, resampling))
        return parts.Measured(results, said(results))

    return measure


def _of_features(
    run: Run, model: LanguageModel, dictionary: Dictionary, prompts: Mapping[str, Sequence[Prompt]]
) -> MeasurePairs:
    """What patches the top features of a dictionary; ``prompts`` are those of all behaviours."""
    config = run.configs[PatchConfig]
    split = SplitModel(model, dictionary)

    @functools.cache
    def judges() -> dict[str, PairsJudge]:
        tests = {name: fitting_pairs(model, own)[0] for name, own in prompts.items()}
        return {name: PairsJudge(split, pairs, config) for name, pairs in tests.items() if pairs}

    def measure(pairs: BehaviourPairs, on_progress: parts.OnProgress) -> parts.Measured:
        patching = FeaturePatching(split, pairs.name, pairs.train, pairs.tests, config, on_progress)
        resampling = of_prompts(pairs.tests, config.bootstrap, config.seed)
        disentangled: tuple[Disentangled, ...] = ()
        if config.das:
            features = patching.top, patching.drawn_NxK
            disentangled = compare(split, pairs.name, pairs.train, judges(), features, config, on_progress)
        found = differences(patching.clean_P, patching.corrupted_P, pairs.left_out, resampling)
        results = patching.results(found, disentangled)
        return parts.Measured(results, results.interchange.said)

    return measure


def _strongest_line(results: PatchedSites) -> str:
    if not results.strongest:
        return "no train prompts with counterparts of as many tokens, so that no strongest place is named"
    found = results.strongest["denoising"]
    return (
        f"{results.reason or 'most is restored'} at layer {found.layer}, position {found.position}, chosen on train "
        f"prompts: {found.effect.mean:.2f} [{found.effect.low:.2f}, {found.effect.high:.2f}] of "
        f"{results.difference.mean:.2f} logits"
    )


def differences(
    clean_P: np.ndarray, corrupted_P: np.ndarray, left_out: Mapping[str, int], resampling: Resampling
) -> PatchedPairs:
    """The clean and the corrupted runs, without a patch."""
    return PatchedPairs(
        prompts=len(clean_P),
        templates=resampling.templates,
        clean=resampling.mean(clean_P),
        corrupted=resampling.mean(corrupted_P),
        difference=resampling.mean(clean_P - corrupted_P),
        reason=None if measurable(clean_P, corrupted_P, resampling) else AT_CHANCE,
        left_out=dict(left_out),
    )
