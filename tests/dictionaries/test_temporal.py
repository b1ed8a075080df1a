"""Temporal SAEs beside their formula, token by token in plain numpy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import yaml
from safetensors.numpy import save_file

import saejax
from saejax.errors import UserError
from saejax.evaluation.temporal import evaluate_texts

D, F, HEADS, BOTTLENECK = 16, 64, 2, 4
SETTINGS = dict(
    architecture="temporal", d_in=D, d_sae=F, n_heads=HEADS, n_attn_layers=2, bottleneck_factor=BOTTLENECK,
    sae_diff_type="topk", kval_topk=5, tied_weights=True, normalize_activations="constant_scalar_rescale",
    activation_normalization_factor=0.3, apply_b_dec_to_input=True, metadata=dict(hook_name="blocks.1.hook_resid_post"),
)  # fmt: skip


def save(folder, **changes):
    """Writes a random one as SAELens does; returns its folder, settings and arrays in float64."""
    rng, settings = np.random.default_rng(0), SETTINGS | changes
    shapes = dict(W_dec=(F, D), b_dec=(D,)) | ({} if settings["tied_weights"] else dict(W_enc=(D, F)))
    for layer in range(settings["n_attn_layers"]):
        sizes = dict(k_ctx=F // BOTTLENECK, q_target=F // BOTTLENECK, v_ctx=F, c_proj=F)
        for name, size in sizes.items():
            shapes |= {f"attn_layers.{layer}.{name}.weight": (size, F), f"attn_layers.{layer}.{name}.bias": (size,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file(arrays, folder / "sae_weights.safetensors")
    return settings, {name: array.astype(np.float64) for name, array in arrays.items()}


def plain(settings, w, x_TxD):
    """Novel and predicted features and the reconstruction of a text, one token after the other."""
    W_enc = w["W_dec"].T if settings["tied_weights"] else w["W_enc"]
    factor = settings["activation_normalization_factor"]
    left = x_TxD * factor - w["b_dec"] * settings["apply_b_dec_to_input"]
    predicted = np.zeros((len(x_TxD), F))
    for layer in range(settings["n_attn_layers"]):
        part = {name: (w[f"attn_layers.{layer}.{name}.weight"], w[f"attn_layers.{layer}.{name}.bias"])
                for name in ("k_ctx", "q_target", "v_ctx", "c_proj")}  # fmt: skip
        of = lambda name, z, part=part: part[name][0] @ z + part[name][1]  # noqa: E731
        z = np.maximum(left @ W_enc / (4 * D), 0)
        earlier = [np.zeros(F), *z[:-1]]
        new_left = left.copy()
        for t in range(len(x_TxD)):
            heads = []
            for head in range(HEADS):
                inner, outer = F // BOTTLENECK // HEADS, F // HEADS
                keys = [of("k_ctx", one)[head * inner : (head + 1) * inner] for one in earlier[: t + 1]]
                values = [of("v_ctx", one)[head * outer : (head + 1) * outer] for one in earlier[: t + 1]]
                query = of("q_target", z[t])[head * inner : (head + 1) * inner]
                size = np.array([query @ key for key in keys]) / np.sqrt(inner)
                share = np.exp(size - size.max()) / np.exp(size - size.max()).sum()
                heads.append(share @ np.array(values))
            guess = np.maximum(of("c_proj", np.concatenate(heads)), 0)
            direction = guess @ w["W_dec"]
            along = direction @ left[t] / (np.linalg.norm(direction) + 1e-6) ** 2
            predicted[t] += along * guess
            new_left[t] -= along * direction
        left = new_left
    novel = np.maximum(left @ W_enc / (4 * D), 0)
    if settings["sae_diff_type"] == "topk":
        novel = np.where(novel >= np.sort(novel, axis=1)[:, [-settings["kval_topk"]]], novel, 0)
    return novel, predicted, ((novel + predicted) @ w["W_dec"] + w["b_dec"]) / factor


@pytest.mark.parametrize("changes", [{}, dict(sae_diff_type="relu", tied_weights=False, apply_b_dec_to_input=False)])
def test_features_and_reconstruction_are_those_of_the_formula(tmp_path, changes):
    settings, w = save(tmp_path / "sae", **changes)
    sae, x_BxTxD = saejax.load_temporal(tmp_path / "sae"), 3 * np.random.default_rng(1).normal(size=(2, 7, D))
    assert (sae.site, sae.config.k) == ("resid_post.1", 5 if not changes else 0)
    found = [*sae.encode_with_predictions(jnp.asarray(x_BxTxD, jnp.float32)), sae(jnp.asarray(x_BxTxD, jnp.float32))]
    for text, x_TxD in enumerate(x_BxTxD):
        for values, expected in zip(found, plain(settings, w, x_TxD), strict=True):
            np.testing.assert_allclose(values[text], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
            assert np.abs(expected).max() > 0


def test_the_authors_own_layout_is_read_and_named_as_in_saelens_registry(tmp_path, monkeypatch):
    settings, w = save(tmp_path / "saelens")
    folder = tmp_path / "canrager" / "temporalSAEs" / "gemma-2-2B" / "layer_12" / "temporal"
    folder.mkdir(parents=True)
    names = ("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights")
    sae = {name: settings[name] for name in names} | dict(exp_factor=F // D, scaling_factor=0.3)
    conf = dict(llm=dict(dimin=D), sae=sae, data=dict(dtype="float32"))
    (folder / "conf.yaml").write_text(yaml.safe_dump(conf))
    renamed = dict(W_dec="D", b_dec="b")
    stored = {renamed.get(name, name): array.astype(np.float32) for name, array in w.items()}
    save_file(stored, folder / "latest_ckpt.safetensors")
    release = dict(repo_id="canrager/temporalSAEs", conversion_func="temporal")
    release |= dict(saes=[dict(id="a", path="gemma-2-2B/layer_12/temporal")])
    release |= dict(config_overrides=dict(model_name="gemma-2-2b"))
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pretrained_saes.yaml").write_text(yaml.safe_dump({"temporal-gemma": release}))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **wanted: str(tmp_path / name))
    x_BxTxD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, D)), jnp.float32)
    expected = saejax.load_temporal(tmp_path / "saelens")(x_BxTxD)
    for address, model in ((folder, ""), ("saelens:temporal-gemma/a", "gemma-2-2b")):
        read = saejax.load_temporal(address)
        assert (read.site, read.config.k, read.config.model) == ("resid_post.12", 5, model)
        np.testing.assert_array_equal(read(x_BxTxD), expected)
    with pytest.raises(UserError, match="saejax.load_temporal reads it"):
        saejax.load_dictionary("saelens:temporal-gemma/a")
    (folder / "conf.yaml").write_text("sae: 3")
    with pytest.raises(UserError, match="conf.yaml does not describe a temporal SAE"):
        saejax.load_temporal(folder)


def test_it_is_scored_on_whole_texts(tmp_path, one_device):
    settings, w = save(tmp_path / "sae")
    lm = saejax.load_model(str(runs.save_model(tmp_path, hidden_size=D)), mesh=one_device)
    texts = ["the cat runs far away", "a dog sits"]
    sae = saejax.load_temporal(tmp_path / "sae")
    scores = saejax.evaluate(lm, sae, texts)
    tokens = lm.tokenize(texts)
    values = np.asarray(lm(tokens, capture=[sae.site]).sites[sae.site], np.float64)
    kept, errors, l0 = [], [], []
    for x_TxD, length in zip(values, tokens.lengths_B, strict=True):
        novel, _, y_hat_TxD = plain(settings, w, x_TxD[:length])
        is_kept = np.linalg.norm(x_TxD[:length], axis=1) <= lm.sink_norm(sae.site)
        kept.append(x_TxD[:length][is_kept])
        errors.append(np.square(x_TxD[:length] - y_hat_TxD)[is_kept].sum())
        l0.append((novel > 0).sum(1)[is_kept])
    every = np.concatenate(kept)
    explained = 1 - sum(errors) / np.square(every - every.mean(0)).sum()
    assert scores.explained_variance == pytest.approx(explained, rel=1e-3, abs=1e-3)
    assert scores.l0 == pytest.approx(np.concatenate(l0).mean(), rel=1e-3) and scores.reconstruction.tokens == len(
        every
    )
    assert scores.losses.ce["reconstructed"] != scores.losses.ce["clean"]
    with pytest.raises(UserError, match="there are no held-out activations to score"):
        evaluate_texts(lm, sae, [np.ones(1, np.int32)])


def test_what_takes_single_tokens_refuses_it_by_name(tmp_path):
    save(tmp_path / "sae")
    with pytest.raises(UserError, match="is a temporal SAE, whose features depend on all tokens before"):
        saejax.load_dictionary(tmp_path / "sae")
    with pytest.raises(UserError, match=r"values of the shape \[3, 16\]: a temporal SAE reads values of whole texts"):
        saejax.load_temporal(tmp_path / "sae").encode(jnp.zeros((3, D)))
    for name, changes, message in (
        ("norm", dict(normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
        ("type", dict(sae_diff_type="nested"), "sae_diff_type is 'nested'"),
        ("heads", dict(n_heads=3), "its tensors do not fit each other, or not .*cfg.json: fetch both again"),
        ("centred", dict(model_from_pretrained_kwargs=dict(center_writing_weights=True)), "weights were centred"),
        ("site", dict(hook_name="blocks.1.hook_mlp_in"), "blocks.1.hook_mlp_in is none of the sites here"),
        ("one head", dict(hook_head_index=2), "hook_head_index is 2, expected null"),
        ("no factor", dict(activation_normalization_factor=0), "activation_normalization_factor is 0: expected"),
        ("layers", dict(architecture="standard"), "architecture is 'standard': use saejax.load_dictionary"),
    ):
        save(tmp_path / name, **changes)
        with pytest.raises(UserError, match=message):
            saejax.load_temporal(tmp_path / name)
