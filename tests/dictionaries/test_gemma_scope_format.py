"""SAEs of Gemma Scope's two forms, and dictionaries that lie on the hub."""

import jax.numpy as jnp
import numpy as np
import pytest
from known_dictionaries import D, make
from safetensors.numpy import save_file

from saejax import load_dictionary, save_dictionary
from saejax.dictionaries import stacks
from saejax.dictionaries.formats import place
from saejax.errors import UserError

FIRST = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
SECOND = "gemma-scope-2-1b-pt/resid_post_all/layer_12_width_16k_l0_small"


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    made = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in dict(W_enc=(D, 30), W_dec=(30, D)).items()
    }
    made |= dict(b_enc=rng.standard_normal(30), b_dec=rng.standard_normal(D), threshold=rng.random(30))
    return {name: array.astype(np.float32) for name, array in made.items()}


def write(folder, made, version):
    folder.mkdir(parents=True)
    if version == 1:
        np.savez(folder / "params.npz", **made)
    else:
        save_file(
            {name.lower() if "W" in name else name: array for name, array in made.items()},
            folder / "params.safetensors",
        )
    return folder


@pytest.mark.parametrize(("name", "version"), [(FIRST, 1), (SECOND, 2)])
def test_both_forms_compute_what_their_formula_says(name, version, tmp_path):
    made = arrays()
    sae = load_dictionary(write(tmp_path / name, made, version))
    assert (sae.site, sae.config.target, sae.config.kind) == ("resid_post.12", "", "jumprelu")
    x = np.random.default_rng(1).standard_normal((7, D)).astype(np.float32)
    wide = {key: array.astype(np.float64) for key, array in made.items()}
    pre = x @ wide["W_enc"] + wide["b_enc"]
    acts = np.where(pre > wide["threshold"], np.maximum(pre, 0), 0)
    np.testing.assert_allclose(sae.encode(jnp.asarray(x)), acts, atol=1e-5)
    np.testing.assert_allclose(sae(jnp.asarray(x)), acts @ wide["W_dec"] + wide["b_dec"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "version", "site"),
    [
        ("gemma-scope-9b-pt-mlp/layer_3/width_16k/average_l0_9", 1, "mlp_out.3"),
        ("gemma-scope-2b-pt-res-canonical/layer_3/width_16k/canonical", 1, "resid_post.3"),
        ("elsewhere/mlp_out/layer_7_width_16k_l0_big", 2, "mlp_out.7"),
        ("elsewhere/layer_7", 2, "unknown"),
    ],
)
def test_the_path_says_where_it_reads(name, version, site, tmp_path):
    assert load_dictionary(write(tmp_path / name, arrays(), version)).site == site


def test_what_no_site_here_is_and_what_is_damaged(tmp_path):
    heads = write(tmp_path / "gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_9", arrays(), 1)
    with pytest.raises(UserError, match="before they are projected, which is no site here"):
        load_dictionary(heads)
    early = write(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_9", arrays(), 1)
    with pytest.raises(UserError, match="before its gain, which is no site here: .* --graph.transcoders"):
        load_dictionary(early)
    assert load_dictionary(early, site="mlp_in.3", target="mlp_out.3").config.target == "mlp_out.3"
    cut = write(tmp_path / FIRST, arrays(), 1)
    (cut / "params.npz").write_bytes((cut / "params.npz").read_bytes()[:200])
    with pytest.raises(UserError, match="params.npz is damaged"):
        load_dictionary(cut)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository; what is asked of it is recorded."""
    asked = []

    def snapshot(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns, ignore_patterns))
        return str(tmp_path / name.replace("/", "--") / "commit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    place._fetched.cache_clear()
    yield asked
    place._fetched.cache_clear()


def test_a_folder_of_the_hub(hub, tmp_path):
    name = FIRST.replace("gemma-scope-2b-pt-res/", "google--gemma-scope-2b-pt-res/commit/")
    write(tmp_path / name, arrays(), 1)
    address = "hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82@v1"
    assert stacks.load_trained(address, {}, "--ablate.dictionary").site == "resid_post.12"
    assert stacks.identity(address) == stacks.identity(str(tmp_path / name))
    ((repository, revision, wanted, skipped),) = hub
    assert (repository, revision) == ("google/gemma-scope-2b-pt-res", "v1")
    assert f"{FIRST.partition('/')[2]}/*.npz" in wanted and skipped == [f"{FIRST.partition('/')[2]}/*/*"]


def test_one_of_our_own_on_the_hub_is_fetched_with_its_arrays(hub, tmp_path):
    saved = make("topk")
    save_dictionary(tmp_path / "me--sae" / "commit", saved)
    np.testing.assert_array_equal(load_dictionary("hf://me/sae").W_dec_FxD, saved.W_dec_FxD)
    assert [wanted for *_, wanted, _ in hub][-1] == ["*"]


@pytest.mark.parametrize("address", ["hf://alone", "hf://", "hf://a/b@"])
def test_wrong_addresses(address):
    with pytest.raises(UserError, match="expected hf://ORG/NAME"):
        load_dictionary(address)
