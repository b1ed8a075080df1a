"""The Jacobian lens: what a layer's stream tends to become at the end of the model (Gurnee et al., 2026).

    logits(h_l) = unembed(norm(J_l h_l)),    J_l = mean over texts and positions t of sum_{t' >= t} d h_L[t'] / d h_l[t]

h_l is the stream leaving layer l, and L the last layer. Where the logit lens reads h_l as if it were h_L, this one
first carries it there by its mean first-order effect. "Verbalizable Representations Form a Global Workspace in Language
Models" (Transformer Circuits, 2026) leaves out the first 16 positions, attention sinks among them, and the last one, on
either side.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.arguments import as_numbers, check_classes, suggests_names
from saejax.dictionaries.formats import place
from saejax.errors import UserError, file_errors
from saejax.files import whole_file
from saejax.models import decoder, lens
from saejax.models.config import DecoderConfig, TorchConfig
from saejax.models.language_model import LanguageModel
from saejax.models.layers import Taps
from saejax.models.tokens import pad
from saejax.progress import OnProgress, show_progress
from saejax.short_reprs import has_short_repr

SKIPPED = 16  # first positions that are left out
LENGTH = 128  # tokens of a text, as in the reference implementation
_AT_ONCE = 16  # dimensions of h_L whose gradients are computed together


@suggests_names
@has_short_repr
@dataclasses.dataclass(frozen=True)
class JacobianLens:
    """A fitted lens of a model; see ``fit_jacobian_lens``."""

    lm: LanguageModel = dataclasses.field(repr=False)  #: the model
    jacobians: Mapping[int, np.ndarray]  #: J_l of each layer, float32 [D, D]: rows are dimensions of h_L
    texts: int  #: on which it was fitted

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it reads, such as "resid_post.3"."""
        return tuple(f"resid_post.{layer}" for layer in self.jacobians)

    def logits(self, sites: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return what streams tend to say: fp32 logits [B, T, V] for each site.

        Args:
          sites: values [B, T, D], such as ``lm(tokens, capture=lens.sites).sites``; other sites are left out.

        Raises:
          UserError: none of them is a site of this lens.
        """
        read = {site: value for site, value in sites.items() if site in self.sites}
        if not read:
            raise UserError(f"the lens reads {', '.join(self.sites)}, and the sites are {', '.join(sites) or 'none'}")
        jacobian_of = dict(zip(self.sites, self.jacobians.values(), strict=True))
        return {site: self.lm.unembed(lens.carry(value, jacobian_of[site])) for site, value in read.items()}

    def save(self, path: str | Path) -> None:
        """Write the lens as a file of the reference implementation: in half precision, unless numbers would overflow.

        Raises:
          UserError: the file is there already.
        """
        import torch

        if Path(path).exists():
            raise UserError(f"{path} is there already: name another file")
        overflows = any(np.abs(matrix).max() > np.finfo(np.float16).max for matrix in self.jacobians.values())
        dtype = np.float32 if overflows else np.float16
        matrices = {layer: torch.from_numpy(np.asarray(matrix, dtype)) for layer, matrix in self.jacobians.items()}
        facts = dict(n_prompts=self.texts, d_model=self.lm.config.d_model, source_layers=sorted(matrices))
        with whole_file(Path(path)) as unfinished, open(unfinished, "wb") as file:
            torch.save(dict(J=matrices, **facts), file)


@check_classes
@file_errors()
def load_jacobian_lens(lm: LanguageModel, path: str | Path) -> JacobianLens:
    """Load a lens that ``JacobianLens.save`` or the reference implementation wrote, such as Neuronpedia's.

    Args:
      lm: the model that it is of.
      path: the ``.pt`` file; or one on the hub, hf://ORG/NAME/FILE[@REVISION].

    Raises:
      UserError: there is no such file, it holds something else, or it is of a model of another size.
    """
    import pickle

    import torch

    file = place.fetch_file(str(path)) if str(path).startswith("hf://") else Path(path)
    if not file.is_file():
        raise UserError(f"{path} does not exist: expected the file of a Jacobian lens")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)  # such files could run code otherwise
        matrices = {int(layer): matrix.float().numpy() for layer, matrix in content["J"].items()}
        texts = int(content["n_prompts"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{path} holds no Jacobian lens: expected J, n_prompts, d_model and source_layers") from None
    config = lm.config
    wrong = [layer for layer, matrix in matrices.items() if matrix.shape != (config.d_model, config.d_model)]
    wrong += [layer for layer in matrices if not 0 <= layer < config.n_layers]
    if wrong or not matrices:
        raise UserError(
            f"{path} is not of {lm.source.name}, which has {config.n_layers} layers of width {config.d_model}: layer "
            f"{wrong[0] if wrong else 'none'} does not fit"
        )
    return JacobianLens(lm, dict(sorted(matrices.items())), texts)


@check_classes
def fit_jacobian_lens(
    lm: LanguageModel,
    texts: Sequence[str],
    layers: Sequence[int] | None = None,
    *,
    length: int = LENGTH,
    skipped: int = SKIPPED,
    on_progress: OnProgress | None = None,
) -> JacobianLens:
    """Fit a Jacobian lens: the mean Jacobian of the last layer's stream with respect to earlier ones, over texts.

    A text takes as many backward passes as the model has dimensions: minutes on a CPU for SmolLM2, seconds on a GPU.
    Dozens of texts give a usable lens, a published one took 1,000.

    Args:
      lm: the model, which has to run in JAX.
      texts: each counts alike; shorter ones than ``skipped + 2`` tokens are left out.
      layers: layers whose streams are read; None: all but the last.
      length: a text is cut to so many tokens.
      skipped: first positions that are left out.
      on_progress: called with the texts done and to do; None: a bar, where somebody looks on.

    Raises:
      UserError: the model runs in PyTorch, there is no such layer, no text is long enough, or a value is not finite.
    """
    config = lm.config
    if isinstance(config, TorchConfig):
        raise UserError(f"{lm.source.name} runs in PyTorch: a Jacobian lens is fitted to models of the JAX families")
    numbers = as_numbers(range(config.n_layers - 1) if layers is None else layers, whole=True)
    if numbers is None or numbers.ndim != 1:
        raise UserError(f"layers is {layers!r:.60}: expected layers, such as [3, 4], or None for all but the last")
    chosen = sorted(set(numbers.tolist()))
    wrong = [layer for layer in chosen if not 0 <= layer < config.n_layers]
    if wrong or not chosen:
        fault = f"{wrong} is none of" if wrong else "expected some of"
        raise UserError(f"layers is {layers}: {fault} 0 to {config.n_layers - 1}")
    length = min(length, config.context)
    ids = [text_ids for text_ids in (lm.encode(text)[:length] for text in texts) if len(text_ids) >= skipped + 2]
    if not ids:
        raise UserError(f"no text has {skipped + 2} tokens: give longer ones, or lower skipped={skipped}")
    total_KxDxD = np.zeros((len(chosen), config.d_model, config.d_model))
    with show_progress("fit_jacobian_lens") as bar:
        for number, of_text in enumerate(ids, 1):
            # All texts are padded to one length, for one program.
            ids_T = pad([of_text, [0] * length]).ids_BxT[0]
            part_KxDxD = _mean_jacobians(config, tuple(chosen), skipped, lm.params, ids_T, np.int32(len(of_text)))
            total_KxDxD += np.asarray(part_KxDxD, np.float64)
            (on_progress or bar)(number, len(ids))
    if not np.isfinite(total_KxDxD).all():
        raise UserError(f"a Jacobian of {lm.source.name} is not finite: try dtype=float32")
    mean_KxDxD = (total_KxDxD / len(ids)).astype(np.float32)
    return JacobianLens(lm, dict(zip(chosen, mean_KxDxD, strict=True)), len(ids))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _mean_jacobians(
    config: DecoderConfig,
    layers: tuple[int, ...],
    skipped: int,
    params: decoder.Params,
    ids_T: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Return the mean Jacobian of K layers (static) over a text's positions, [K, D, D].

    One forward pass has a place to add to every layer's stream; the gradient of a dimension of h_L, summed over all
    positions, with respect to what is added there is a row of all Jacobians, at each position.
    """
    position_T = jnp.arange(len(ids_T))
    # The last position predicts what is not in the text; it is left out, as in the reference implementation.
    valid_T = ((position_T >= skipped) & (position_T < count - 1)).astype(jnp.float32)
    x_TxD = decoder.embed(config, params, ids_T)

    def run(added_LxTxD: jax.Array) -> jax.Array:
        """Return h_L at all positions, of streams to which something is added."""

        def add(kind: str, layer: int | jax.Array, value_TxD: jax.Array) -> jax.Array:
            """Add to the stream leaving a layer."""
            return value_TxD + added_LxTxD[layer].astype(value_TxD.dtype) if kind == "resid_post" else value_TxD

        # hook_layers=None: within the loop over layers, so that the program is as short for many of them.
        last_TxD = decoder.run_layers(config, params, x_TxD, 0, config.n_layers, Taps(add, None)).x
        return last_TxD.astype(jnp.float32)

    last_TxD, pull_back = jax.vjp(run, jnp.zeros((config.n_layers, *x_TxD.shape), jnp.float32))

    def rows(dimension: jax.Array) -> jax.Array:
        """Return one row of the Jacobian of each of the K layers, [K, D]."""
        basis_D = (jnp.arange(last_TxD.shape[1]) == dimension).astype(jnp.float32)
        (gradient_LxTxD,) = pull_back(valid_T[:, None] * basis_D[None, :])
        chosen_KxTxD = gradient_LxTxD[np.array(layers)]
        return jnp.einsum("ktd,t->kd", chosen_KxTxD, valid_T, precision="highest") / valid_T.sum()

    rows_DxKxD = lax.map(rows, jnp.arange(last_TxD.shape[1]), batch_size=_AT_ONCE)
    return rows_DxKxD.transpose(1, 0, 2)
