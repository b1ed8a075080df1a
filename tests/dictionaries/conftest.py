"""Models whose features are edited, each made once."""

import pytest
from edited_model import EditedModel


@pytest.fixture(scope="session")
def setups(tmp_path_factory, one_device):
    made = {}

    def make(family):
        if family not in made:
            made[family] = EditedModel(family, tmp_path_factory.mktemp(family), one_device)
        return made[family]

    return make


@pytest.fixture
def llama(setups):
    return setups("llama")
