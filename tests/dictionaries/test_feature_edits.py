"""Edits of features, sites and error terms against hooks in transformers models in fp64; identities; bad input."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_edits import PlainDictionary, PlainModel, make_dictionary, wanted
from tiny_models import save_tiny, save_tiny_tokenizer

from saejax import SiteEdit, load_model
from saejax.dictionaries import Dictionary
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.models import language_model, source
from saejax.models.edits import ForwardPass
from saejax.models.tokens import pad
from saejax.tasks.likelihood import loglikelihoods

FEATURES = [3, 17, 40]
POSITIONS = ("all", "last", (2, 6), "fires")
SITE = "resid_post.1"


class Setup:
    """A tiny model of a family, here and in PyTorch, three prompts and a dictionary."""

    def __init__(self, family, folder, mesh):
        save_tiny(folder, family, vocab_size=257)
        save_tiny_tokenizer(folder, 257)
        self.lm = load_model(str(folder), mesh=mesh)
        self.plain = PlainModel(source.load_torch_model(self.lm.source, "float32"))
        rng = np.random.default_rng(7)
        self.prompts = [rng.integers(1, 257, n).tolist() for n in (5, 13, 9)]
        self.tokens = pad(self.prompts)
        self.sae = make_dictionary(self.lm, self.tokens, SITE)
        self.clean = self.lm(self.tokens, capture=[SITE])
        self.given_BxTxK = rng.uniform(0, 3, (3, 13, 3)).astype(np.float32)

    def check(self, edits, plain):
        """Logits with edits equal those with plain(b)'s edits; errors relative to the largest logit."""
        found = np.asarray(self.lm(self.tokens, edits=edits).logits_BxTxV)
        for b, ids in enumerate(self.prompts):
            expected = self.plain.logits(ids, *plain(b))
            assert np.abs(found[b, : len(ids)] - expected).max() < 1e-4 * np.abs(expected).max()
        change = np.abs(found - np.asarray(self.clean.logits_BxTxV))[self.tokens.mask_BxT].max()
        assert change > 0.01 * np.abs(expected).max()


@pytest.fixture(scope="module")
def setups(tmp_path_factory, one_device):
    made = {}

    def make(family):
        if family not in made:
            made[family] = Setup(family, tmp_path_factory.mktemp(family), one_device)
        return made[family]

    return make


@pytest.fixture
def llama(setups):
    return setups("llama")


