"""sparsify folders: the function they describe, the sites that their names mean, and what is refused."""

import json

import known_dictionaries as known
import numpy as np
import pytest
from known_dictionaries import D, F
from safetensors.numpy import save_file

from saejax.dictionaries import load_dictionary, save_dictionary, save_transcoders
from saejax.errors import UserError


def write(folder, transcode=False, skip=False, **changes):
    rng = np.random.default_rng(2)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= {"W_skip": (D, D)} if skip else {}
    cfg = dict(activation="topk", expansion_factor=32, normalize_decoder=True, num_latents=F, k=6, multi_topk=False)
    cfg |= dict(skip_connection=skip, transcode=transcode, d_in=D)
    folder.mkdir(parents=True)
    save_file({n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}, folder / "sae.safetensors")
    cfg = {key: value for key, value in (cfg | changes).items() if value is not ...}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def by_formula(folder, x):
    cfg, w = json.loads((folder / "cfg.json").read_text()), known.tensors_of(folder / "sae.safetensors")
    x = x.astype(np.float64)
    centred = x if cfg["transcode"] else x - w["b_dec"]
    f = known.largest(centred @ w["encoder.weight"].T + w["encoder.bias"], cfg["k"])
    y = f @ w["W_dec"] + w["b_dec"]
    return f, y + x @ w["W_skip"].T if "W_skip" in w else y


@pytest.mark.parametrize("transcode,skip", [(False, False), (False, True), (True, False), (True, True)])
def test_what_a_folder_computes(transcode, skip, tmp_path):
    folder, x = write(tmp_path / "layers.5.mlp", transcode, skip), known.activations()
    dictionary = load_dictionary(folder)
    f, y = by_formula(folder, x)
    assert known.relative(dictionary.encode(x), f) < 1e-5 and known.relative(dictionary(x), y) < 1e-5
    sites = ("mlp_in.5", "mlp_out.5") if transcode else ("mlp_out.5", "")
    assert (dictionary.config.site, dictionary.config.target) == sites
    assert (dictionary.config.k, dictionary.config.n_features) == (6, F)


@pytest.mark.parametrize(
    "name,site",
    [
        ("layers.10", "resid_post.10"),
        ("h.3.attn", "attn_out.3"),
        ("gpt_neox.layers.2.mlp", "mlp_out.2"),
        ("model.embed_tokens", "module:model.embed_tokens"),
        ("best", "unknown"),
    ],
)
def test_folders_are_named_after_modules(name, site, tmp_path):
    assert load_dictionary(write(tmp_path / name)).site == site
    assert load_dictionary(tmp_path / name, site="resid_pre.1").site == "resid_pre.1"


def test_the_models_name_decides_what_an_mlps_output_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(model="google/gemma-2-2b")))
    dictionary = load_dictionary(write(tmp_path / "layers.5.mlp"))
    assert (dictionary.site, dictionary.config.model) == ("module:layers.5.mlp", "google/gemma-2-2b")


def test_it_goes_on_to_other_formats(tmp_path):
    x = known.activations()
    folder = write(tmp_path / "layers.5")
    save_dictionary(tmp_path / "saelens", load_dictionary(folder), "saelens")
    f, y = known.saelens_by_formula(tmp_path / "saelens", x)
    assert known.relative(f, by_formula(folder, x)[0]) < 1e-12 and known.relative(y, by_formula(folder, x)[1]) < 1e-12
    folder = write(tmp_path / "layers.0.mlp", transcode=True, skip=True)
    save_transcoders(tmp_path / "set", [load_dictionary(folder)])
    f, y = known.circuit_tracer_by_formula(tmp_path / "set", 0, x)
    assert known.relative(f, by_formula(folder, x)[0]) < 1e-12 and known.relative(y, by_formula(folder, x)[1]) < 1e-12


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(activation="groupmax"), "activation is 'groupmax', which no dictionary here has: expected 'topk'"),
        (dict(signed=True), "signed is true"),
        (dict(k=F + 1), "k is 41, more than the 40 features"),
        (dict(k=...), "k is None"),
        (dict(num_latents=0), r"encoder.weight has the shape \(40, 12\), expected \(384, 12\)"),
        (dict(d_in="x"), "d_in is 'x'"),
        (dict(skip_connection=True), "W_skip is missing"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_dictionary(write(tmp_path / "layers.1", **changes))
