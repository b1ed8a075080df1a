"""The stage ``patch``: what moves a prompt's answer when it is carried over from the prompt's counterpart, or to it.

A unit for each kind of site patches it at every layer and position (``patching``); the unit of a dictionary patches
features (``feature_patching``). Test prompts judge; train prompts choose features.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.causal.ablate import progress
from saejax.causal.feature_patching import FeaturePatching
from saejax.causal.patch_cells import Cells, cells_file, make_cells, measurable
from saejax.causal.patching import DIRECTIONS, patch_sites
from saejax.causal.split import SplitModel
from saejax.dictionaries import stacks
from saejax.errors import UserError, one_of
from saejax.models.language_model import LanguageModel, load_model
from saejax.models.sites import KINDS
from saejax.models.tokens import token_text
from saejax.parallel import AgreedStop, make_mesh
from saejax.settings import PatchConfig
from saejax.tasks.behaviours import Prompt, read_prompts
from saejax.tasks.scoring import bootstrap_mean
from saejax.workspace import Run, read_json, write_json

AT_CHANCE = (
    "the model's logit difference does not clearly fall from the prompts to their counterparts: there is nothing to "
    "divide effects by"
)


def run_patch(run: Run) -> dict:
    """Patches a kind of site, or features, of every behaviour.

    Each behaviour's results are kept in ``<behaviour>.json`` as soon as they are there, so that a run that was killed
    goes on with the next one; of a kind of site every cell is in ``<behaviour>-patching.parquet``.

    Returns:
      The results; WORKSPACE.md describes them.
    """
    config: PatchConfig = run.configs["patch"]
    by_behaviour = _prompts(run, config)
    behaviours = {name: read_json(_file(run, name)) for name in by_behaviour if _file(run, name).exists()}
    if behaviours:
        run.say(f"patch: kept from an earlier run: {', '.join(behaviours)}")
    what = _Sites(run.name, config) if run.name in KINDS else _Features(run, config)
    if len(behaviours) < len(by_behaviour):
        settings = run.configs["model"]
        mesh = make_mesh(run.configs.get("mesh"))
        model = load_model(settings.path, settings.revision, settings.dtype, mesh, settings.remat)
        for number, (name, prompts) in enumerate(by_behaviour.items(), 1):
            if name not in behaviours:
                label = f"patch: {name} ({number} of {len(by_behaviour)})"
                pairs, left_out = _pairs(model, name, prompts)
                result = what.measure(run.folder, model, name, pairs, progress(run, label, AgreedStop(run.stopping)))
                behaviours[name] = result | dict(left_out=left_out)
                write_json(_file(run, name), behaviours[name])  # last: it says that the behaviour is done
                run.say(f"{label}: {what.say(behaviours[name])}")
    return what.about | dict(behaviours={name: behaviours[name] for name in by_behaviour})


class _Sites:
    """A kind of site at every layer and position."""

    def __init__(self, kind: str, config: PatchConfig):
        self._kind, self._config, self.about = kind, config, dict(kind=kind)

    def measure(
        self,
        folder: Path,
        model: LanguageModel,
        name: str,
        prompts: Sequence[Prompt],
        tick: Callable[[int, int], None],
    ) -> dict[str, Any]:
        config = self._config
        tested = [prompt for prompt in prompts if prompt.split == "test"]
        patched = patch_sites(model, self._kind, tested, config.batch_rows, tick)
        cells = make_cells(patched, config.bootstrap, config.seed)
        cells.save(cells_file(folder, name))
        return dict(
            **differences(patched.clean_P, patched.corrupted_P, config),
            columns=_columns(model, tested),
            strongest=_strongest(cells),
            rows=dict(run=patched.rows, all=patched.all_rows),
            work=dict(run=patched.work, all=patched.all_work),
        )

    def say(self, result: dict[str, Any]) -> str:
        found = result["strongest"]["denoising"]
        return (
            f"{result['reason'] or 'most is restored'} at layer {found['layer']}, position {found['position']}: "
            f"{found['effect']:.2f} of {result['difference']['mean']:.2f} logits"
        )


class _Features:
    """The top features of a dictionary."""

    def __init__(self, run: Run, config: PatchConfig):
        kind, _ = stacks.kind_and_member(config.dictionary)
        self._dictionary = stacks.load_member(run.inputs[f"train/{kind}"], config.dictionary, "--patch.dictionary")
        self._config = config
        self._split: SplitModel | None = None
        self.about = dict(dictionary=config.dictionary, site=self._dictionary.site, top=config.top, draws=config.draws)

    def measure(
        self,
        folder: Path,
        model: LanguageModel,
        name: str,
        prompts: Sequence[Prompt],
        tick: Callable[[int, int], None],
    ) -> dict[str, Any]:
        self._split = self._split or SplitModel(model, self._dictionary)
        patching = FeaturePatching(self._split, name, prompts, self._config, tick)
        return differences(patching.clean_P, patching.corrupted_P, self._config) | patching.results()

    def say(self, result: dict[str, Any]) -> str:
        return result["interchange"]["said"]


def differences(clean_P: np.ndarray, corrupted_P: np.ndarray, config: PatchConfig) -> dict[str, Any]:
    """The runs without a patch: intervals, and why there are no normalised effects, if there are none."""
    values = dict(clean=clean_P, corrupted=corrupted_P, difference=clean_P - corrupted_P)
    intervals = {
        name: dataclasses.asdict(bootstrap_mean(values_P, config.bootstrap, config.seed))
        for name, values_P in values.items()
    }
    above = measurable(clean_P, corrupted_P, config.bootstrap, config.seed)
    return dict(prompts=len(clean_P), **intervals, reason=None if above else AT_CHANCE)


def _file(run: Run, behaviour: str) -> Path:
    return run.folder / f"{behaviour}.json"


def _prompts(run: Run, config: PatchConfig) -> dict[str, list[Prompt]]:
    found: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(run.inputs["baseline"] / "prompts.jsonl"):
        found.setdefault(prompt.behaviour, []).append(prompt)
    wanted = [one_of(name, found, "behaviour (--patch.behaviours)") for name in config.behaviours]
    return {name: found[name] for name in wanted or found}


def _pairs(model: LanguageModel, name: str, prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[str, int]]:
    """The train prompts, the test prompts with a counterpart of as many tokens, and how many others there are, by why.

    Raises:
      UserError: no test prompt is left.
    """
    tested = [prompt for prompt in prompts if prompt.split == "test"]
    paired = [prompt for prompt in tested if prompt.counterpart]
    fitting: list[Prompt] = []
    if paired:
        sides = [model.tokenize([getattr(p, side) for p in paired]).lengths_B for side in ("text", "counterpart")]
        fitting = [prompt for prompt, same in zip(paired, sides[0] == sides[1], strict=True) if same]
    left_out = {"no counterpart": len(tested) - len(paired), "other length": len(paired) - len(fitting)}
    if not fitting:
        raise UserError(
            f"behaviour {name}: of {len(tested)} test prompts {left_out['no counterpart']} have no counterpart and "
            f"{left_out['other length']} one of another number of tokens: expected pairs of one length; give them in "
            "--task.prompts, or name other behaviours with --patch.behaviours"
        )
    return [prompt for prompt in prompts if prompt.split == "train"] + fitting, left_out


def _columns(model: LanguageModel, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """What stands at each position, counted from the end, first position first."""
    text = token_text(model.tokenizer)
    sides = [model.tokenize([getattr(p, side) for p in prompts]) for side in ("text", "counterpart")]
    columns = []
    for position in range(-int(sides[0].lengths_B.max()), 0):
        has_P = sides[0].lengths_B + position >= 0
        ids, others = (tokens.ids_BxT[has_P, (tokens.lengths_B + position)[has_P]] for tokens in sides)
        ((token, count),) = collections.Counter(ids.tolist()).most_common(1)
        columns.append(
            dict(
                position=position,
                prompts=int(has_P.sum()),
                token=text(token),
                share=count / int(has_P.sum()),
                differs=float((ids != others).mean()),
            )
        )
    return columns


def _strongest(cells: Cells) -> dict[str, dict[str, Any]]:
    """Of each direction the cell of largest effect."""
    found = {}
    for direction in DIRECTIONS:
        own_N = np.flatnonzero(cells.direction == direction)
        best = own_N[np.argmax(cells.effect[own_N])]
        normalised = float(cells.normalised[best])
        found[direction] = dict(
            layer=int(cells.layer[best]),
            position=int(cells.position[best]),
            effect=float(cells.effect[best]),
            normalised=None if np.isnan(normalised) else normalised,
        )
    return found
