"""Edits: changes to the values at sites during a forward pass.

``Positions`` say where an edit acts and ``Values`` what it puts there; ``SiteEdit`` changes a whole site. Edits of a
dictionary's features are in ``saejax.dictionaries``.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from saejax.arguments import as_index, as_numbers, suggests_names
from saejax.errors import UserError
from saejax.models.sites import Site, edit_site
from saejax.short_reprs import has_short_repr

Span = tuple[int, int | None]


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """The forward pass in which edits act."""

    position_BxT: jax.Array  #: int32 position of each token in its text, from 0; -1 at padding
    prompt_lengths_B: jax.Array  #: int32 number of tokens of each prompt; tokens after them were made by ``generate``
    #: while tracing, values [B, T, D] at the sites passed so far in layers with hooks, after the edits there.
    values: dict[Site, jax.Array] = dataclasses.field(default_factory=dict)
    #: the same values before the edits there, by which attention sinks are told.
    unedited: dict[Site, jax.Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def over(cls, mask_BxT: jax.Array) -> Self:
        """Return the pass over whole prompts padded on the right; the mask is True at real positions."""
        return cls(jnp.where(mask_BxT, jnp.cumsum(mask_BxT, axis=1) - 1, -1), mask_BxT.sum(axis=1))

    @property
    def mask_BxT(self) -> jax.Array:
        """Return True at real positions."""
        return self.position_BxT >= 0

    def hook(self, edits: Sequence["Edit"]) -> Callable[[str, Any, jax.Array], jax.Array]:
        """Return the hook for ``decoder.run_layers`` that makes the edits, in order where several act at a site."""

        def call(kind: str, layer: int, value_BxTxD: jax.Array) -> jax.Array:
            """Apply the edits of a site, in order."""
            site = Site(kind, layer)
            self.unedited[site] = value_BxTxD
            # Compared while tracing: only the edits of this site become part of the program.
            for edit in edits:
                if edit.site == site:
                    value_BxTxD = edit(value_BxTxD, self)
            self.values[site] = value_BxTxD
            return value_BxTxD

        return call


class Edit(Protocol):
    """A change to the values at a site: a registered pytree whose ``site`` is static."""

    @property
    def site(self) -> Site:
        """Return the site at which the edit acts."""

    def __call__(self, value_BxTxD: jax.Array, run: ForwardPass, /) -> jax.Array:
        """Return the new value. In generation a pass is over the prompts (T tokens) or over new tokens (T is 1)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Positions of a text at which an edit acts."""

    #: start and stop: int32, the first and the one after the last.
    start: jax.Array
    stop: jax.Array
    #: "" for all of them; "last": a prompt's last token and every new one; "new": every new one; "fires": where the
    #: feature that is edited is active (static).
    only: str = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def parse(cls, positions: str | Span, names: Sequence[str] = ("all", "last")) -> Self:
        """Return the positions that a user names: one of ``names``, or (start, stop); a ``UserError`` for others.

        Both are counted from 0; a stop of None is the end of the text.
        """
        first, end = 0, np.iinfo(np.int32).max  # no text is that long: the end of any
        if isinstance(positions, str) and positions in names:
            return cls(jnp.int32(first), jnp.int32(end), "" if positions == "all" else positions)
        # Anything but a pair of whole numbers, of Python, NumPy or JAX, is refused below; lists would list positions.
        with contextlib.suppress(ValueError):
            bounds = positions if isinstance(positions, tuple) else ()
            start, stop = (end if bound is None else as_index(bound) for bound in bounds)
            if 0 <= start < stop:
                return cls(jnp.int32(min(start, end)), jnp.int32(min(stop, end)), "")
        raise UserError(
            f"unknown positions {positions!r}: expected {', '.join(names)}, or (start, stop) with 0 <= start < stop, "
            "where a stop of None is the end: a tuple, as lists of positions are not taken"
        )

    def at(self, run: ForwardPass) -> jax.Array:
        """Return True there, [B, T]; never at padding. "fires" is left to the edit."""
        position_BxT = run.position_BxT
        where_BxT = run.mask_BxT & (position_BxT >= self.start) & (position_BxT < self.stop)
        if self.only not in ("last", "new"):
            return where_BxT
        return where_BxT & (position_BxT >= run.prompt_lengths_B[:, None] - (self.only == "last"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Values:
    """N numbers for every position of given prompts, or of any text, or the same N everywhere."""

    #: [1, 1, N] if they are the same everywhere, [1, T, N] if they are for the positions of any text, [B, T, N] if each
    #: of B texts has its own.
    values_BxTxN: jax.Array
    #: whether they belong to given prompts (static); new tokens then have none.
    by_position: bool = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def constant(cls, values: Any, n: int, what: str) -> Self:
        """Return the same ``n`` finite values everywhere, or one number; a ``UserError`` about ``what`` otherwise."""
        if (numbers := as_numbers(values)) is None:
            raise UserError(f"{what} is {values!r:.60}: expected a number, or {n} of them")
        with np.errstate(over="ignore"):  # what fp32 does not hold is refused below
            array = numbers.astype(np.float32)
        if array.shape not in ((), (n,)):
            raise UserError(f"{what} has the shape {array.shape}: expected a number or the shape ({n},)")
        if not np.isfinite(array).all():
            raise UserError(f"{what} holds NaN or infinity: expected finite numbers")
        return cls(jnp.asarray(np.broadcast_to(array, (1, 1, n))), False)

    @classmethod
    def for_prompts(cls, values: Any, n: int | None, what: str) -> Self:
        """Return values for every position of given prompts; a ``UserError`` about ``what`` unless [B, T, n].

        An ``n`` of None is any.
        """
        numbers = values if isinstance(values, jax.Array) else as_numbers(values)  # which would copy it to the host
        if numbers is None:
            raise UserError(f"{what} is {values!r:.60}: expected numbers, [prompts, tokens, {n or 'width'}]")
        array = jnp.asarray(numbers)
        if array.ndim != 3 or n not in (None, array.shape[-1]):
            raise UserError(f"{what} has the shape {array.shape}: expected [prompts, tokens, {n or 'width'}]")
        return cls(array, True)

    @classmethod
    def for_positions(cls, values_BxTxN: np.ndarray) -> Self:
        """Return numbers for positions 0 to T-1 of B texts, or with a B of 1 of any text, new tokens included.

        Positions beyond take the last ones.
        """
        return cls(jnp.asarray(values_BxTxN, jnp.float32), False)

    def at(self, run: ForwardPass) -> tuple[jax.Array, jax.Array]:
        """Return the numbers, [B, T, N] or broadcastable to that, and where there are any, [B, T]."""
        texts, positions = self.values_BxTxN.shape[:2]
        if not self.by_position and positions == 1:
            return self.values_BxTxN, run.mask_BxT
        # Padding has the position -1, and new tokens lie beyond the values: both read an edge value that is masked out.
        index_BxT = jnp.clip(run.position_BxT, 0, positions - 1)
        if not self.by_position and texts == 1:
            return self.values_BxTxN[0][index_BxT], run.mask_BxT
        given_BxT = run.mask_BxT
        if self.by_position:
            given_BxT &= run.position_BxT < run.prompt_lengths_B[:, None]
        return jnp.take_along_axis(self.values_BxTxN, index_BxT[..., None], axis=1), given_BxT


def fit_values(
    edits: Sequence[Edit], shape: tuple[int, int], length: int, rows: Sequence[int] | None = None
) -> tuple[Edit, ...]:
    """Return the edits with their values by position cut or padded to ``length``, for some of the prompts.

    Args:
      edits: any pytrees, of which ``Values`` are changed.
      shape: number of prompts and of tokens, padding included, that values must be for.
      length: number of tokens afterwards.
      rows: indices of prompts; None: all of them.

    Raises:
      UserError: values are for prompts of another shape.
    """

    def fit(leaf: Any) -> Any:
        """Fit one leaf of an edit's tree."""
        if not isinstance(leaf, Values) or (not leaf.by_position and len(leaf.values_BxTxN) == 1):
            return leaf
        values = leaf.values_BxTxN
        if not leaf.by_position:
            if len(values) != shape[0]:
                raise UserError(f"an edit is for {len(values)} texts, but it is used on {shape[0]}: give one for each")
            return leaf if rows is None else Values(values[np.asarray(rows)], False)
        if values.shape[:2] != shape:
            raise UserError(
                f"an edit has values for {values.shape[0]} prompts of {values.shape[1]} tokens, but it is used on "
                f"{shape[0]} prompts of {shape[1]}, padding included: give one for each position"
            )
        if rows is None and values.shape[1] == length:
            return leaf
        values = values[:, :length] if rows is None else values[np.asarray(rows), :length]
        return Values(jnp.pad(values, ((0, 0), (0, length - values.shape[1]), (0, 0))), True)

    return tuple(jax.tree.map(fit, tuple(edits), is_leaf=lambda leaf: isinstance(leaf, Values)))


