"""The sizes of what the stages run for one model: batches, lengths, dictionaries."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.causal.split import LENGTH_STEP
from saejax.dictionaries import DictionaryConfig
from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.sites import ModuleSite, Site
from saejax.settings import TrainConfig
from saejax.tasks.benchmark_scores import way
from saejax.training.train import dictionary_shape


@dataclasses.dataclass(frozen=True)
class Work:
    """What the stages run.

    Attributes:
      name: of the model, for messages.
      model: its decoder.
      dtype: of its weights and products in JAX.
      capture: dtype of the same while it is captured.
      backend: what captures, "torch" or "jax".
      stored: dtype of the stored activations, which training reads.
      sites: captured in one pass.
      train: how dictionaries are trained.
      dictionaries: one for each kind.
      tested: the one whose features are ablated.
      batch: [rows, length] of a batch of documents in capture.
      scored: [rows, length] of a batch of documents in evaluate.
      generated: [rows, length of prompt, new tokens] of a batch of benchmark answers; None: none are generated.
      prompt: tokens of a prompt of a behaviour.
      rows: edited prompts per batch of the ablation's tail.
      features: most features in the sets of one ablation.
    """

    name: str
    model: DecoderConfig
    dtype: str
    capture: str
    backend: str
    stored: str
    sites: tuple[Site, ...]
    train: TrainConfig
    dictionaries: tuple[DictionaryConfig, ...]
    tested: DictionaryConfig
    batch: tuple[int, int]
    scored: tuple[int, int]
    generated: tuple[int, int, int] | None
    prompt: int
    rows: int
    features: int

    @property
    def site(self) -> Site:
        """The site of the dictionaries."""
        return Site.parse(self.tested.site)


def plan_work(name: str, model: DecoderConfig, configs: Mapping[str, Any]) -> Work:
    """The work of a configuration on one model.

    Args:
      name: of the model.
      model: its decoder.
      configs: the groups of configuration.

    Raises:
      UserError: a site does not exist in this model, or is trained on and not captured; k is above the features.
    """
    capture, train, ablate = configs["capture"], configs["train"], configs["ablate"]
    try:
        # Modules of the PyTorch model, which may be captured beside the sites, have sizes that only it knows.
        sites = tuple(Site.parse(site).check(model) for site in capture.sites if not ModuleSite.names(site))
        site = Site.parse(train.site).check(model)
    except UserError as error:
        raise UserError(f"{name}: {error}: choose --capture.sites and --train.site for this model") from None
    if site not in sites:
        raise UserError(f"--train.site={site} is not captured: add it to --capture.sites={','.join(capture.sites)}")
    length = min(configs["corpus"].context, model.context)
    scored = -(-length // 32) * 32
    dictionaries = tuple(dictionary_shape(train, kind, site.width(model)) for kind in train.kinds)
    tested = dictionary_shape(train, ablate.dictionary, site.width(model))
    prompt = min(configs["preflight"].prompt_tokens, model.context)
    return Work(
        name=name,
        model=dataclasses.replace(model, remat=configs["model"].remat),
        dtype=configs["model"].dtype,
        capture=capture.dtype,
        backend=capture.backend,
        stored=capture.store_dtype,
        sites=sites,
        train=train,
        dictionaries=dictionaries,
        tested=tested,
        batch=(max(1, capture.batch_tokens // length), length),
        scored=(max(1, configs["evaluate"].batch_tokens // scored), scored),
        generated=_generated(model, configs),
        prompt=-(-prompt // LENGTH_STEP) * LENGTH_STEP,
        rows=ablate.batch_rows,
        features=min(tested.n_features, ablate.top * (1 + ablate.matches)),
    )


def _generated(model: DecoderConfig, configs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    task = configs["task"]
    if not any(way(name, task) == "generate" for name in task.benchmarks):
        return None
    new = min(task.max_new_tokens, model.context - 1)
    return task.batch, min(configs["preflight"].benchmark_tokens, model.context - new), new
