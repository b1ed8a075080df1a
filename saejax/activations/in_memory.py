"""Activations of texts in memory."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.activations.chunker import SPLITS
from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.manifest import CapturedModel
from saejax.activations.store import Store
from saejax.activations.writer import write_store
from saejax.arguments import check_classes, suggests_names
from saejax.errors import UserError, one_of
from saejax.models.language_model import LanguageModel
from saejax.models.lengths import even_batches
from saejax.models.sites import parse_site
from saejax.models.tokens import Tokens, bos_tokens, tokenize_in_pieces
from saejax.parallel.mesh import document_devices
from saejax.progress import show_progress
from saejax.short_reprs import has_short_repr

_PROGRAM = 4096  # tokens that run in the time in which a program of another shape is compiled, roughly


@suggests_names
@has_short_repr
@dataclasses.dataclass(frozen=True)
class Activations:
    """Values of some sites on the tokens of texts, in memory; row r of every site is the same token."""

    values: Mapping[str, np.ndarray]  #: fp32 [N, D] of every site, by its name
    index_Nx3: np.ndarray  #: int32 columns: the piece (its place in ``texts``), the position in it, the token id
    texts: Sequence[np.ndarray]  #: token ids of the texts; a long text is several, its pieces
    sink_factor: float  #: rows with norms above so many times the median of their site are attention sinks
    model: CapturedModel  #: the language model
    bos: bool  #: whether every text begins with a BOS token, or a special token of its own
    sources: np.ndarray | None = None  #: the text that each piece is of, rising; None: each is a text of its own

    def __getitem__(self, site: str) -> np.ndarray:
        """Return the values at a site, fp32 [N, D]; raise a ``UserError`` if it was not captured."""
        return self.values[one_of(site, self.values, "captured site")]

    def max_norm(self, site: str) -> float:
        """Norm above which a row is an attention sink."""
        return float(np.float32(self.sink_factor * float(np.median(np.linalg.norm(self[site], axis=1)))))

    def rows(self, *sites: str) -> np.ndarray:
        """Rows, ascending, that are attention sinks at none of the sites; all sites by default."""
        sites = sites or tuple(self.values)
        norms = [np.linalg.norm(self[site], axis=1) <= self.max_norm(site) for site in sites]
        return np.flatnonzero(np.all(norms, axis=0))

    def sources_of_pieces(self) -> np.ndarray:
        """Return the text that each of ``texts`` is a piece of, int [pieces]."""
        return np.arange(len(self.texts)) if self.sources is None else self.sources

    def save(self, folder: str | Path, held_out: int = 0) -> Store:
        """Write them as a store, as the stage ``capture`` does, and open it.

        Args:
          folder: made if missing; a store that is there is replaced.
          held_out: number of texts, the last ones, that are held out, with all of their pieces; the others are for
            training.

        Raises:
          UserError: a site's values are not one vector for each token, or not finite; or no text is for training.
        """
        # Without text for training there would be no median norm, and no row an attention sink.
        count = len(np.unique(self.sources_of_pieces()))
        if not 0 <= held_out < count:
            raise UserError(f"held_out is {held_out}: expected less than the number of texts, which is {count}")
        folder, tokens = Path(folder), sum(map(len, self.texts))
        values = {site: np.asarray(value_NxD, np.float32) for site, value_NxD in self.values.items()}
        for site, value_NxD in values.items():
            if value_NxD.ndim != 2 or len(value_NxD) != tokens:
                raise UserError(
                    f"activations at {site} have the shape {value_NxD.shape}, but the texts have {tokens} tokens: "
                    "expected one vector for each"
                )
            if not (is_finite_N := np.isfinite(value_NxD).all(axis=1)).all():
                raise UserError(
                    f"activations at {site} are NaN or infinite, first in row {np.argmin(is_finite_N)}: expected "
                    "finite values"
                )
        folder.mkdir(parents=True, exist_ok=True)
        table_Nx4 = np.zeros((len(self.texts), len(COLUMNS)), np.int32)
        source_N = self.sources_of_pieces()
        table_Nx4[:, COLUMNS.index("source")] = source_N
        lengths_N = np.array([len(text) for text in self.texts])
        # The first piece of a text that begins with a special token of its own has no BOS, as the last one shows.
        first_N, last_N = (np.searchsorted(source_N, source_N, side=side) for side in ("left", "right"))
        begin_N = np.array([text[0] for text in self.texts])
        own_N = lengths_N - (self.bos & (begin_N == begin_N[last_N - 1]))
        before_N = np.cumsum(own_N) - own_N
        table_Nx4[:, COLUMNS.index("start")] = before_N - before_N[first_N]
        is_held_out_N = np.isin(source_N, np.unique(source_N)[::-1][:held_out])
        table_Nx4[is_held_out_N, COLUMNS.index("split")] = SPLITS.index("held_out")
        documents = Documents.contiguous(np.concatenate(self.texts), lengths_N, table_Nx4, ("text",))
        write_store(folder, documents, values, self.model, bos=self.bos, sink_factor=self.sink_factor)
        return Store.open(folder)


@check_classes
def capture(
    lm: LanguageModel,
    texts: Sequence[str],
    sites: Sequence[str] | str,
    *,
    context: int | None = None,
    batch_tokens: int = 4096,
    sink_factor: float = 10.0,
) -> Activations:
    """Run texts through a model and keep the values of some sites.

    Args:
      lm: the model.
      texts: a longer one than ``context`` is split; each of its pieces is a text of the result.
      sites: or one, such as "resid_post.15".
      context: most tokens of a piece, as ``--corpus.context`` of the stages; None: the model's context.
      batch_tokens: most tokens of a batch, padding included.
      sink_factor: norms above so many times the median of their site are attention sinks.

    Raises:
      UserError: a text is empty, no site is named or one does not exist, or a value is not finite.
    """
    if not sites:
        raise UserError("sites is empty: name some, such as resid_post.15")
    names = [str(parse_site(str(site))) for site in ([sites] if isinstance(sites, str) else sites)]
    most = lm.config.context
    size = most if context is None else min(context, most)
    tokens, source_B = tokenize_in_pieces(lm.tokenizer, texts, size, lm.bos)
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths_B)])
    values: dict[str, np.ndarray] = {}
    done = 0
    with show_progress("capture") as on_progress:
        for chosen, rows, length in even_batches(tokens.lengths_B, batch_tokens, document_devices(lm.mesh), _PROGRAM):
            # Rows are filled up to a number that the devices divide; the copies are not kept.
            filled_B = np.resize(chosen, rows)
            batch = Tokens(tokens.ids_BxT[filled_B, :length], tokens.lengths_B[filled_B])
            for site, value_BxTxD in lm(batch, capture=names, logits=False).sites.items():
                host_BxTxD = np.asarray(value_BxTxD, np.float32)
                kept_NxD = values.setdefault(site, np.empty((offsets[-1], host_BxTxD.shape[2]), np.float32))
                for text, value_TxD in zip(chosen, host_BxTxD, strict=False):
                    kept_NxD[offsets[text] : offsets[text + 1]] = value_TxD[: tokens.lengths_B[text]]
            done += int(tokens.lengths_B[chosen].sum())
            on_progress(done, int(offsets[-1]))
    for site, value_NxD in values.items():
        if not np.isfinite(value_NxD).all():
            raise UserError(f"activations at {site} are NaN or infinite: check the model's weights, or use float32")
    texts_ids = [row_T[:length] for row_T, length in zip(tokens.ids_BxT, tokens.lengths_B, strict=True)]
    text_N = np.repeat(np.arange(len(texts_ids)), tokens.lengths_B)
    index_Nx3 = np.stack([text_N, np.arange(offsets[-1]) - offsets[text_N], np.concatenate(texts_ids)], axis=1)
    model = CapturedModel.of(lm.source, str(lm.params["embed_VxD"].dtype))
    # As the stage records it: some tokenizers put another token in front, or have no BOS token.
    bos = bool(bos_tokens(lm.tokenizer, lm.bos))
    return Activations(values, index_Nx3.astype(np.int32), texts_ids, sink_factor, model, bos, source_B)
