"""Effects of every kind of edit against PyTorch hooks in float64, slopes of any target, and readouts of texts."""

import dataclasses
import itertools

import numpy as np
import pytest
from full_passes import attribution_of_each, draw_falls
from scipy.special import log_softmax

from saejax.dictionaries import Dictionary, rescale
from saejax.errors import UserError
from saejax.interventions import bases, edits, engine, slopes
from saejax.interventions.edits import ActivationReplacement
from saejax.interventions.split_model import SplitModel
from saejax.interventions.steering import vector_edits
from saejax.tasks.likelihood import encode_pair, loglikelihoods

SETS = [[3], [40], [7, 90, 120], list(range(0, 160, 2)), []]
FEW_SETS = [[3], [8, 20, 51], [90, 4], []]
TWO_SETS = [[3, 20], [90, 4], []]  # two of one size, for whole passes: each size is another program
READOUTS = ("logit_diff", "log_prob", "top1", "kl", "change_norm")
MEAN_F = np.linspace(0.0, 0.5, 160).astype(np.float32)
FACTORS = np.array([2.0, 0.5, -1.0, 0.0, 1.0])
# An activation f becomes f - a (f - r) + b, for each set: how the edit is made, and a, r and b.
EDITS = dict(
    zero=(edits.mask, (), 1.0, "nothing", 0.0),
    part=(edits.mask, (0.3,), 0.3, "nothing", 0.0),
    mean=(edits.mask, (1.0, ActivationReplacement("mean", mean_F=MEAN_F)), 1.0, "means", 0.0),
    random=(edits.resample, (), 1.0, "draws", 0.0),
    scale=(edits.scale, (FACTORS,), 1.0 - FACTORS, "nothing", 0.0),
    set_to=(edits.set_to, (0.7,), 1.0, "nothing", 0.7),
    add=(edits.add, (0.4,), 0.0, "nothing", 0.4),
    swap=(edits.swap, (0.8,), 0.8, "counterpart", 0.0),
)
PLACES = [
    ("resid_post.1", "all", "keep"),
    ("resid_post.1", "last", "drop"),
    ("resid_post.1", "1:4", "keep"),
    ("transcoder", "all", "drop"),
    ("transcoder", "last", "keep"),
    ("transcoder", "1:4", "drop"),
]
# Every kind at an SAE or at a transcoder, and every place with a kind or two; all pairs are slow.
QUICK = {(kind, PLACES[(3 * n + n // 2) % 6]) for n, kind in enumerate(EDITS)}
CASES = [
    pytest.param(kind, *place, marks=() if (kind, place) in QUICK else pytest.mark.slow)
    for kind, place in itertools.product(EDITS, PLACES)
]
CASES += [("zero", site, "all", "keep") for site in ("resid_post.3", "mlp_act.1", "attn_out.3")]


@pytest.fixture(scope="module")
def find_dictionary(make_dictionary):
    """find_dictionary(site): an SAE, or a transcoder of the same size whose features write to the MLP's output."""

    def find(site: str) -> Dictionary:
        if site != "transcoder":
            return make_dictionary(site)
        reads = make_dictionary("mlp_in.1")
        config = dataclasses.replace(reads.config, target="mlp_out.1", target_max_norm=1e9, centred=False)
        arrays = reads.arrays
        # Without centring, the encoder's bias takes the decoder's bias along.
        arrays["b_enc_F"] = arrays["b_enc_F"] - arrays["b_dec_D"] @ arrays["W_enc_DxF"]
        return Dictionary(config, **arrays)

    return find


def draw_replacements(tiny, dictionary, some, source, positions, error) -> list[np.ndarray]:
    """Return what stands in place of each prompt's activations under random replacement, [T, F] each.

    What the draws are is tested elsewhere; here they are those of the engine.
    """
    split = SplitModel(tiny, dictionary, positions, error)
    drawn = [None] * len(some)
    features_F = np.arange(dictionary.config.n_features)
    for number, run in enumerate(split.run(some)):
        f_BxTxF = np.asarray(split.dictionary.encode(run.read_BxTxD), np.float64)
        fall_PxTxF = draw_falls(split, run, source.of_run(number), features_F)
        for row, prompt in enumerate(run.index_P):
            drawn[prompt] = (f_BxTxF[row] - fall_PxTxF[row])[: run.last_B[row] + 1]
    return drawn


def put(run, value_TxD) -> np.ndarray:
    """Return the last logits with this value at the site that the features write to."""
    return run.logits(lambda _: value_TxD)


def read_out(logits_V, clean_V, run, change_TxD) -> list[float]:
    """Return the readouts of one edit from the last logits with it and without it."""
    logp_V, clean_logp_V = log_softmax(logits_V), log_softmax(clean_V)
    return [
        logp_V[run.correct] - logp_V[run.wrong],
        logp_V[run.correct],
        logp_V.argmax() == run.correct,
        np.sum(np.exp(clean_logp_V) * (clean_logp_V - logp_V)),
        np.linalg.norm(change_TxD),
    ]


# Statement 5 of WORKSPACE.md, what must hold.
@pytest.mark.parametrize(("kind", "site", "positions", "error"), CASES)
def test_effects_equal_torch_hooks(tiny, plain, pairs, find_dictionary, kind, site, positions, error):
    dictionary, some = find_dictionary(site), pairs[:6]
    make, options, fraction, replacement, addend = EDITS[kind]
    batch = make(dictionary, SETS, *options)
    value_ExPxR = engine.effects(tiny, some, batch, READOUTS, positions, error)
    fraction_E = np.broadcast_to(fraction, len(SETS))
    if replacement == "draws":
        drawn = draw_replacements(tiny, dictionary, some, batch.replacement, positions, error)
    for p in range(0, len(some), 2):
        run = plain(dictionary, some[p])
        x_TxD = run.value()
        f_TxF, usable_Tx1 = run.features(x_TxD), run.is_usable(x_TxD)[:, None]
        rebuilt_TxD = f_TxF @ run.W_dec_FxD + np.asarray(dictionary.b_dec_D[...], np.float64)
        editable_Tx1 = np.zeros_like(usable_Tx1)
        editable_Tx1[dict(all=slice(None), last=slice(-1, None)).get(positions, slice(1, 4))] = True
        editable_Tx1 &= usable_Tx1
        r_TxF = 0.0 * f_TxF
        if replacement == "means":
            r_TxF = r_TxF + MEAN_F
        elif replacement == "draws":
            r_TxF = drawn[p]
        elif replacement == "counterpart":
            counterpart = plain(dictionary, dataclasses.replace(some[p], text=some[p].counterpart))
            r_TxF = counterpart.features(counterpart.value())
        base_TxD = run.value(dictionary.config.target or site)
        if error == "drop":
            base_TxD = np.where(usable_Tx1, rebuilt_TxD, base_TxD)
        clean_V = put(run, base_TxD)
        for e, members in enumerate(SETS):
            rise_TxK = addend - fraction_E[e] * (f_TxF - r_TxF)[:, members]
            change_TxD = (editable_Tx1 * rise_TxK) @ run.W_dec_FxD[members]
            wanted_R = read_out(put(run, base_TxD + change_TxD), clean_V, run, change_TxD)
            np.testing.assert_allclose(value_ExPxR[e, p], wanted_R, atol=2e-5)
    assert np.ptp(value_ExPxR[:, :, 0], axis=0).max() > 0.02, "an edit changes something"


@pytest.mark.parametrize("norm", ["layer_norm", "token_norm", "center"])
def test_features_of_normalised_tokens_write_in_the_units_of_the_site(tiny, plain, pairs, make_dictionary, norm):
    made = make_dictionary("resid_post.1")
    arrays = made.arrays | dict(b_enc_F=0 * made.b_enc_F[...] - 0.2)
    dictionary = Dictionary(dataclasses.replace(made.config, input_norm=norm), **arrays)
    value_ExP = engine.effects(tiny, pairs[:2], edits.mask(dictionary, FEW_SETS))[:, :, 0]
    W_enc_DxF, b_enc_F, b_dec_D = (np.asarray(arrays[n], np.float64) for n in ("W_enc_DxF", "b_enc_F", "b_dec_D"))
    for p, prompt in enumerate(pairs[:2]):
        run = plain(dictionary, prompt)
        x_TxD = run.value()
        mean_Tx1 = 0 if norm == "token_norm" else x_TxD.mean(axis=1, keepdims=True)
        scale_Tx1 = dict(
            layer_norm=x_TxD.std(axis=1, ddof=1, keepdims=True),
            token_norm=np.sqrt(np.square(x_TxD).mean(axis=1, keepdims=True)),
            center=np.ones((len(x_TxD), 1)),
        )[norm]
        normal_TxD = (x_TxD - mean_Tx1) / (scale_Tx1 + (1e-5 if norm == "layer_norm" else 0))
        f_TxF = np.maximum((normal_TxD - b_dec_D) @ W_enc_DxF + b_enc_F, 0) * run.is_usable(x_TxD)[:, None]
        for e, members in enumerate(FEW_SETS):
            wanted = run.diff(lambda _: x_TxD - scale_Tx1 * (f_TxF[:, members] @ run.W_dec_FxD[members]))  # noqa: B023
            assert value_ExP[e, p] == pytest.approx(wanted, abs=1e-4)


def test_other_bases_of_a_site_read_it_whether_or_not_the_dictionary_normalises_tokens(make_dictionary):
    made = make_dictionary("resid_post.1")
    normal = rescale.to_output_units(made.with_config(dataclasses.replace(made.config, input_norm="layer_norm")))
    x_NxD = 4 * np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32) + 1
    np.testing.assert_allclose(bases.linear(normal, np.eye(64)).encode(x_NxD), x_NxD, rtol=1e-6)
    random = bases.untrained(normal, 7, 0)
    scale_Nx1 = x_NxD.std(axis=1, ddof=1, keepdims=True)
    pre_NxF = (x_NxD - x_NxD.mean(axis=1, keepdims=True)) / scale_Nx1 - np.asarray(made.b_dec_D[...])
    pre_NxF = pre_NxF @ np.asarray(random.W_enc_DxF[...])
    wanted_NxF = np.where(pre_NxF >= np.sort(pre_NxF, axis=1)[:, [-7]], pre_NxF, 0) * scale_Nx1
    np.testing.assert_allclose(random.encode(x_NxD), wanted_NxF, atol=1e-3)


def test_effects_of_matrices_in_bfloat16_are_not_rounded(tiny, pairs, make_dictionary):
    arrays = make_dictionary("resid_post.1").arrays
    narrow = {name: array.astype("bfloat16") if name.startswith("W") else array for name, array in arrays.items()}
    config = make_dictionary("resid_post.1").config
    wide = Dictionary(config, **{name: array.astype("float32") for name, array in narrow.items()})
    narrow_ExP, wide_ExP = (
        engine.effects(tiny, pairs[:4], edits.mask(each, SETS))[:, :, 0]
        for each in (Dictionary(config, **narrow), wide)
    )
    np.testing.assert_allclose(narrow_ExP, wide_ExP, atol=1e-5)
    f_BxTxF, slope_BxTxD = (np.random.default_rng(0).normal(size=(2, 3, n)).astype(np.float32) for n in (160, 64))
    scores = (slopes.weighted(f_BxTxF, slope_BxTxD, each["W_dec_FxD"]) for each in (narrow, wide.arrays))
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)


def test_vectors_equal_torch_hooks(tiny, plain, pairs, make_dictionary):
    vector_D, sae = np.random.default_rng(0).normal(size=64), make_dictionary("resid_post.1")
    added_P = engine.effects(tiny, pairs[:4], vector_edits(sae, [vector_D]))[0, :, 0]
    for p, prompt in enumerate(pairs[:4]):
        run = plain(sae, prompt)
        wanted = run.diff(lambda x_TxD, run=run: x_TxD + run.is_usable(x_TxD)[:, None] * vector_D)
        np.testing.assert_allclose(added_P[p], wanted, atol=2e-5)


@pytest.mark.parametrize("norm", ["layer_norm", pytest.param("token_norm", marks=pytest.mark.slow)])
def test_features_of_normalised_tokens_add_what_they_do_in_the_model(tiny, few, dictionary, norm):
    """The engine, which computes changes from activations and decoder rows, equals edits of forward passes."""
    known = Dictionary(dataclasses.replace(dictionary.config, input_norm=norm), **dictionary.arrays)
    some, split = few[:2], SplitModel(tiny, known)
    value_ExP = engine.effects(tiny, some, edits.mask(known, FEW_SETS))[:, :, 0]
    attribution_PxF = attribution_of_each(split, some)
    slope_PxTxD = slopes.slopes(tiny, some, "logit_diff", known.site)
    for p, prompt in enumerate(some):
        tokens = tiny.tokenize([prompt.text])
        answers = [tiny.token_id(answer) for answer in (prompt.correct, prompt.wrong)]
        for e, members in enumerate(FEW_SETS):
            output = tiny(tokens, edits=[known.ablate(members)] if members else [])
            correct, wrong = np.asarray(output.logits_BxTxV)[0, tokens.last_B[0], answers]
            assert value_ExP[e, p] == pytest.approx(correct - wrong, abs=2e-5)
        x_TxD = np.asarray(tiny(tokens, capture=[known.site], logits=False).sites[known.site])[0]
        f_TxF = np.asarray(known.encode(x_TxD) * known.output_scale(x_TxD) * known.is_not_sink(x_TxD)[:, None])
        wanted_F = (f_TxF * (slope_PxTxD[p, : len(x_TxD)] @ np.asarray(known.W_dec_FxD[...]).T)).sum(axis=0)
        np.testing.assert_allclose(attribution_PxF[p], wanted_F, atol=1e-4)
    assert np.abs(value_ExP[-1:] - value_ExP[:-1]).max() > 0.02
    with pytest.raises(UserError, match="normalises each token"):
        engine.effects(tiny, some, edits.add(known, FEW_SETS, 0.4))


def test_edits_where_no_position_is_editable_are_told(tiny, few, dictionary, caplog):
    config = dataclasses.replace(dictionary.config, max_norm=1e-6)  # every position is an attention sink
    for known, positions, is_told in (
        (dictionary, "all", False),
        (Dictionary(config, **dictionary.arrays), "all", True),
        (dictionary, "90:91", True),
    ):
        caplog.clear()
        values_ExP = engine.effects(tiny, few[:2], edits.mask(known, [FEW_SETS[1], []]), positions=positions)[:, :, 0]
        assert ("edits change nothing, with the positions" in caplog.text) == is_told
        assert (np.ptp(values_ExP, axis=0).max() == 0) == is_told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(readouts=()), "readouts is empty"),
        (dict(error="droped"), "unknown error 'droped'"),
        (dict(positions="4:2"), "no positions in '4:2'"),
        (dict(correct=" runs" * 200, readouts=("answer_log_prob",)), "with its answer, more than the model's context"),
        (dict(wrong="same"), "both answers of prompt 2, counted from 0, begin with the same token"),
        (dict(edits=(edits.swap, FEW_SETS), readouts=("ce",)), "ce is measured on whole texts: use another"),
        (dict(edits=(edits.mask, [[1.5]])), "expected a list of their numbers"),
        (dict(edits=(edits.mask, [[True, False]])), "expected a list of their numbers"),
        (dict(edits=(edits.mask, [3, 4])), "expected a list of their numbers"),
        (dict(edits=(edits.scale, FEW_SETS, [1.0, 2.0])), "there are 4 sets and amounts of the shape"),
    ],
)
def test_requests_that_mean_nothing_are_refused(tiny, few, dictionary, changes, message):
    make, sets, *amounts = changes.pop("edits", (edits.mask, FEW_SETS))
    some = list(few)
    correct = changes.pop("correct", some[2].correct)
    wrong = correct + " far" if changes.pop("wrong", None) else some[2].wrong
    some[2] = dataclasses.replace(some[2], correct=correct, wrong=wrong)
    with pytest.raises(UserError, match=message):
        engine.effects(tiny, some, make(dictionary, sets, *amounts), **changes)


