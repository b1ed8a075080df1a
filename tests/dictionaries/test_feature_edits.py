"""Edits of features, sites and error terms against hooks in transformers models in fp64."""

import copy
import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from plain_edits import FEATURES, SITE, PlainDictionary, PlainModel, make_dictionary, wanted

from saejax import SiteEdit, load_model
from saejax.dictionaries import Dictionary, DictionaryConfig, joined
from saejax.models.tokens import pad
from saejax.parallel.mesh import make_mesh
from saejax.parallel.settings import MeshConfig

VALUES = [0.5, 2.0, 1.0]
# What the methods are given, and the activation that takes the place of f of the k-th feature at t of prompt b.
EDITS = {
    "ablate": lambda s: ((), lambda b, k, t, f: 0.0),
    "set": lambda s: ((VALUES,), lambda b, k, t, f: VALUES[k]),
    "scale": lambda s: ((-1.5,), lambda b, k, t, f: -1.5 * f),
    "steer": lambda s: ((VALUES,), lambda b, k, t, f: f + VALUES[k]),
    "patch": lambda s: ((s.given_BxTxK,), lambda b, k, t, f: s.given_BxTxK[b, t, k]),
}
POSITIONS = ("all", "last", (2, 6), "fires")
EVERY = [(name, positions, error) for positions in POSITIONS for error in ("keep", "drop") for name in EDITS]
SOME = [
    ("ablate", "all", "keep"), ("scale", (2, 6), "keep"), ("steer", (2, 6), "keep"), ("set", "fires", "drop"),
    ("patch", "last", "drop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "cases"),
    [("llama", SOME), *(pytest.param(name, EVERY, marks=pytest.mark.slow) for name in ("llama", "gpt2", "gemma2"))],
)
def test_every_edit_equals_plain_hooks(setups, family, cases):
    setup = setups(family)
    plain_sae = PlainDictionary(setup.sae)
    for name, positions, error in cases:
        args, new = EDITS[name](setup)

        def plain(b, new=new, positions=positions, error=error):
            def call(x_TxD):
                return plain_sae.edited(x_TxD, x_TxD, FEATURES, lambda k, t, f: new(b, k, t, f), positions, error)

            return [(SITE, call)]

        setup.check([getattr(setup.sae, name)(FEATURES, *args, positions=positions, error=error)], plain)


def test_site_edits_equal_plain_hooks(llama):
    """One at each of several sites of two layers, at the same kinds of positions."""
    rng = np.random.default_rng(8)
    vector_D, given_BxTxD = rng.normal(size=40), rng.normal(size=(3, 13, 40)).astype(np.float32)
    edits = [
        SiteEdit.patch("resid_pre.1", given_BxTxD, (1, None)),
        SiteEdit.ablate("attn_out.1", "last"),
        SiteEdit.set("mlp_in.1", vector_D),
        SiteEdit.steer("mlp_out.1", vector_D, 0.5, (0, 4)),
    ]

    def plain(b):
        def on(new, positions):
            def call(x_TxD):
                rows = [new(t, x_D) if wanted(t, positions, len(x_TxD)) else x_D for t, x_D in enumerate(x_TxD)]
                return np.stack(rows)

            return call

        return [
            ("resid_pre.1", on(lambda t, x_D: given_BxTxD[b, t].astype(np.float64), (1, None))),
            ("attn_out.1", on(lambda t, x_D: 0 * x_D, "last")),
            ("mlp_in.1", on(lambda t, x_D: vector_D, "all")),
            ("mlp_out.1", on(lambda t, x_D: x_D + 0.5 * vector_D, (0, 4))),
        ]

    llama.check(edits, plain)


def test_edits_of_the_error_term_equal_plain_hooks(llama):
    """It goes at some positions and becomes another's at others; sinks keep it."""
    given_BxTxD = np.random.default_rng(8).normal(size=(3, 13, 40)).astype(np.float32)
    at_last_BxT = np.arange(13)[None] == llama.tokens.last_B[:, None]
    given_BxTxD = np.where(at_last_BxT[..., None], given_BxTxD, np.nan)  # what is not asked for is without effect
    plain_sae = PlainDictionary(llama.sae)

    def plain(b):
        def call(x_TxD):
            out_TxD, last = x_TxD.copy(), len(x_TxD) - 1
            for t, x_D in enumerate(x_TxD):
                if np.linalg.norm(x_D) <= llama.sae.config.max_norm and (1 <= t < 4 or t == last):
                    rebuilt_D = plain_sae.decode(plain_sae.encode(x_D), x_D)
                    out_TxD[t] = rebuilt_D + (given_BxTxD[b, t] if t == last else 0)
            return out_TxD

        return [(SITE, call)]

    llama.check([llama.sae.patch_error(given_BxTxD, "last"), llama.sae.ablate_error((1, 4))], plain)


def test_edits_of_several_layers_and_of_one_site_act_in_their_order(llama):
    """A skip transcoder, two edits at one site, and a transcoder that reads what they left and changes a later site."""
    first = make_dictionary(llama.lm, llama.tokens, "mlp_in.0", "mlp_out.0", skip=True)
    last = make_dictionary(llama.lm, llama.tokens, "mlp_in.2", "mlp_out.2")
    plain_first, plain_sae, plain_last = map(PlainDictionary, (first, llama.sae, last))
    many = list(range(20))

    def plain(b):
        # Sinks are those of the prompt without edits.
        kept, clean = {}, {site: llama.plain.value(llama.prompts[b], site) for site in (SITE, "mlp_in.2")}

        def keep(x_TxD, site):
            kept[site] = x_TxD.copy()
            return x_TxD

        def both(x_TxD):
            once_TxD = plain_sae.edited(x_TxD, x_TxD, FEATURES, lambda k, t, f: f + 4.0, before=clean[SITE])
            return plain_sae.edited(once_TxD, once_TxD, FEATURES[:2], lambda k, t, f: 0.0, before=clean[SITE])

        def drop(y_TxD):
            return plain_first.edited(kept["mlp_in.0"], y_TxD, many, lambda k, t, f: 2 * f, error="drop")

        def double(y_TxD):
            read_TxD, before = kept["mlp_in.2"], clean["mlp_in.2"]
            return plain_last.edited(read_TxD, y_TxD, many, lambda k, t, f: 2 * f, before=before)

        return [
            ("mlp_in.0", functools.partial(keep, site="mlp_in.0")),
            ("mlp_out.0", drop),
            (SITE, both),
            ("mlp_in.2", functools.partial(keep, site="mlp_in.2")),
            ("mlp_out.2", double),
        ]

    early = [llama.sae.steer(FEATURES, 4.0), llama.sae.ablate(FEATURES[:2])]
    llama.check([*early, first.scale(many, 2.0, error="drop"), last.scale(many, 2.0)], plain)


@pytest.mark.slow
def test_edits_of_smollm2_equal_plain_hooks(smollm2, smollm2_torch):
    texts = ["The capital of France is the city of", "3 + 4 ="]
    tokens = smollm2.tokenize(texts)
    sae = make_dictionary(smollm2, tokens, "resid_post.15")
    plain, plain_sae = PlainModel(copy.deepcopy(smollm2_torch)), PlainDictionary(sae)
    every, clean = list(range(60)), np.asarray(smollm2(tokens).logits_BxTxV)
    for edit, new in (
        (sae.ablate(every), lambda k, t, f: 0.0),
        (sae.scale(every, 3.0), lambda k, t, f: 3 * f),
        (sae.steer(every, 5.0), lambda k, t, f: f + 5.0),
    ):
        logits = np.asarray(smollm2(tokens, edits=[edit]).logits_BxTxV)
        for b, length in enumerate(tokens.lengths_B):

            def call(x_TxD, new=new):
                return plain_sae.edited(x_TxD, x_TxD, every, new)

            ids_T = tokens.ids_BxT[b, :length]
            change = plain.logits(ids_T, ("resid_post.15", call)) - plain.logits(ids_T)
            assert np.abs(change).max() > 0.1
            np.testing.assert_allclose(logits[b, :length] - clean[b, :length], change, atol=1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[] if k in ("ablate", "patch") else pytest.mark.slow) for k in EDITS]
)
def test_features_of_a_crosscoder_are_changed_at_each_of_its_sites(lm, name):
    """Read without edits; a later site keeps what the change at an earlier one does to it, and gets its own part."""
    parts, width, rng = ("resid_post.0", "resid_post.2"), lm.config.d_model, np.random.default_rng(0)
    sizes = dict(d_in=2 * width, n_features=48, k=8, widths=(width, width), scales=(0.5, 2.0), max_norms=(1e9, 1e9))
    crosscoder = Dictionary.initial(DictionaryConfig(kind="topk", site="+".join(parts), **sizes), jax.random.key(0))
    tokens = pad([[5, 9, 2, 17], [8, 1, 30, 3, 77, 12]])
    clean = {part: np.asarray(value) for part, value in lm(tokens, capture=parts).sites.items()}
    f_BxTxF = np.asarray(crosscoder.encode(joined.join(crosscoder.config, clean)))
    features = [int(i) for i in np.argsort(-f_BxTxF.sum((0, 1)))[:3]]
    args, new = EDITS[name](SimpleNamespace(given_BxTxK=rng.normal(size=(2, 6, 3)).astype(np.float32)))
    change_BxTxK = np.array([[[new(b, k, t, f_BxTxF[b, t, i]) - f_BxTxF[b, t, i] for k, i in enumerate(features)]
                              for t in range(6)] for b in range(2)]) * tokens.mask_BxT[..., None]  # fmt: skip
    delta = change_BxTxK @ np.asarray(crosscoder.W_dec_FxD, np.float64)[features]
    first, second = delta[..., :width] / 0.5, delta[..., width:] / 2.0
    edited = lm(tokens, capture=parts, edits=[getattr(crosscoder, name)(features, *args)]).sites
    real = tokens.mask_BxT
    np.testing.assert_allclose(edited[parts[0]][real], (clean[parts[0]] + first)[real], rtol=1e-4, atol=1e-4)
    passed_on = lm(tokens, capture=parts, edits=[SiteEdit.patch(parts[0], edited[parts[0]])]).sites[parts[1]]
    np.testing.assert_allclose(edited[parts[1]][real], (np.asarray(passed_on) + second)[real], rtol=1e-4, atol=1e-4)
    assert np.abs(second[real]).max() > 0.05


