"""Configuration and the flags made from it."""

import dataclasses

import pytest
from absl import flags

from saejax import config
from saejax.activations.settings import CaptureConfig
from saejax.config import Config, Configs, setting
from saejax.errors import UserError
from saejax.models.settings import ModelConfig
from saejax.models.site_ranges import expand_ranges
from saejax.parallel.settings import MeshConfig
from saejax.runner import command_line
from saejax.runner.flags import define_flags, flag_fields, from_flags
from saejax.runner.registry import all_groups


@dataclasses.dataclass(frozen=True)
class Example(Config):
    """A group."""

    number: int = setting(3, "a number", low=1, high=9)
    share: float = setting(0.5, "a share", low=0.0, high=1.0)
    kinds: tuple[str, ...] = setting(("a", "b"), "kinds", choices=("a", "b", "c"))
    sizes: tuple[int, ...] = setting((), "sizes", low=0)
    on: bool = setting(False, "a switch")
    speed: int = setting(1, "only speed", changes_results=False)


def parse(*arguments: str) -> Example:
    values = flags.FlagValues()
    define_flags(dict(ex=Example), values)
    try:
        values(["program", *arguments])
    except flags.Error as error:
        raise flags.Error(command_line.flag_error(error)) from None
    return from_flags(dict(ex=Example), values)[Example]


def test_defaults_and_every_type():
    assert parse() == Example()
    changed = parse("--ex.number=7", "--ex.share=0.25", "--ex.kinds=c,a", "--ex.sizes=1, 2", "--ex.on")
    assert changed == Example(number=7, share=0.25, kinds=("c", "a"), sizes=(1, 2), on=True)
    assert parse("--ex.kinds=").kinds == ()
    assert parse("--noex.on").on is False


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--ex.number=0", "--ex.number is 0: expected at least 1"),
        ("--ex.number=10", "--ex.number is 10: expected at most 9"),
        ("--ex.share=nan", "--ex.share is NaN"),
        ("--ex.share=inf", "--ex.share is inf: expected a finite number"),
        ("--ex.kinds=a,d", "--ex.kinds is 'd': expected one of a, b, c"),
        ("--ex.sizes=3,-1", "--ex.sizes is -1: expected at least 0"),
        ("--ex.nmber=3", r"ex\.nmber.*ex\.number"),
        ("--ex.number=three", "ex.number=three: 'three' is not a whole number"),
        ("--ex.sizes=3,1.5", "ex.sizes=3,1.5: '1.5' is not a whole number"),
    ],
)
def test_wrong_values_name_the_flag(argument, message):
    with pytest.raises((UserError, flags.Error), match=message):
        parse(argument)


def test_ranges_of_layers_are_written_out():
    sites = ("resid_post.3", "mlp_in.9-11", "module:model.layers.0-1")
    assert expand_ranges(sites) == ("resid_post.3", "mlp_in.9", "mlp_in.10", "mlp_in.11", "module:model.layers.0-1")
    assert (
        all_groups()["train"](sites=("mlp_in.0-1",)).sites
        == all_groups()["train"](sites=("mlp_in.0", "mlp_in.1")).sites
    )
    assert all_groups()["capture"](sites=("mlp_out.4-4",)).sites == ("mlp_out.4",)
    for wrong in ("mlp_in.3-2", "mlp_in.0-100000"):
        with pytest.raises(UserError, match=f"sites={wrong}: expected a first and a last layer"):
            all_groups()["train"](sites=(wrong,))


def test_json_round_trip_and_settings_that_count():
    example = Example(kinds=("c",), sizes=(4, 5), speed=9)
    data = config.to_json(example)
    assert data["kinds"] == ["c"] and config.from_json(Example, data, "a.json") == example
    counted = config.counted(example, but=["example.share"])
    assert counted == {"example.number": 3, "example.kinds": ["c"], "example.sizes": [4, 5], "example.on": False}
    without = {name: value for name, value in data.items() if name != "number"}
    assert config.from_json(Example, without, "a.json") == example, "a field of a later version has its default"
    with pytest.raises(UserError, match="unknown: an older or a newer version of saejax wrote it"):
        config.from_json(Example, dict(data, other=1), "a.json")
    with pytest.raises(UserError, match=r"a.json has '9' in config.speed, expected int"):
        config.from_json(Example, dict(data, speed="9"), "a.json", "config")


def test_names_that_are_a_set_have_one_order():
    @dataclasses.dataclass(frozen=True)
    class Chosen(Config):
        """A group."""

        names: tuple[str, ...] = setting((), "names", order=("b", "a"))
        listed: tuple[str, ...] = setting((), "names whose order counts")

    for names in (("z", "a", "c", "b"), ("b", "c", "a", "z", "a")):
        assert Chosen(names=names, listed=names) == Chosen(names=("b", "a", "c", "z"), listed=names)
    assert Chosen(listed=("a", "b")) != Chosen(listed=("b", "a"))


def test_groups_are_found_by_their_class_and_every_setting_is_explained():
    for group, cls in all_groups().items():
        cls()  # every default is valid
        for name, field in flag_fields(group, cls).items():
            assert len(field.metadata["help"]) > 10, name
    first = Configs(ModelConfig(path="a"), CaptureConfig(last=3))
    second = first | ModelConfig(path="b")
    assert (first[ModelConfig].path, second[ModelConfig].path, second[CaptureConfig].last) == ("a", "b", 3)
    assert second.named("capture") is first[CaptureConfig] and len(list(second)) == 2
    assert second.get(MeshConfig) is None
    for missing in (lambda: second[MeshConfig], lambda: second.named("mesh")):
        with pytest.raises(KeyError):
            missing()


def test_a_tilde_in_the_workdir_is_the_home(monkeypatch, tmp_path):
    """No shell expands it behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flag_values = command_line.stage_flags()
    flag_values(["program", "--workdir=~/run"])
    assert command_line.named_workdir(flag_values) == str(tmp_path / "run")
