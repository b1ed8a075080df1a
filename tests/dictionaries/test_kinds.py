"""The registry of kinds, kinds from a user's file, and the settings that each has."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from absl import flags
from every_kind import KINDS, MADE_UP, OWN_KINDS, PLUGIN

from saejax.dictionaries import Dictionary, DictionaryConfig, kinds, load_dictionary, save_dictionary
from saejax.errors import UserError
from saejax.runner import command, plugins
from saejax.runner.flags import define_flags, from_flags
from saejax.runner.registry import all_groups
from saejax.training.members import make_members
from saejax.training.settings import TrainConfig
from saejax.training.stack import stack_shape

SETTINGS = dict(plugins=PLUGIN, train__kinds=MADE_UP, ablate__dictionary=MADE_UP, task__behaviours="agreement")


def test_kinds_are_found_by_name_and_others_refused_with_the_names():
    assert [kinds.by_name(name).name for name in KINDS] == list(KINDS) and MADE_UP not in OWN_KINDS
    with pytest.raises(UserError, match="standard, linear, gated, jumprelu, topk, batchtopk, matryoshka"):
        kinds.by_name("dense")
    with pytest.raises(ValueError, match="topk"):
        kinds.register(type("Other", (kinds.Kind,), dict(name="topk")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def broken(:", "SyntaxError"),
        ("numbers = [1, 2]", "adds nothing"),
        ("from saejax.dictionaries import kinds\n\n@kinds.register\nclass A(kinds.Kind):\n    name = 'topk'", "'topk'"),
    ],
)
def test_a_bad_file_gives_one_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "kind.py").write_text(text)
    assert command.run(["train"], "", ["train", f"--workdir={tmp_path}", f"--plugins={tmp_path}/kind.py"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0] and "kind.py" in error[0], error


def parse(*arguments):
    values = flags.FlagValues()
    define_flags(all_groups(), values)
    values(["program", *arguments])
    return from_flags(all_groups(), values)[TrainConfig]


def test_settings_of_a_kind_have_its_name():
    assert parse().of_kind("jumprelu").bandwidth == 0.05
    assert parse("--train.jumprelu.bandwidth=0.5").of_kind("jumprelu").bandwidth == 0.5
    assert parse("--train.matryoshka.groups=0.5,1").of_kind("matryoshka").groups == (0.5, 1.0)
    assert parse("--train.shrunk.strength=1,2").of_kind(MADE_UP).strength == (1.0, 2.0)
    with pytest.raises(UserError, match=r"--train.jumprelu.bandwidth is 0.0: expected at least"):
        parse("--train.jumprelu.bandwidth=0")


def test_a_unit_depends_on_the_settings_that_its_kind_reads():
    plain, changed = TrainConfig().read_by("topk"), parse("--train.jumprelu.bandwidth=1")
    assert plain == changed.read_by("topk") and plain["train.k"] == [32]
    assert not {"train.l1", "train.plugin", "train.jumprelu.bandwidth"} & plain.keys()
    assert {"train.b1", "train.eps", "train.decay"} <= plain.keys(), "recorded at their defaults too"
    assert parse("--train.b1=0.8").read_by("topk")["train.b1"] == 0.8
    assert changed.read_by("jumprelu")["train.jumprelu.bandwidth"] == 1.0
    assert TrainConfig().read_by("standard")["train.l1"] == [2.0]


@pytest.fixture
def load_plugin(tmp_path):
    """A function that loads a file of kinds, of which others have their own again afterwards."""

    def load(text):
        (tmp_path / "plugin.py").write_text(text)
        plugins.load([tmp_path / "plugin.py"])

    yield load
    plugins.load([PLUGIN])
    kinds.KINDS.pop("above", None)


def test_a_changed_file_is_another_unit(load_plugin):
    before = TrainConfig().read_by(MADE_UP)
    load_plugin(PLUGIN.read_text() + "\n# changed\n")
    after = TrainConfig().read_by(MADE_UP)
    assert before.pop("train.plugin") != after.pop("train.plugin") and before == after


def initial(kind: str, **vectors: float) -> Dictionary:
    """A dictionary of a kind, with the same number in all of a vector."""
    described = DictionaryConfig(kind=kind, site="resid_post.1", d_in=8, n_features=16)
    dictionary = Dictionary.initial(described, jax.random.key(0))
    return Dictionary(described, **dictionary.arrays | {name: jnp.full(16, value) for name, value in vectors.items()})


def test_the_example_of_the_guide_is_a_kind(load_plugin):
    page = (runs.ROOT / "docs" / "extending.md").read_text()
    load_plugin(page[page.index("# shrunk.py\n") :].partition("```")[0])
    x_BxD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    expected = np.maximum(initial("standard").encode(x_BxD) - 0.5, 0)
    np.testing.assert_allclose(initial(MADE_UP, margin_F=0.5).encode(x_BxD), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (
            "jax.nn.relu(pre_xF - numbers['strength'])",
            r"KeyError: 'strength'. At inference `numbers` has the fields of",
        ),
        ("jax.nn.relu(inputs.pre_xF).sum(-1)", r"encode of the kind shrunk returns |could not encode"),
        ("jax.nn.relu(pre_xF - dictionary.config.margin)", "AttributeError: .*'margin'. At inference `numbers`"),
        ("jax.nn.relu(pre_xF - margn_F)", "NameError: name 'margn_F' is not defined$"),
        ("jax.nn.rellu(pre_xF)", "AttributeError: .*'rellu'$"),
        ("jax.nn.relu(pre_xF - dictionary.arrays['margn_F'])", "KeyError: 'margn_F'$"),
        ("jax.nn.relu(pre_xF) ** 2", "activations of the kind shrunk are not homogeneous"),
        ("jax.nn.relu(pre_xF - 0.5)", "not homogeneous"),
        ("jax.numpy.where(pre_xF > 100, pre_xF, 0)", "not homogeneous"),
        ("jax.numpy.log(pre_xF)", "gives activations of NaN or infinity"),
        ("jax.nn.relu(pre_xF * (1 + margin_F.reshape(shape)))", "not homogeneous: .* in `unscaled`"),
    ],
)
def test_a_kind_that_cannot_encode_at_inference_is_not_trained(load_plugin, encode, message):
    """Its encode has other numbers in training."""
    text = PLUGIN.read_text()
    start = text.index("    def encode(")
    line = text[text.index("        return ", start) :].partition("\n")[0]
    load_plugin(text.replace(line, f"        return {encode}", 1))
    train = parse("--train.kinds=shrunk", "--train.sites=resid_post.1", "--train.shrunk.strength=0.5,1")
    members = make_members(train, MADE_UP, ["resid_post.1"])
    with pytest.raises(UserError, match=message):
        stack_shape(train, MADE_UP, members, {"resid_post.1": 8})
    load_plugin(text)
    assert stack_shape(train, MADE_UP, members, {"resid_post.1": 8}).n_features == 64


def test_a_kind_that_wrongly_declares_elementwise_is_not_trained(load_plugin):
    """Its edits of some features would encode others' activations."""
    text = PLUGIN.read_text().replace("    vectors =", "    elementwise = True\n    vectors =")
    load_plugin(text.replace("return jax.nn.relu(", "return jax.nn.relu(pre_xF - pre_xF.max(-1, keepdims=True) / 2 -"))
    train = parse("--train.kinds=shrunk", "--train.sites=resid_post.1")
    with pytest.raises(UserError, match="elementwise = True, but a feature that is encoded alone has another"):
        stack_shape(train, MADE_UP, make_members(train, MADE_UP, ["resid_post.1"]), {"resid_post.1": 8})


