"""The train stage: a stack of dictionaries of one kind, on a captured store or straight from the model."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from saejax.activations.joined import single_sites
from saejax.activations.store import Store
from saejax.dictionaries.cross_layer import FORM
from saejax.dictionaries.kinds import PRETRAINED
from saejax.errors import UserError
from saejax.files import read_object
from saejax.models.loading import load_configured_model
from saejax.models.settings import ModelConfig
from saejax.models.sites import OtherSite, decoder_site
from saejax.parallel.collectives import is_first_process, process_count
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.runner.results import load_results
from saejax.runner.workspace import STACK, STARTED, Run
from saejax.stages.tokenize.run import text_documents
from saejax.stages.train.metrics import split_metrics
from saejax.stages.train.pretrained import run_pretrained
from saejax.training.finetune import check_can_finetune, finetune_members
from saejax.training.held_out import LossScorer
from saejax.training.inputs import Calibrate, Finetuned, Source, model_source, store_source
from saejax.training.longer import LATER
from saejax.training.loop import Listener, TrainFolders, check_state_dtype, train_stack
from saejax.training.members import Member, choose_sites, make_members
from saejax.training.metrics import METRICS
from saejax.training.results import TrainResults
from saejax.training.scales import HELD_OUT_TOKENS
from saejax.training.settings import TrainConfig
from saejax.training.stack import TrainStack, batch_parts
from saejax.training.state import TrainState


def run_train(run: Run) -> TrainResults | None:
    """Train the members of kind ``run.name`` and write them to ``run.folder``; copy existing ones for "pretrained".

    This writes ``checkpoints/`` and ``metrics.jsonl`` (in a folder for each of several sizes) and ``dictionary/``.
    Each member of a stack has a folder of its own for its ``dictionary/`` and ``metrics.jsonl``, and only members that
    are not there are trained. A cross-layer transcoder is one set, in circuit-tracer's format, in ``run.folder``. An
    interrupted run goes on at its newest checkpoint and ends with the same bits as an uninterrupted one.
    """
    config = run.configs[TrainConfig]
    if run.name == PRETRAINED:
        return run_pretrained(run)
    check_state_dtype(config)
    if config.kl_steps and process_count() > 1:
        raise UserError(f"--train.kl_steps={config.kl_steps} runs in one process, and there are several: leave it out")
    (*_, results) = [_run_size(run, of_size, size) for size, of_size in config.each_size().items()]
    if not run.stack or not is_first_process():
        return results
    return TrainResults.of_stack({name: load_results(folder) for name, folder in run.stack.folders.items()})


def _run_size(run: Run, config: TrainConfig, size: str) -> TrainResults | None:
    """Train the members of one of ``each_size`` that are not there; None if all are."""
    # Members come before the source, which reads no sites but theirs.
    store = None if config.source == "model" else Store.open(run.inputs["capture"])
    members = make_members(config, run.name, choose_sites(config, store.sites if store else None), size)
    if run.stack:
        names = [*run.stack.together]  # in the order of checkpoints, whatever order the flags have now
        members = sorted((member for member in members if member.name in names), key=lambda m: names.index(m.name))
    if not members:
        return None
    parts = batch_parts(members)
    if store is None:
        documents = functools.partial(text_documents, run)
        source = model_source(run.configs | config, parts, documents, run.say, run.stopping)
    else:
        source = store_source(config, store, parts, run.say)
    if config.ce_every:
        source = dataclasses.replace(source, loss_scorer=functools.partial(_loss_scorer, run, source.rows))
    if config.kl_steps:
        source = dataclasses.replace(source, finetune=functools.partial(_finetune, run, source.rows))
    return train_members(run, config, members, source, size)


def _loss_scorer(run: Run, rows: Any, stack: TrainStack) -> LossScorer:
    """Return a scorer of a stack in the model of a store or a stream, which it loads.

    Raises:
      UserError: the members cannot be scored while they are trained.
    """
    sites = single_sites(site for pair in stack.sites for site in pair)
    of_second = [site for site in sites if OtherSite.names(site)]
    reason = f"of a second model ({of_second[0]})" if of_second else ""
    reason = f"of the form {FORM}" if stack.is_cross_layer else reason
    reason = "in several processes" if process_count() > 1 else reason
    if reason:
        raise UserError(f"--train.ce_every={stack.config.ce_every} is not for dictionaries {reason}: leave it out")
    for site in sites:
        decoder_site(site)  # losses are measured in the decoder, which does not have a module of the PyTorch model
    lm = load_configured_model(run.configs[ModelConfig], stack.mesh)
    if stack.config.source == "store":
        rows.check_model(lm.source)
    return LossScorer(stack, lm, rows.documents.sample(HELD_OUT_TOKENS).of("held_out"))


def _finetune(run: Run, rows: Any, stack: TrainStack, state: TrainState, calibrate: Calibrate) -> Finetuned:
    """Fine-tune the members of a state in the model of a store or a stream, which is loaded."""
    lm = load_configured_model(run.configs[ModelConfig], stack.mesh)
    if stack.config.source == "store":
        rows.check_model(lm.source)
    for member in stack.members:
        check_can_finetune(lm, dataclasses.replace(stack.dictionary, site=member.site, target=member.target))
    # As much of the text as the steps take, unless its documents are short; then it is read again.
    documents = rows.documents.sample(stack.config.kl_steps * stack.config.batch).of("train")
    held_out = [ids_T for ids_T in rows.documents.sample(HELD_OUT_TOKENS).of("held_out") if len(ids_T) > 1]
    scorer = LossScorer(stack, lm, held_out)
    before = scorer.measure(state, calibrate(state)) if held_out else []
    state, records = finetune_members(stack, state, lm, documents, run.say, run.stopping)
    after = scorer.measure(state, calibrate(state)) if held_out else []
    return Finetuned(state, records, [*zip(before, after, strict=True)])


def train_members(
    run: Run, config: TrainConfig, members: Sequence[Member], source: Source, size: str = ""
) -> TrainResults:
    """Train members together, and write each one's ``dictionary/`` to ``run.member_folder(member.name)``.

    Args:
      run: the run, whose name is the kind.
      config: the settings, one of ``each_size``.
      members: the dictionaries; see ``make_members``.
      source: their activations.
      size: the name of the settings in ``each_size``.

    Returns:
      The results, with each member's.

    Raises:
      UserError: see ``train_stack``.
      Interrupted: asked to stop; the state is saved.
    """
    folders, mesh = _folders(run, members, size), _fitting_mesh(run, len(members))
    results = train_stack(config, members, source, mesh, folders, Listener(run.say, run.stopping))
    if run.stack:
        if is_first_process():
            split_metrics(folders.logs / METRICS, folders.members)
        for index, member in enumerate(members):
            if member.name in folders.members:
                run.stack.finish(member.name, results.of_member(index))
    return results


def _folders(run: Run, members: Sequence[Member], size: str = "") -> TrainFolders:
    """Return the folders in which a run trains members; it writes unfinished ones."""
    names = [member.name for member in members if not run.stack or member.name in run.stack.missing]
    written = {name: run.member_folder(name) for name in names}
    if not (run.folder / STARTED).exists():  # a folder inside of a unit
        return TrainFolders(run.folder, written, run.folder, size=size)
    # Files of wandb change after the run: they are in ``wandb/`` in the workdir, not among the unit's.
    started, earlier = (run.folder / STARTED).read_text(), _begun_alike(run, [member.name for member in members])
    return TrainFolders(run.folder, written, run.folder.parents[1], started, earlier, size)


def _begun_alike(run: Run, members: Sequence[str]) -> tuple[Path, ...]:
    """Return the units of trainings in this workdir whose members differ from these in ``LATER`` settings alone."""
    wanted, units = _first_steps(run.folder, members if run.stack else ()), []
    for folder in sorted(run.folder.parent.glob(f"{run.name}-*")):
        with contextlib.suppress(UserError):  # a damaged unit is not taken
            if folder != run.folder and _first_steps(folder, members if run.stack else ()) == wanted:
                units.append(folder)
    return tuple(units)


def _first_steps(unit: Path, members: Sequence[str]) -> list[Any]:
    """Return what the first steps of a unit, or of each of these members of a stack, depend on."""
    folders = [unit]
    if members:
        places = read_object(unit / STACK, "members")["members"] if (unit / STACK).exists() else {}
        folders = [unit.with_name(places[member]) for member in members] if {*members} <= {*places} else []
    depends: list[Any] = []
    for folder in folders:
        # The unit is named like its folder, and its name says nothing about its content.
        depends.append({**read_object(folder / STARTED).get("depends_on", {}), "unit": ""})
        settings = depends[-1].get("settings", {})
        depends[-1]["settings"] = {name: value for name, value in settings.items() if name not in LATER}
        # Activations that are read from a store have its hash; only fine-tuning runs the model.
        if settings.get("train.source") == "store":
            kept = {name: value for name, value in depends[-1]["settings"].items() if not name.startswith("model.")}
            depends[-1] |= dict(settings=kept, sources={**depends[-1].get("sources", {}), "model": ""})
    return depends


def _fitting_mesh(run: Run, members: int) -> Mesh:
    """Return the run's mesh; of a stack of which some members are there, as many parts of it as divide the others.

    Args:
      run: the run.
      members: number of members that are trained at once, of one size.

    Raises:
      UserError: see ``make_mesh``.
    """
    config = run.configs[MeshConfig]
    # A mesh that does not fit a whole stack is for ``check_divides`` to refuse, also where it has several sizes.
    if run.stack and len(run.stack.together) < len(run.stack.folders):
        config = dataclasses.replace(config, member=math.gcd(config.member, members), data=0)
    return make_mesh(config)
