"""The sizes of what the stages run for one model: batches, lengths, dictionaries."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.causal.ablation import FEATURES
from saejax.causal.split import GROUP_TOKENS, LENGTH_STEP, PROMPTS
from saejax.dictionaries import DictionaryConfig, stacks
from saejax.errors import UserError, one_of
from saejax.models.config import DecoderConfig
from saejax.models.rules import RunRules
from saejax.models.sites import ModuleSite, Site
from saejax.preflight.graphs import GraphWork, plan_graphs
from saejax.settings import AblateConfig, TaskConfig, TrainConfig
from saejax.tasks.benchmark_scores import way
from saejax.training.members import Member, members
from saejax.training.train import chosen_sites, stack_shape


@dataclasses.dataclass(frozen=True)
class Stack:
    """Dictionaries that one program trains.

    Attributes:
      dictionary: what its members have in common.
      members: who they are.
    """

    dictionary: DictionaryConfig
    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the stages run.

    Attributes:
      name: of the model, for messages.
      model: its decoder.
      rules: how its gradients are taken.
      dtype: of its weights and products in JAX.
      capture: dtype of the same while it is captured.
      backend: what captures, "torch" or "jax".
      stored: dtype of the stored activations, which training reads.
      sites: captured in one pass.
      train: how dictionaries are trained.
      stacks: one for each kind.
      tested: the one whose features are ablated.
      batch: [rows, length] of a batch of documents in capture.
      scored: [rows, length] of a batch of documents in evaluate.
      generated: [rows, length of prompt, new tokens] of a batch of benchmark answers; None: none are generated.
      prompt: tokens of a prompt of a behaviour.
      prompts: prompts whose clean run the ablation keeps at once.
      rows: edited prompts per batch of the ablation's tail.
      features: most features in the sets of one ablation.
      estimate: what ranks features.
      replacement: what stands in the place of removed ones.
      pairs: prompts of a behaviour that are patched together with their counterparts; 0: no kind of site is patched.
      patch_rows: patched prompts per batch.
      patched, probed, studied: the dictionaries of these stages; None where the stage was not asked for.
      references: [rows, length] of a batch of benchmark answers while a study chooses features.
      graphs: the attribution graphs; None: none, or their transcoders' sizes are not known.
      uncounted: what is asked for and not counted here, and why; "": nothing.
    """

    name: str
    model: DecoderConfig
    rules: RunRules
    dtype: str
    capture: str
    backend: str
    stored: str
    sites: tuple[Site, ...]
    train: TrainConfig
    stacks: tuple[Stack, ...]
    tested: DictionaryConfig
    batch: tuple[int, int]
    scored: tuple[int, int]
    generated: tuple[int, int, int] | None
    prompt: int
    prompts: int
    rows: int
    features: int
    estimate: str
    replacement: str
    pairs: int
    patch_rows: int
    patched: DictionaryConfig | None
    probed: DictionaryConfig | None
    studied: DictionaryConfig | None
    references: tuple[int, int]
    graphs: GraphWork | None = None
    uncounted: str = ""

    @property
    def site(self) -> Site:
        """The site of the tested dictionary."""
        return Site.parse(self.tested.site)

    @property
    def dictionaries(self) -> int:
        """How many are trained."""
        return sum(len(stack.members) for stack in self.stacks)


