"""Training that starts from dictionaries of ours or of other tools (``--train.init_from``).

A dictionary reads raw activations, the trainer scaled ones: here the scales go into the arrays, the inverse of
``Trainer.finish``. Optimizer, counters and running thresholds begin anew.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig, rescale
from saejax.dictionaries.formats import circuit_tracer, load_dictionary, own
from saejax.errors import UserError
from saejax.parallel.collectives import to_host
from saejax.training.members import Member
from saejax.training.scales import ScaledRows, sampled
from saejax.training.step import Trainer, TrainState
from saejax.training.widening import widened


def state_from_dictionary(
    trainer: Trainer, folder: str, rows: ScaledRows | None = None, say: Callable[[str], None] = lambda line: None
) -> TrainState:
    """The state before the first step, with the parameters of the dictionaries in a folder.

    Args:
      folder: one dictionary, from which all members start; or a train unit, each of whose members starts its namesake;
        or a circuit-tracer set, of which each member takes its layer. Sites may be others than the members'.
      rows: of the activations; only read where features are looked for in errors (``--train.widen=errors``).
      say: is told what such a search finds.

    Raises:
      UserError: there is none for a member, or it differs in kind, form, width or model, or has more features.
    """
    dictionaries = [_load(Path(folder), member) for member in trainer.members]
    if trainer.config.widen != "random":
        assert rows is not None
        dictionaries = [_widened(trainer, index, one, rows, say) for index, one in enumerate(dictionaries)]
    return state_of(trainer, dictionaries)


def _widened(
    trainer: Trainer, index: int, dictionary: Dictionary, rows: ScaledRows, say: Callable[[str], None]
) -> Dictionary:
    """A member's dictionary with features that it lacked on a sample of the rows."""
    _check(trainer, index, dictionary)
    site, seed = trainer.members[index].site, int(trainer.members[index].settings["seed"])
    acts_NxD = rows.read(site, sampled(rows.rows("train", site), trainer.config.seed[0]))
    replace = trainer.config.widen == "replace"
    return widened(dictionary, trainer.dictionary.n_features, acts_NxD, seed, replace=replace, say=say)


def state_of(trainer: Trainer, dictionaries: Sequence[Dictionary | None]) -> TrainState:
    """The state before the first step, with the parameters of dictionaries.

    Args:
      dictionaries: one for each member; None: it starts at random.

    Raises:
      UserError: one differs from its member in kind, form, width or model, or has more features.
    """
    state = trainer.initial_state()
    starts = [dictionary and _scaled(trainer, index, dictionary) for index, dictionary in enumerate(dictionaries)]
    for name, array in state.params.items():
        host_Mx = to_host(array).copy()
        for member_x, start in zip(host_Mx, starts, strict=True):
            if start:  # its features come first; those that it does not have stay random
                member_x[tuple(map(slice, start[name].shape))] = start[name]
        state.params[name] = jax.make_array_from_callback(array.shape, array.sharding, host_Mx.__getitem__)
    return state


def _load(folder: Path, member: Member) -> Dictionary:
    """The dictionary from which a member starts."""
    target = "" if member.target == member.site else member.target
    if (folder / circuit_tracer.DESCRIPTION).exists():
        kinds = [site.partition(".")[0] for site in (member.site, target)]
        layers, layer = circuit_tracer.open_set(folder, *kinds), int(member.site.rpartition(".")[2])
        if layer >= len(layers.layers):
            raise UserError(
                f"--train.init_from={folder} has layers 0 to {len(layers.layers) - 1}, not the {layer} of {member.site}"
            )
        return layers.load(layer)
    if member.name and (folder / member.name).is_dir():
        folder = folder / member.name
    described_here = any((place / own.DESCRIPTION).exists() for place in (folder, folder / "dictionary"))
    # Other tools may name places of which there is none here; ours say what they are.
    return load_dictionary(folder) if described_here else load_dictionary(folder, site=member.site, target=target)


def _scaled(trainer: Trainer, index: int, dictionary: Dictionary) -> dict[str, np.ndarray]:
    """A member's parameters, float64, that ``Trainer.finish`` makes this dictionary of."""
    _check(trainer, index, dictionary)
    dictionary = _lengths(trainer, dictionary)
    dictionary = rescale.centred(dictionary, trainer.dictionary.centred)
    arrays = {name: np.asarray(array, np.float64) for name, array in dictionary.arrays.items()}
    scale, kind = trainer.scales[index], dictionary.kind
    return kind.resume(rescale.fold_input_scaling(kind, arrays, 1 / scale.input, 1 / scale.output))


def _lengths(trainer: Trainer, dictionary: Dictionary) -> Dictionary:
    """The same dictionary with decoder rows of the length that training keeps them at."""
    if trainer.config.decoder_norm == "free":
        return dictionary
    name = f"--train.init_from={trainer.config.init_from}"
    length_F = np.linalg.norm(np.asarray(dictionary.W_dec_FxD[...], np.float64), axis=1)
    if not length_F.all():
        remedy = "give them directions" if dictionary.kind.no_free_decoder else "use --train.decoder_norm=free"
        raise UserError(
            f"{name}: {np.sum(length_F == 0)} decoder rows are zero, such as {np.argmin(length_F)}, and training keeps "
            f"them at length 1: {remedy}"
        )
    try:
        return rescale.unit_decoder(dictionary)
    except UserError:
        raise UserError(
            f"{name}: its decoder rows have lengths from {length_F.min():.3g} to {length_F.max():.3g}; training keeps "
            "them at one length, with which it would choose other features"
        ) from None


def _check(trainer: Trainer, index: int, dictionary: Dictionary) -> None:
    """A ``UserError`` that lists in what the dictionary differs from the member that is to be trained."""
    found, wanted = dictionary.config, trainer.dictionary
    pairs = dict(
        kind=(found.kind, wanted.kind),
        form=tuple(_form(bool(config.target), config.skip) for config in (found, wanted)),
        width=(found.d_in, wanted.d_in),
        features=(found.n_features, f"at most {wanted.n_features}"),
        model=tuple(_model(config, found.model == wanted.model) for config in (found, wanted)),
    )
    different = [name for name, (a, b) in pairs.items() if a != b and name not in ("features", "model")]
    if found.n_features > wanted.n_features:
        different.append("features")
    if found.fingerprint and wanted.fingerprint:
        same_model = found.fingerprint == wanted.fingerprint
    else:
        same_model = not found.model or not wanted.model or _short(found.model) == _short(wanted.model)
    if not same_model:
        different.append("model")
    if different:
        told = "; ".join(f"{name} is {pairs[name][0]}, expected {pairs[name][1]}" for name in different)
        member = trainer.members[index].name
        of = f" for {member}" if member else ""
        raise UserError(f"--train.init_from={trainer.config.init_from}: the dictionary{of} does not fit: {told}")


def _model(config: DictionaryConfig, twice: bool) -> str:
    """The name of a dictionary's model, and its fingerprint where the other one's has the same name."""
    return f"{config.model or 'unnamed'}{f' ({config.fingerprint})' if twice and config.fingerprint else ''}"


def _form(transcoder: bool, skip: bool) -> str:
    return ("skip " if skip else "") + ("transcoder" if transcoder else "SAE")


def _short(model: str) -> str:
    """A model's name as all tools write it: without its owner, and as TransformerLens calls the smallest GPT-2."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    return "gpt2" if name == "gpt2-small" else name