def test_an_unknown_kind_is_said_to_need_its_file(capsys):
    for call in (lambda: parse("--train.kinds=shrank"), lambda: DictionaryConfig("shrank", "resid_post.1", d_in=8)):
        with pytest.raises(UserError, match="'shrank': expected one of .*; --plugins=FILE adds others"):
            call()
    assert command.run(["train"], "", ["program", "--workdir=x", "--train.shrank.strength=0.5"]) == 2
    assert "a kind of your own has its flags with --plugins=FILE" in capsys.readouterr().err


def test_a_kind_that_is_a_jumprelu_at_inference_is_written_for_other_tools(load_plugin, tmp_path):
    load_plugin(
        "from saejax.dictionaries import kinds, sparsity\n\n\n@kinds.register\nclass Above(kinds.Kind):\n"
        "    name, vectors, jumprelu = 'above', ('threshold_F',), True\n\n"
        "    def encode(self, member, inputs, numbers):\n"
        "        return sparsity.threshold(inputs.pre_xF, member.arrays['threshold_F'])\n"
    )
    dictionary = initial("above", threshold_F=0.5)
    save_dictionary(tmp_path / "written", dictionary, "saelens")
    loaded, x_BxD = load_dictionary(tmp_path / "written"), jax.random.normal(jax.random.key(1), (9, 8))
    f_BxF = loaded.encode(x_BxD)
    assert loaded.config.kind == "jumprelu" and (f_BxF > 0).any()
    np.testing.assert_allclose(f_BxF, dictionary.encode(x_BxD), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(inputs, single_device, tmp_path_factory):
    """A workdir of all stages on a stack of a user's kind, which the flag made known."""
    workdir = tmp_path_factory.mktemp("plugin") / "run"
    changes = SETTINGS | dict(train__shrunk__strength="0.2,0.4", ablate__dictionary=f"{MADE_UP}/strength0.2")
    changes |= dict(ablate__baselines="", ablate__untrained_dictionaries=0, ablate__text_documents=0, train__epochs=3)
    del kinds.KINDS[MADE_UP]
    stages = ["baseline", "capture", "train", "evaluate", "ablate", "report"]
    assert command.run(stages, "", ["program", *runs.small_flags(*inputs, workdir, **changes)]) == 0
    return workdir


def test_a_kind_of_a_users_file_goes_through_all_stages(trained):
    summary = json.loads((trained / "train" / MADE_UP / "done.json").read_text())["results"]
    assert [member["settings"]["strength"] for member in summary["members"]] == [0.2, 0.4]
    assert all("margins" in member["final"] for member in summary["members"])
    for stage in ("evaluate", "ablate"):
        assert list((trained / stage).glob("shrunk*/done.json")), stage
    assert "takes a margin that each feature learns off" in (trained / "report" / "report.md").read_text()
    dictionary = load_dictionary(trained / "train" / MADE_UP / "strength0.4")
    x_BxD = np.random.default_rng(0).normal(size=(9, dictionary.config.d_in)).astype(np.float32)
    projected = (x_BxD - np.asarray(dictionary.b_dec_D[...])) @ np.asarray(dictionary.W_enc_DxF[...])
    pre = projected + np.asarray(dictionary.b_enc_F[...]) - np.asarray(dictionary.margin_F[...])
    np.testing.assert_allclose(dictionary.encode(x_BxD), np.maximum(pre, 0), rtol=1e-4, atol=1e-4)
    assert np.any(np.asarray(dictionary.margin_F[...]) > 0)


def test_a_user_who_forgets_the_file_is_told(trained, inputs, tmp_path, monkeypatch, capsys):
    runs.copy_run(trained, tmp_path / "run")
    monkeypatch.delitem(kinds.KINDS, MADE_UP)
    flags = runs.small_flags(*inputs, tmp_path / "run", **SETTINGS | dict(plugins=""))
    assert command.run(["evaluate"], "", ["program", *flags]) == 2
    error = capsys.readouterr().err
    assert "shrunk" in error and "expected one of" in error and len(error.splitlines()) == 1
