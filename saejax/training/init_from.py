"""Training that starts from dictionaries of ours or of other tools (``--train.init_from``).

A dictionary reads raw activations, training scaled ones: here the scales go into the arrays, the inverse of
``state.finish_dictionary``. Optimiser and counters start anew.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.dictionaries import Dictionary, DictionaryConfig, rescale
from saejax.dictionaries.formats import circuit_tracer, load_dictionary, own
from saejax.dictionaries.formats.hooks import short_model_name
from saejax.dictionaries.kinds.base import Arrays
from saejax.errors import UserError
from saejax.links import member_folder
from saejax.training.members import Member
from saejax.training.scales import ScaledRows, sample_rows
from saejax.training.stack import TrainStack
from saejax.training.state import TrainState, init_state
from saejax.training.widening import widen


def state_from_folder(
    stack: TrainStack, folder: str, rows: ScaledRows | None = None, say: Callable[[str], None] = lambda line: None
) -> TrainState:
    """Return the state before the first step, with the parameters of the dictionaries in a folder.

    Args:
      stack: what is trained.
      folder: one dictionary, from which all members start; or a train unit, each of whose members starts its namesake;
        or a circuit-tracer set, of which each member takes its layer. Sites may differ from the members', not the
        kinds of a transcoder's target.
      rows: the activations; only read where features are looked for in errors (``--train.widen=errors``).
      say: logs what such a search finds.

    Raises:
      UserError: there is none for a member, or it differs in kind, form, width or model, or has more features.
    """
    says_signed = False
    if stack.config.widen != "random":
        say(f"searching the errors of {stack.config.init_from} for new features, which may take minutes")
    state = init_state(stack)
    for index, member in enumerate(stack.members):  # one dictionary on the devices at a time
        # Each member starts from its namesake where the folder is a stack of ours.
        dictionary = _load(Path(folder), member, stack.mesh)
        if dictionary.config.signed and not says_signed:
            say(f"{folder} keeps activations below 0, too; training keeps those above 0 alone")
            says_signed = True
        if stack.config.widen != "random":
            assert rows is not None
            dictionary = _widen(stack, index, dictionary, rows, say)
        put_member(state, index, _scale(stack, index, dictionary).arrays)
    return state


def put_member(state: TrainState, index: int, arrays: Arrays) -> None:
    """Put arrays in the place of a member's parameters, which may have more features."""
    for name, array_Mx in state.params.items():
        put = jax.jit(_put_array, donate_argnums=0, out_shardings=array_Mx.sharding)
        state.params[name] = put(array_Mx, index, arrays[name])


def _widen(
    stack: TrainStack, index: int, dictionary: Dictionary, rows: ScaledRows, say: Callable[[str], None]
) -> Dictionary:
    """Return a member's dictionary with features that it lacked on a sample of the rows."""
    _check(stack, index, dictionary)
    dictionary = rescale.scale_parts(dictionary, stack.scales[index].scales)  # as the rows have them
    site, seed = stack.members[index].site, int(stack.members[index].settings["seed"])
    acts_NxD = rows.read(site, sample_rows(rows.rows("train", site), stack.config.seed[0]))
    wider = widen(dictionary, stack.dictionary.n_features, acts_NxD, seed, stack.config.widen == "replace", say)
    return wider.on_mesh(stack.mesh)


def _put_array(array_Mx: jax.Array, index: jax.Array, member_x: jax.Array) -> jax.Array:
    """Return an array with one member replaced; to be traced. Where it has more features, further ones stay."""
    # A choice at each place, so that every device works on its own part: an update at an index that is known at run
    # time alone would be made on a copy of the whole.
    wider = [(0, size - count) for size, count in zip(array_Mx.shape[1:], member_x.shape, strict=True)]
    given_1x, is_given_1x = (jnp.pad(array, wider)[None] for array in (member_x, jnp.ones(member_x.shape, bool)))
    is_member_M = jnp.arange(len(array_Mx)) == index
    return jnp.where(is_member_M.reshape(-1, *[1] * member_x.ndim) & is_given_1x, given_1x, array_Mx)


