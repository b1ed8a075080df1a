"""A dictionary of features as a Flax module: encoder, sparsity function, decoder, and edits of its features.

    f = sparsity((x - b_dec) W_enc + b_enc)        features, F of them, mostly 0
    y_hat = f W_dec + b_dec [+ x W_skip]           reconstruction of x, or a transcoder's prediction of another site

Everything that has features with directions at a site is a ``Dictionary``: an SAE, a transcoder, one layer of a
cross-layer transcoder, principal components, an MLP's neurons. Which features are active is decided by its kind, one of
``dictionaries.kinds``.

Rows of ``W_dec`` are the features' directions. In dictionaries trained here they have unit norm, so that ``f_i`` is
the length of what feature i adds; a dictionary loaded from another tool's file keeps the lengths of the file.

Positions with an extreme norm are attention sinks: features mean nothing there, and edits leave them as they are. The
rule belongs to the model and the site; see ``models.sinks``. A dictionary whose ``max_norm`` is None does not know it
yet and refuses to be edited or masked until ``with_sink_norms`` has been called, which ``lm(..., edits=[...])`` and
every stage do.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from saejax.arguments import as_numbers, suggests_names
from saejax.dictionaries import joined, kinds
from saejax.dictionaries.description import DictionaryConfig
from saejax.dictionaries.edits import FeatureEdit
from saejax.dictionaries.input_norm import normalise
from saejax.dictionaries.matmul import centred_matmul, matmul
from saejax.dictionaries.sparsity import row
from saejax.errors import UserError, one_of
from saejax.models.edits import Positions, Span, Values
from saejax.models.sinks import position_norms
from saejax.models.sites import ALL_KINDS, Site, edit_site, site_parts
from saejax.parallel.mesh import check_mesh, fitting_sharding, place_on


def parameter_table(config: DictionaryConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Return each array's shape, and the mesh axis over which each of its dimensions is split."""
    d, o, f = config.d_in, config.d_out, config.n_features
    by_feature: tuple[tuple[int, ...], tuple[str | None, ...]] = ((f,), ("model",))
    table: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
        "W_enc_DxF": ((d, f), (None, "model")),
        "b_enc_F": by_feature,
        "W_dec_FxD": ((f, o), ("model", None)),
        "b_dec_D": ((o,), (None,)),
    }
    table |= {name: by_feature for name in kinds.by_name(config.kind).vectors}
    if config.skip:
        table["W_skip_DxD"] = ((d, o), (None, None))
    return table


