"""Which members a configuration makes."""

import dataclasses

import pytest
from small_stacks import make_config

from saejax.activations.settings import CaptureConfig
from saejax.config import Config, Configs, setting
from saejax.dictionaries.kinds import KINDS
from saejax.dictionaries.kinds.topk import TopK
from saejax.errors import UserError
from saejax.stages.train.members import units_of_members
from saejax.training.members import make_members
from saejax.training.settings import TrainConfig

SITES = tuple(f"resid_post.{layer}" for layer in range(6))


@pytest.mark.parametrize(
    ("changes", "kind", "site", "target", "k"),
    [
        (dict(k=(7,)), "topk", "resid_post.3", "resid_post.3", 7),
        (dict(k=(16, 32)), "standard", "resid_post.3", "resid_post.3", None),  # which reads no k
        (dict(form="transcoder", k=(7,)), "topk", "mlp_in.3", "mlp_out.3", 7),
        (dict(form="transcoder", target="attn_out", k=(7,)), "topk", "attn_z.3", "attn_out.3", 7),
        (dict(target="attn_out", k=(7,)), "topk", "attn_z.3", "attn_z.3", 7),
    ],
)
def test_one_member_has_no_name(changes, kind, site, target, k):
    (member,) = make_members(make_config(**changes), kind, (site,))
    assert (member.name, member.site, member.target, member.settings.get("k")) == ("", site, target, k)


def test_a_sweep_is_every_combination():
    made = make_members(make_config(k=(16, 32), learning_rate=(1e-3, 3e-4)), "topk", ("resid_post.3",))
    pairs = [(rate, k) for rate in (1e-3, 3e-4) for k in (16, 32)]
    assert [member.name for member in made] == [f"learning_rate{rate}-k{k}" for rate, k in pairs]
    assert [(member.settings["learning_rate"], member.settings["k"]) for member in made] == pairs


def test_l1_by_depth_goes_by_thirds_of_the_layers():
    made = make_members(make_config(l1_by_depth=(1.5e-4, 1e-4, 5e-5)), "standard", SITES)
    assert [m.settings["l1"] for m in made] == [1.5e-4] * 2 + [1e-4] * 2 + [5e-5] * 2
    assert [m.name for m in made] == list(SITES)


@pytest.mark.parametrize(
    ("changes", "kind", "sites", "message"),
    [
        (dict(form="transcoder"), "topk", ("resid_post.3",), "mlp_in.L"),
        (dict(form="transcoder"), "topk", ("attn_z.3+mlp_in.3",), "does not follow"),
        (dict(form="transcoder", target="attn_z"), "topk", ("mlp_in.3",), "target=attn_z does not follow mlp_in.3"),
        (dict(l1_by_depth=(1.0, 2.0)), "standard", SITES, "three values"),
        (dict(seed=(1, 1)), "topk", SITES[:1], "seed1"),
        ({}, "topk", (SITES[0], SITES[0]), "two members"),
    ],
)
def test_bad_stacks(changes, kind, sites, message):
    with pytest.raises(UserError, match=message):
        make_members(make_config(**changes), kind, sites)


def test_a_further_site_changes_no_others_initial_values():
    """Of one site nothing is folded into the seed; of several its name, wherever it stands."""
    seeds = {member.site: member.site_seed for member in make_members(make_config(), "topk", SITES)}
    assert len({*seeds.values()} - {0}) == len(SITES)
    for fewer in (SITES[2:5], SITES[::-1]):
        assert all(seeds[member.site] == member.site_seed for member in make_members(make_config(), "topk", fewer))
    assert make_members(make_config(), "topk", SITES[:1])[0].site_seed == 0


@dataclasses.dataclass(frozen=True)
class WantedConfig(Config):
    """A setting of the kind's own, by the name of a shared one."""

    k: tuple[int, ...] = setting((3, 5), "active features", swept=True)


class Wanted(TopK):
    """TopK with that setting in place of the shared one."""

    name, Settings, reads = "wanted", WantedConfig, ()


def test_a_users_kind_may_have_a_setting_by_the_name_of_a_shared_one(monkeypatch):
    monkeypatch.setitem(KINDS, "wanted", Wanted())
    configs = Configs(TrainConfig(kinds=("wanted",), sites=SITES[:1]), CaptureConfig(sites=SITES[:1]))
    units = units_of_members(configs, "wanted")
    assert [*units] == ["k3", "k5"]
    for k, alone in zip((3, 5), units.values(), strict=True):
        config = alone[TrainConfig]
        assert config.of_kind("wanted").k == (k,) and config.k == TrainConfig().k
        (member,) = make_members(config, "wanted", SITES[:1])
        assert member.settings["k"] == k