def test_a_crosscoder_steers_new_tokens_at_all_its_sites(lm):
    """Greedy generation against whole runs in which what is steered is added at every token, site by site."""
    parts, width = ("resid_post.0", "resid_post.2"), lm.config.d_model
    sizes = dict(d_in=2 * width, n_features=48, k=8, widths=(width, width), scales=(0.5, 2.0), max_norms=(1e9, 1e9))
    crosscoder = Dictionary.initial(DictionaryConfig(kind="topk", site="+".join(parts), **sizes), jax.random.key(0))
    prompts, new = [[5, 9, 2, 17], [8, 1, 30, 3, 77, 12]], 8
    rows_2xD = np.asarray(crosscoder.W_dec_FxD)[[3, 40]]
    added_D = np.float32([25.0, -30.0]) @ rows_2xD
    vectors = dict(zip(parts, (added_D[:width] / 0.5, added_D[width:] / 2.0), strict=True))

    def generate(edits):
        return [list(each.ids) for each in lm.generate(pad(prompts), max_new_tokens=new, edits=edits)]

    def follow(edits):
        texts = [list(prompt) for prompt in prompts]
        for _ in range(new):
            tokens = pad(texts)
            logits_BxTxV = np.asarray(lm(tokens, edits=edits).logits_BxTxV)
            for text, logits_TxV, last in zip(texts, logits_BxTxV, tokens.last_B, strict=True):
                text.append(int(logits_TxV[last].argmax()))
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def cut(rows):  # where the model ends a text, what follows is not generated
        return [row[: len(made)] for row, made in zip(rows, found, strict=True)]

    found = generate([crosscoder.steer([3, 40], [25.0, -30.0])])
    wanted = follow([SiteEdit.steer(part, vector_D) for part, vector_D in vectors.items()])
    assert found == cut(wanted) != cut(follow([])) and all(found)
    # Where a part of a new token is a sink, it stays; edits that read features leave new tokens alone.
    silent = dataclasses.replace(crosscoder.config, max_norms=(1e-6, 1e-6))
    assert generate([crosscoder.with_config(silent).steer([3, 40], [25.0, -30.0])]) == generate([])
    for edit in (crosscoder.ablate([3]), crosscoder.set([3], 2.0), crosscoder.steer([3], 2.0, positions="fires")):
        assert edit.at_parts_of_new_tokens() == []


def test_edits_of_several_sites_are_the_same_on_eight_devices(llama):
    """Their sinks come from a run without edits, of which each device has a part."""
    late = make_dictionary(llama.lm, llama.tokens, "resid_post.2")
    edits = [llama.sae.steer(FEATURES, 300.0), late.ablate(list(range(60)))]
    split = load_model(str(llama.lm.source.folder), mesh=make_mesh(MeshConfig(data=2, model=4)))
    own = llama.tokens.mask_BxT
    expected, found = (np.asarray(lm(llama.tokens, edits=edits).logits_BxTxV)[own] for lm in (llama.lm, split))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    alone = np.asarray(llama.lm(llama.tokens, edits=edits[:1]).logits_BxTxV)[own]
    assert np.abs(alone - expected).max() > 0.1
