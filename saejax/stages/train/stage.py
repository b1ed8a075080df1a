"""The stage ``train``."""

from typing import Any

from saejax.activations.request import check_limits
from saejax.activations.settings import CaptureConfig
from saejax.config import Configs, counted
from saejax.dictionaries.cross_layer import FORMS
from saejax.dictionaries.formats.place import is_address
from saejax.dictionaries.hashes import hash_dictionaries
from saejax.dictionaries.kinds import PRETRAINED
from saejax.errors import UserError
from saejax.files import fingerprint
from saejax.models.settings import ModelConfig
from saejax.models.sites import ModuleSite, is_joined, parse_site, site_parts
from saejax.models.source import runs_in_torch
from saejax.runner.stage import Input, Stage, inputs_of
from saejax.stages import identities
from saejax.stages.train.members import place_in_stack, trained_sites, units_of_members
from saejax.stages.train.run import run_train
from saejax.tasks.settings import CorpusConfig
from saejax.training.results import TrainResults
from saejax.training.settings import TrainConfig

# Settings of --capture that only stores have: training from the model reads its own sites, of all text, and writes no
# shards, whose sinks are counted.
_OF_STORES = ("capture.sites", "capture.tokens", "capture.shard_rows", "capture.max_sink_share")


def _initial(configs: Configs) -> str:
    """Return the identity of the dictionaries that training starts from; "" without any."""
    folder = configs[TrainConfig].init_from
    return hash_dictionaries(folder) if folder else ""


def _check(configs: Configs) -> None:
    train = configs[TrainConfig]
    parts = [part for site in train.sites if site != "all" for part in site_parts(site)]
    for part in parts:
        parse_site(part)
    if train.source == "model":
        check_limits(configs, parts)
    if train.kl_steps:
        _check_finetuning(configs)


def _places(configs: Configs) -> dict[str, list[str]]:
    """Return the folders that training starts from, and of dictionaries that are taken as they are."""
    train = configs[TrainConfig]
    taken = train.pretrained if PRETRAINED in train.kinds else ()
    named = {"train.init_from": (train.init_from,), "train.pretrained": taken}
    return {name: [place for place in some if place and not is_address(place)] for name, some in named.items()}


def _check_finetuning(configs: Configs) -> None:
    """Raise a ``UserError`` unless dictionaries can be fine-tuned through the model, before they are trained."""
    train, reason = configs[TrainConfig], ""
    if train.form in FORMS:
        reason = f"the form {train.form}"
    elif joined := [site for site in train.sites if is_joined(site)]:
        reason = f"crosscoders ({joined[0]})"
    elif modules := [site for site in train.sites if ModuleSite.names(site)]:
        reason = f"modules of PyTorch ({modules[0]})"
    elif runs_in_torch(configs[ModelConfig]):
        reason = "models that run in PyTorch"
    if reason:
        raise UserError(f"--train.kl_steps={train.kl_steps} is not for {reason}: leave it out")


def _settings(configs: Configs, name: str) -> dict[str, Any]:
    """Return the settings that training reads; without a store also the settings of the text and its capture."""
    train = configs[TrainConfig]
    if name == PRETRAINED:
        return {}
    streamed = counted(configs[CorpusConfig], configs[CaptureConfig], but=_OF_STORES) if train.source == "model" else {}
    # Fine-tuning runs the model in its own dtype, which captured activations need not have.
    return train.read_by(name) | streamed | (counted(configs[ModelConfig]) if train.kl_steps else {})


def _inputs(configs: Configs, name: str) -> dict[str, Input]:
    if name == PRETRAINED:
        addresses = configs[TrainConfig].pretrained
        return inputs_of(configs, pretrained=lambda _: fingerprint([*map(hash_dictionaries, addresses)]))
    outside = place_in_stack(configs)
    if configs[TrainConfig].source == "store":
        tuned = dict(model=identities.model) if configs[TrainConfig].kl_steps else {}
        return inputs_of(trained_sites(configs), "capture", initial=_initial, **tuned, **outside)
    text = identities.training_text(configs)
    return inputs_of(configs, *text, initial=_initial, model=identities.model, corpus=identities.corpus, **outside)


TRAIN = Stage(
    name="train",
    summary="trains sparse dictionaries on the captured activations",
    run=run_train,
    results=TrainResults,
    groups=(TrainConfig,),
    reads=("tokenize", "capture"),
    settings=_settings,
    inputs=_inputs,
    names=lambda configs: configs[TrainConfig].kinds,
    check=_check,
    places=_places,
    members=units_of_members,
    revision=3,  # thresholds of BatchTopK lie below the smallest activation that training keeps
    processes="all",
)