VALUES = [0.5, 2.0, 1.0]
# What the methods are given, and the activation that takes the place of f of the k-th feature at t of prompt b.
EDITS = {
    "ablate": lambda s: ((), lambda b, k, t, f: 0.0),
    "set": lambda s: ((VALUES,), lambda b, k, t, f: VALUES[k]),
    "scale": lambda s: ((-1.5,), lambda b, k, t, f: -1.5 * f),
    "steer": lambda s: ((VALUES,), lambda b, k, t, f: f + VALUES[k]),
    "patch": lambda s: ((s.given_BxTxK,), lambda b, k, t, f: s.given_BxTxK[b, t, k]),
}
EVERY = [(name, positions, error) for positions in POSITIONS for error in ("keep", "drop") for name in EDITS]
SOME = [
    ("ablate", "all", "keep"), ("scale", (2, 6), "keep"), ("steer", (2, 6), "keep"), ("set", "fires", "drop"),
    ("patch", "last", "drop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "cases"),
    [("llama", SOME), *(pytest.param(name, EVERY, marks=pytest.mark.slow) for name in ("llama", "gpt2", "gemma2"))],
)
def test_every_edit_equals_plain_hooks(setups, quick_compiler, family, cases):
    setup = setups(family)
    plain_sae = PlainDictionary(setup.sae)
    for name, positions, error in cases:
        args, new = EDITS[name](setup)

        def plain(b, new=new, positions=positions, error=error):
            def call(x_TxD):
                return plain_sae.edited(x_TxD, x_TxD, FEATURES, lambda k, t, f: new(b, k, t, f), positions, error)

            return [(SITE, call)]

        setup.check([getattr(setup.sae, name)(FEATURES, *args, positions=positions, error=error)], plain)


def test_site_edits_equal_plain_hooks(llama, quick_compiler):
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


def test_edits_of_the_error_term_equal_plain_hooks(llama, quick_compiler):
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


def test_edits_of_several_layers_and_of_one_site_act_in_their_order(llama, quick_compiler):
    """A skip transcoder, two edits at one site, and a transcoder that reads what they left and changes a later site."""
    first = make_dictionary(llama.lm, llama.tokens, "mlp_in.0", "mlp_out.0", skip=True)
    last = make_dictionary(llama.lm, llama.tokens, "mlp_in.2", "mlp_out.2")
    plain_first, plain_sae, plain_last = map(PlainDictionary, (first, llama.sae, last))
    many = list(range(20))

    def plain(b):
        kept = {}

        def keep(x_TxD, site):
            kept[site] = x_TxD.copy()
            return x_TxD

        def both(x_TxD):
            x_TxD = plain_sae.edited(x_TxD, x_TxD, FEATURES, lambda k, t, f: f + 4.0)
            return plain_sae.edited(x_TxD, x_TxD, FEATURES[:2], lambda k, t, f: 0.0)

        def drop(y_TxD):
            return plain_first.edited(kept["mlp_in.0"], y_TxD, many, lambda k, t, f: 2 * f, error="drop")

        return [
            ("mlp_in.0", functools.partial(keep, site="mlp_in.0")),
            ("mlp_out.0", drop),
            (SITE, both),
            ("mlp_in.2", functools.partial(keep, site="mlp_in.2")),
            ("mlp_out.2", lambda y: plain_last.edited(kept["mlp_in.2"], y, many, lambda k, t, f: 2 * f)),
        ]

    early = [llama.sae.steer(FEATURES, 4.0), llama.sae.ablate(FEATURES[:2])]
    llama.check([*early, first.scale(many, 2.0, error="drop"), last.scale(many, 2.0)], plain)


@jax.jit
def at_site(edit, x_BxTxD, mask_BxT):
    return edit(x_BxTxD, ForwardPass.over(mask_BxT))


def test_what_changes_nothing(llama):
    sae, x_BxTxD, mask_BxT = llama.sae, llama.clean.sites[SITE], jnp.asarray(llama.tokens.mask_BxT)
    f_BxTxF = np.asarray(sae.encode(x_BxTxD)) * llama.tokens.mask_BxT[..., None]
    silent = [int(i) for i in np.flatnonzero(f_BxTxF[:, 7:].sum((0, 1)) == 0)[:3]]
    assert len(silent) == 3
    for edit in (
        sae.scale(FEATURES, 1.0),
        sae.steer(FEATURES, 0.0),
        sae.ablate(silent, (7, None)),
        SiteEdit.patch(SITE, x_BxTxD),
    ):
        np.testing.assert_array_equal(at_site(edit, x_BxTxD, mask_BxT), x_BxTxD)
    assert (at_site(sae.ablate(silent, (0, None)), x_BxTxD, mask_BxT) != x_BxTxD).any()
    own_BxTxK = sae.encode(x_BxTxD)[..., np.array(FEATURES)]
    for edit in (sae.patch(FEATURES, own_BxTxK), sae.patch_error(x_BxTxD - sae(x_BxTxD))):  # to rounding
        np.testing.assert_allclose(at_site(edit, x_BxTxD, mask_BxT), x_BxTxD, atol=2e-5)


def test_a_patched_site_gives_the_other_run_from_there_on(llama, quick_compiler):
    other = pad([ids[::-1] for ids in llama.prompts])
    expected = llama.lm(other, capture=[SITE])
    found = llama.lm(llama.tokens, capture=[SITE], edits=[SiteEdit.patch(SITE, expected.sites[SITE])])
    mask_BxT = llama.tokens.mask_BxT
    np.testing.assert_array_equal(found.sites[SITE][mask_BxT], expected.sites[SITE][mask_BxT])
    np.testing.assert_allclose(found.logits_BxTxV[mask_BxT], expected.logits_BxTxV[mask_BxT], atol=1e-4)
    assert np.abs(found.logits_BxTxV - llama.clean.logits_BxTxV)[mask_BxT].max() > 0.1


def test_programs_are_compiled_for_kinds_not_for_features_and_values(llama, quick_compiler):
    sae, lm, tokens = llama.sae, llama.lm, llama.tokens
    lm(tokens, edits=[sae.ablate([1, 2])]), lm(tokens, edits=[sae.patch([1, 2], np.zeros((3, 13, 2)))])
    before = language_model.forward._cache_size()
    for edit in (sae.ablate([5, 9]), sae.set([7, 3], 2.0), sae.scale([0, 1], [1, 2]), sae.steer([0, 4], 3, (2, 5))):
        lm(tokens, edits=[edit])
    short = pad([ids[:4] for ids in llama.prompts])
    lm(short, edits=[sae.patch([4, 5], np.ones((3, 4, 2)))])
    assert language_model.forward._cache_size() == before


def next_ids(llama, b, edits_of, count):
    """Greedy ids after prompt b, each by a whole plain forward pass with edits_of(prompt length)."""
    ids, prompt = list(llama.prompts[b]), len(llama.prompts[b])
    for _ in range(count):
        ids.append(int(llama.plain.logits(ids, *edits_of(b, prompt))[-1].argmax()))
    new = ids[prompt:]
    return tuple(new[: new.index(0)] if 0 in new else new)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_edits_in_generation_equal_plain_hooks(llama, quick_compiler, cache):
    """Every new token is edited, or those at some positions; what was given for prompts is for prompts alone."""
    plain_sae, given, steps = PlainDictionary(llama.sae), 2 * llama.given_BxTxK, (("last", 3.0), ((6, 11), -2.0))
    edits = [llama.sae.steer(FEATURES, amount, positions) for positions, amount in steps]

    def plain(b, prompt, given_to=0, last_from=0):
        def call(x_TxD):
            new = lambda k, t, f: given[b, min(t, 12), k] if t < max(prompt, given_to) else f  # noqa: E731
            x_TxD = plain_sae.edited(x_TxD, x_TxD, FEATURES, new)
            for positions, amount in steps:
                new = lambda k, t, f, a=amount: f + a  # noqa: E731
                x_TxD = plain_sae.edited(x_TxD, x_TxD, FEATURES, new, positions, prompt=max(prompt, last_from))
            return x_TxD

        return [(SITE, call)]

    def texts(**other):
        return [next_ids(llama, b, functools.partial(plain, **other), 8) for b in range(3)]

    found = llama.lm.generate(llama.tokens, 8, edits=[llama.sae.patch(FEATURES, given), *edits], cache=cache)
    assert [done.ids for done in found] == texts()
    for other in (dict(given_to=99), dict(last_from=99)):  # other readings give other texts
        assert texts() != texts(**other)


def test_edits_in_scoring_equal_plain_hooks(llama, quick_compiler):
    """In several batches, in another order than given."""
    plain_sae = PlainDictionary(llama.sae)
    contexts, continuations = [ids[:-3] for ids in llama.prompts], [ids[-3:] for ids in llama.prompts]
    edits = [llama.sae.patch(FEATURES, llama.given_BxTxK, error="drop")]
    found = loglikelihoods(llama.lm, contexts, continuations, edits, batch_tokens=16)
    for b, ids in enumerate(llama.prompts):

        def call(x_TxD, b=b):
            return plain_sae.edited(x_TxD, x_TxD, FEATURES, lambda k, t, f: llama.given_BxTxK[b, t, k], error="drop")

        logits_TxV = llama.plain.logits(ids, (SITE, call))
        logp_TxV = logits_TxV - np.log(np.exp(logits_TxV).sum(axis=1, keepdims=True))
        assert found[b].total == pytest.approx(
            logp_TxV[np.arange(len(ids) - 4, len(ids) - 1), ids[-3:]].sum(), abs=1e-4
        )


def test_resampled_activations_are_those_of_other_firing_positions(llama):
    x_BxTxD, mask_BxT = np.asarray(llama.clean.sites[SITE]), llama.tokens.mask_BxT
    features = list(range(60))
    drawn = llama.sae.resample(features, x_BxTxD, mask_BxT, seed=1)
    f = np.asarray(llama.sae.encode(jnp.asarray(x_BxTxD)))
    fires = (f > 0) & mask_BxT[..., None] & (np.linalg.norm(x_BxTxD, axis=-1) <= llama.sae.config.max_norm)[..., None]
    np.testing.assert_array_equal(drawn[~fires], f[~fires])
    for k in features:
        own, other = f[..., k][fires[..., k]], drawn[..., k][fires[..., k]]
        assert set(other.tolist()) <= set(own.tolist()) and (len(own) < 2 or (own != other).all())
    np.testing.assert_array_equal(llama.sae.resample([40, 7], x_BxTxD, mask_BxT, seed=1), drawn[..., [40, 7]])
    assert (llama.sae.resample(features, x_BxTxD, mask_BxT, seed=2) != drawn).any()


@pytest.mark.parametrize("new_tokens", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_redrawn_activations_come_from_pools_in_prompts_and_new_tokens(llama, quick_compiler, new_tokens):
    plain_sae, pools = PlainDictionary(llama.sae), [[4.0, -3.0], [], [6.0]]
    edit = llama.sae.redraw(FEATURES, pools, 40, seed=3)
    drawn_TxK = np.asarray(edit.offset.values_BxTxN[0])
    assert set(drawn_TxK[:, 0].tolist()) == {4.0, -3.0} and (drawn_TxK[:, 2] == 6).all()

    def plain(b, prompt=None):
        def new(k, t, f):
            return drawn_TxK[t, k] if pools[k] else f

        return [(SITE, lambda x_TxD: plain_sae.edited(x_TxD, x_TxD, FEATURES, new, "fires"))]

    llama.check([edit], plain)
    if new_tokens:
        found = llama.lm.generate(llama.tokens, new_tokens, edits=[edit])
        assert [done.ids for done in found] == [next_ids(llama, b, plain, new_tokens) for b in range(3)]
    again = llama.sae.redraw(FEATURES[::-1], pools[::-1], 40, seed=3)  # each feature has draws of its own
    np.testing.assert_array_equal(np.asarray(again.offset.values_BxTxN[0])[:, ::-1], drawn_TxK)
    own = llama.sae.redraw(FEATURES, pools, 40, seed=3, texts=[5, 2, 5])  # texts have draws of their own
    drawn_BxTxK = np.asarray(own.offset.values_BxTxN)
    assert (drawn_BxTxK[0] != drawn_BxTxK[1]).any()
    np.testing.assert_array_equal(drawn_BxTxK[0], drawn_BxTxK[2])

    def plain_of_its_own(b, prompt=None):
        def new(k, t, f):
            return drawn_BxTxK[b, t, k] if pools[k] else f

        return [(SITE, lambda x_TxD: plain_sae.edited(x_TxD, x_TxD, FEATURES, new, "fires"))]

    llama.check([own], plain_of_its_own)
    with pytest.raises(UserError, match="an edit is for 2 texts, but it is used on 3"):
        llama.lm(llama.tokens, edits=[llama.sae.redraw(FEATURES, pools, 40, texts=[0, 1])])
    with pytest.raises(UserError, match="the pool of feature 3 holds NaN"):
        llama.sae.redraw([3], [[np.nan]], 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sae: sae.ablate([60]), r"features \[60\] do not exist: there are 0 to 59"),
        (lambda sae: sae.scale([-1], 2.0), r"features \[-1\] do not exist"),
        (lambda sae: sae.ablate([]), "expected at least one, and none twice"),
        (lambda sae: sae.ablate([4, 5, 4]), "expected at least one, and none twice"),
        (lambda sae: sae.ablate([1], "first"), r"unknown positions 'first': expected all, last, fires, or \(start"),
        (lambda sae: sae.ablate([1], (5, 5)), r"unknown positions \(5, 5\)"),
        (lambda sae: sae.ablate([1], (-2, None)), r"unknown positions \(-2, None\)"),
        (lambda sae: sae.ablate([1], error="lose"), "unknown error 'lose': expected one of keep, drop"),
        (lambda sae: sae.ablate_error("fires"), "unknown positions 'fires'"),
        (
            lambda sae: sae.set([1, 2], [1.0]),
            r"the activation has the shape \(1,\): expected a number or the shape \(2,\)",
        ),
        (lambda sae: sae.steer([1], np.nan), "holds NaN"),
        (lambda sae: sae.patch([1, 2], np.zeros((3, 13, 3))), r"\(3, 13, 3\): expected \[prompts, tokens, 2\]"),
        (lambda sae: sae.patch_error(np.zeros((3, 13, 39))), r"expected \[prompts, tokens, 40\]"),
        (lambda sae: sae.patch([1], np.zeros((2, 13, 1))), "values for 2 prompts of 13 tokens, but .* 3 prompts of 13"),
        (lambda sae: sae.patch([1], np.zeros((3, 12, 1))), "values for 3 prompts of 12 tokens"),
        (lambda sae: SiteEdit.set("resid_last.1", np.zeros(40)), "there is no site 'resid_last.1'"),
        (lambda sae: SiteEdit.ablate("resid_post.7"), "there is no site resid_post.7"),
        (lambda sae: SiteEdit.set(SITE, 2.0), r"the vector has the shape \(\): expected one number for each dimension"),
        (lambda sae: SiteEdit.set(SITE, np.zeros(39)), "an edit has the width 39, but resid_post.1 is 40 wide"),
        (lambda sae: SiteEdit.patch(SITE, np.zeros((3, 13, 8))), "an edit has the width 8"),
        (lambda sae: SiteEdit.ablate(SITE, "fires"), "unknown positions 'fires': expected all, last, or"),
    ],
)
def test_bad_edits_are_refused(llama, make, message):
    with pytest.raises(UserError, match=message) as error:
        llama.lm(llama.tokens, edits=[make(llama.sae)])
    assert "\n" not in str(error.value)


def test_dictionaries_that_do_not_fit_are_refused(llama):
    def changed(**changes):
        other = make_dictionary(llama.lm, llama.tokens, SITE)
        config = dataclasses.replace(other.config, **changes)
        shapes = {name: shape for name, (shape, _) in parameter_table(config).items()}
        return Dictionary(config, **{name: jnp.ones(shape) for name, shape in shapes.items()})

    with pytest.raises(UserError, match=r"from mlp_out.2 to mlp_in.2 cannot be edited"):
        changed(site="mlp_out.2", target="mlp_in.2").ablate([1])
    with pytest.raises(UserError, match="a dictionary has the width 39, but resid_post.1 is 40 wide"):
        llama.lm(llama.tokens, edits=[changed(d_in=39).ablate([1])])
    with pytest.raises(UserError, match="there is no site resid_post.9"):
        llama.lm.generate(llama.tokens, 2, edits=[changed(site="resid_post.9").ablate([1])])


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
