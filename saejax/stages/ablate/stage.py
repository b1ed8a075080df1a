"""The stage ``ablate``."""

from typing import Any

from saejax.config import Configs, counted
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.names import folder_name, is_folder
from saejax.errors import one_of
from saejax.files import fingerprint
from saejax.interventions.answers import AblateResults
from saejax.interventions.settings import BASES, AblateConfig
from saejax.models.settings import ModelConfig
from saejax.models.sites import OtherSite, site_parts
from saejax.runner.stage import Input, Stage, inputs_of, list_folders, train_units
from saejax.stages import identities
from saejax.stages.ablate.run import check_settings, run_ablate
from saejax.tasks.settings import CorpusConfig, TaskConfig, held_out_settings
from saejax.training.settings import TrainConfig


def _bases(configs: Configs) -> str:
    """Return the identity of dictionaries that are named by their folders: other bases, and tested ones."""
    by_folder = [name for name in _dictionaries(configs) if is_folder(name)]
    bases = [name for name in configs[AblateConfig].baselines if name not in BASES]
    return fingerprint([hash_dictionaries(name) for name in (*bases, *by_folder)])


def _check(configs: Configs) -> None:
    check_settings(configs[AblateConfig])
    for name in configs[AblateConfig].baselines:
        if not is_folder(name):
            one_of(name, BASES, "basis (--ablate.baselines), and no folder of a dictionary:")


def _dictionaries(configs: Configs) -> tuple[str, ...]:
    """Return the dictionaries that are tested, the main one first."""
    ablate = configs[AblateConfig]
    return tuple(dict.fromkeys((ablate.dictionary, *ablate.repeats, *ablate.joined)))


def _names(configs: Configs) -> tuple[str, ...]:
    """Return the tested dictionary; none where only crosscoders of two models are trained, which are not tested."""
    tested, sites = configs[AblateConfig].dictionary, configs[TrainConfig].sites
    of_two_models = not is_folder(tested) and all(any(map(OtherSite.names, site_parts(site))) for site in sites)
    return (folder_name(tested),) if configs[TaskConfig].has_behaviours and not of_two_models else ()


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings that are read; those of the corpus only where cross-entropy is measured on its text."""
    read = counted(configs[ModelConfig], configs[AblateConfig])
    return read | (held_out_settings(configs[CorpusConfig]) if configs[AblateConfig].text_documents else {})


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    units = ("baseline", *train_units(*_dictionaries(configs)))
    text = dict(corpus=identities.corpus) if configs[AblateConfig].text_documents else {}
    return inputs_of(configs, *units, model=identities.model, bases=_bases, **text)


ABLATE = Stage(
    name="ablate",
    summary="ablates top features and control sets, and says whether the features cause the behaviours",
    run=run_ablate,
    results=AblateResults,
    groups=(ModelConfig, CorpusConfig, AblateConfig),
    reads=("baseline", "train"),
    follows=("evaluate",),
    settings=_settings,
    inputs=_inputs,
    names=_names,
    check=_check,
    places=list_folders("ablate", "dictionary", "repeats", "joined", "baselines"),
    revision=13,  # means that are not testable are not corrected for
    processes="all",
)
