"""A transformers model behind ``LanguageModel``'s interface, against the JAX decoder with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loaded_models import change_config
from tiny_models import OTHER_FIELDS, make_tiny, save_tiny, save_tiny_tokenizer
from torch_sites import relative_error

from saejax import load_model
from saejax.dictionaries import Dictionary, DictionaryConfig, check_dictionary
from saejax.errors import UserError
from saejax.models.edits import SiteEdit
from saejax.models.language_model import forward
from saejax.models.sites import KINDS, NEURONS, Site
from saejax.models.split import SharedPrefixBatch, SplitPoint
from saejax.models.tokens import pad
from saejax.parallel.mesh import make_mesh

TEXTS = ["The cat near the dogs runs.", "3 + 4 =", "The capital of France is"]
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2")
# For what goes through the hooks that other tests check in all families: with norms behind.
ONE_FAMILY = pytest.mark.parametrize(
    "both", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[:3])], indirect=True
)


def save(folder, family, **changes):
    save_tiny(folder, family, vocab_size=300, **changes)
    save_tiny_tokenizer(folder, 300)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory, one_device):
    """The decoder and the transformers model, of the same weights."""
    path = save(tmp_path_factory.mktemp("model"), request.param)
    return load_model(path, mesh=one_device), load_model(path, backend="torch")


def make_dictionary(site: str, target: str = "", d: int = 40, limit: float | None = 1e3) -> Dictionary:
    """With a sink rule, or without one, as dictionaries of others are loaded."""
    config = DictionaryConfig("standard", site, target, d, 24, max_norm=limit, target_max_norm=limit)
    rng = np.random.default_rng(0)
    weights = dict(W_enc_DxF=(d, 24), b_enc_F=(24,), W_dec_FxD=(24, d), b_dec_D=(d,))
    arrays = {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in weights.items()}
    return Dictionary(config, **arrays)


def check_same(both, edits, tokens):
    """The same logits, and the same values at later sites."""
    mask_BxT = tokens.mask_BxT
    ours, theirs = (lm(tokens, capture=["resid_post.2", "mlp_out.1"], edits=edits) for lm in both)
    assert relative_error(theirs.logits_BxTxV[mask_BxT], ours.logits_BxTxV[mask_BxT]) < 1e-5
    for site, value in ours.sites.items():
        assert relative_error(theirs.sites[site][mask_BxT], value[mask_BxT]) < 1e-5
    return ours


def test_sites_and_logits(both):
    tokens = both[0].tokenize(TEXTS)
    sites = [Site(kind, layer) for layer in range(3) for kind in (*KINDS, NEURONS)]
    ours, theirs = (lm(tokens, capture=sites) for lm in both)
    for site in map(str, sites):
        assert relative_error(theirs.sites[site][tokens.mask_BxT], ours.sites[site][tokens.mask_BxT]) < 1e-5
    check_same(both, [], tokens)
    for lm in both:
        with pytest.raises(UserError, match="is a site of the second model: run that model"):
            lm(tokens, capture="other:resid_post.1")
    last = both[1](tokens, capture="resid_post.2", logits=False)
    assert last.logits_BxTxV is None and list(last.sites) == ["resid_post.2"]
    assert np.abs(both[1].unembed(last.sites["resid_post.2"]) - theirs.logits_BxTxV)[tokens.mask_BxT].max() < 1e-5


@pytest.mark.parametrize(
    ("both", "positions"),
    [
        ("gpt_neox", "all"),
        ("gemma2", (1, 3)),  # the last one alone: below
        *(pytest.param(family, "all", marks=pytest.mark.slow) for family in ("llama", "gpt2")),
    ],
    indirect=["both"],
)
def test_edits_of_sites(both, positions):
    """Of features and of vectors, at each of the sites: one that is left out would change all after it."""
    tokens, direction = both[0].tokenize(TEXTS), np.linspace(-1, 1, 40)
    edits = [make_dictionary(f"{kind}.1").steer([3], 2.0, positions) for kind in KINDS]
    edits += [SiteEdit.steer(f"{kind}.1", direction, 1.5, positions) for kind in KINDS]
    width = Site(NEURONS, 1).width(both[0].config)
    edits += [make_dictionary("mlp_act.1", d=width).steer([3], 2.0, positions), SiteEdit.ablate("mlp_act.0", positions)]
    changed = check_same(both, edits, tokens).logits_BxTxV
    assert relative_error(changed, both[0](tokens).logits_BxTxV) > 1e-3


@ONE_FAMILY
def test_edits_of_features(both):
    tokens = both[0].tokenize(TEXTS)
    sae, transcoder = make_dictionary("resid_post.1"), make_dictionary("mlp_in.1", "mlp_out.1")
    value = np.random.default_rng(1).normal(size=(3, tokens.ids_BxT.shape[1], 2))
    for edits in (
        [sae.ablate([1, 5], "fires"), sae.scale([0, 7], [2.0, -1.0]), sae.patch([4, 6], value)],
        [SiteEdit.ablate("attn_out.2"), sae.ablate_error(), sae.steer([1], 1.0)],
        [sae.set([2], 3.0, error="drop"), transcoder.steer([2, 3], 2.0), SiteEdit.ablate("resid_pre.2", "last")],
        # Positions that an edit makes longer than the limit are no sinks for the next one.
        [sae.steer([1], 5e3), sae.ablate([2, 5]), transcoder.steer([1], 5e3), transcoder.ablate([2, 5])],
        # Nor for those of later sites. No constant, which layer norm takes away again: what rounding left would show.
        [SiteEdit.steer("resid_post.0", np.linspace(-1, 1, 40), 5e3), sae.ablate([2, 5]), transcoder.ablate([2, 5])],
        # A dictionary that does not know its sink rule gets that of the model.
        [transcoder.scale([2, 3], 2.0, error="drop"), make_dictionary("resid_post.1", limit=None).ablate([1, 5])],
    ):
        check_same(both, edits, tokens)


@pytest.mark.parametrize(
    "both", ["gpt2", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt_neox"))],
    indirect=True,
)  # fmt: skip
def test_modules(both):
    """A module's output as a site: what is there, an edit of it, and a dictionary of it, which is measured."""
    decoder, lm = both
    paths = dict(gpt2="transformer.h.1.mlp", gpt_neox="gpt_neox.layers.1.mlp")
    tokens, module = lm.tokenize(TEXTS), f"module:{paths.get(decoder.config.family, 'model.layers.1.mlp')}"
    values = lm(tokens, capture=[module, "mlp_out.1"]).sites
    if decoder.config.post_norms:
        assert values[module].shape == values["mlp_out.1"].shape
        return
    np.testing.assert_array_equal(values[module], values["mlp_out.1"])
    edits = [make_dictionary(module).steer([1], 2.0), SiteEdit.ablate(module, (3, None))]
    same = [make_dictionary("mlp_out.1").steer([1], 2.0), SiteEdit.ablate("mlp_out.1", (3, None))]
    logits, expected = lm(tokens, edits=edits).logits_BxTxV, decoder(tokens, edits=same).logits_BxTxV
    assert relative_error(logits[tokens.mask_BxT], expected[tokens.mask_BxT]) < 1e-5
    with pytest.raises(UserError, match="module of the PyTorch model"):
        decoder(tokens, edits=edits)
    measured = check_dictionary(lm, make_dictionary(module, limit=None))
    expected = check_dictionary(decoder, make_dictionary("mlp_out.1", limit=None))
    assert (measured.l0, measured.tokens) == (expected.l0, expected.tokens)
    assert measured.explained_variance == pytest.approx(expected.explained_variance, rel=1e-4)


