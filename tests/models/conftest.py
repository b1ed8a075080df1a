"""Folders of models that tests change, and a cache of their own."""

import shutil

import pytest


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny Llama's folder."""
    return shutil.copytree(tiny_llama, tmp_path / "copy")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of models that are made of others."""
    monkeypatch.setenv("SAEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
