"""The stage ``transfer``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from saejax.runner.config import Config, Configs, setting
from saejax.runner.stage import Stage, is_folder, train_units
from saejax.runner.workspace import Run
from saejax.settings import CorpusConfig, MeshConfig, ModelConfig
from saejax.tasks import identities

MEASURES = ("decoder", "encoder", "folded", "activity")


@dataclasses.dataclass(frozen=True)
class TransferConfig(Config):
    """Comparison of dictionaries of different layers, seeds, sizes and models."""

    dictionaries: tuple[str, ...] = setting(
        (),
        "dictionaries to compare, two at least: kinds trained here with all members of their stacks (topk), members "
        "(topk/seed5), or folders; empty: none",
    )
    measures: tuple[str, ...] = setting(
        ("decoder", "encoder"),
        "what features are matched by: cosines of decoder or encoder rows, folded (decoder rows times thresholds, of "
        "jumprelu, batchtopk and gated), or activity: correlation on text that both models read",
        choices=MEASURES,
    )
    shared: float = setting(0.7, "cosine or correlation from which on matched features are shared", low=0.0, high=1.0)
    reconstruction: bool = setting(False, "put each dictionary in the place of each other, with and without a map")
    tokens: int = setting(8192, "held-out text, about so many tokens, for activity and reconstruction", low=64)
    ce_documents: int = setting(0, "texts of it on which cross-entropy recovered is measured; 0: not", low=0)
    tune_tokens: int = setting(
        0,
        "tokens on which each dictionary with a k goes on training in the place of each other, beside a random start: "
        "how many does it save? Implies reconstruction, and wants --transfer.tokens of about twice as many; 0: none",
        low=0,
    )
    ablations: tuple[str, ...] = setting(
        (),
        "folders of finished ablate units with --ablate.effects=all, such as runs/demo/ablate/topk: whether shared "
        "features of their dictionaries have the same effects",
    )
    batch_tokens: int = setting(2048, "tokens run at a time", low=32, changes_results=False)
    seed: int = setting(789, "seed of random directions, rotations and shuffled pairs", low=0)


def _folders(configs: Configs) -> str:
    """Return the identity of dictionaries and ablations that are named by their folders."""
    from pathlib import Path

    from saejax.dictionaries import stacks
    from saejax.files import file_sha256
    from saejax.runner.workspace import SUMMARY, fingerprint

    config = configs[TransferConfig]
    summaries = [Path(folder) / SUMMARY for folder in config.ablations]
    return fingerprint(
        [stacks.identity(name) for name in config.dictionaries if is_folder(name)]
        + [file_sha256(path) if path.is_file() else "" for path in summaries]  # what is missing is said when it runs
    )


def _run(run: Run) -> Any:
    from saejax.transfer.run import run_transfer

    return run_transfer(run)


def _results() -> Any:
    from saejax.transfer.results import TransferResults

    return TransferResults


def _sections(findings: Any, draw: Any) -> Sequence[Any]:
    from saejax.transfer.report import sections

    return sections(findings, draw)


TRANSFER = Stage(
    name="transfer",
    summary="says what dictionaries of different layers, seeds, sizes and models share, if --transfer.dictionaries "
    "names any",
    run=_run,
    results=_results,
    groups=(ModelConfig, CorpusConfig, TransferConfig),
    placement=(MeshConfig,),
    reads=("train",),
    follows=("ablate", "interpret", "atlas"),
    needs=lambda configs, name: train_units(*configs[TransferConfig].dictionaries),
    names=lambda configs: ("",) if configs[TransferConfig].dictionaries else (),
    identity=dict(model=identities.model, corpus=identities.corpus, folders=_folders),
    processes="items",
    section=_sections,
)
