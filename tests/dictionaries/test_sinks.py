"""The attention-sink rule is the model's, whoever trained a dictionary: in edits, scores and files."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TINY_TEXT

import saejax
from saejax.dictionaries import Dictionary, DictionaryConfig, load_dictionary, save_dictionary
from saejax.errors import UserError
from saejax.models.edits import SiteEdit
from saejax.models.sinks import SAMPLE, SINK_FACTOR
from saejax.models.tokens import pad

SITE = "resid_post.1"
SINK, USUAL = 7, (40, 41, 52, 63, 44, 75)  # token ids; the first gets an embedding of an extreme norm
TEXTS = [sentence.strip() + "." for sentence in TINY_TEXT.split(".") if sentence.strip()]


@pytest.fixture(scope="module")
def lm(tiny_llama, one_device):
    """A tiny model in which every position of the token ``SINK`` is an attention sink."""
    model = saejax.load_model(str(tiny_llama), mesh=one_device)
    embed_VxD = model.params["embed_VxD"]
    model.params["embed_VxD"] = embed_VxD.at[SINK].set(1000 * jnp.abs(embed_VxD[SINK]) + 500)
    return model


@pytest.fixture(scope="module")
def foreign(lm):
    """An SAE of another tool: its file says nothing of sinks. All features fire at sinks."""
    return make_dictionary(lm.config.d_model, SITE)


def make_dictionary(d: int, site: str, target: str = "") -> Dictionary:
    config = DictionaryConfig(kind="standard", site=site, target=target, d_in=d, n_features=2 * d, centred=not target)
    dictionary = Dictionary.initial(config, jax.random.key(0))
    noise = 0.1 * np.abs(np.random.default_rng(0).normal(size=(d, 2 * d))).astype(np.float32)
    return Dictionary(config, **dictionary.arrays | dict(W_enc_DxF=dictionary.W_enc_DxF[...] + noise))


def change(lm, tokens, edit, site=SITE):
    """By how much an edit changes the value at a site, [B, T]."""
    edited, clean = (np.asarray(lm(tokens, capture=[site], edits=edits).sites[site]) for edits in ([edit], []))
    return np.abs(edited - clean).max(axis=-1)


# Statement 7 of WORKSPACE.md, what must hold.
def test_edits_of_a_dictionary_of_others_leave_sinks_alone(lm, foreign):
    """By norm, wherever the sink is: position 0 of a text that begins without one is edited."""
    places = (0, 3)
    ids = pad([[*USUAL[:place], SINK, *USUAL[place:]] for place in places])
    for edit in (foreign.ablate(range(20)), foreign.ablate(range(20), error="drop"), foreign.steer([3], 5.0)):
        for place, change_T in zip(places, change(lm, ids, edit), strict=True):
            assert change_T[place] == 0
            assert (np.delete(change_T, place) > 1e-3).all()
    before, after = (lm.generate(ids, 3, edits=edits) for edits in ([], [foreign.steer([3], 0.0)]))
    assert all(one.ids and one.ids == other.ids for one, other in zip(before, after, strict=True))


def test_a_strong_edit_makes_no_sinks_for_the_edits_after_it(lm, foreign):
    """An ablation after a strong steering acts at the steered positions, of an SAE and of a transcoder."""
    ids, transcoder = pad([[SINK, *USUAL]]), make_dictionary(lm.config.d_model, "mlp_in.1", "mlp_out.1")
    for dictionary in (foreign, transcoder):
        site = dictionary.config.target or dictionary.site
        amount = 5 * lm.sink_norm(site)
        strong, ablated = dictionary.steer([3], amount, positions=(1, None)), dictionary.ablate(range(4, 24))
        steered, both = (
            np.asarray(lm(ids, capture=[site], edits=edits).sites[site])[0] for edits in ([strong], [strong, ablated])
        )
        change_T = np.abs(both - steered).max(axis=-1)
        assert (change_T[1:] > 1e-4).all() and (site != SITE or change_T[0] == 0), (site, change_T)


def test_an_edit_of_an_earlier_site_makes_no_sinks_for_edits_of_later_ones(lm, foreign):
    """Nor does it unmake one: sinks are those of the run without edits."""
    ids, d = pad([[SINK, *USUAL], [*USUAL, SINK]]), lm.config.d_model
    transcoder = make_dictionary(d, "mlp_in.1", "mlp_out.1")
    strong = SiteEdit.steer("resid_post.0", np.ones(d), 5 * lm.sink_norm(SITE))
    strong_sae = make_dictionary(d, "resid_post.0").steer([3], 5 * lm.sink_norm(SITE))
    weak = SiteEdit.set("resid_post.0", np.linspace(-1, 1, d))
    is_sink_BxT = ids.ids_BxT == SINK
    for earlier, later in ((strong_sae, foreign), (weak, foreign), (strong, transcoder)):
        site, ablated = later.config.target or later.site, later.ablate(range(4, 24))
        first, both = (
            np.asarray(lm(ids, capture=[site], edits=edits).sites[site]) for edits in ([earlier], [ablated, earlier])
        )
        changed_BxT = np.abs(both - first).max(axis=-1) > 1e-4
        assert changed_BxT[~is_sink_BxT].all() and not (changed_BxT & is_sink_BxT)[:, : 7 * (later is foreign)].any()
    # In a text that goes on, new tokens are no part of that run.
    steered = [one.ids for one in lm.generate(ids, 4, edits=[strong])]
    moved = lm.generate(ids, 4, edits=[strong, foreign.steer([3], 9 * lm.sink_norm(SITE))])
    assert [one.ids for one in moved] != steered


def test_an_edit_behind_all_texts_is_told(lm, foreign, caplog):
    ids = pad([[*USUAL], [*USUAL[:3]]])
    told = f"an edit at {SITE} changes nothing: it begins at token 6, counted from 0, and the longest text has 6"
    for edit in (foreign.ablate([3], positions=(6, None)), SiteEdit.ablate(SITE, (np.int64(6), 2**40))):
        lm(ids, edits=[edit])
        assert told in caplog.text
        caplog.clear()
        lm.generate(ids, 2, edits=edit)
        assert not caplog.text


def test_a_model_without_a_tokenizer_has_no_rule(lm, foreign):
    bare = copy.copy(lm)
    bare.tokenizer = None
    with pytest.raises(UserError, match=f"at {SITE} is measured on a few sentences, and this model has no tokenizer"):
        bare(pad([[*USUAL]]), edits=[foreign.ablate([3])])
    known = foreign.with_sink_norms(lambda site: 100.0)
    assert bare(pad([[*USUAL]]), edits=[known.ablate([3])]).logits_BxTxV is not None


def test_an_edit_of_sinks_alone_is_told(lm, foreign, caplog):
    at_sinks, elsewhere = pad([[SINK, *USUAL]] * 2), pad([[SINK, *USUAL], [*USUAL, SINK]])
    two_sinks = pad([[SINK, SINK, *USUAL[1:]]] * 2)
    cases = (
        ((0, 1), at_sinks, True),
        ((0, 1), elsewhere, False),
        ((0, 2), at_sinks, False),
        ((0, 2), two_sinks, True),
        ((1, 2), two_sinks, True),
        ((0, 9), pad([[SINK] * 9]), False),  # longer than what chat templates begin with
        ("all", at_sinks, False),
    )
    in_a_pass = [(lambda edit, ids: lm(ids, edits=[edit]), *case) for case in cases]
    generating = [(lambda edit, ids: lm.generate(ids, 2, edits=[edit]), *case) for case in cases[:2]]
    for call, positions, ids, is_told in in_a_pass + generating:
        caplog.clear()
        call(foreign.steer([3], 5.0, positions=positions), ids)
        where = {(0, 1): "the first token alone, an", (1, 2): "token 1 alone, an"}
        where = where.get(positions, "tokens 0 to 1 alone,")
        told = f"an edit at {SITE} changes nothing: it acts at {where} attention sink"
        assert (told in caplog.text) == is_told, (positions, caplog.text)


def test_an_edit_of_a_crosscoder_at_sinks_alone_is_told(lm, caplog):
    d, parts = lm.config.d_model, ("resid_post.0", "resid_post.1")
    at_sink = pad([[SINK, *USUAL]])
    norms = [np.linalg.norm(np.asarray(value)[0], axis=-1) for value in lm(at_sink, capture=parts).sites.values()]
    limits = tuple(float(np.sort(norm_T)[-2:].mean()) for norm_T in norms)
    assert [norm_T.argmax() for norm_T in norms] == [0, 0]
    config = DictionaryConfig(
        kind="standard",
        site="+".join(parts),
        d_in=2 * d,
        n_features=3 * d,
        widths=(d, d),
        scales=(1.0, 1.0),
        max_norms=limits,
    )
    crosscoder = Dictionary.initial(config, jax.random.key(0))
    for positions, is_told in (((0, 1), True), ((0, 3), False)):
        caplog.clear()
        lm(at_sink, edits=crosscoder.steer([3], 5.0, positions=positions))
        told = "an edit at resid_post.0+resid_post.1 changes nothing: it acts at the first token alone"
        assert (told in caplog.text) == is_told, (positions, caplog.text)


def test_a_transcoder_leaves_sinks_of_either_site_alone(lm):
    transcoder = make_dictionary(lm.config.d_model, "mlp_in.1", "mlp_out.1")
    ids = pad([[SINK, *USUAL]])
    sites = lm(ids, capture=["mlp_in.1", "mlp_out.1"]).sites
    read, written = (np.linalg.norm(value_1xTxD[0], axis=-1) for value_1xTxD in sites.values())
    for norms, name in ((read, "max_norm"), (written, "target_max_norm")):
        limits = dict(max_norm=1e9, target_max_norm=1e9) | {name: float(np.sort(norms)[-2:].mean())}
        edited = transcoder.with_config(dataclasses.replace(transcoder.config, **limits))
        change_T = change(lm, ids, edited.steer([3], 5.0), "mlp_out.1")[0]
        assert np.flatnonzero(change_T == 0).tolist() == [int(norms.argmax())]


def test_the_rule_is_ten_times_the_median_of_the_sample(lm):
    tokens = pad([lm.tokenizer(text)["input_ids"][: lm.config.context] for text in SAMPLE])
    norm_N = np.linalg.norm(np.asarray(lm(tokens, capture=[SITE]).sites[SITE]), axis=-1)[tokens.mask_BxT]
    assert lm.sink_norm(SITE) == pytest.approx(SINK_FACTOR * np.median(norm_N), rel=1e-4)
    assert lm.sink_norm(SITE, factor=3.0) == pytest.approx(0.3 * lm.sink_norm(SITE), rel=1e-6)
    with pytest.raises(UserError, match="there is no site resid_post.9"):
        lm.sink_norm("resid_post.9")


def test_a_dictionary_that_does_not_know_the_rule_refuses_to_guess(foreign):
    assert not foreign.config.knows_sinks
    with pytest.raises(UserError, match=r"take dictionary.with_sink_norms\(lm.sink_norm\)"):
        foreign.is_not_sink(np.zeros((2, foreign.config.d_in), np.float32))
    crosscoder = DictionaryConfig(site="resid_post.0+resid_post.1", d_in=8, widths=(4, 4), scales=(1.0, 2.0))
    with pytest.raises(UserError, match="does not know yet"):
        crosscoder.require_sink_norms()
    known = crosscoder.with_sink_norms(dict(zip(crosscoder.site.split("+"), (3.0, 5.0), strict=True)).__getitem__)
    assert known.max_norms == (3.0, 5.0)
    # A known rule stays unless it is replaced.
    known = foreign.with_sink_norms({SITE: 4.0}.__getitem__)
    assert known.config.max_norm == 4.0
    assert known.with_sink_norms({SITE: 5.0}.__getitem__).config.max_norm == 4.0
    assert known.with_sink_norms({SITE: 5.0}.__getitem__, replace=True).config.max_norm == 5.0
    assert foreign.config.max_norm is None


def test_scores_do_not_depend_on_metadata(lm, foreign, tmp_path):
    """The same SAELens folder, with the threshold that training found and without any."""
    ids = [[SINK, *lm.tokenizer(text)["input_ids"]] for text in TEXTS]
    texts = [lm.tokenizer.decode(row) for row in ids]
    acts = saejax.capture(lm, texts, SITE)
    known = foreign.with_sink_norms(acts.max_norm)
    save_dictionary(tmp_path / "known", known, "saelens")
    save_dictionary(tmp_path / "plain", foreign, "saelens")
    assert "max_norm" in json.loads((tmp_path / "known" / "cfg.json").read_text())["metadata"]["saejax"]
    assert "max_norm" not in (tmp_path / "plain" / "cfg.json").read_text()
    scores = [saejax.evaluate(lm, load_dictionary(tmp_path / name), texts) for name in ("known", "plain")]
    first, second = (dict(ev=each.explained_variance, l0=each.l0, **each.losses.ce) for each in scores)
    assert first == pytest.approx(second, rel=1e-6)
    sinks = np.flatnonzero(acts.index_Nx3[:, 2] == SINK)
    assert len(sinks) and not set(sinks) & set(acts.rows(SITE))


def test_texts_that_give_no_scores_are_refused(lm, foreign):
    with pytest.raises(UserError, match="each text is one token"):
        saejax.evaluate(lm, foreign, [lm.tokenizer.decode([9])])
    with pytest.raises(UserError, match="texts is one string: expected a list"):
        saejax.evaluate(lm, foreign, "a text")


@pytest.mark.slow  # the rule is tested above on a model with planted sinks
def test_smollm2_has_sinks_that_edits_leave_alone(smollm2):
    site = "resid_post.15"
    tokens = smollm2.tokenize(["The capital of France is Paris, and the capital of Italy is"])
    norm_T = np.linalg.norm(np.asarray(smollm2(tokens, capture=[site]).sites[site])[0], axis=-1)
    limit = smollm2.sink_norm(site)
    assert norm_T[0] > 3 * limit and norm_T[1:].max() < limit / 3
    change_T = change(smollm2, tokens, make_dictionary(smollm2.config.d_model, site).ablate(range(50)), site)[0]
    assert change_T[0] == 0 and (change_T[1:] > 0).all()
