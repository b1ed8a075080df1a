"""Which members a configuration makes."""

import pytest
from small_stacks import make_config

from saejax.errors import UserError
from saejax.training.members import make_members

SITES = tuple(f"resid_post.{layer}" for layer in range(6))


def test_one_member_has_no_name():
    (member,) = make_members(make_config(k=(7,)), "topk", ("resid_post.3",))
    assert (member.name, member.site, member.target, member.settings["k"]) == ("", "resid_post.3", "resid_post.3", 7)


def test_a_sweep_is_every_combination():
    made = make_members(make_config(k=(16, 32), learning_rate=(1e-3, 3e-4)), "topk", ("resid_post.3",))
    assert [m.name for m in made] == [f"learning_rate{rate}-k{k}" for rate in ("0.001", "0.0003") for k in (16, 32)]
    assert [(m.settings["learning_rate"], m.settings["k"]) for m in made] == [
        (1e-3, 16),
        (1e-3, 32),
        (3e-4, 16),
        (3e-4, 32),
    ]


def test_what_a_kind_does_not_read_is_not_swept():
    (member,) = make_members(make_config(k=(16, 32)), "standard", ("resid_post.3",))
    assert member.name == ""


def test_l1_by_depth_goes_by_thirds_of_the_layers():
    made = make_members(make_config(l1_by_depth=(1.5e-4, 1e-4, 5e-5)), "standard", SITES)
    assert [m.settings["l1"] for m in made] == [1.5e-4] * 2 + [1e-4] * 2 + [5e-5] * 2
    assert [m.name for m in made] == list(SITES)


def test_a_transcoder_predicts_the_output_of_its_mlp():
    (member,) = make_members(make_config(form="transcoder"), "topk", ("mlp_in.3",))
    assert (member.site, member.target) == ("mlp_in.3", "mlp_out.3")


@pytest.mark.parametrize(
    ("changes", "kind", "sites", "message"),
    [
        (dict(form="transcoder"), "topk", ("resid_post.3",), "mlp_in.L"),
        (dict(l1_by_depth=(1.0, 2.0)), "standard", SITES, "three values"),
        (dict(seed=(1, 1)), "topk", SITES[:1], "seed1"),
        ({}, "topk", (SITES[0], SITES[0]), "two members"),
    ],
)
def test_bad_stacks(changes, kind, sites, message):
    with pytest.raises(UserError, match=message):
        make_members(make_config(**changes), kind, sites)
