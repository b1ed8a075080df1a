"""Modules of any transformers model as sites: captured, trained on, and refused where the decoder is needed."""

import numpy as np
import pytest
import torch
from capture_setup import make_setup, rows_by_place
from runs import small_flags
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer
from torch_sites import relative_error

from saejax.dictionaries import load_dictionary
from saejax.errors import UserError
from saejax.models import source
from saejax.models.settings import ModelConfig
from saejax.runner import command

SITES = (
    "module:transformer.h.1.mlp.dense_4h_to_h",
    "module_in:transformer.h.0.mlp.dense_4h_to_h",
    "module:transformer.h.0",
)


@pytest.fixture(scope="module")
def bloom_setup(tmp_path_factory):
    """Of an architecture that the decoder does not know."""
    folder = tmp_path_factory.mktemp("bloom")
    save_tiny(folder, "bloom", vocab_size=384, n_layer=2)
    save_tiny_tokenizer(folder, 384)
    return make_setup(folder, tmp_path_factory.mktemp("bloom_capture"))


def test_an_architecture_that_the_decoder_does_not_know(bloom_setup):
    store, results = bloom_setup.capture("bloom", sites=SITES)
    assert store.sites == SITES
    assert {name: facts.d for name, facts in results.sites.items()} == dict(zip(SITES, (32, 128, 32), strict=True))
    model = source.load_torch_model(source.resolve(ModelConfig(path=str(bloom_setup.model))))
    values, (first, second) = {}, model.transformer.h
    second.mlp.dense_4h_to_h.register_forward_hook(lambda _, args, output: values.update({SITES[0]: output}))
    first.mlp.dense_4h_to_h.register_forward_hook(lambda _, args, output: values.update({SITES[1]: args[0]}))
    first.register_forward_hook(lambda _, args, output: values.update({SITES[2]: output[0]}))
    places = rows_by_place(store)
    for document, ids in enumerate(store.documents):
        with torch.no_grad():
            model(torch.tensor(ids[None].astype(np.int64)))
        rows = np.array([places[document, position] for position in range(len(ids))])
        for site in SITES:
            value_TxD = values[site].numpy().reshape(len(ids), -1)
            assert relative_error(store.read(site, rows), value_TxD) < 1e-5, (site, document)


def test_a_recurrent_model(tmp_path):
    make_tiny("mamba", dict(vocab_size=384, hidden_size=16, state_size=4, num_hidden_layers=2)).save_pretrained(
        tmp_path
    )
    save_tiny_tokenizer(tmp_path, 384)
    sites = ("module:backbone.layers.0", "module:backbone.layers.1.mixer")
    store, _ = make_setup(tmp_path, tmp_path).capture(sites=sites)
    # Padding is on the right and states go from left to right, so that a document alone gives the same.
    alone, _ = make_setup(tmp_path, tmp_path).capture("alone", sites=sites, batch_tokens=1)
    rows = np.arange(store.manifest.rows)
    for site in sites:
        assert relative_error(alone.read(site, rows), store.read(site, rows)) < 1e-5


def test_modules_beside_sites_of_the_decoder(setup, captured):
    module = "module:model.layers.2.mlp"
    store, _ = setup.capture("beside", sites=("resid_post.0", module, "module:model.layers.0.mlp.act_fn", "mlp_out.2"))
    rows = np.arange(store.manifest.rows)
    assert np.array_equal(store.read(module, rows), store.read("mlp_out.2", rows))
    assert relative_error(store.read("resid_post.0", rows), captured[0].read("resid_post.0", rows)) < 1e-5
    assert store.d("module:model.layers.0.mlp.act_fn") == 96
    with pytest.raises(UserError, match="module:model.layers.2.mlp, a module of the PyTorch model: use --model.b"):
        setup.capture("refused", sites=(module,), backend="jax")


def test_a_pass_ends_after_the_last_module(setup, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    layers, forward = [], LlamaAttention.forward

    def noted(self, *args, **options):
        layers.append(self.layer_idx)
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaAttention, "forward", noted)
    setup.capture("ends", sites=("module:model.layers.1.mlp", "module:model.layers.0.mlp"))
    # All layers are there, but only the passes that check the model and look for the modules run them.
    assert layers.count(3) == layers.count(2) == 2 < layers.count(1) == layers.count(0)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("module:transformer.h.1.mlp.dense_h_to_5h", "no such module; expected a path such as transformer.h.1.mlp"),
        ("module:", "no such module"),
        ("module:transformer.word_embedings", "such as transformer.word_embeddings"),
        ("module_in:transformer.word_embeddings", "is torch.int64 .*: expected one vector of floating-point numbers"),
        ("module:transformer.h", "a forward pass runs the module of module:transformer.h 0 times, expected once"),
        ("resid_post.2", "there is no site resid_post.2: BloomForCausalLM has 2 layers, 0 to 1"),
        ("resid_last.0", "there is no site 'resid_last.0'"),
    ],
)
def test_sites_that_a_model_does_not_have(bloom_setup, site, message):
    with pytest.raises(UserError, match=message):
        bloom_setup.capture("refused", sites=(site,))
    assert not list((bloom_setup.folder / "refused").rglob("*.npy"))


@pytest.mark.usefixtures("single_device")
def test_from_capture_to_training_and_no_further(bloom_setup, tmp_path, capsys):
    settings = dict(task__behaviours="", capture__sites=SITES[0], train__kinds="topk")
    corpus = bloom_setup.folder / "corpus.jsonl"
    flags = small_flags(bloom_setup.model, corpus, tmp_path / "run", train__sites=SITES[0], **settings)
    assert command.run(["capture", "train"], "", ["program", *flags]) == 0
    assert load_dictionary(tmp_path / "run" / "train" / "topk").site == SITES[0]
    assert command.run(["evaluate"], "", ["program", *flags]) == 2
    error = capsys.readouterr().err
    assert "the site module:" in error and " is a module of the PyTorch model, which only capture" in error
