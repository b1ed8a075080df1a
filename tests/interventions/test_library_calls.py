"""The causal calls of the library: without a workdir, several devices and PyTorch give the same as one JAX device."""

import dataclasses
import functools
import logging
import numbers

import jax
import numpy as np
import pytest

import saejax
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.interventions import edits
from saejax.interventions.settings import AblateConfig, PatchConfig, ProbeConfig, SteerConfig, StudyConfig
from saejax.interventions.table import TESTED
from saejax.results import to_json

SITE = "resid_post.1"
SETS = [[3], [8, 20, 51], []]
DOCUMENTS = ["The river follows the teacher.", "The garden carries the engine and so on."]
ABLATE = dict(top=3, random_sets=12, placebo_targets=6, bootstrap=200, untrained_dictionaries=0, baselines=())
STEER = dict(top=3, doses=(0.4,), random_sets=3, bootstrap=200)
PROBE = dict(sparse=(1, 2), shuffles=2, strengths=(0.01, 1.0))


@pytest.fixture(scope="module")
def answered(make_answered):
    """Prompts that the model answers correctly, with a label to probe."""
    return [
        dataclasses.replace(prompt, labels=(("length", "long" if i % 4 > 1 else "short"),))
        for i, prompt in enumerate(make_answered("tiny"))
    ]


@pytest.fixture(scope="module")
def dictionary(make_dictionary):
    """Thresholds lie apart from the activations of these prompts: no firing hangs on the last bit."""
    made = make_dictionary(SITE)
    return Dictionary(made.config, **made.arrays | dict(b_enc_F=made.b_enc_F[...] - 1e-3))