def edited_layers(edits: Sequence[Edit]) -> set[int]:
    """Return the layers in which edits act."""
    return {edit.site.layer for edit in edits}


def check_width(site: Site, width: int, what: str, actual: int) -> None:
    """Raise a ``UserError`` unless the ``actual`` width of what acts at a site is the site's."""
    if actual != width:
        raise UserError(f"{what} has the width {actual}, but {site} is {width} wide: take one made for this model")


@suggests_names
@has_short_repr
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteEdit:
    """A change to a whole site: x' = factor x + offset.

    Attention sinks are changed like other positions: a site has no rule for them, as a dictionary has. Padding is
    never changed. ``positions`` are "all", "last" (each prompt's last token and, in generation, every new one) or
    (start, stop), counted from 0 in each text; a stop of None is the end. Sites are named as in "resid_post.15".
    All methods raise a ``UserError`` for impossible sites, positions and shapes; the width is checked when a model
    runs.
    """

    factor: jax.Array  #: scalar, 0 where x is replaced
    offset: Values  #: what is added, with N = D
    positions: Positions  #: where it acts
    site: Site = dataclasses.field(metadata=dict(static=True))  #: static

    @classmethod
    def ablate(cls, site: str | Site, positions: str | Span = "all") -> Self:
        """Return the edit x' = 0."""
        return cls._of(site, 0.0, Values(jnp.zeros((1, 1, 1)), False), positions)

    @classmethod
    def set(cls, site: str | Site, vector: Any, positions: str | Span = "all") -> Self:
        """Return the edit x' = vector, [D], such as the site's mean over some text."""
        return cls._of(site, 0.0, _vector(vector, "the vector"), positions)

    @classmethod
    def patch(cls, site: str | Site, values_BxTxD: Any, positions: str | Span = "all") -> Self:
        """Return the edit x' = values, such as those captured in another run; new tokens stay unchanged."""
        return cls._of(site, 0.0, Values.for_prompts(values_BxTxD, None, "what is patched in"), positions)

    @classmethod
    def steer(cls, site: str | Site, direction: Any, amount: float = 1.0, positions: str | Span = "all") -> Self:
        """Return the edit x' = x + amount x direction, [D]; the direction is not normalised."""
        factor = np.float32(Values.constant(amount, 1, "the amount").values_BxTxN.item())
        return cls._of(site, 1.0, _vector(direction, "the direction", factor), positions)

    @classmethod
    def _of(cls, site: str | Site, factor: float, offset: Values, positions: str | Span) -> Self:
        """Return the edit x' = factor x + offset at a site."""
        return cls(jnp.float32(factor), offset, Positions.parse(positions), edit_site(site))

    def __call__(self, value_BxTxD: jax.Array, run: ForwardPass) -> jax.Array:
        """Return the edited site."""
        offset, given_BxT = self.offset.at(run)
        if self.offset.by_position or offset.shape[-1] > 1:  # the single number of ``ablate`` fits every width
            check_width(self.site, value_BxTxD.shape[-1], "an edit", offset.shape[-1])
        # In the fp32 of the factor, rounded once.
        new_BxTxD = (self.factor * value_BxTxD + offset).astype(value_BxTxD.dtype)
        return jnp.where((self.positions.at(run) & given_BxT)[..., None], new_BxTxD, value_BxTxD)


def _vector(vector: Any, what: str, factor: np.float32 | None = None) -> Values:
    """Return a vector, times a factor, as values that are the same everywhere; a ``UserError`` if it is none."""
    array, expected = as_numbers(vector), "expected one number for each dimension of the site"
    if array is None:
        raise UserError(f"{what} is {vector!r:.60}: {expected}")
    if array.ndim != 1 or array.size < 2:
        raise UserError(f"{what} has the shape {array.shape}: {expected}")
    with np.errstate(over="ignore"):  # what fp32 does not hold is refused
        return Values.constant(array if factor is None else factor * array, array.size, what)