EDITS = [make_dictionary("resid_post.1").steer([3], 1.0, "last"), SiteEdit.ablate("mlp_out.0", (2, None))]
EDITS += [make_dictionary("resid_post.2", limit=None).steer([3], 1.0)]


@pytest.mark.parametrize(
    ("edits", "options"),
    [([], dict(stop=["e"])), (EDITS, dict(temperature=0.8, top_p=0.9, seed=3))],
    ids=["stop", "sampled edits"],
)
@ONE_FAMILY
def test_generated_tokens(both, edits, options):
    tokens = both[0].tokenize(TEXTS)
    ours, theirs = (lm.generate(tokens, 8, edits=edits, **options) for lm in both)
    assert ours == theirs


@pytest.mark.parametrize(
    ("both", "kind"),
    [
        ("gemma2", "inside"),
        *(pytest.param(family, "mlp_act", marks=pytest.mark.slow) for family in ("gpt2", "gemma2")),
        *(pytest.param("llama", kind, marks=pytest.mark.slow) for kind in ("inside", "resid_post")),
        pytest.param("gpt_neox", "inside", marks=pytest.mark.slow),
    ],
    indirect=["both"],
)
def test_jax_functions_of_a_model(both, kind):
    """The functions that causal stages run: split at a site, differentiated, vmapped, and run from a changed token."""
    lm = both[1]
    if kind == "inside":  # each of two sites in a family of either layout: without and with norms behind, or parallel
        kind = "mlp_out" if both[0].config.family in ("gpt2", "gemma2") else "resid_mid"
    tokens = lm.tokenize(TEXTS)
    ids_BxT, last_B = jnp.asarray(tokens.ids_BxT), jnp.asarray(tokens.last_B)
    answers_Bx2 = jnp.array([[3, 4], [5, 6], [7, 8]])
    results = []
    for each in both:
        point = SplitPoint(each.config, Site(kind, 1), Site("resid_pre", 1), each.mesh)

        @jax.jit
        def run(ids_BxT, point=point, each=each):
            stream, value, read = point.run_prefix(each.params, ids_BxT)

            def difference(value_BxTxX):
                x_BxTxD = point.run_suffix(each.params, stream, value_BxTxX)
                return point.logit_difference(each.params, x_BxTxD, last_B, answers_Bx2)

            slope = jax.grad(lambda value: difference(value).sum())(value)
            batch = jnp.stack([value, value + 0.1, 0.5 * value])
            _, past = point.run_suffix_with_kv(each.params, stream, value)
            rows = SharedPrefixBatch.unshared(jnp.array([0, 1]), jnp.array([2, 1]), 4, 1)
            changed = [part[rows.prompt_SxN, rows.position_SxN] for part in (stream, 0.7 * value)]
            ends = point.run_shared_suffix(each.params, past, rows, *changed)
            return value, read, slope, jax.vmap(difference)(batch), ends

        results.append(run(ids_BxT))
    for ours, theirs in zip(*results, strict=True):
        mask = tokens.mask_BxT if ours.shape[:2] == tokens.mask_BxT.shape else np.ones(ours.shape[:2], bool)
        assert relative_error(theirs[mask], ours[mask]) < 2e-5