def placements(config: DictionaryConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Return where each array of a dictionary is on a mesh: features split over ``model``, the rest on every device."""
    return {name: fitting_sharding(mesh, shape, *axes) for name, (shape, axes) in parameter_table(config).items()}


@suggests_names
class Dictionary(nnx.Module):
    """A sparse autoencoder of one site, a transcoder from one site to another, or another basis; a pytree of arrays.

    ``config`` and ``matmul_dtype`` are static, part of the tree's structure: programs take dictionaries as arguments,
    and dictionaries that differ only in their arrays share a compiled program.

    **Edits.** ``ablate``, ``set``, ``scale``, ``patch``, ``steer``, ``redraw``, ``ablate_error`` and ``patch_error``
    give edits for ``lm(tokens, edits=[sae.ablate([101, 2048])])``. Features are distinct indices, 0 <= i < n_features.
    The new activation g_i of each replaces its activation f_i; a transcoder's features are read at its site and changed
    at its target. Padding and attention sinks pass untouched.

    - ``positions``: "all"; "last", each prompt's last token, and in generation every new token as it is read;
      (start, stop), counted from 0 in each text, new tokens included, where a stop of None is the end; or "fires", of
      each feature those at which it is active.
    - ``error``: "keep", y' = y + sum_i (g_i - f_i) W_dec_i, so that what the dictionary does not explain stays; or
      "drop", y' = decode(f with g in it), with "fires" at positions at which any of the features does.

    All edit methods raise a ``UserError`` for features, positions and shapes that cannot be. A width that differs from
    the site's is an error when the model runs.

    Args:
      matmul_dtype: dtype of the operands of matrix products (sums are in the arrays' dtype).
      arrays: the arrays of ``parameter_table``; and "max_norm", a scalar, in place of ``config``'s where dictionaries
        of several layers should share compiled programs. Without "W_dec_FxD" it can encode and not decode: of a
        decoder only some rows may be wanted, and the features of a cross-layer transcoder write to several layers, so
        that they have "decoder_norms_F", the norms of their joined decoders, instead.
    """

    def __init__(self, config: DictionaryConfig, matmul_dtype: str = "float32", **arrays: jax.Array):
        self.config = nnx.static(config)
        self.matmul_dtype = nnx.static(matmul_dtype)
        optional = () if "W_dec_FxD" in arrays else ("W_dec_FxD", "b_dec_D", "W_skip_DxD")
        for name, (shape, _) in parameter_table(config).items():
            if name in optional and name not in arrays:
                continue
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has the shape {arrays[name].shape}, expected {shape}")
            setattr(self, name, nnx.Param(arrays[name]))
        if "max_norm" in arrays:
            self.max_norm = nnx.Param(arrays["max_norm"])
        if "decoder_norms_F" in arrays:
            self.joined_norms_F = nnx.Param(arrays["decoder_norms_F"])

    @classmethod
    def initial(
        cls, config: DictionaryConfig, key: jax.Array, matmul_dtype: str = "float32", dtype: str = "float32"
    ) -> "Dictionary":
        """Return a dictionary of random unit directions; the encoder is the decoder's transpose, all else is 0.

        Where the target has another width than the site, encoder columns are random unit directions of their own.

        Args:
          config: configuration of the dictionary.
          key: random key of the directions.
          matmul_dtype: dtype of the operands of matrix products.
          dtype: dtype of the arrays.
        """

        def draw_directions(key: jax.Array, width: int) -> jax.Array:
            directions_FxX = jax.random.normal(key, (config.n_features, width), dtype)
            return directions_FxX / jnp.linalg.norm(directions_FxX, axis=-1, keepdims=True)

        rows_FxO = draw_directions(key, config.d_out)
        is_square = config.d_in == config.d_out
        columns_DxF = (rows_FxO if is_square else draw_directions(jax.random.fold_in(key, 1), config.d_in)).T
        arrays = {name: jnp.zeros(shape, dtype) for name, (shape, _) in parameter_table(config).items()}
        first = dict(W_enc_DxF=columns_DxF, W_dec_FxD=rows_FxO)
        if config.widths:
            # Rows of norm 1 / length: the encoder is longer by as much, so that decode(encode(row)) gives the row.
            length_Fx1 = joined.row_lengths(rows_FxO, config.widths)[:, None]
            first = dict(W_enc_DxF=(rows_FxO * length_Fx1).T, W_dec_FxD=rows_FxO / length_Fx1)
        return Dictionary(config, matmul_dtype, **arrays | first)

    def __repr__(self) -> str:
        config = self.config
        target = f" to {config.target}" if config.target else ""
        k, model = (f", k {config.k}" if config.k else ""), (f", trained on {config.model}" if config.model else "")
        return f"<{config.kind} dictionary of {config.site}{target}: {config.n_features:,} features{k}{model}>"

    def __str__(self) -> str:
        return repr(self)  # Flax's would show arrays

    @property
    def site(self) -> str:
        """The site that is read."""
        return self.config.site

    @property
    def kind(self) -> kinds.Kind:
        """The object that decides which features are active."""
        return kinds.by_name(self.config.kind)

    @property
    def numbers(self) -> dict[str, float]:
        """The fields of ``config`` that the kind reads as numbers."""
        return {name: getattr(self.config, name) for name in self.kind.numbers}

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """The arrays by name."""
        names = (*parameter_table(self.config), "max_norm")
        return {name: getattr(self, name)[...] for name in names if hasattr(self, name)}

    @property
    def decoder_norms_F(self) -> jax.Array:
        """Length of each feature's direction, [F], its weight in penalties; see ``joined.row_lengths``."""
        if hasattr(self, "joined_norms_F"):
            return self.joined_norms_F[...]
        return joined.row_lengths(self.W_dec_FxD[...], self.config.widths)

    def with_config(self, config: DictionaryConfig) -> Self:
        """Return a dictionary of the same arrays with another config.

        Raises:
          UserError: with this config the arrays would have other names or shapes, or its k is not a number of features.
        """
        table, before = parameter_table(config), parameter_table(self.config)
        if table != before:
            changed = sorted({name.rpartition("_")[0] for name, _ in table.items() ^ before.items()})
            raise UserError(f"another config would take other arrays ({', '.join(changed)}): its kind and sizes stay")
        if "k" in kinds.by_name(config.kind).numbers and not 1 <= config.k <= config.n_features:
            raise UserError(f"k is {config.k}: expected a whole number from 1 to the {config.n_features} features")
        copied = nnx.merge(*nnx.split(self))
        copied.config = nnx.static(config)
        return copied

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the arrays were placed on; None where they go with values on whatever devices."""
        where = getattr(self.b_dec_D[...], "sharding", None) if hasattr(self, "b_dec_D") else None
        return where.mesh if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) else None

    def on_mesh(self, mesh: Mesh) -> Self:
        """Return the same with its arrays on a mesh's devices: features split over ``model``, the rest on every one.

        Arrays that are elsewhere go there by way of the host, so that no device holds more of them than its part.
        """
        check_mesh(mesh)
        axes = self.mesh_axes()

        def place(path: Any, array: jax.Array | np.ndarray) -> jax.Array:
            spec = axes.get(str(getattr(path[0], "key", getattr(path[0], "name", ""))), (None,) * np.ndim(array))
            return place_on(array, fitting_sharding(mesh, np.shape(array), *spec))

        return jax.tree_util.tree_map_with_path(place, self)

    def mesh_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the mesh axis over which each dimension of each array is split."""
        return {name: axes for name, (_, axes) in parameter_table(self.config).items()}

    def encoder_inputs(self, x_xD: jax.Array) -> kinds.EncoderInputs:
        """Return the values from which the kind makes activations."""
        x_xD, W_enc_DxF = x_xD.astype(self.b_dec_D.dtype), self._matrix(self.W_enc_DxF)
        if self.config.input_norm:
            x_xD = normalise(x_xD, self.config.input_norm).x_xD
        if self.config.centred:
            projected_xF = centred_matmul(x_xD, self.b_dec_D[...], W_enc_DxF, self.matmul_dtype)
        else:
            projected_xF = matmul(x_xD, W_enc_DxF, self.matmul_dtype)
        return kinds.EncoderInputs(x_xD, projected_xF, projected_xF + row(self.b_enc_F[...], x_xD.ndim))

    def _check_width(self, values: jax.Array, width: int) -> None:
        """Raise a ``UserError`` if values are no array, or of another width."""
        if not hasattr(values, "dtype"):
            raise UserError(f"values are a {type(values).__name__}: expected an array [..., {width}]")
        if values.shape[-1:] != (width,):
            raise UserError(
                f"values of the shape {list(values.shape)}: expected [..., {width}], as this {self.config.kind} "
                f"dictionary has {self.config.d_in} dimensions and {self.config.n_features} features"
            )

    def _matrix(self, parameter: nnx.Param) -> jax.Array:
        """Return a matrix in the dtype of the biases: at inference it may be in bfloat16, and products are not."""
        return parameter[...].astype(self.b_dec_D.dtype)

    def encode(self, x_xD: jax.Array, numbers: Mapping[str, Any] | None = None) -> jax.Array:
        """Return feature activations [..., F] of the site's values x; 0 or above unless the kind is signed.

        A token whose values are not all finite has NaN for every feature, whatever its kind makes of NaN: a feature
        that does not fire there would be a finding. ``numbers`` stand in place of ``config``'s, such as traced ones.
        """
        self._check_width(x_xD, self.config.d_in)
        f_xF = self.kind.encode(self, self.encoder_inputs(x_xD), self.numbers if numbers is None else numbers)
        if self.config.output_units:
            f_xF = f_xF * normalise(x_xD.astype(f_xF.dtype), self.config.input_norm).scale_x1
        return jnp.where(jnp.isfinite(x_xD).all(axis=-1, keepdims=True), f_xF, jnp.nan)

    def encode_features(self, x_xD: jax.Array, features_K: jax.Array) -> jax.Array:
        """Return the activations [..., K] of some features, ``encode(x)[..., features_K]``.

        Where a feature's activation depends on its own column only (``Kind.elementwise``), K columns of the encoder are
        computed instead of F.
        """
        # Not for a subclass that encodes in another way; and a dictionary has at least one feature.
        if type(self).encode is not Dictionary.encode or not self.kind.is_elementwise() or not len(features_K):
            return self.encode(x_xD)[..., features_K]
        return self.restrict(features_K).encode(x_xD)

    def restrict(self, features_K: Any) -> "Dictionary":
        """Return the dictionary of some features alone, which encodes as they do where ``Kind.is_elementwise``."""
        arrays = self.arrays
        for name, (_, axes) in parameter_table(self.config).items():
            if name in arrays and "model" in axes:  # which features are split over
                arrays[name] = jnp.take(arrays[name], features_K, axis=axes.index("model"))
        config = dataclasses.replace(self.config, n_features=len(features_K), groups=())
        return Dictionary(config, self.matmul_dtype, **arrays)

    def decode(self, f_xF: jax.Array, x_xD: jax.Array | None = None) -> jax.Array:
        """Return the reconstruction, or the prediction of the target, [..., O].

        Args:
          f_xF: feature activations.
          x_xD: the input, which a skip transcoder needs, and a dictionary that normalises each token.
        """
        self._check_width(f_xF, self.config.n_features)
        written_xO = matmul(f_xF, self._matrix(self.W_dec_FxD), self.matmul_dtype)
        if not self.config.input_norm:
            return self._add_bias(written_xO, x_xD)
        if x_xD is None:
            raise ValueError("a dictionary that normalises each token decodes with its input: give x_xD")
        normalised = normalise(x_xD.astype(written_xO.dtype), self.config.input_norm)
        if self.config.output_units:  # features have the scale already
            bias_xO = self._add_bias(jnp.zeros_like(written_xO), normalised.x_xD)
            return written_xO + bias_xO * normalised.scale_x1 + normalised.shift_x1
        return self._add_bias(written_xO, normalised.x_xD) * normalised.scale_x1 + normalised.shift_x1

    def output_scale(self, x_xD: jax.Array) -> jax.Array | None:
        """Return the factor of decoder rows at each token, [..., 1]; None for 1 at all of them."""
        if self.config.input_norm in ("", "center") or self.config.output_units:
            return None
        return normalise(x_xD.astype(self.b_dec_D.dtype), self.config.input_norm).scale_x1

    def without_bias(self, y_xO: jax.Array, x_xD: jax.Array | None = None) -> jax.Array:
        """Return the part of targets y that is left for features: without the decoder's bias and the skip path.

        Args:
          y_xO: targets.
          x_xD: inputs of the dictionary; needed for a skip path alone.
        """
        return y_xO - self._add_bias(jnp.zeros_like(y_xO), x_xD)

    def _add_bias(self, y_xO: jax.Array, x_xD: jax.Array | None) -> jax.Array:
        """Return what the features write, with the decoder's bias and the skip path."""
        y_xO = y_xO + row(self.b_dec_D[...], y_xO.ndim)
        if not self.config.skip:
            return y_xO
        if x_xD is None:
            raise ValueError("a skip transcoder decodes with its input: give x_xD")
        return y_xO + matmul(x_xD.astype(y_xO.dtype), self._matrix(self.W_skip_DxD), self.matmul_dtype)

    def __call__(self, x_xD: jax.Array) -> jax.Array:
        """Encode and decode."""
        return self.decode(self.encode(x_xD), x_xD)

    def fires(self, f_xF: jax.Array) -> jax.Array:
        """Return where activations count as active; above 0 in most kinds."""
        return self.kind.fires(f_xF, self.numbers)

    # The attention-sink rule.

    def with_sink_norms(self, sink_norm: Callable[[str], float], replace: bool = False) -> Self:
        """Return the dictionary with the sink rule of its sites.

        Args:
          sink_norm: gives the norm above which a position of a site is an attention sink: ``lm.sink_norm`` of the
            model, or ``store.max_norm`` of a store of its activations.
          replace: also take the place of thresholds that the dictionary already has.
        """
        config = self.config.with_sink_norms(sink_norm, replace)
        return self if config == self.config else self.with_config(config)

    def is_not_sink(self, x_xD: jax.Array, y_xO: jax.Array | None = None) -> jax.Array:
        """Return True where a position is no attention sink; the shape of ``x`` without its last axis.

        Args:
          x_xD: values at the site that is read.
          y_xO: values at a transcoder's target; a position is a sink if it is one at either site.

        Raises:
          UserError: the sink rule is not known yet.
        """
        if hasattr(self, "max_norm"):
            return position_norms(x_xD) <= self.max_norm[...]
        self.config.require_sink_norms()
        if self.config.widths:
            return joined.is_not_sink(self.config, x_xD)
        is_not_sink_x = position_norms(x_xD) <= self.config.max_norm
        if self.config.target and y_xO is not None:
            is_not_sink_x &= position_norms(y_xO) <= self.config.target_max_norm
        return is_not_sink_x

    # Edits of features.

    def ablate(self, features: Sequence[int] | int, positions: str | Span = "all", error: str = "keep") -> FeatureEdit:
        """Return the edit g = 0."""
        return self._edit(features, 0.0, 0.0, positions, error)

    def set(
        self, features: Sequence[int] | int, activations: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """Return the edit g = activations: a number, or one for each feature, [K], such as means over some text."""
        return self._edit(features, 0.0, activations, positions, error)

    def scale(
        self, features: Sequence[int] | int, factor: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """Return the edit g = factor x f; the factor is a number, or one for each feature, [K]."""
        return self._edit(features, factor, 0.0, positions, error)

    def patch(
        self, features: Sequence[int] | int, f_BxTxK: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """Return the edit g = activations given for every position of the prompts, such as the counterparts'.

        T is the prompts' length with padding; values at padding have no effect. New tokens, in generation, have none
        and pass unchanged. ``positions`` and ``error`` are as the class says.
        """
        values = Values.for_prompts(f_BxTxK, np.size(features), "what is patched in")
        return self._edit(features, 0.0, values, positions, error)

    def steer(
        self, features: Sequence[int] | int, amount: Any, positions: str | Span = "all", error: str = "keep"
    ) -> FeatureEdit:
        """Return the edit g = f + amount: amount x W_dec_i is added, whether the feature fires there or not.

        The amount is in units of activations, a number or one for each feature, [K]. Where decoder rows have unit norm
        it is the length of what is added. ``positions`` and ``error`` are as the class says.
        """
        return self._edit(features, 1.0, amount, positions, error)

    def redraw(
        self,
        features: Sequence[int],
        pools: Sequence[Any],
        length: int,
        seed: int = 789,
        texts: Sequence[int] | None = None,
    ) -> FeatureEdit:
        """Return the edit g = a random draw from the feature's pool where it fires, at new tokens, too.

        The draw depends on seed, feature, text and position in the text alone, so that it is the same in every batch
        and with every method of generation.

        Args:
          features: distinct indices.
          pools: for each feature the activations, [N], that are drawn from, such as those where it fires on some text;
            a feature whose pool is empty stays as it is.
          length: positions of a text with independent draws, such as the model's context; later ones share one draw.
          seed: seed of the draws.
          texts: a number for each text that the edit is used on; equal numbers get equal draws. None: all texts get the
            same draws, however many there are.

        Raises:
          UserError: there are not as many pools as features, a pool is not finite, or ``length`` or ``seed`` is out of
            its range.
        """
        features_K = self.feature_indices(features)
        if len(pools) != len(features_K):
            raise UserError(f"there are {len(pools)} pools for {len(features_K)} features: give one for each")
        for name, number, least in (("length", length, 1), ("seed", seed, 0)):
            if not isinstance(number, Integral) or number < least:
                raise UserError(f"{name} is {number!r}: expected a whole number, {least} or more")
        numbers, row_B = np.unique(np.zeros(1, int) if texts is None else texts, return_inverse=True)
        draw_NxTxK = np.zeros((len(numbers), length, len(features_K)), np.float32)
        factor_K = np.ones(len(features_K), np.float32)
        for k, (feature, pool) in enumerate(zip(features_K.tolist(), pools, strict=True)):
            pool = np.asarray(pool, np.float32)
            if not np.isfinite(pool).all():
                raise UserError(f"the pool of feature {feature} holds NaN or infinity: expected finite activations")
            if len(pool):
                for draw_TxK, number in zip(draw_NxTxK, numbers.tolist(), strict=True):
                    # Feature by feature, so that its draws are the same whatever others it is edited with.
                    key = [seed, feature] if texts is None else [seed, feature, number]
                    draw_TxK[:, k] = np.random.default_rng(key).choice(pool, length)
                factor_K[k] = 0.0
        where = Positions.parse("fires", ("fires",))
        return self._make_edit(features_K, factor_K, Values.for_positions(draw_NxTxK[row_B]), where, None)

    def ablate_error(self, positions: str | Span = "all") -> FeatureEdit:
        """Return the edit y' = decode(f): the dictionary's error term goes and all features stay."""
        return self._error_edit(Values.constant(0.0, self.config.d_out, "the error term"), positions)

    def patch_error(self, error_BxTxD: Any, positions: str | Span = "all") -> FeatureEdit:
        """Return the edit y' = decode(f) + an error term given for every position of the prompts.

        It is such as ``x - sae(x)`` of counterpart prompts; see ``patch``.
        """
        return self._error_edit(Values.for_prompts(error_BxTxD, self.config.d_out, "the error term"), positions)

    def _edit(
        self, features: Sequence[int] | int, factor: Any, offset: Any, positions: str | Span, error: str
    ) -> FeatureEdit:
        """Return the edit of checked features; see ``FeatureEdit``."""
        one_of(error, ("keep", "drop"), "error")
        dropped = Values.constant(0.0, self.config.d_out, "the error term") if error == "drop" else None
        where = Positions.parse(positions, ("all", "last", "fires"))
        return self._make_edit(self.feature_indices(features), factor, offset, where, dropped)

    def _error_edit(self, error: Values, positions: str | Span) -> FeatureEdit:
        """Return the edit that replaces the error term and no feature."""
        return self._make_edit(np.zeros(0, np.int32), 1.0, 0.0, Positions.parse(positions), error)

    def _make_edit(
        self, features_K: np.ndarray, factor: Any, offset: Any, where: Positions, error: Values | None
    ) -> FeatureEdit:
        """Return an edit; raise a ``UserError`` unless the dictionary reads before it writes."""
        reads, *others = sites = tuple(edit_site(part) for part in site_parts(self.config.site))
        site = edit_site(self.config.target) if self.config.target else reads
        # In the order of the forward pass: what is read must be known when the target is written.
        ordered = isinstance(reads, Site) and isinstance(site, Site) and reads.layer == site.layer
        if reads != site and not (ordered and ALL_KINDS.index(reads.kind) <= ALL_KINDS.index(site.kind)):
            raise UserError(f"a dictionary from {reads} to {site} cannot be edited: expected a later site of one layer")
        factors = Values.constant(factor, len(features_K), "the factor").values_BxTxN
        if not isinstance(offset, Values):
            offset = Values.constant(offset, len(features_K), "the activation")
        parts = sites if others else ()
        return FeatureEdit(self, jnp.asarray(features_K), factors, offset, error, where, reads, site, parts)

    def feature_indices(self, features: Sequence[int] | int) -> np.ndarray:
        """Return indices of features, or of one, as int32 [K]; raise a ``UserError`` unless they exist and differ."""
        array, n = as_numbers(features, whole=True), self.config.n_features
        if array is None:
            raise UserError(f"features are {features!r:.60}: expected whole numbers, or one")
        indices = array.ravel().tolist()
        wrong = [i for i in indices if not 0 <= i < n]
        if wrong:
            raise UserError(f"features {wrong[:5]} do not exist: there are 0 to {n - 1}")
        if not indices or len({*indices}) < len(indices):
            raise UserError(f"features are {indices[:8]}: expected at least one, and none twice")
        return np.asarray(indices, np.int32)
