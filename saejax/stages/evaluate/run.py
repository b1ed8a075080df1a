"""The evaluate stage: held-out scores of the members of a train unit."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saejax.activations.joined import single_sites, with_joined
from saejax.activations.progress import say_progress
from saejax.activations.store import Store
from saejax.dictionaries import Dictionary, load_dictionary
from saejax.dictionaries.formats import circuit_tracer, read_config
from saejax.dictionaries.joined import part_norms as decoder_part_norms
from saejax.dictionaries.results import TrainedMember
from saejax.errors import Interrupted, UserError
from saejax.evaluation import neighbours
from saejax.evaluation.cross_layer import LoadedLayers, describe_layers, reconstruct_layers, replaced_losses
from saejax.evaluation.latent_scaling import LatentScaling, scale_latents
from saejax.evaluation.loss_recovered import Losses, recovered, scored_documents, stand_in_losses
from saejax.evaluation.member_data import compiled_in
from saejax.evaluation.parts import (
    histogram,
    is_shared,
    part_losses,
    part_variances,
    parts_by_model,
    private_part,
    relative_norms,
)
from saejax.evaluation.reconstruction import Reconstruction, read_rows, reconstruct
from saejax.evaluation.results import DictionaryScores, EvaluateResults, LeftOutSinks, PartScores
from saejax.evaluation.roles import find_roles, score_roles
from saejax.evaluation.settings import EvaluateConfig
from saejax.files import read_json, write_array, write_json
from saejax.links import member_folder
from saejax.models.language_model import LanguageModel
from saejax.models.loading import load_configured_model
from saejax.models.settings import ModelConfig
from saejax.models.sites import decoder_site, is_joined, site_parts
from saejax.models.source import other_model
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig
from saejax.results import from_json, to_json
from saejax.runner import stacks
from saejax.runner.workspace import Run
from saejax.wording import counted

SCORES = "scores.json"
_AT_A_TIME = 4  # members of one site that are scored together, and by one process


def run_evaluate(run: Run) -> EvaluateResults:
    """Score the dictionaries of the train unit ``run.name`` on the store's held-out split.

    This writes for each member, in a folder of its own if there are several: ``firing_rate.npy`` and
    ``mean_activation.npy`` [F], fp32, and ``scores.json``; members with scores are left out. Of a crosscoder it writes
    ``latent_scaling.npy`` [2, F], fp32, too; see ``LatentScaling``.
    """
    store = Store.open(run.inputs["capture"])
    trained = run.inputs[f"train/{run.name}"]
    if circuit_tracer.is_cross_layer(trained):
        run.share.join([])  # it is one item, which the first process makes
        return _evaluate_layers(run, store, trained)
    stack = stacks.members(trained)
    for site in single_sites(member.site for member in stack):
        decoder_site(site)  # losses are measured in the decoder, which does not have a module of the PyTorch model

    # Loaded when a member is to be scored: a run that finds all scores needs no model.
    @functools.cache
    def models() -> tuple[LanguageModel, LanguageModel | None]:
        mesh, model = make_mesh(run.configs[MeshConfig]), run.configs[ModelConfig]
        lm = load_configured_model(model, mesh)
        store.check_model(lm.source)
        second = other_model(model) if store.manifest.other else None
        return lm, load_configured_model(second, mesh) if second else None

    def file(members: Sequence[TrainedMember]) -> Path:
        """Return the scores file of the first member that is not scored; of the last one if all are."""
        files = [run.member_folder(member.name) / SCORES for member in members]
        return next((path for path in files if not path.exists()), files[-1])

    def score(members: Sequence[TrainedMember]) -> None:
        _check_stop(run)
        names = [member.name for member in members if not (run.member_folder(member.name) / SCORES).exists()]
        sites = members[0].site, members[0].target
        _score_site(run, store, models(), sites, {name: member_folder(trained, name) for name in names})

    scored = [member for member in stack if not run.stack or member.name in run.stack.together]
    run.make_each(_together(trained, scored), file, score)
    paths = {member.name: run.member_folder(member.name) / SCORES for member in stack}
    scores = {name: from_json(DictionaryScores, read_json(path), path) for name, path in paths.items()}
    if run.stack:  # where each has no name
        for name in run.stack.missing:
            run.stack.finish(name, EvaluateResults(run.name, (scores[name],)))
    named = [dataclasses.replace(score, name=name) for name, score in scores.items()]
    return EvaluateResults(run.name, tuple(named))


def _evaluate_layers(run: Run, store: Store, folder: Path) -> EvaluateResults:
    """Score the cross-layer transcoder of a train unit on the store's held-out split.

    This writes ``firing_rate.npy`` and ``mean_activation.npy`` [L, F], fp32, and ``scores.json``.

    Raises:
      UserError: the store lacks a layer, or is of another model.
    """
    config, mesh, model = run.configs[EvaluateConfig], make_mesh(run.configs[MeshConfig]), run.configs[ModelConfig]
    loaded = LoadedLayers.of(folder, mesh)
    missing = [site for pair in loaded.sites for site in pair if site not in store.sites]
    if missing:
        last = len(loaded.sites) - 1
        raise UserError(
            f"{store.folder} has no {missing[0]}: --capture.sites=mlp_in.0-{last},mlp_out.0-{last} has all that a "
            "cross-layer transcoder is scored on"
        )
    lm = load_configured_model(model, mesh)
    store.check_model(lm.source)
    _check_stop(run)
    scores = reconstruct_layers(loaded, store, mesh, config.batch_tokens)
    _check_stop(run)
    losses = replaced_losses(lm, loaded, store, config)
    write_array(run.folder / "firing_rate.npy", np.stack([score.firing_rate_F for score in scores]).astype(np.float32))
    active_LxF = np.stack([score.mean_activation_F for score in scores])
    write_array(run.folder / "mean_activation.npy", active_LxF.astype(np.float32))
    described = describe_layers(scores, losses)
    write_json(run.folder / "scores.json", to_json(described))
    run.say(
        f"explained variance {described.explained_variance:.3f}, L0 {described.l0:.1f}, dead "
        f"{described.dead_fraction:.1%} on {described.tokens:,} held-out tokens; all MLPs replaced: cross-entropy "
        f"{described.ce.reconstructed:.3f}, clean {described.ce.clean:.3f}, means {described.ce.mean_ablated:.3f}"
    )
    return EvaluateResults(run.name, (), described)


def _check_stop(run: Run) -> None:
    if run.stopping():
        raise Interrupted("stopped; the dictionaries that were scored are kept: run the same command to go on")


def _together(trained: Path, stack: Sequence[TrainedMember]) -> list[list[TrainedMember]]:
    """Group members by what they read, predict and share a program with, a few at a time: the store is read once.

    Crosscoders of one joined site that were not trained together may put its parts together by scales of their own.
    """
    alike: dict[tuple, list[TrainedMember]] = {}
    for member in stack:
        config = read_config(member_folder(trained, member.name))
        alike.setdefault((member.site, member.target, compiled_in(config)), []).append(member)
    return [group[first : first + _AT_A_TIME] for group in alike.values() for first in range(0, len(group), _AT_A_TIME)]


def _score_site(
    run: Run,
    store: Store,
    models: tuple[LanguageModel, LanguageModel | None],
    sites: tuple[str, str],
    folders: dict[str, Path],
) -> None:
    """Score the members that read one site and predict one target, and write the results of each."""
    (site, target), config, mesh = sites, run.configs[EvaluateConfig], models[0].mesh
    # The rule of the store, whoever trained the dictionaries.
    loaded = (load_dictionary(folder, mesh=mesh) for folder in folders.values())
    dictionaries = [dictionary.with_sink_norms(store.max_norm, True) for dictionary in loaded]
    store = with_joined(store, [site], {site: dictionaries[0].config.scales})
    rows, documents = store.rows("held_out", *dict.fromkeys(sites)), scored_documents(store, config)
    named = ", ".join(filter(None, folders)) or run.name
    run.say(f"scoring {named} on {len(rows):,} held-out tokens, losses on {counted(len(documents), 'document')}")
    ask = functools.partial(_check_stop, run)

    def read() -> Iterator[list[np.ndarray]]:
        on_progress = say_progress(run.say, "reconstruction", ask)
        for number, block in enumerate(read_rows(store, rows, sites, config.batch_tokens)):
            on_progress(number * config.batch_tokens, len(rows))
            yield block

    scores = reconstruct(dictionaries, read(), mesh, config.batch_tokens)
    roles = find_roles(models[0], store, sites)
    groups = roles.groups[: len(documents)] if roles else ()
    mean_D, say_losses = store.mean(target, site), say_progress(run.say, "losses", ask)
    # What is written of each dictionary, and scores that only some have.
    arrays = [dict(firing_rate=score.firing_rate_F, mean_activation=score.mean_activation_F) for score in scores]
    more: list[dict[str, Any]] = [{} for _ in dictionaries]
    if is_joined(site):
        of_models = parts_by_model(site, *models)
        all_losses = part_losses(of_models, dictionaries, documents, mean_D, config.batch_tokens, groups, say_losses)
        all_variances = part_variances(dictionaries, read())
        losses = [losses_by_part["+".join(of_models[0].sites)] for losses_by_part in all_losses]
        for i, dictionary in enumerate(dictionaries):
            live_F = scores[i].firing_rate_F > 0
            # Live features only: the row of a feature that never fires says nothing about the parts.
            relative_PxA = relative_norms(
                decoder_part_norms(dictionary.W_dec_FxD[...], dictionary.config.widths)[:, live_F]
            )
            part_F = np.full(len(live_F), -1)
            part_F[live_F] = private_part(relative_PxA)
            scaling = scale_latents(dictionary, part_F, read)
            arrays[i]["latent_scaling"] = np.stack(scaling)
            parts = _parts(dictionary, all_variances[i], all_losses[i], relative_PxA, live_F, scaling)
            more[i] |= dict(parts=parts, shared=int(is_shared(relative_PxA).sum()))
    else:
        losses = stand_in_losses(models[0], dictionaries, documents, mean_D, config.batch_tokens, say_losses, groups)
    if roles:
        by_role = score_roles(roles, dictionaries, losses, store, sites, mesh, config.batch_tokens)
        more = [of_one | dict(roles=of_roles) for of_one, of_roles in zip(more, by_role, strict=True)]
    sinks, target_sinks = (
        LeftOutSinks(**vars(store.sinks(name)), max_norm=store.max_norm(name)) for name in (site, target)
    )
    for name, dictionary, score, loss, of_one, written in zip(
        folders, dictionaries, scores, losses, more, arrays, strict=True
    ):
        folder = run.member_folder(name)
        folder.mkdir(exist_ok=True)
        for file, array in written.items():
            write_array(folder / f"{file}.npy", array.astype(np.float32))
        # A member that is a unit can be in several stacks, under several names: its unit has none.
        where = dict(name="" if run.stack else name, site=site, target=target, sinks=sinks)
        where |= dict(target_sinks=target_sinks if target != site else None)
        described = _describe(dictionary, score, loss, **of_one, **where)
        write_json(folder / SCORES, to_json(described))
        run.say(_line(dataclasses.replace(described, name=name)))
        if conflict := dictionary.config.bos_conflict(store.manifest.bos):
            run.say(f"{name or run.name}: {conflict}")


def _describe(dictionary: Dictionary, score: Reconstruction, loss: Losses, **where: Any) -> DictionaryScores:
    return DictionaryScores(
        tokens=score.tokens,
        **score.figures(),
        decoder_neighbours=neighbours.summary(
            neighbours.neighbour_cosines(dictionary.W_dec_FxD[...]), dictionary.config.n_features
        ),
        **loss.figures(),
        ce_recovered_zero=recovered(loss.ce, "zero_ablated"),
        kl_recovered_zero=recovered(loss.kl, "zero_ablated"),
        density_histogram=score.density_histogram(),
        **where,
    )


def _parts(
    dictionary: Dictionary,
    variances: Sequence[float],
    losses: Mapping[str, Losses],
    relative_PxA: np.ndarray,
    live_F: np.ndarray,
    scaling: LatentScaling,
) -> dict[str, PartScores]:
    """Return a crosscoder's scores at each part, with the relative norms of its live features."""
    private_A, is_specific_A = private_part(relative_PxA), scaling.is_specific()[live_F]
    names, widths = site_parts(dictionary.site), dictionary.config.widths
    return {
        name: PartScores(
            variance,
            **losses[name].figures(),
            private=int((private_A == part).sum()),
            specific=int((is_specific_A & (private_A == part)).sum()) if widths.count(width) > 1 else None,
            relative_norms=histogram(relative_PxA[part]),
        )
        for part, (name, width, variance) in enumerate(zip(names, widths, variances, strict=True))
    }


def _line(scores: DictionaryScores) -> str:
    of_floor = [
        "nothing to recover" if value is None else f"{value:.3f}"
        for value in (scores.ce_recovered_mean, scores.kl_recovered_mean)
    ]
    name = f"{scores.name}: " if scores.name else ""
    by_role = [f"{role} {of_role.explained_variance:.3f}" for role, of_role in (scores.roles or {}).items()]
    return (
        f"{name}explained variance {scores.explained_variance:.3f}, L0 {scores.l0:.1f}, "
        f"dead {scores.dead_fraction:.1%} on {scores.tokens:,} held-out tokens; recovered against the mean: "
        f"cross-entropy {of_floor[0]}, KL {of_floor[1]}, on {scores.ce.tokens:,}"
        + (f"; explained variance by role: {', '.join(by_role)}" if by_role else "")
    )
