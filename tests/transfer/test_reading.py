"""What is compared over text: figures that leave attention sinks out, and dictionaries of which nothing fires."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.parallel.mesh import make_mesh
from saejax.runner.config import Configs
from saejax.stages.transfer import TransferConfig
from saejax.transfer import reading
from saejax.transfer.compared import Compared
from saejax.transfer.reading import Reading
from saejax.transfer.text import ReadText

SITE, TEXTS, TOKENS, WIDTH = "resid_post.0", 40, 10, 16


def made_reading(values_NxD, *dictionaries):
    """Dictionaries of one model, which has read texts of ten tokens each."""
    compared = [Compared(f"d{number}", Path(), one) for number, one in enumerate(dictionaries)]
    text_N = np.repeat(np.arange(TEXTS), TOKENS)
    read = ReadText((np.arange(TOKENS),) * TEXTS, 0, text_N, np.tile(np.arange(1, TOKENS + 1), TEXTS))
    lm = SimpleNamespace(sink_norm=lambda site: 50.0)
    run = SimpleNamespace(configs=Configs(TransferConfig(ce_documents=2)))
    return Reading(run, compared, make_mesh(), {"": lm}, {"": read}, {("", SITE): values_NxD})


def random_dictionary(seed, **changes):
    config = DictionaryConfig(kind="standard", site=SITE, d_in=WIDTH, n_features=24, max_norm=50.0)
    found = Dictionary.initial(config, jax.random.key(seed))
    return Dictionary(config, **{**found.arrays, **changes})


def test_the_mean_that_stands_in_has_no_sinks(monkeypatch):
    """As evaluate takes it: sinks are left as they are where the mean takes the place of the others."""
    values_NxD = np.random.default_rng(0).normal(1.0, 1.0, (TEXTS * TOKENS, WIDTH)).astype(np.float32)
    values_NxD[::TOKENS] = 1000.0
    means = []
    monkeypatch.setattr(
        reading, "stand_in_losses", lambda lm, some, documents, mean_D, batch: means.append(mean_D) or []
    )
    made_reading(values_NxD, random_dictionary(0))._losses(0)([])
    ordinary = np.delete(values_NxD, np.s_[::TOKENS], axis=0)
    np.testing.assert_allclose(means[0], ordinary.mean(0, dtype=np.float64), rtol=1e-6)


def test_where_nothing_fires_there_are_no_partners_and_no_figure():
    values_NxD = np.random.default_rng(0).normal(size=(TEXTS * TOKENS, WIDTH)).astype(np.float32)
    dead = random_dictionary(0, b_enc_F=np.full(24, -1e6, np.float32))
    read = made_reading(values_NxD, dead, random_dictionary(1))
    assert read.alike(0, 1, np.full(24, -1)) is None
    assert -1 <= read.alike(1, 1, np.arange(24)) < 1