def _load(folder: Path, member: Member, mesh: Mesh) -> Dictionary:
    """Return the dictionary from which a member starts, on a mesh."""
    target = "" if member.target == member.site else member.target
    if (folder / circuit_tracer.DESCRIPTION).exists():
        kinds = [site.partition(".")[0] for site in (member.site, target)]
        layers, layer = circuit_tracer.open_transcoders(folder, *kinds), int(member.site.rpartition(".")[2])
        if layer >= len(layers.layers):
            raise UserError(
                f"--train.init_from={folder} has layers 0 to {len(layers.layers) - 1}, not the {layer} of {member.site}"
            )
        return layers.load(layer, mesh=mesh)
    if (inside := member_folder(folder, member.name)).is_dir():
        folder = inside
    described_here = any((place / own.DESCRIPTION).exists() for place in (folder, folder / "dictionary"))
    # Other tools may name sites that do not exist here; ours describe themselves.
    site, target = ("", "") if described_here else (member.site, target)
    return load_dictionary(folder, site=site, target=target, mesh=mesh)


def _scale(stack: TrainStack, index: int, dictionary: Dictionary) -> Dictionary:
    """Return the dictionary of the member's parameters, of which ``finish_dictionary`` makes the one that is given."""
    _check(stack, index, dictionary)
    scale = stack.scales[index]
    dictionary = rescale.scale_parts(dictionary, scale.scales)
    if stack.config.decoder_norm == "unit":
        dictionary = with_unit_rows(dictionary, f"--train.init_from={stack.config.init_from}")
    dictionary = rescale.centre(dictionary, stack.dictionary.centred)
    return rescale.scale_for_training(dictionary, scale.input, scale.output, stack.config.state_dtype)


def with_unit_rows(dictionary: Dictionary, name: str) -> Dictionary:
    """Return the dictionary, called ``name`` in messages, with rows of the length that training keeps them at.

    Raises:
      UserError: a decoder row is zero, or the dictionary would choose other features with rows of one length.
    """
    length_F = rescale.all_decoder_lengths(dictionary)
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


def _check(stack: TrainStack, index: int, dictionary: Dictionary) -> None:
    """Raise a ``UserError`` that lists in what the dictionary differs from the member that is to be trained."""
    start, expected = dictionary.config, stack.dictionary
    pairs = dict(
        kind=(start.kind, expected.kind),
        form=tuple(
            ("skip " if config.skip else "") + ("transcoder" if config.target else "SAE")
            for config in (start, expected)
        ),
        width=(_width(start), _width(expected)),
        target=tuple(config.target.partition(".")[0] for config in (start, expected)),
        parts=(start.widths or "none", expected.widths or "none"),
        normalisation=tuple(config.input_norm or "none" for config in (start, expected)),
        features=(start.n_features, f"at most {expected.n_features}"),
        model=tuple(_model(config, start.model == expected.model) for config in (start, expected)),
    )
    # Features and model have their own tests: fewer features are widened, models go by fingerprint. An SAE has no
    # target, which its form says.
    tested = pairs.keys() - {"features", "model"} - (set() if start.target and expected.target else {"target"})
    different = [name for name, (a, b) in pairs.items() if a != b and name in tested]
    if start.n_features > expected.n_features:
        different.append("features")
    if start.fingerprint and expected.fingerprint:
        same_model = start.fingerprint == expected.fingerprint
    else:
        names = {short_model_name(start.model), short_model_name(expected.model)}
        same_model = "" in names or len(names) == 1  # a folder's name says nothing
    if not same_model:
        different.append("model")
    if different:
        differences = "; ".join(f"{name} is {pairs[name][0]}, expected {pairs[name][1]}" for name in different)
        member = stack.members[index].name
        of = f" for {member}" if member else ""
        raise UserError(f"--train.init_from={stack.config.init_from}: the dictionary{of} does not fit: {differences}")


def _width(config: DictionaryConfig) -> str:
    """Return the width of a dictionary's site, and of its target if that is another."""
    return f"{config.d_in} to {config.d_out}" if config.d_out != config.d_in else str(config.d_in)


def _model(config: DictionaryConfig, twice: bool) -> str:
    """Return the name of a dictionary's model, and its fingerprint if the other model has the same name."""
    return f"{config.model or 'unnamed'}{f' ({config.fingerprint})' if twice and config.fingerprint else ''}"
