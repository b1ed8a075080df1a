"""What holds of edits whatever their values: those that change nothing, what is compiled, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_edits import FEATURES, SITE

from saejax import SiteEdit
from saejax.dictionaries import Dictionary
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.models import language_model
from saejax.models.edits import ForwardPass
from saejax.models.tokens import pad


@jax.jit
def at_site(edit, x_BxTxD, mask_BxT):
    return edit(x_BxTxD, ForwardPass.over(mask_BxT))


# Statement 6 of WORKSPACE.md, what must hold.
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
    everywhere = at_site(sae.steer(FEATURES, 1.0), x_BxTxD, mask_BxT) - x_BxTxD
    assert not everywhere[~mask_BxT].any(), "padding stays as it is"
    own_BxTxK = sae.encode(x_BxTxD)[..., np.array(FEATURES)]
    for edit in (sae.patch(FEATURES, own_BxTxK), sae.patch_error(x_BxTxD - sae(x_BxTxD))):  # to rounding
        np.testing.assert_allclose(at_site(edit, x_BxTxD, mask_BxT), x_BxTxD, atol=2e-5)


def test_a_patched_site_gives_the_other_run_from_there_on(llama):
    reversed_prompts = pad([ids[::-1] for ids in llama.prompts])
    expected = llama.lm(reversed_prompts, capture=[SITE])
    found = llama.lm(llama.tokens, capture=[SITE], edits=[SiteEdit.patch(SITE, expected.sites[SITE])])
    mask_BxT = llama.tokens.mask_BxT
    np.testing.assert_array_equal(found.sites[SITE][mask_BxT], expected.sites[SITE][mask_BxT])
    np.testing.assert_allclose(found.logits_BxTxV[mask_BxT], expected.logits_BxTxV[mask_BxT], atol=1e-4)
    assert np.abs(found.logits_BxTxV - llama.clean.logits_BxTxV)[mask_BxT].max() > 0.1


def test_programs_are_compiled_for_kinds_not_for_features_and_values(llama):
    sae, lm, tokens = llama.sae, llama.lm, llama.tokens
    lm(tokens, edits=[sae.ablate([1, 2])]), lm(tokens, edits=[sae.patch([1, 2], np.zeros((3, 13, 2)))])
    lm(tokens, edits=[sae.ablate([1, 2], (0, 3))])  # reads the site first, to warn where all of these are sinks
    before = language_model.forward._cache_size()
    for edit in (sae.ablate([5, 9]), sae.set([7, 3], 2.0), sae.scale([0, 1], [1, 2]), sae.steer([0, 4], 3, (2, 5))):
        lm(tokens, edits=[edit])
    short = pad([ids[:4] for ids in llama.prompts])
    lm(short, edits=[sae.patch([4, 5], np.ones((3, 4, 2)))])
    assert language_model.forward._cache_size() == before


def changed(sae, **changes) -> Dictionary:
    config = dataclasses.replace(sae.config, **changes)
    shapes = {name: shape for name, (shape, _) in parameter_table(config).items()}
    return Dictionary(config, **{name: jnp.ones(shape) for name, shape in shapes.items()})


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
        (lambda sae: sae.set([1, 2], [1.0]), r"has the shape \(1,\): expected a number or the shape \(2,\)"),
        (lambda sae: sae.steer([1], np.nan), "holds NaN"),
        (lambda sae: sae.steer([1], "3"), "the activation is '3': expected a number"),
        (lambda sae: sae.scale([1], True), "the factor is True: expected a number"),
        (lambda sae: sae.set([1, 2], ["3", "4"]), r"the activation is \['3', '4'\]: expected a number, or 2 of them"),
        (lambda sae: sae.steer([1], 10**400), "the activation is 1000"),
        (lambda sae: sae.ablate([3, True]), r"features are \[3, True\]: expected whole numbers"),
        (lambda sae: sae.ablate([[3], [4, 5]]), r"features are \[\[3\], \[4, 5\]\]: expected whole numbers"),
        (lambda sae: sae.ablate([1], (False, True)), r"unknown positions \(False, True\)"),
        (lambda sae: sae.ablate([1], range(2)), r"unknown positions range\(0, 2\)"),
        (lambda sae: sae.ablate([1], [0, 2]), r"unknown positions \[0, 2\]: .* a tuple, as lists of positions are not"),
        (lambda sae: sae.ablate([1], np.array([0, 2])), r"unknown positions array\(\[0, 2\]\)"),
        (lambda sae: sae.patch([1], None), r"what is patched in is None: expected numbers, \[prompts, tokens, 1\]"),
        (
            lambda sae: SiteEdit.set(SITE, ["1"] * 40),
            r"the vector is \['1', .*: expected one number for each dimension",
        ),
        (
            lambda sae: SiteEdit.steer(SITE, np.ones(40, bool)),
            r"the direction is array\(\[ True, .*: expected one number",
        ),
        (lambda sae: SiteEdit.steer(SITE, np.ones(40), "2"), "the amount is '2': expected a number"),
        (
            lambda sae: SiteEdit.patch(SITE, np.full((3, 13, 40), 1j)),
            r"what is patched in is array\(.*: expected numbers",
        ),
        (lambda sae: sae.patch([1, 2], np.zeros((3, 13, 3))), r"\(3, 13, 3\): expected \[prompts, tokens, 2\]"),
        (lambda sae: sae.patch_error(np.zeros((3, 13, 39))), r"expected \[prompts, tokens, 40\]"),
        (lambda sae: sae.patch([1], np.zeros((2, 13, 1))), "values for 2 prompts of 13 tokens, but .* 3 prompts of 13"),
        (lambda sae: sae.patch([1], np.zeros((3, 12, 1))), "values for 3 prompts of 12 tokens"),
        (lambda sae: SiteEdit.set("resid_last.1", np.zeros(40)), "there is no site 'resid_last.1'"),
        (lambda sae: SiteEdit.ablate("resid_post.7"), "there is no site resid_post.7"),
        (lambda sae: SiteEdit.set(SITE, 2.0), r"the vector has the shape \(\): expected one number for each dimension"),
        (lambda sae: SiteEdit.set(SITE, np.zeros(39)), "an edit has the width 39, but resid_post.1 is 40 wide"),
        (lambda sae: SiteEdit.patch(SITE, np.zeros((3, 13, 8))), "an edit has the width 8"),
        (lambda sae: SiteEdit.patch(SITE, np.zeros((3, 13, 1))), "an edit has the width 1, but resid_post.1 is 40"),
        (lambda sae: SiteEdit.ablate(SITE, "fires"), "unknown positions 'fires': expected all, last, or"),
        (lambda sae: changed(sae, site="mlp_out.2", target="mlp_in.2").ablate([1]), "mlp_in.2 cannot be edited"),
        (lambda sae: changed(sae, d_in=39).ablate([1]), "a dictionary has the width 39, but resid_post.1 is 40 wide"),
        (lambda sae: changed(sae, site="resid_post.9").ablate([1]), "there is no site resid_post.9"),
    ],
)
def test_bad_edits_are_refused(llama, make, message):
    with pytest.raises(UserError, match=message) as error:
        llama.lm(llama.tokens, edits=[make(llama.sae)])
    assert "\n" not in str(error.value)