def test_edits_of_forward_passes_are_no_batch_of_edits(tiny, few, dictionary):
    with pytest.raises(UserError, match="edits is a list: expected edits of one dictionary's features"):
        engine.effects(tiny, few, [dictionary.ablate([3])])


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    return make_dictionary("resid_post.1")


@pytest.fixture(scope="module")
def few(prompts):
    return prompts[:6]


def test_a_set_with_a_feature_twice_or_out_of_range_is_refused(dictionary):
    for members, message in (([1, 2, 1], "holds a feature twice"), ([10_000], "does not exist")):
        with pytest.raises(UserError, match=message):
            edits.mask(dictionary, [members])


def test_slopes_equal_autograd_in_torch(tiny, few, dictionary, plain):
    slope_PxTxD = slopes.slopes(tiny, few, "logit_diff", "resid_post.1")
    for p, prompt in enumerate(few):
        want_TxD = plain(dictionary, prompt).slopes()
        np.testing.assert_allclose(slope_PxTxD[p, : len(want_TxD)], want_TxD, atol=1e-4)
        assert (slope_PxTxD[p, len(want_TxD) :] == 0).all()


def test_attribution_of_a_target_equals_that_of_answers(tiny, prompts, dictionary):
    """For prompts that all have the same two answers, these are a target like any other."""
    alike = [prompt for prompt in prompts if (prompt.correct, prompt.wrong) == (prompts[1].correct, prompts[1].wrong)]
    split = SplitModel(tiny, dictionary)
    runs = split.run(alike)
    targets_Rx2 = np.array([[5, 9], [tiny.token_id(alike[0].correct), tiny.token_id(alike[0].wrong)], [9, 5]])
    target_RxF, again_RxF = slopes.target_attributions([split, split], [runs, runs], targets_Rx2)
    np.testing.assert_array_equal(target_RxF, again_RxF)
    want_F = slopes.attribution(split, runs)
    np.testing.assert_allclose(target_RxF[1], want_F, atol=1e-5)
    np.testing.assert_allclose(target_RxF[0], -target_RxF[2], atol=1e-5)
    assert np.abs(target_RxF[0]).max() > 1e-3


