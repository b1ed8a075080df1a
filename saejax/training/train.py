"""The train stage: a stack of dictionaries of one kind on sites of a captured store."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.activations.batches import Parts, sites_of, steps_per_epoch, training_batches
from saejax.activations.store import Store
from saejax.dictionaries import DictionaryConfig, save_dictionary
from saejax.dictionaries.formats import own
from saejax.errors import UserError, one_of
from saejax.models.sites import KINDS as SITE_KINDS
from saejax.parallel import describe, is_first_process, make_mesh, sharding
from saejax.settings import TrainConfig
from saejax.training.checkpoints import Checkpoints
from saejax.training.loop import Metrics, train
from saejax.training.members import Member, members
from saejax.training.scales import site_scales
from saejax.training.step import Trainer
from saejax.workspace import Run


def run_train(run: Run) -> dict:
    """Trains the members of kind ``run.name`` and writes them to ``run.folder``.

    Writes ``checkpoints/``, ``metrics.jsonl`` and, for each member, ``dictionary/`` (in a folder of the member's name
    if there are several). An interrupted run goes on at its newest checkpoint and ends with the same bits as one that
    was not.
    """
    config: TrainConfig = run.configs["train"]
    store = Store.open(run.inputs["capture"])
    stack = members(config, run.name, chosen_sites(config, store.sites))
    mesh = make_mesh(run.configs["mesh"])
    dictionary = describe_stack(config, run.name, store, stack)
    parts = batch_parts(stack)
    steps = _steps(config, store, parts)
    check_divides(config, dictionary, len(stack), mesh)
    trainer = Trainer(config, dictionary, stack, mesh, steps, site_scales(store, config, stack, parts))

    checkpoints = Checkpoints(run.folder / "checkpoints")
    first_step = checkpoints.latest_step or 0
    state = checkpoints.restore(trainer.abstract_state) if first_step else trainer.initial_state()
    axes = "x".join(str(size) for size in mesh.shape.values())
    verb = f"resuming {run.name} at step {first_step}" if first_step else f"training {run.name}"
    many = f"{len(stack)} members, " if len(stack) > 1 else ""
    run.say(
        f"{verb}: {many}{dictionary.d_in} -> {dictionary.n_features}, {steps} steps of {config.batch} tokens, "
        f"mesh {axes}"
    )
    metrics = Metrics(
        run.folder / "metrics.jsonl",
        first_step,
        config.batch,
        config.log_every,
        steps,
        [member.name for member in stack],
        run.say,
    )
    order = (config.seed[0], config.epochs, first_step, jax.process_index(), jax.process_count())
    batches = training_batches(store, parts, config.batch, *order)
    state = train(
        trainer, state, batches, first_step, steps, metrics, checkpoints, config.checkpoint_every, run.stopping
    )
    checkpoints.close()
    silent_for = steps_per_epoch(store, parts, config.batch) * config.batch
    silent = jax.jit(lambda silent_MxF: jnp.mean(silent_MxF >= silent_for, axis=1), out_shardings=sharding(mesh))
    dead_M = np.asarray(silent(state.silent_MxF))
    results = [
        dict(
            name=member.name,
            site=member.site,
            target=member.target,
            settings={key: getattr(member, key) for key in ("learning_rate", "k", "l1", "target_l0", "seed")},
            input_scale=scale.input,
            output_scale=scale.output,
            dead_fraction=float(dead),
            final=metrics.last(member.name),
        )
        for member, scale, dead in zip(stack, trainer.scales, dead_M, strict=True)
    ]
    for index, member in enumerate(stack):
        folder = run.folder / member.name / "dictionary"
        if is_first_process():
            (folder / own.DESCRIPTION).unlink(missing_ok=True)  # of a run killed between here and its summary
        save_dictionary(folder, trainer.finish(state, index))
    return dict(
        kind=run.name,
        steps=steps,
        tokens=steps * config.batch,
        tokens_per_second=metrics.tokens_per_second(),
        seconds=metrics.seconds,
        members=results,
        mesh=describe(mesh),
    )


def chosen_sites(config: TrainConfig, captured: Sequence[str]) -> list[str]:
    """The sites that ``--train.sites`` names, all of them captured; "all" are those of one kind, in order of layers."""
    if config.sites == ("all",):
        reads = "mlp_in" if config.form != "sae" else None
        kinds = {site.partition(".")[0] for site in captured} & set(SITE_KINDS)
        kind = reads or (kinds.pop() if len(kinds) == 1 else "resid_post")
        found = [site for site in captured if site.partition(".")[0] == kind]
        if not found:
            raise UserError(f"the store has no {kind} sites for --train.sites=all: it has {', '.join(captured)}")
        return sorted(found, key=lambda site: int(site.rpartition(".")[2]))
    if not config.sites:
        raise UserError("--train.sites is empty: name at least one captured site, such as resid_post.15")
    for site in config.sites:
        one_of(site, captured, "site in this store (--train.sites)")
    return list(config.sites)


def batch_parts(stack: Sequence[Member]) -> Parts:
    """The sites of each part of a batch: of the inputs, and of the targets if these are not the same."""
    pairs = list(dict.fromkeys((member.site, member.target) for member in stack))
    inputs, targets = zip(*pairs, strict=True)
    return (inputs,) if inputs == targets else (inputs, targets)


def describe_stack(config: TrainConfig, kind: str, store: Store, stack: Sequence[Member]) -> DictionaryConfig:
    """What the members have in common, with the largest of their k and the model of the store."""
    sites = dict.fromkeys(site for member in stack for site in (member.site, member.target))
    widths = {site: store.d(one_of(site, store.sites, "site in this store")) for site in sites}
    return dataclasses.replace(
        stack_shape(config, kind, stack, widths),
        max_norm=store.max_norm(stack[0].site),
        model=store.model["name"],
        revision=store.model["revision"],
        fingerprint=store.model["fingerprint"],
    )


def stack_shape(config: TrainConfig, kind: str, stack: Sequence[Member], widths: Mapping[str, int]) -> DictionaryConfig:
    """What the members have in common before there are activations.

    Args:
      widths: of all their sites.

    Raises:
      UserError: their sites differ in width, or k or the groups do not fit the features.
    """
    if len(set(widths.values())) > 1:
        raise UserError(f"the sites of a stack must have one width, but have {widths}: train them in several runs")
    d_in = next(iter(widths.values()))
    features = config.expansion * d_in
    k = max(member.k for member in stack) if kind in ("topk", "batchtopk", "matryoshka") else 0
    if k > features:
        raise UserError(f"--train.k={k} is more than the {features} features: lower it")
    if k and config.decoder_norm == "free":
        raise UserError(f"--train.decoder_norm=free has no penalty to hold it in a {kind} dictionary: use unit")
    groups = tuple(round(share * features) for share in config.groups) if kind == "matryoshka" else ()
    if groups and (sorted(set(groups)) != list(groups) or groups[0] < 1 or groups[-1] != features):
        raise UserError(
            f"--train.groups={config.groups} gives groups of {groups} features: expected shares ascending to 1"
        )
    return DictionaryConfig(
        kind=kind,
        site=stack[0].site,
        target="" if config.form == "sae" else stack[0].target,
        d_in=d_in,
        n_features=features,
        k=k,
        groups=groups,
        skip=config.form == "skip_transcoder",
        centred=config.form == "sae",
        fires_above=config.fires_above if kind == "linear" else 0.0,
    )


def _steps(config: TrainConfig, store: Store, parts: Parts) -> int:
    per_epoch = steps_per_epoch(store, parts, config.batch)
    if per_epoch == 0:
        rows = len(store.rows("train", *sites_of(parts)))
        raise UserError(
            f"the store has {rows} training tokens, fewer than one batch: lower --train.batch={config.batch}"
        )
    steps = per_epoch * config.epochs
    return min(steps, config.max_steps) if config.max_steps else steps


def check_divides(config: TrainConfig, dictionary: DictionaryConfig, members: int, mesh: Mesh) -> None:
    """A ``UserError`` unless the mesh divides the batch, the features and the members of a stack."""
    if config.batch % mesh.shape["data"]:
        raise UserError(
            f"--train.batch={config.batch} is not divisible by the {mesh.shape['data']} devices on the data axis"
        )
    if dictionary.n_features % mesh.shape["model"]:
        raise UserError(f"{dictionary.n_features} features are not divisible by --mesh.model={mesh.shape['model']}")
    if members % mesh.shape["member"]:
        fitting = [n for n in range(1, mesh.devices.size + 1) if members % n == 0 and mesh.devices.size % n == 0]
        raise UserError(
            f"--mesh.member={mesh.shape['member']} does not divide the stack's {members} members: with "
            f"{mesh.devices.size} devices it can be {', '.join(map(str, fitting))}"
        )
