"""A corpus and a capture run for the tests of both backends."""

import dataclasses
import json

import numpy as np
import torch
from torch_sites import relative_error, run_torch

from saejax.activations.settings import CaptureConfig
from saejax.activations.store import Store
from saejax.config import Configs
from saejax.models.settings import ModelConfig
from saejax.models.sites import KINDS, NEURONS
from saejax.parallel.settings import MeshConfig
from saejax.runner.workspace import Run
from saejax.stages.capture import run as capture
from saejax.tasks.settings import CorpusConfig, TaskConfig

ALL_SITES = tuple(f"{kind}.{layer}" for layer in (0, 2) for kind in (*KINDS, NEURONS))
WORDS = ["the", "cat", "near", "dogs", "runs", "capital", "France", "is", "Paris", "war", "lasted", "year", "1732"]
RESUMED = dict(sites=("resid_post.1", "mlp_in.2"), shard_rows=40, batch_tokens=64)


@dataclasses.dataclass
class Setup:
    """A model and a corpus; ``run(**settings)`` captures into a folder and opens the store."""

    model: str
    folder: object

    def make_run(
        self,
        name="capture",
        corpus=(),
        say=lambda line: None,
        stopping=lambda: False,
        model=None,
        mesh=None,
        backend="torch",
        **options,
    ):
        settings = dict(sites=ALL_SITES, store_dtype="float32", shard_rows=200, batch_tokens=64, max_sink_share=1.0)
        configs = Configs(
            ModelConfig(path=str(model or self.model), backend=backend),
            CorpusConfig(**dict(path=str(self.folder / "corpus.jsonl"), context=32, held_out=0.3) | dict(corpus)),
            TaskConfig(),
            CaptureConfig(**settings | options),
            mesh or MeshConfig(),
        )
        (self.folder / name).mkdir(exist_ok=True)
        return Run("capture", "", self.folder / name, configs, {}, say, stopping)

    def capture(self, *args, **options):
        run = self.make_run(*args, **options)
        results = capture.run_capture(run)
        return Store.open(run.folder), results


def corpus_texts():
    rng = np.random.default_rng(0)
    lengths = [1, 3, 40, 12, 7, 25, 90, 9, 18, 5, 33, 2]
    return ["3", *(" ".join(rng.choice(WORDS, length)) for length in lengths[1:])]


def make_setup(model, folder) -> Setup:
    """Writes the corpus into the folder."""
    lines = [json.dumps(dict(text=text, group=f"g{i // 2}")) for i, text in enumerate(corpus_texts())]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return Setup(model, folder)


def rows_by_place(store):
    """Row id of every (document, position)."""
    rows = np.arange(store.manifest.rows)
    document_N, position_N, _ = store.tokens(rows)
    places = dict(zip(zip(document_N.tolist(), position_N.tolist(), strict=True), rows.tolist(), strict=True))
    assert len(places) == len(rows)  # no token twice
    return places


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain_forward(model, ids) -> dict[str, np.ndarray]:
    """The value at every site for one document without padding, by other ways than those of the capture.

    The stream comes from ``output_hidden_states`` (the last of which is normalised, so layer 3 is not read).
    """
    ids_BxT = torch.tensor(ids[None].astype(np.int64))
    stream, (_, values) = model(ids_BxT, output_hidden_states=True).hidden_states, run_torch(model, ids_BxT)
    for layer in range(3):
        values[f"resid_pre.{layer}"], values[f"resid_post.{layer}"] = stream[layer], stream[layer + 1]
    return {name: value[0].detach().float().numpy() for name, value in values.items()}


def check_against_plain_forward(store, model, tolerance):
    places = rows_by_place(store)
    for document, ids in enumerate(store.documents):
        expected = plain_forward(model, ids)
        positions = [position for position in range(len(ids)) if (document, position) in places]
        rows = np.array([places[document, position] for position in positions], np.int64)
        if not positions:
            continue
        assert store.tokens(rows)[2].tolist() == ids[positions].tolist()
        for site in store.sites:
            assert relative_error(store.read(site, rows), expected[site][positions]) < tolerance, (site, document)
