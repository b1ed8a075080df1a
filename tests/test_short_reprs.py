"""What a notebook shows of models, dictionaries, activations, edits and results is a screen at most."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from tiny_models import save_tiny, save_tiny_tokenizer

import saejax
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.errors import UserError
from saejax.files import write_json
from saejax.interventions.answers import AblateResults, BehaviourVerdict, CausalAnswer, CausalVerdict, Kept
from saejax.models.edits import SiteEdit
from saejax.models.tokens import pad
from saejax.results import Interval, from_json


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part of results."""

    values: tuple[float, ...]
    name: str


@dataclasses.dataclass(frozen=True)
class Outer:
    """Results."""

    parts: Mapping[str, Inner]
    text: str


def is_short(value: object, *words: str) -> bool:
    text = repr(value)
    return (
        len(text.splitlines()) <= 27 and max(map(len, text.splitlines())) < 250 and all(word in text for word in words)
    )


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, "llama", vocab_size=300)
    save_tiny_tokenizer(folder, 300)
    return saejax.load_model(str(folder))


def test_models_dictionaries_activations_and_edits(lm):
    config = DictionaryConfig("topk", "resid_post.1", d_in=lm.config.d_model, n_features=5000, k=7, max_norm=1e3)
    sae = Dictionary.initial(config, jax.random.key(0))
    assert is_short(lm, "LanguageModel", "llama, 3 layers of width 40", "300 token ids", "float32")
    assert repr(sae) == "<topk dictionary of resid_post.1: 5,000 features, k 7>"
    tokens = pad([[1] * 30] * 20)
    assert is_short(tokens, "ids_BxT=<int32 [20, 30]>") and is_short(
        lm(tokens, capture="resid_post.1"), "<float32 [20,"
    )
    assert is_short(saejax.capture(lm, ["one text"] * 90, "resid_post.1"), "Activations(", "resid_post.1", "(90)")
    assert str(sae) == repr(sae) and is_short(sae, "topk dictionary of resid_post.1")
    assert is_short(sae.ablate([1, 2]), "FeatureEdit(", "topk dictionary")
    assert is_short(SiteEdit.set("resid_post.1", np.ones(40)), "SiteEdit(")


def test_results_and_verdicts():
    data = dict(parts={f"part{i}": dict(values=[1.0 / 3] * 900, name="inner") for i in range(700)}, text="word " * 900)
    results = from_json(Outer, data, "file")
    assert is_short(results, "Outer(", "part0", "Inner(values=[...]") and is_short(
        results.parts["part0"], "0.333333", "(900)"
    )
    answer = CausalAnswer("yes", "because " * 99)
    verdict = BehaviourVerdict(tuple(range(99)), 1.0, dict(logit_diff=answer), {}, (), answer, answer, {}, answer, 0, 9)
    assert is_short(verdict, "BehaviourVerdict(", "(99)")
    whole = CausalVerdict("rule " * 99, {f"dictionary{i}": dict(capital=verdict) for i in range(50)})
    assert is_short(whole, "  dictionary0, capital: effect: yes, more than random: yes", "... and 30 more")
    left = Kept(2, Interval(0.37, 0.1, 0.5), None, {})
    tested = CausalVerdict("rule", dict(tested=dict(capital=dataclasses.replace(verdict, enough=(left,)))))
    results = AblateResults("topk", "resid_post.1", 99, "zero", "all", "keep", {}, tested)
    lines = results.summary().splitlines()
    yes = f"  yes: {answer.sentence}"
    assert lines[:-1] == ["capital", yes, yes, yes, "  not tested: Not tested.", yes]
    assert lines[-1] == "  left of the answer: 37 % with 2 features alone"


def test_a_feature_shows_its_contexts(tmp_path):
    context = dict(tokens=["The", " cat", " sat"], acts=[0.0, 2.0, 0.0], peak=1, document=0, position=1)
    fired = dict(feature=3, fires=9, rate=0.5, nearest=[], tokens=[dict(text=" cat", sum=2.0)], examples=[context] * 90)
    silent = dict(feature=4, fires=0, rate=0.0, nearest=[])
    (tmp_path / "features").mkdir()
    write_json(tmp_path / "features/00000.json", [fired, silent])
    feature = saejax.load_feature(tmp_path, 3)
    assert feature.examples() == ["The» cat« sat"] * 90 and feature.record["fires"] == 9
    assert is_short(feature, "feature 3, fires on 50.00% of the tokens: “cat”", "  The» cat« sat")
    assert repr(saejax.load_feature(tmp_path, 4)) == "feature 4, fires on 0.00% of the tokens: no name"
    for folder, index, message in ((tmp_path, 5, "has no feature 5"), (tmp_path / "none", 3, "has no folder features")):
        with pytest.raises(UserError, match=message):
            saejax.load_feature(folder, index)


def test_what_public_functions_return():
    """Dataclasses that Python shows whole would fill a notebook with arrays."""
    functions = [member for name in saejax.__all__ if callable(member := getattr(saejax, name))]
    for cls in [member for member in functions if inspect.isclass(member)]:
        functions += [member for name, member in inspect.getmembers(cls, inspect.isroutine) if name[0] != "_"]
    whole, seen = set(), 0
    for function in functions:
        if inspect.isclass(function) or not str(getattr(function, "__module__", "")).startswith("saejax"):
            continue
        hint = inspect.signature(function).return_annotation
        for cls in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(cls):
                seen += 1
                whole |= {cls.__name__} if hasattr(cls.__repr__, "__wrapped__") else set()  # type: ignore[union-attr]
    records = {"Prompt", "EditDefinition", "PromptDefinition", "GraphScores"}  # of a line, without arrays
    assert seen > 15 and whole <= records, whole - records
