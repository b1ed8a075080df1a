"""The capture stage: activations by hooks in the transformers PyTorch model, into a store.

All sites are recorded in one pass, which ends at the last of them: later layers are dropped, and what follows
the last site in its layer is not run.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saejax.activations.documents import COLUMNS, SPLITS, Documents, make_documents
from saejax.activations.plan import Batch, Plan
from saejax.activations.store import DTYPES
from saejax.activations.writer import StoreWriter
from saejax.config import identity
from saejax.errors import Interrupted, UserError
from saejax.models import source
from saejax.models.config import DecoderConfig
from saejax.models.families import read_config
from saejax.models.sites import KINDS, Site
from saejax.settings import CaptureConfig
from saejax.tasks import corpora
from saejax.tasks.behaviours import read_prompts
from saejax.workspace import Run, fingerprint, read_json

_SAY_EVERY = 5.0  # seconds


@dataclasses.dataclass(frozen=True)
class Modules:
    """Where a family keeps its modules: names below the model without its head.

    Attributes:
      layers: the list of layers.
      attention, mlp_norm, mlp: parts of a layer; ``mlp_norm`` reads the stream between attention and MLP.
    """

    layers: str
    attention: str
    mlp_norm: str
    mlp: str


MODULES = {"llama": Modules("layers", "self_attn", "post_attention_layernorm", "mlp")}


class _Reached(Exception):
    """The last site was read: the rest of the forward pass is not needed."""


class SiteReader:
    """Runs a model up to the last of some sites and hands over the value at each.

    Args:
      model: a transformers causal language model; layers after the last site are dropped from it, and with them go
        their memory. It is moved to a GPU if torch has one.
      sites: what to read, at least one.
    """

    def __init__(self, model: Any, sites: Sequence[Site]):
        self._names = MODULES[model.config.model_type]
        self._body, self._sites = model.base_model, tuple(sites)
        self._last = max(self._sites, key=lambda site: (site.layer, KINDS.index(site.kind)))
        self._layers = self._body.get_submodule(self._names.layers)[: self._last.layer + 1]
        self._body.set_submodule(self._names.layers, self._layers)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._body.to(self._device)

    def read(self, batch: Batch, take: Callable[[Site, torch.Tensor], None]) -> None:
        """Runs a batch; calls ``take(site, value_BxTxD)`` at every site, in the order of the forward pass."""
        arrays = (batch.ids_BxT.astype(np.int64), batch.mask_BxT)
        ids_BxT, mask_BxT = (torch.from_numpy(array).to(self._device) for array in arrays)
        with self._hooks(take), torch.inference_mode():
            try:
                self._body(input_ids=ids_BxT, attention_mask=mask_BxT, use_cache=False)
            except _Reached:
                return
        raise RuntimeError(f"the forward pass of {type(self._body).__name__} did not come by {self._last}")

    @contextlib.contextmanager
    def _hooks(self, take: Callable[[Site, torch.Tensor], None]) -> Iterator[None]:
        def reader(site: Site, after: bool) -> Callable:
            def hook(module, args, kwargs, output=None):
                value = output if after else (args[0] if args else kwargs["hidden_states"])
                take(site, value[0] if isinstance(value, tuple) else value)
                if site == self._last:
                    raise _Reached

            return hook

        handles = []
        try:
            for site in self._sites:
                module, after = self._place(site)
                register = module.register_forward_hook if after else module.register_forward_pre_hook
                handles.append(register(reader(site, after), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _place(self, site: Site) -> tuple[torch.nn.Module, bool]:
        """The module at whose input (False) or output (True) the site is read."""
        layer, names = self._layers[site.layer], self._names
        part, after = {
            "resid_pre": ("", False),
            "attn_out": (names.attention, True),
            "resid_mid": (names.mlp_norm, False),
            "mlp_in": (names.mlp, False),
            "mlp_out": (names.mlp, True),
            "resid_post": ("", True),
        }[site.kind]
        return layer.get_submodule(part), after


class ShardBuffers:
    """The vectors and norms of the shard that is being made.

    Args:
      widths: width of every site.
      rows: rows of the largest shard.
      dtype: "float32" or "bfloat16", as stored.
    """

    def __init__(self, widths: dict[Site, int], rows: int, dtype: str):
        self._dtype = getattr(torch, dtype)
        self._vectors = {site: torch.empty(rows, width, dtype=self._dtype) for site, width in widths.items()}
        self._norms = {site: torch.empty(rows, dtype=torch.float32) for site in widths}

    def take(self, site: Site, value_BxTxD: torch.Tensor, batch: Batch) -> tuple[int, int] | None:
        """Takes the recorded positions of a batch; padding is not among them.

        Returns:
          Index in the batch and position of the first vector that is not finite, or None.
        """
        stored_BxTxD = value_BxTxD.to(device="cpu", dtype=self._dtype)
        # In fp64 a finite vector has a finite norm, so that the norm tells whether the vector is.
        norm_BxT = torch.linalg.vector_norm(stored_BxTxD, dim=-1, dtype=torch.float64)
        for i, (first, stop, rows) in enumerate(zip(batch.first_B, batch.stop_B, batch.rows_B, strict=True)):
            norm_N = norm_BxT[i, first:stop]
            if not torch.isfinite(norm_N).all():
                return i, int(first) + int(torch.argmin(torch.isfinite(norm_N).int()))
            # The one copy between the model and the store: from torch's own memory to the row's random place in the
            # buffer, whose memory the file is written from. JAX reads that file through a memory map.
            place_N = torch.from_numpy(rows)
            self._vectors[site].index_copy_(0, place_N, stored_BxTxD[i, first:stop])
            self._norms[site].index_copy_(0, place_N, norm_N.float())
        return None

    def parts(self, rows: int) -> dict[str, np.ndarray]:
        """Views of the first rows, for ``StoreWriter.write_shard``; bfloat16 as uint16."""
        parts = {}
        for site, vectors in self._vectors.items():
            parts[str(site)] = (vectors.view(torch.uint16) if self._dtype == torch.bfloat16 else vectors)[:rows].numpy()
            parts[f"{site} norms"] = self._norms[site][:rows].numpy()
        return parts


class _Progress:
    """Says how far the capture is, every few seconds."""

    def __init__(self, say: Callable[[str], None], left: int):
        self._say, self._left, self._done = say, left, 0
        self._start = self._said = time.monotonic()

    def add(self, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY:
            self._said, rate = now, self.rate
            left = self._left - self._done
            self._say(f"{self._done:,} of {self._left:,} tokens  {rate:,.0f} tokens/s  {left / rate:.0f} s to go")

    @property
    def rate(self) -> float:
        """Tokens per second, padding left out; 0 before there are any."""
        return self._done / (time.monotonic() - self._start) if self._done else 0.0


def run_capture(run: Run) -> dict:
    """Records activations of the corpus and of the behaviours' train prompts into a store in ``run.folder``.

    Finished shards of a run that was stopped or killed are kept; the store comes out the same.

    Raises:
      UserError: a site, the corpus or the model is not usable; activations are not finite; too many positions are
        attention sinks; the disk is full.
      Interrupted: asked to stop; finished shards are kept.
    """
    config: CaptureConfig = run.configs["capture"]
    model_source = source.resolve(run.configs["model"])
    config_file = model_source.folder / "config.json"
    decoder = read_config(read_json(config_file), str(config_file))
    sites = parse_sites(config.sites, decoder)
    documents = _documents(run, model_source, decoder)
    plan = Plan(documents, config.shard_rows, config.batch_tokens, config.last, run.configs["corpus"].seed)
    widths = {site: site.width(decoder) for site in sites}
    writer = StoreWriter(run.folder, [str(site) for site in sites], _work(run, model_source, documents))
    missing = [shard for shard in range(plan.shards) if not writer.has(shard)]
    _check_disk(run.folder, plan, missing, widths, config)
    writer.write_documents(documents)
    run.say(
        f"{len(documents):,} documents, {plan.rows:,} tokens at {', '.join(config.sites)}; "
        f"{plan.shards - len(missing)} of {plan.shards} shards are done"
    )
    rate = _capture(run, model_source, plan, writer, widths, missing) if missing else 0.0
    statistics = writer.site_statistics(plan.shards, documents, config.sink_factor)
    _check_sinks(statistics, config)
    counts = _counts(documents, plan)
    described = {str(site): dict(d=width, **statistics[str(site)]) for site, width in widths.items()}
    writer.finish(_manifest(run, model_source, plan, described, counts))
    for name, facts in described.items():
        run.say(
            f"{name}: median norm {facts['median_norm']:.4g}; norms above {facts['max_norm']:.4g} are attention sinks: "
            f"{facts['sinks']['position_0']:,} at position 0, {facts['sinks']['share_beyond']:.2%} of the others"
        )
    size = DTYPES[config.store_dtype].itemsize
    return dict(
        sites={
            name: dict(rows=plan.rows, bytes=plan.rows * facts["d"] * size, **facts)
            for name, facts in described.items()
        },
        **counts,
        tokens_per_second=round(rate, 1),
        padding_share=plan.padding_share,
    )


def parse_sites(names: Sequence[str], decoder: DecoderConfig) -> list[Site]:
    """The sites that ``--capture.sites`` names; a ``UserError`` if one does not exist or is named twice."""
    if not names:
        raise UserError("--capture.sites is empty: name at least one site, such as resid_post.15")
    sites = [Site.parse(name).check(decoder) for name in names]
    for site in sites:
        if sites.count(site) > 1:
            raise UserError(f"--capture.sites names {site} twice: name each site once")
    return sites


def _documents(run: Run, model_source: source.ModelSource, decoder: DecoderConfig) -> Documents:
    prompts = read_prompts(run.inputs["baseline"] / "prompts.jsonl")
    chosen = {index: prompt for index, prompt in enumerate(prompts) if prompt.split == "train"}
    return make_documents(run.configs["corpus"], chosen, source.load_tokenizer(model_source), decoder.context)


def _work(run: Run, model_source: source.ModelSource, documents: Documents) -> str:
    """Identifies what the shards depend on."""
    hashes = [hashlib.sha256(array.tobytes()).hexdigest() for array in documents.arrays().values()]
    return fingerprint([identity(run.configs["capture"]), model_source.fingerprint, run.configs["corpus"].seed, hashes])


def _check_disk(
    folder: Path, plan: Plan, missing: Sequence[int], widths: dict[Site, int], config: CaptureConfig
) -> None:
    size = DTYPES[config.store_dtype].itemsize
    needed = sum(plan.size(shard) for shard in missing) * (12 + sum(width * size + 4 for width in widths.values()))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the disk is full: the store needs {needed / 2**20:,.0f} MiB more and {free / 2**20:,.0f} are free in "
            f"{folder}: free space, use another --workdir or a smaller --corpus.max_tokens"
        )


def _capture(
    run: Run,
    model_source: source.ModelSource,
    plan: Plan,
    writer: StoreWriter,
    widths: dict[Site, int],
    shards: Sequence[int],
) -> float:
    """Makes the shards; returns the speed in tokens per second."""
    config: CaptureConfig = run.configs["capture"]
    reader = SiteReader(source.load_torch_model(model_source, config.dtype), list(widths))
    buffers = ShardBuffers(widths, max(map(plan.size, shards)), config.store_dtype)
    progress = _Progress(run.say, sum(map(plan.size, shards)))
    for done, shard in enumerate(shards):
        for batch in plan.batches(shard):
            if run.stopping():
                kept = f"{plan.shards - len(shards) + done} of {plan.shards} shards"
                raise Interrupted(f"stopped; {kept} are finished and kept: run the same command to go on")

            def take(site: Site, value_BxTxD: torch.Tensor, batch: Batch = batch) -> None:
                bad = buffers.take(site, value_BxTxD, batch)
                if bad is not None:
                    place = plan.documents.place(int(batch.documents_B[bad[0]]), bad[1])
                    raise UserError(
                        f"activations at {site} are NaN or infinite: {place}, token id {batch.ids_BxT[bad]}: expected "
                        f"finite numbers; check the model's weights, or use --capture.dtype=float32; nothing of this "
                        "shard was stored"
                    )

            reader.read(batch, take)
            progress.add(batch.rows)
        writer.write_shard(shard, dict(index=plan.index(shard), **buffers.parts(plan.size(shard))))
    return progress.rate


def _check_sinks(statistics: dict[str, dict[str, Any]], config: CaptureConfig) -> None:
    for site, facts in statistics.items():
        share = facts["sinks"]["share_beyond"]
        if share > config.max_sink_share:
            raise UserError(
                f"at {site}, {share:.2%} of the tokens beyond position 0 have a norm above {facts['max_norm']:.4g}, "
                f"{config.sink_factor:g} times the median, and would be dropped as attention sinks; expected at most "
                f"{config.max_sink_share:.2%}: raise --capture.sink_factor, or allow more by --capture.max_sink_share"
            )


def _manifest(
    run: Run, model_source: source.ModelSource, plan: Plan, sites: dict[str, dict], counts: dict[str, dict]
) -> dict[str, Any]:
    """The manifest but for its files. It holds no times, so that it is the same for every run of the same work."""
    config: CaptureConfig = run.configs["capture"]
    return dict(
        sites=sites,
        dtype=config.store_dtype,
        rows=plan.rows,
        shards=plan.shards,
        shard_rows=config.shard_rows,
        model=dict(
            name=model_source.name,
            revision=model_source.revision,
            fingerprint=model_source.fingerprint,
            dtype=config.dtype,
        ),
        corpus=corpora.identity(run.configs["corpus"]),
        sink_factor=config.sink_factor,
        last=config.last,
        documents=dict(counts["documents"], columns=COLUMNS, groups=plan.documents.groups),
        tokens=counts["tokens"],
    )


def _counts(documents: Documents, plan: Plan) -> dict[str, dict[str, int]]:
    """Documents, and recorded tokens, of each split."""
    inside = {name: documents.split_N == index for index, name in enumerate(SPLITS)}
    return dict(
        documents={name: int(inside_N.sum()) for name, inside_N in inside.items()},
        tokens={name: int(plan.recorded_N[inside_N].sum()) for name, inside_N in inside.items()},
    )