@ONE_FAMILY
def test_the_program_of_a_forward_pass(both):
    """``forward`` with edits, as stages call it, gives what the hooks give."""
    lm = both[1]
    tokens = lm.tokenize(TEXTS)
    edits = (make_dictionary("resid_mid.1").steer([2], 1.0), SiteEdit.ablate("mlp_out.1"))
    sites = (Site("resid_post", 1), Site("resid_post", 2))
    logits, values = forward(lm.config, sites, True, lm.params, tokens.ids_BxT, tokens.lengths_B, edits)
    expected = lm(tokens, capture=sites, edits=edits)
    mask_BxT = tokens.mask_BxT  # beyond it, the hooks' pass has other tokens
    assert relative_error(logits[mask_BxT], expected.logits_BxTxV[mask_BxT]) < 1e-5
    for site, value in zip(sites, values, strict=True):
        assert relative_error(value[mask_BxT], expected.sites[str(site)][mask_BxT]) < 1e-5


# Two have positions of their own, one linear attention; test_torch_hooks.py has the sites of the others.
KNOWN_APART = ("gptj", "bloom", "qwen3_5_text")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in KNOWN_APART else pytest.mark.slow) for f in OTHER_FIELDS]
)
def test_an_architecture_without_a_family(family, tmp_path, caplog):
    lm = load_model(save(tmp_path, family))
    tokens = lm.tokenize(TEXTS)
    logits = lm(tokens).logits_BxTxV
    last_BxV = np.stack([lm(lm.tokenize([text])).logits_BxTxV[0, -1] for text in TEXTS])
    assert np.abs(last_BxV - np.asarray(logits)[np.arange(3), tokens.last_B]).max() < 1e-5 * np.abs(last_BxV).max()
    edits = [SiteEdit.ablate("mlp_out.1")]
    for text, made in zip(TEXTS, lm.generate(tokens, 5, edits=edits), strict=True):
        ids = lm.tokenize([text]).ids_BxT[0].tolist()  # by a pass over all tokens for each new one, without a cache
        for _ in range(5):
            ids.append(int(lm(pad([ids]), edits=edits).logits_BxTxV[0, -1].argmax()))
        assert list(made.ids) == ids[-5:][: len(made.ids)]
    split, values = forward(lm.config, (Site("mlp_out", 1),), True, lm.params, tokens.ids_BxT, tokens.lengths_B)
    assert relative_error(split[tokens.mask_BxT], logits[tokens.mask_BxT]) < 1e-5 and values[0].shape[-1] > 1