def ablate(lm, dictionary, prompts):
    """Return what effects, slopes and an ablation give, as JSON data."""
    readouts = ("logit_diff", "log_prob", "top1", "kl", "change_norm")
    batches = edits.mask(dictionary, SETS), edits.add(dictionary, SETS, 0.4)
    halves = [
        dataclasses.replace(prompt, behaviour=("first", "second")[i // 2 % 2]) for i, prompt in enumerate(prompts)
    ]
    ablated = saejax.ablate(lm, dictionary, halves, documents=DOCUMENTS, **ABLATE).verdict.dictionaries[TESTED]
    return dict(
        effects=[saejax.effects(lm, prompts[:5], batch, readouts).tolist() for batch in batches],
        slopes=saejax.slopes(lm, prompts[:5], "logit_diff", SITE).tolist(),
        ablate={
            name: dict(
                features=list(answers.features),
                effect=answers.ablation["logit_diff"].effect.mean,
                sets=[answers.random.numbers["sets"], answers.placebo_sets],
            )
            for name, answers in ablated.items()
        },
    )


def call_others(lm, dictionary, prompts):
    """Return what the other calls give, as JSON data."""
    patched = saejax.patch(lm, prompts[::2], "resid_post", layers=[2])
    steered = saejax.steer(lm, dictionary, prompts, documents=DOCUMENTS, **STEER)
    probed = saejax.probe(lm, dictionary, prompts, ["length", "correct"], **PROBE)
    return dict(
        patch=dict(effect=patched.effect_DxLxHxPxC[..., -3:].tolist()),
        steer={name: to_json(result) for name, result in steered.items()},
        probe=[to_json(label) for label in probed],
    )


@pytest.fixture(scope="module")
def on_one_device(tiny, dictionary, answered):
    """on_one_device(calls): what the calls give there."""
    return functools.cache(lambda calls: calls(tiny, dictionary, answered))


def assert_close(data, wanted, where=""):
    """The same data but for rounding: 1e-5 of numbers, 1e-6 of large ones, which sentences print to two digits.

    The p-values of ablated features count 10,000 bootstrap samples on either side of zero. Each sample whose mean is so
    near zero that rounding decides its side moves p by 2e-4; here one does, and up to five may.
    """
    assert type(data) is type(wanted), where
    if isinstance(wanted, dict):
        assert data.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_close(data[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(data) == len(wanted), where
        for place, value in enumerate(wanted):
            assert_close(data[place], value, f"{where}[{place}]")
    elif isinstance(wanted, numbers.Real):
        limit = 2e-5 if where.startswith((".effects", ".slopes", ".ablate")) else 1e-5
        limit = 1e-3 if where.endswith(("p_value", "p_holm")) else limit
        assert data == pytest.approx(wanted, rel=1e-6, abs=limit, nan_ok=True), where
    else:
        assert data == wanted, where


@pytest.mark.slow  # test_split_dictionaries.py measures on eight devices, and test_torch_model.py in PyTorch
@pytest.mark.parametrize("calls", [ablate, call_others])
@pytest.mark.parametrize("where", ["eight devices", "torch"])
def test_library_calls_write_nothing_and_equal_those_on_one_device(
    where, calls, tiny, tiny_llama, dictionary, answered, on_one_device, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if where == "torch":
        lm = saejax.load_model(str(tiny_llama), backend="torch", mesh=tiny.mesh)
    else:
        lm = saejax.load_model(str(tiny_llama))
        assert lm.mesh.size == len(jax.devices()) == 8
    wanted = on_one_device(calls)
    assert_close(calls(lm, dictionary, answered), wanted)
    assert calls is call_others or set(wanted["ablate"]) == {"first", "second"}
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # the stages of these calls have tests of their results
def test_results_are_not_empty(on_one_device):
    found = on_one_device(call_others)
    steered = found["steer"]["tiny"]
    assert steered["reason"] is None and set(steered["methods"]) == {"add", "clamp", "mean_difference"}
    for method in steered["methods"].values():
        assert method["controls"] and method["points"][0]["ce_rise"] is not None
    length, correct = found["probe"]
    assert len(length["probes"]) == 6 and any(each["controls"] for each in length["selected"]["features"])
    assert correct["reason"].startswith("fewer than two classes")


def test_prompts_that_stand_twice_and_documents_without_text_are_refused(tiny, dictionary, answered):
    for call in (saejax.ablate, saejax.steer):
        with pytest.raises(UserError, match="appear twice or more often: .* in tiny: keep one"):
            call(tiny, dictionary, [*answered, dataclasses.replace(answered[0], split="test")])
        with pytest.raises(UserError, match="none of the documents has two tokens"):
            call(tiny, dictionary, answered, documents=["", "a"])


def test_texts_begin_as_those_of_the_training(tiny, dictionary, answered, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = dictionary.with_config(dataclasses.replace(dictionary.config, bos="always"))
    begun, texts = tiny.with_bos("always"), [f"<end>{text}" for text in DOCUMENTS]
    with caplog.at_level(logging.WARNING, "absl"):
        scores = saejax.evaluate(tiny, trained, DOCUMENTS)
        probed = saejax.probe(tiny, trained, answered, "length", **PROBE)
        effects_ExPxR = saejax.effects(
            tiny, answered, edits.mask(trained, [[3], [5]]), ("logit_diff", "answer_log_prob")
        )
    told = "'<end>' is put in front of texts, as the dictionary was trained (bos=always) and unlike the tokenizer"
    assert caplog.messages == [told] * 3
    assert begun.tokenize(DOCUMENTS).ids_BxT.tolist() == tiny.tokenize(texts).ids_BxT.tolist()
    assert tiny.with_bos("always") is begun and begun.with_bos("auto") is tiny
    assert scores.losses.ce == saejax.evaluate(tiny, dictionary, texts).losses.ce
    assert to_json(probed) == to_json(saejax.probe(begun, dictionary, answered, "length", **PROBE))
    prefixed = [dataclasses.replace(prompt, text=f"<end>{prompt.text}") for prompt in answered]
    readouts = ("logit_diff", "answer_log_prob")
    np.testing.assert_array_equal(
        effects_ExPxR, saejax.effects(tiny, prefixed, edits.mask(dictionary, [[3], [5]]), readouts)
    )
    assert not list(tmp_path.iterdir()), "calls of the library write nothing"


def test_controls_are_drawn_by_the_seed_of_interventions():
    assert {config().seed for config in (AblateConfig, PatchConfig, SteerConfig, ProbeConfig, StudyConfig)} == {456}
