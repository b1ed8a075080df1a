"""The stage ``transfer``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Config, setting
from saejax.runner.stage import Stage, train_units
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, MeshConfig, ModelConfig
from saejax.settings.shared import analysis_batch_tokens, analysis_seed
from saejax.tasks import identities

MEASURES = ("decoder", "encoder", "activity")


@dataclasses.dataclass(frozen=True)
class TransferConfig(Config):
    """Comparison of dictionaries of different layers, seeds, sizes and models."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "dictionaries to compare, at least two: kinds trained here with all members of their stacks (topk), members "
        "(topk/seed5), or folders; empty: none",
    )
    measures: tuple[str, ...] = setting(
        ("decoder", "encoder"),
        "how features are matched: by cosines of decoder or encoder rows (within one model), or by activity, the "
        "correlation of activations on text that both models read",
        choices=MEASURES,
    )
    between: int = setting(0, "number of random pairs of dictionaries of different models; 0: all such pairs", low=0)
    reconstruction: bool = setting(
        False, "evaluate each dictionary at the site of each other, unchanged and between affine maps"
    )
    tokens: int = setting(
        8192,
        "approximate number of tokens of held-out text for activity and reconstruction; maps need 8 per dimension of "
        "the widest site",
        low=64,
    )
    batch_tokens: int = analysis_batch_tokens()
    seed: int = analysis_seed()


def _run(run: Run) -> Any:
    from saejax.matching.transfer.run import run_transfer

    return run_transfer(run)


def _results() -> Any:
    from saejax.matching.transfer.results import TransferResults

    return TransferResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.matching.transfer.report import sections

    return sections(findings, draw)


TRANSFER = Stage(
    name="transfer",
    summary="compares dictionaries of different layers, seeds, sizes and models, if --transfer.dictionaries names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, CorpusConfig, TransferConfig),
    placement=(MeshConfig,),
    reads=("train",),
    follows=("ablate", "interpret", "atlas"),
    needs=lambda configs, name: train_units(*configs[TransferConfig].dictionaries),
    revision=4,  # without dead features, also before evaluate has run
    names=lambda configs: ("",) if configs[TransferConfig].dictionaries else (),
    identity=dict(
        model=identities.model,
        corpus=identities.corpus,
        folders=lambda configs: identities.dictionaries(configs, "transfer"),
    ),
    processes="items",
    section=_sections,
)