RECURRENT = dict(vocab_size=131, hidden_size=32, num_hidden_layers=3)
RECURRENT_FIELDS = {
    "mamba": RECURRENT | dict(state_size=4, time_step_rank=2),
    "falcon_mamba": RECURRENT | dict(state_size=4, time_step_rank=2),
    "rwkv": RECURRENT | dict(attention_hidden_size=32, context_length=64),
    "xlstm": RECURRENT | dict(num_heads=4, num_blocks=3),
    "recurrent_gemma": RECURRENT
    | dict(num_attention_heads=4, num_key_value_heads=1, intermediate_size=48, lru_width=32, attention_window_size=16),
}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in ("mamba", "recurrent_gemma") else pytest.mark.slow) for f in RECURRENT_FIELDS],
)
def test_recurrent_models_generate_what_whole_passes_say(family, tmp_path):
    make_tiny(family, RECURRENT_FIELDS[family]).save_pretrained(tmp_path)
    lm = load_model(str(tmp_path), backend="torch")
    edits = [SiteEdit.steer("resid_post.1", np.linspace(-1, 1, 32), 1.0)]
    for prompts in ([[7]], [[7, 9], [5]], [[5], [1, 2, 3, 4, 5, 6, 7], [9, 7], [4]]):
        for prompt, made in zip(prompts, lm.generate(pad(prompts), 4, edits=edits), strict=True):
            ids = list(prompt)
            for _ in made.ids:
                ids.append(int(lm(pad([ids]), edits=edits).logits_BxTxV[0, -1].argmax()))
            assert list(made.ids) == ids[len(prompt) :]


def test_what_the_decoder_refuses_in_a_family_runs_in_torch(tmp_path):
    """But not where the weights are quantised."""
    path = save(tmp_path, "qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(UserError, match=r"mlp_only_layers \[1\] is not supported, .*: run it in PyTorch"):
        load_model(path)
    change_config(tmp_path, return_dict=False)  # about the form of outputs, which is not the file's to say
    lm = load_model(path, backend="torch")
    assert lm.config.context == 64 and np.isfinite(lm(lm.tokenize(TEXTS)).logits_BxTxV).all()
    change_config(tmp_path, quantization_config=dict(quant_method="fp8"))
    with pytest.raises(UserError, match="the weights are quantised|cannot be loaded by"):
        load_model(path, backend="torch")


def test_sizes_that_differ_between_layers(tmp_path):
    """Such as the width of Gemma 4's heads, which transformers does not tell for the whole model."""
    fields = OTHER_FIELDS["olmo"] | dict(head_dim=12, hidden_size_per_layer_input=0)
    make_tiny("gemma4_text", fields).save_pretrained(tmp_path)
    lm = load_model(str(tmp_path))
    assert (lm.config.d_model, lm.config.n_layers) == (40, 3)
    out = lm(pad([[5, 6, 7]]), capture=["mlp_out.1", "resid_post.2"])
    assert np.isfinite(out.logits_BxTxV).all() and out.sites["resid_post.2"].shape == (1, 3, 40)


def test_several_devices_are_refused(tmp_path):
    path = save(tmp_path, "olmo")
    with pytest.raises(UserError, match=r"runs in PyTorch, beside one device of JAX, but there are 8: .* JAX family$"):
        load_model(path, mesh=make_mesh())
    with pytest.raises(UserError, match="does not have the family 'olmo'"):
        load_model(path, backend="jax")
    with pytest.raises(UserError, match="there is no site resid_post.3: OlmoForCausalLM has 3 layers"):
        lm = load_model(path)
        lm(lm.tokenize(TEXTS), capture="resid_post.3")
