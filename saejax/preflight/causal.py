"""What patching, probes and studies of a configuration run: rows, tokens and operations, by unit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.causal.patching.features import steps
from saejax.causal.screening import points
from saejax.causal.study.scores import conditions
from saejax.models.sites import Site
from saejax.preflight.costs import pass_flops
from saejax.preflight.work import Work
from saejax.settings import TaskConfig
from saejax.tasks.benchmark_scores import way
from saejax.tasks.benchmarks import definition
from saejax.tasks.own_prompts import count_behaviours

PROMPT = 16  # tokens: the behaviours' prompts have 8 to 26
_CHOICES = 4  # of a question of the logic benchmark
_NEW = 4  # a generated token costs about as much as so many that are read
_CHANGED = 0.5  # of a prompt's positions: those from the first on at which its counterpart differs
_FIRING = 0.85  # of rows: a set that changes nothing on a prompt is not run
_FIT = 0.02  # seconds of a logistic regression on some hundred prompts, on one core


@dataclasses.dataclass(frozen=True)
class UnitWork:
    """What a unit runs.

    Attributes:
      rows: prompts or items that go through the model, each edit of one counted.
      tokens: of theirs that do.
      flops: of the model's products, by ``costs``.
      fits: probes that are fitted, on the host.
    """

    rows: int
    tokens: int
    flops: float
    fits: int = 0

    @property
    def host_seconds(self) -> float:
        """Seconds on the host, beside the model's products."""
        return _FIT * self.fits


def causal_units(work: Work, configs: Mapping[str, Any]) -> dict[str, UnitWork]:
    """The units that a configuration asks for beside ``ablate``: "patch/...", "probe/...", "study/..."."""
    units: dict[str, UnitWork] = {}
    behaviours = count_all_behaviours(configs["task"])
    patch, probe, study = configs["patch"], configs["probe"], configs["study"]
    if behaviours:
        units |= {f"patch/{kind}": _patch_sites(work, behaviours, configs["task"]) for kind in patch.kinds}
        if work.patched:
            units[f"patch/{patch.dictionary.replace('/', '-')}"] = _patch_features(work, behaviours, configs)
        if work.probed:
            units[f"probe/{probe.dictionary.replace('/', '-')}"] = _probe(work, behaviours, configs)
    return units | {f"study/{name}": _study(work, name, configs) for name in study.benchmarks}


def count_all_behaviours(task: TaskConfig) -> int:
    """How many behaviours are measured, the user's own included."""
    return len(task.behaviours) + count_behaviours(task)


def item_tokens(name: str, task: TaskConfig, length: int) -> int:
    """About how many tokens it takes to score an item of a benchmark whose prompts have this length."""
    each = dict(generate=length + _NEW * task.max_new_tokens, choice=_CHOICES * length, likelihood=length)
    return each[way(name, task)]


def _patch_sites(work: Work, behaviours: int, task: TaskConfig) -> UnitWork:
    """Every layer and position in both directions, from there on: on average half of what is left of each."""
    layers, pairs = work.model.n_layers, behaviours * task.test_prompts
    rows = round(2 * layers * _CHANGED * PROMPT * pairs)
    tokens = round(rows * _CHANGED * PROMPT / 2) + 2 * pairs * PROMPT
    flops = pass_flops(work.model, tokens, PROMPT, 1) * layers / 2
    return UnitWork(rows, tokens, flops)


def _patch_features(work: Work, behaviours: int, configs: Mapping[str, Any]) -> UnitWork:
    """The top features one by one and in growing sets in both directions, and random sets in one."""
    task, patch = configs["task"], configs["patch"]
    assert work.patched
    grown = len(steps(patch.top))
    sets = 2 * (patch.top + grown + 1) + patch.draws * grown
    rows = round(behaviours * task.test_prompts * sets * _FIRING)
    slopes = 3 * points(patch.estimate) * behaviours * task.train_prompts  # forwards, and backwards at twice the cost
    tokens = (rows + slopes) * PROMPT
    return UnitWork(rows, tokens, pass_flops(work.model, tokens, PROMPT, _above(work, work.patched.site)))


def _probe(work: Work, behaviours: int, configs: Mapping[str, Any]) -> UnitWork:
    """All prompts up to the site, and for every label probes of features and of raw activations."""
    task, probe = configs["task"], configs["probe"]
    assert work.probed
    rows = behaviours * (task.train_prompts + task.test_prompts)
    labels = sum(1 if label == "behaviour" else behaviours for label in dict.fromkeys(probe.labels))
    chosen = probe.folds * len(probe.strengths) if len(probe.strengths) > 1 else 0
    full, sparse = chosen + 1 + probe.shuffles, chosen + 1 + 2 * probe.shuffles
    fits = 2 * labels * (full + len(set(probe.sparse)) * sparse)
    below = Site.parse(work.probed.site).layer + 1
    return UnitWork(rows, rows * PROMPT, pass_flops(work.model, rows * PROMPT, PROMPT, below), fits)


def _study(work: Work, name: str, configs: Mapping[str, Any]) -> UnitWork:
    """Half of the items under every condition, and slopes of the answers of the other half."""
    task, study, length = configs["task"], configs["study"], configs["preflight"].benchmark_tokens
    assert work.studied
    items = min(study.items, task.examples or definition(name).examples)
    train, each = items // 2, item_tokens(name, task, length)
    likelihood = length if way(name, task) == "generate" else 0  # of the solution, beside the generated answer
    rows = (items - train) * len(conditions(study.draws))
    answers = train * (2 if way(name, task) == "choice" else 1)
    slopes = 4 * answers * length  # forwards, and backwards at twice the cost and the layers once more
    scored = rows * (each + likelihood)
    flops = pass_flops(work.model, scored, length, work.model.n_layers)
    flops += pass_flops(work.model, slopes, length, _above(work, work.studied.site))
    flops += pass_flops(work.model, (answers + items) * length, length, Site.parse(work.studied.site).layer + 1)
    return UnitWork(rows, scored + slopes + (answers + items) * length, flops)


def _above(work: Work, site: str) -> int:
    """How many layers stand above a site."""
    return work.model.n_layers - Site.parse(site).layer - 1