def test_whole_answers_and_cross_entropy_equal_full_passes(tiny, few, dictionary):
    batch = edits.mask(dictionary, TWO_SETS)
    value_ExPxR = engine.effects(tiny, few, batch, ("answer_log_prob", "ce", "logit_diff"))
    # Other readouts make another program: the same to rounding of logits.
    np.testing.assert_allclose(value_ExPxR[:, :, 2], engine.effects(tiny, few, batch)[:, :, 0], atol=2e-5)
    pairs = [encode_pair(tiny.tokenizer, prompt.text, prompt.correct + " and on") for prompt in few]
    longer = [dataclasses.replace(prompt, correct=prompt.correct + " and on") for prompt in few]
    tokens = tiny.tokenize([prompt.text for prompt in few])
    added_ExP = engine.effects(tiny, few, edits.add(dictionary, TWO_SETS, 0.4), ("ce",))[:, :, 0]
    whole = engine.effects(tiny, longer, batch, ("answer_log_prob",))[:, :, 0]
    for e, members in enumerate(TWO_SETS):
        changes = [dictionary.ablate(members)] if members else []
        totals = [scored.total for scored in loglikelihoods(tiny, *zip(*pairs, strict=True), changes)]
        np.testing.assert_allclose(whole[e], totals, atol=2e-4)
        logp_PxTxV = log_softmax(np.asarray(tiny(tokens, edits=changes).logits_BxTxV, np.float64), axis=2)
        for p, length in enumerate(tokens.lengths_B):
            ce = -logp_PxTxV[p, np.arange(length - 1), tokens.ids_BxT[p, 1:length]].mean()
            assert value_ExPxR[e, p, 1] == pytest.approx(ce, abs=1e-4)
        steered = [dictionary.steer(members, 0.4)] if members else []
        logp_PxTxV = log_softmax(np.asarray(tiny(tokens, edits=steered).logits_BxTxV, np.float64), axis=2)
        for p, length in enumerate(tokens.lengths_B):
            ce = -logp_PxTxV[p, np.arange(length - 1), tokens.ids_BxT[p, 1:length]].mean()
            assert added_ExP[e, p] == pytest.approx(ce, abs=1e-4)
    with pytest.raises(UserError, match="edits at all positions"):
        engine.effects(tiny, few, batch, ("ce",), positions="last")


def test_without_edits_a_prompt_runs_its_last_token_alone(tiny, few, dictionary, monkeypatch):
    split, tokens, progress, run_rows = SplitModel(tiny, dictionary), [], [], engine.run_rows
    nothing = edits.mask(dictionary, [[]])
    monkeypatch.setattr(engine, "run_rows", lambda *args: tokens.append(args[3].row_SxN.size) or run_rows(*args))
    values = engine.run_edits(split, split.run(few), nothing, 1, lambda *done: progress.append(done))
    assert tokens == [-(-len(few) // 8) * 8]  # filled up to a multiple of 8 tokens
    assert progress[0] == (0, 2 * len(few)) and progress[-1] == (2 * len(few), 2 * len(few))
    np.testing.assert_array_equal(values["logit_diff"][0], values["logit_diff"][1])
