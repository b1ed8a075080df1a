"""Settings of exports."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, setting
from saejax.dictionaries.kinds import unit_names


@dataclasses.dataclass(frozen=True)
class ExportConfig(Config):
    """Export of trained dictionaries to the formats of other tools."""

    format: str = setting(
        "saelens",
        "format: saelens (a folder per dictionary), circuit_tracer (transcoders of all layers in one set) or "
        "neuronpedia (features for its importer and for graph viewers; needs --interpret.dictionaries)",
        choices=("saelens", "circuit_tracer", "neuronpedia"),
    )
    dictionaries: tuple[str, ...] = setting(
        (),
        "kinds of trained dictionaries to export, each with all members of its stack; empty: none",
        choices=unit_names,
        changes_results=False,
    )
    push: str = setting(
        "",
        "repository of the Hugging Face hub, such as org/name, to which SAELens folders are pushed with a model card "
        "and the scores of the stage evaluate; takes a token; empty: none",
    )
    model_id: str = setting("", "the model's id at Neuronpedia; empty: the last part of its name in lower case")
    source_set: str = shared.source_set()
