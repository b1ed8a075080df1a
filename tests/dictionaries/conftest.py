"""Models whose features are edited, each made once."""

import functools

import pytest
from plain_edits import EditedModel
from tiny_models import save_tiny, save_tiny_tokenizer

from saejax import load_model


@pytest.fixture(scope="session")
def setups(tmp_path_factory, one_device):
    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        save_tiny(folder, family, vocab_size=257)
        save_tiny_tokenizer(folder, 257)
        return EditedModel(load_model(str(folder), mesh=one_device))

    return make


@pytest.fixture
def llama(setups):
    return setups("llama")