def plan_work(name: str, model: DecoderConfig, configs: Mapping[str, Any]) -> Work:
    """The work of a configuration on one model.

    Args:
      name: of the model.
      model: its decoder.
      configs: the groups of configuration.

    Raises:
      UserError: a site does not exist in this model, or is trained on and not captured; k is above the features; no
        such dictionary is trained as the one that is to be tested.
    """
    capture, train, ablate = configs["capture"], configs["train"], configs["ablate"]
    try:
        # Modules of the PyTorch model, which may be captured beside the sites, have sizes that only it knows.
        sites = tuple(Site.parse(site).check(model) for site in capture.sites if not ModuleSite.names(site))
        trained = _stacks(train, capture.sites, model)
    except UserError as error:
        raise UserError(f"{name}: {error}: choose --capture.sites and --train.sites for this model") from None
    length = min(configs["corpus"].context, model.context)
    scored = -(-length // 32) * 32
    patch, probe, study = configs["patch"], configs["probe"], configs["study"]
    item = min(configs["preflight"].benchmark_tokens, model.context)

    def used(stage: str, asked: bool) -> DictionaryConfig | None:
        return _tested(stage, configs[stage].dictionary, trained) if asked else None

    tested = _tested("ablate", ablate.dictionary, trained)
    graphs = plan_graphs(model, configs, [stack.dictionary for stack in trained.values()])
    prompt = min(configs["preflight"].prompt_tokens, model.context)
    return Work(
        name=name,
        model=model,
        rules=RunRules(remat=configs["model"].remat),
        dtype=configs["model"].dtype,
        capture=capture.dtype,
        backend=capture.backend,
        stored=capture.store_dtype,
        sites=sites,
        train=train,
        stacks=tuple(trained.values()),
        tested=tested,
        batch=(max(1, capture.batch_tokens // length), length),
        scored=(max(1, configs["evaluate"].batch_tokens // scored), scored),
        generated=_generated(model, configs),
        prompt=-(-prompt // LENGTH_STEP) * LENGTH_STEP,
        prompts=_kept_prompts(configs["task"], prompt),
        rows=ablate.batch_rows,
        features=_gathered(ablate, tested.n_features),
        estimate=ablate.estimate,
        replacement=ablate.replacement,
        pairs=configs["task"].test_prompts if patch.kinds else 0,
        patch_rows=patch.batch_rows,
        patched=used("patch", bool(patch.dictionary)),
        probed=used("probe", bool(probe.labels)),
        studied=used("study", bool(study.benchmarks)),
        references=(max(1, study.batch_tokens // item), item),
        graphs=graphs if isinstance(graphs, GraphWork) else None,
        uncounted=graphs if isinstance(graphs, str) else "",
    )


def _gathered(ablate: AblateConfig, features: int) -> int:
    """The features whose activations are kept at once; a circuit kept alone is all others removed."""
    if ablate.circuit_tests:
        return features
    return min(features, max(ablate.top * (1 + ablate.matches), FEATURES if ablate.effects == "all" else 0))


def _kept_prompts(task: TaskConfig, length: int) -> int:
    """The prompts of a behaviour, filled up to whole runs of the head, or as many as one group holds."""
    most = max(GROUP_TOKENS // length // PROMPTS, 1)
    return PROMPTS * min(-(-max(task.train_prompts, task.test_prompts) // PROMPTS), most)


def _stacks(train: TrainConfig, captured: Sequence[str], model: DecoderConfig) -> dict[str, Stack]:
    sites = chosen_sites(train, captured if train.sites == ("all",) else train.sites)
    trained = {}
    for kind in train.kinds:
        stack = members(train, kind, sites)
        needed = list(dict.fromkeys(site for member in stack for site in (member.site, member.target)))
        widths = {site: Site.parse(site).check(model).width(model) for site in needed}
        missing = [site for site in needed if site not in captured]
        if missing and train.source == "store":
            raise UserError(
                f"--train.sites needs {', '.join(missing)}, which --capture.sites={','.join(captured)} leaves out"
            )
        trained[kind] = Stack(stack_shape(train, kind, stack, widths), tuple(stack))
    return trained


def _tested(stage: str, name: str, trained: Mapping[str, Stack]) -> DictionaryConfig:
    """The dictionary of this name that a stage uses."""
    kind, member = stacks.kind_and_member(name)
    stack = trained[one_of(kind, trained, f"dictionary for {stage} (--train.kinds)")]
    stacks.check_member(name, [entry.name for entry in stack.members], f"--{stage}.dictionary")
    site = next(entry.site for entry in stack.members if entry.name == member)
    return dataclasses.replace(stack.dictionary, site=site)


def _generated(model: DecoderConfig, configs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    task = configs["task"]
    if not any(way(name, task) == "generate" for name in (*task.benchmarks, *configs["study"].benchmarks)):
        return None
    new = min(task.max_new_tokens, model.context - 1)
    return task.batch, min(configs["preflight"].benchmark_tokens, model.context - new), new
