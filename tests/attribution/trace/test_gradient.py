"""Graphs with SAEs: against torch's gradients in float64, edits of the real model, and what holds by construction."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from graph_checks import double
from made_transcoders import made_sae
from torch_sites import MODULES, relative_error, run_torch

from saejax import LocalModel, open_saes, save_dictionary, trace
from saejax.attribution.graph import Graph
from saejax.attribution.graph.data import BIAS, FEATURE, LOGIT, TOKEN
from saejax.attribution.local.edits import Change
from saejax.attribution.trace import prompt
from saejax.attribution.trace.gradient import SaeRun
from saejax.attribution.trace.prompt import Memory, trace_prompt
from saejax.dictionaries import Dictionary
from saejax.dictionaries.modules import parameter_table
from saejax.errors import UserError
from saejax.models import source
from saejax.models.tokens import Tokens
from saejax.runner import command

IDS = [17, 230, 5, 42]
CASES = [("llama", "resid_post.0", "mlp_out.2"), ("gpt2", "resid_mid.0", "resid_post.1")]


def fp64(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float64))


def explained(sae, x_TxD):
    """Pre-activations, activations and error of an SAE in float64, from its definition."""
    w = {name: fp64(array) for name, array in sae.arrays.items()}
    pre_TxF = (x_TxD - w["b_dec_D"]) @ w["W_enc_DxF"] + w["b_enc_F"]
    if sae.config.kind == "topk":
        active_TxF = pre_TxF >= pre_TxF.topk(sae.config.k).values[:, -1:]
    else:
        active_TxF = pre_TxF > w["threshold_F"]
    active_TxF = active_TxF & (pre_TxF > 0) & (x_TxD.norm(dim=1) <= sae.config.max_norm)[:, None]
    acts_TxF = torch.where(active_TxF, pre_TxF, 0).detach()
    return pre_TxF, acts_TxF, (x_TxD - acts_TxF @ w["W_dec_FxD"] - w["b_dec_D"]).detach()


def torch_rows(model, saes, graph, held=False):
    """The rows of a graph by ``torch.autograd``, in the order of its targets and sources.

    Held, what an SAE's site passes on is a leaf, so that no gradient goes through it.
    """
    handles, read = [], {}
    where = MODULES[model.config.model_type]
    for sae in saes if held else ():
        kind, layer = sae.site.split(".")

        def cut(module, args, output, site=sae.site):
            read[site] = output
            return output.detach()

        layer = model.get_submodule(where.layers)[int(layer)]
        module = layer if kind == "resid_post" else layer.get_submodule(where.mlp_out)
        handles.append(module.register_forward_hook(cut))
    logits_BxTxV, values = run_torch(model, np.array([graph.ids_P]))
    for handle in handles:
        handle.remove()
    logits_V, by_layer = logits_BxTxV[0, -1], {int(sae.site.split(".")[1]): sae for sae in saes}
    of = {layer: explained(sae, (read or values)[sae.site][0]) for layer, sae in by_layer.items()}
    leaves = [values[sae.site] for sae in saes] + [values["resid_pre.0"]]
    table = list(zip(graph.nodes.kind_N, graph.nodes.layer_N, graph.nodes.position_N, graph.nodes.index_N, strict=True))

    def edge(kind, layer, position, index, slopes):
        slope_TxD = slopes[-1 if kind == TOKEN else list(by_layer).index(layer)]
        if slope_TxD is None:
            return 0.0
        if kind == TOKEN:
            return slope_TxD[0, position] @ values["resid_pre.0"][0, position]
        _, acts_TxF, error_TxD = of[layer]
        if kind == BIAS:
            return slope_TxD[0].sum(dim=0) @ fp64(by_layer[layer].arrays["b_dec_D"])
        if kind == FEATURE:
            return acts_TxF[position, index] * (
                slope_TxD[0, position] @ fp64(by_layer[layer].arrays["W_dec_FxD"])[index]
            )
        return slope_TxD[0, position] @ error_TxD[position]

    rows = []
    for kind, own, position, index in table:
        if kind not in (FEATURE, LOGIT):
            continue
        target = of[own][0][position, index] if kind == FEATURE else logits_V[index] - logits_V.mean()
        slopes = torch.autograd.grad(target, leaves, retain_graph=True, allow_unused=True)
        sources = table[: graph.adjacency_RxS.shape[1]]
        with torch.no_grad():
            rows.append([0.0 if source[1] == own else float(edge(*source, slopes)) for source in sources])
    return np.array(rows)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def case(request, tiny_model):
    """A tiny model, SAEs at two layers, and the model in torch, in float64."""
    family, *sites = request.param
    lm = tiny_model(family)
    return lm, saes_of(lm, sites), source.load_torch_model(lm.source, "float32").double()


@pytest.fixture(scope="module")
def llama(tiny_model):
    lm = tiny_model("llama")
    return lm, saes_of(lm, CASES[0][1:])


def saes_of(lm, sites):
    return [made_sae(lm, site, IDS, kind, seed) for seed, (site, kind) in enumerate(zip(sites, ("topk", "jumprelu")))]


def test_rows_are_torchs_gradients(case):
    lm, saes, model = case
    with pytest.raises(UserError, match="are SAEs: expected transcoders of all layers; features of SAEs"):
        LocalModel(lm, open_saes(saes), IDS)
    graph = trace(lm, open_saes(saes), IDS, max_logits=3)
    features = graph.nodes[graph.slice_of(FEATURE)]
    _, values = run_torch(model, np.array([IDS]))
    for sae in saes:
        acts_TxF = explained(sae, values[sae.site][0])[1].numpy()
        own = features[features.layer_N == int(sae.site.split(".")[1])]
        assert np.array_equal(np.argwhere(acts_TxF), np.stack([own.position_N, own.index_N], axis=1)) and len(own) > 8
        assert len(np.unique(own.position_N)) == len(IDS) - 1  # one token is a sink
        assert relative_error(own.value_N, acts_TxF[own.position_N, own.index_N]) < 1e-5
    wanted = torch_rows(model, saes, graph)
    error = relative_error(graph.adjacency_RxS, wanted)
    print(f"rows {error:.1e}")
    assert error < 1e-5 and (wanted[: len(features)] != 0).any()


def test_direct_edges_go_through_no_other_site_and_those_of_relevance_patching_add_up(llama):
    lm, saes = llama
    model = source.load_torch_model(lm.source, "float32").double()
    graph = trace(lm, open_saes(saes, direct=True), IDS, max_logits=2)
    assert relative_error(graph.adjacency_RxS, torch_rows(model, saes, graph, held=True)) < 1e-5
    # All of the stream goes through resid_post.0, so tokens reach the features there and nothing else.
    later = graph.nodes.layer_N[graph.target_R] > 0
    assert not graph.adjacency_RxS[later, graph.slice_of(TOKEN)].any()
    assert graph.adjacency_RxS[~later, graph.slice_of(TOKEN)].any()
    graph = trace(lm, open_saes(saes, "relp", direct=True), IDS, max_logits=3)
    assert np.abs(graph.unexplained_R).max() < 1e-5 * np.abs(graph.value_R).max()
    total = trace(lm, open_saes(saes), IDS, max_logits=3)
    assert np.abs(total.unexplained_R).max() > 0.1 * np.abs(total.value_R).max()


def edited(lm, saes, graph, node, factor):
    """The features and logits of a graph when one feature is scaled by the library's own edit."""
    nodes, position = graph.nodes, int(graph.nodes.position_N[node])
    sites = {int(sae.site.split(".")[1]): sae for sae in saes}
    edit = sites[nodes.layer_N[node]].scale([int(nodes.index_N[node])], factor, positions=(position, position + 1))
    out = lm(Tokens(np.array([IDS], np.int32), np.array([len(IDS)], np.int32)), list({s.site: 0 for s in saes}), [edit])
    logits_V = np.asarray(out.logits_BxTxV[0, -1], np.float64)
    features = nodes[graph.slice_of(FEATURE)]
    found = [
        float(explained(sites[layer], fp64(out.sites[sites[layer].site][0]))[0][position, index])
        for layer, position, index in zip(features.layer_N, features.position_N, features.index_N, strict=True)
    ]
    return np.array([*found, *(logits_V[nodes.index_N[graph.slice_of(LOGIT)]] - logits_V.mean())])


def test_edges_foretell_edits_of_the_model(llama):
    lm, saes = llama
    traced = trace_prompt(lm, open_saes(saes), IDS, max_logits=3)
    graph = traced.graph
    doubling = double(traced.local, graph, traced.readouts, count=10)
    assert doubling.results.held_error is None
    lower = np.flatnonzero(graph.nodes.layer_N[doubling.node_E] == 0)[:3]
    above_T = graph.nodes.layer_N[graph.target_R] > 0  # an edit shows at its own site, too
    for row in lower:
        node = doubling.node_E[row]
        clean_T, twice_T = (edited(lm, saes, graph, node, factor)[above_T] for factor in (1.0, 2.0))
        np.testing.assert_allclose(doubling.free_ExR[row, above_T], twice_T - clean_T, atol=1e-5)
        more_T, less_T = (edited(lm, saes, graph, node, 1 + step)[above_T] for step in (0.03, -0.03))
        assert relative_error((more_T - less_T) / 0.06, doubling.edge_ExR[row, above_T]) < 1e-2
    assert 0 < doubling.results.correlation <= 1


def test_saes_of_what_heads_give_have_edges(tiny_model):
    """Their site is within attention: as many numbers as the stream has, where heads fill it."""
    lm, ids = tiny_model("gpt2"), [17, 230, 5, 42]
    saes = [made_sae(lm, "resid_post.0", ids), made_sae(lm, "attn_z.1", ids, seed=1)]
    graph, run, readouts = trace_prompt(lm, open_saes(saes), ids, targets=7)
    features, layer_N = graph.count(FEATURE), graph.nodes.layer_N
    upper = np.flatnonzero(layer_N[:features] == 1)
    source = upper[np.abs(graph.adjacency_RxS[-1, upper]).argmax()]
    where = [int(column[source]) for column in (layer_N, graph.nodes.position_N, graph.nodes.index_N)]
    rows = [[Change(*where, graph.nodes.value_N[source] * (1 + step))] for step in (0.03, -0.03)]
    more, less = run.run(rows, readouts=readouts).readout_RxK[:, 0]
    assert (more - less) / 0.06 == pytest.approx(graph.adjacency_RxS[-1, source], rel=2e-2) and more != less
    lower = np.abs(graph.adjacency_RxS[:features, : upper[0]]).sum(axis=0).argmax()
    where = [int(column[lower]) for column in (layer_N, graph.nodes.position_N, graph.nodes.index_N)]
    rows = [[Change(*where, graph.nodes.value_N[lower] * (1 + step))] for step in (0.03, -0.03)]
    more_J, less_J = run.run(rows, features=upper).feature_RxJ
    assert np.abs(more_J - less_J).max() > 1e-4
    assert relative_error((more_J - less_J) / 0.06, graph.adjacency_RxS[upper, lower]) < 2e-2


def test_fewer_features_are_the_most_influential_ones(llama):
    lm, saes = llama
    graph, part = (trace(lm, open_saes(saes), IDS, max_logits=2, max_features=most) for most in (None, 11))
    assert part.count(FEATURE) == 11 and part.settings["active_features"] == graph.count(FEATURE)
    ids = [list(zip(g.nodes.layer_N, g.nodes.position_N, g.nodes.index_N))[: g.count(FEATURE)] for g in (graph, part)]
    kept = [ids[0].index(one) for one in ids[1]]
    rows, columns = [*kept, -2, -1], [*kept, *range(len(ids[0]), graph.adjacency_RxS.shape[1])]
    assert relative_error(part.adjacency_RxS, graph.adjacency_RxS[np.ix_(rows, columns)]) < 1e-6
    assert relative_error(part.unexplained_R, graph.unexplained_R[rows]) < 1e-4


def test_one_sae_and_one_token(llama):
    lm, saes = llama
    graph = trace(lm, open_saes(saes[0]), IDS, max_logits=3)
    features = graph.count(FEATURE)
    assert set(graph.nodes.layer_N[:features]) == {0} and not graph.adjacency_RxS[:features, :features].any()
    # To the features of the first site and the logits, edges are those of two SAEs.
    both, rows = trace(lm, open_saes(saes), IDS, max_logits=3), [*range(features), -3, -2, -1]
    assert relative_error(graph.adjacency_RxS[:, :features], both.adjacency_RxS[rows, :features]) < 1e-6
    graph = trace(lm, open_saes(saes), IDS[-1:], max_logits=1)
    assert graph.ids_P.shape == (1,) and graph.adjacency_RxS[-1].all()
    pruned = graph.prune()
    assert 0 <= pruned.scores().replacement <= 1 and 0 <= pruned.scores().completeness <= 1


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(target="mlp_out.0"), "is a transcoder, from resid_post.0 to mlp_out.0: expected SAEs"),
        (dict(site="mlp_out.2"), r"SAEs of one layer \(mlp_out.2\): expected one of each layer"),
        (dict(site="resid_post.9"), "there is no site resid_post.9: the model has 3 layers"),
        (dict(site="module:a.b"), "a module of the PyTorch model"),
        (dict(site="attn_k.0"), "attn_k.0 has 20 numbers, and graphs are of sites as wide as the stream"),
        (dict(d_in=5), "reads 5 dimensions, but .* has 40"),
        (dict(fingerprint="another"), "the SAE of resid_post.0 was trained on tiny .fingerprint another"),
        (dict(kind="linear", k=0), "a linear dictionary"),
        (dict(kind="matching_pursuit"), "whose features read what others leave of the input"),
        (dict(max_norm=0.0), "no feature of .* is active"),
    ],
)
def test_what_cannot_be_traced_is_refused(llama, change, message):
    lm, saes = llama
    config = dataclasses.replace(saes[0].config, **change)
    shapes = {name: shape for name, (shape, _) in parameter_table(config).items()}
    arrays = {name: array[tuple(map(slice, shapes[name]))] for name, array in saes[0].arrays.items()}
    changed = Dictionary(config, **arrays)
    saes = [changed] if "max_norm" in change else [changed, saes[1]]
    with pytest.raises(UserError, match=message):
        trace(lm, open_saes(saes), IDS)


def test_other_bad_input_is_refused(llama):
    lm, saes = llama
    with pytest.raises(UserError, match="no SAE"):
        open_saes([])
    with pytest.raises(UserError, match="nowhere holds no dictionary"):
        open_saes("nowhere")
    with pytest.raises(UserError, match="estimate"):
        open_saes(saes, "integrated")
    with pytest.raises(UserError, match="max_features is 0"):
        trace(lm, open_saes(saes), IDS, max_features=0)
    nan = Dictionary(saes[0].config, **saes[0].arrays | dict(W_dec_FxD=saes[0].arrays["W_dec_FxD"] * np.nan))
    with pytest.raises(UserError, match="not finite"):
        trace(lm, open_saes(nan), IDS)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([Change(1, 1, 0, 0.0)], "feature 0 of layer 1 cannot be set to 0.0 at position 1: .* of the layers 0, 2"),
        ([Change(0, 4, 0, 0.0)], "position 4: this prompt has the positions 0 to 3"),
        ([Change(0, 1, 99_999, 0.0)], "feature 99999 of layer 0 cannot be set"),
        ([Change(0, slice(None), 0, 1.0), Change(0, 2, 0, 2.0)], "row 0 changes a feature twice at one position"),
    ],
)
def test_changes_that_no_run_with_saes_can_make_are_refused(llama, row, said):
    lm, saes = llama
    run = SaeRun.of(lm, open_saes(saes), np.array(IDS, np.int32))
    with pytest.raises(UserError, match=said):
        run.run([row])
    with pytest.raises(UserError, match="expected a list of places in the active features"):
        run.run([[]], features=[-1])


def test_changes_at_sinks_are_told_and_a_strong_change_makes_none(llama, caplog):
    lm, _ = llama
    saes = saes_of(lm, ("resid_post.0", "resid_post.1"))
    run = SaeRun.of(lm, open_saes(saes), np.array(IDS))
    (sink,) = np.flatnonzero(run.sink_SxT[1, : len(IDS)])
    (clean_V,) = run.run([[]]).logits_RxV
    at_sink = Change(1, int(sink), 3, 5.0)
    np.testing.assert_array_equal(run.run([[at_sink]]).logits_RxV[0], clean_V)
    assert "1 of 1 rows of changes change nothing: they act at attention sinks alone" in caplog.text
    caplog.clear()
    # The first change makes the position longer than any sink where the second one acts.
    place = int(np.flatnonzero(~run.sink_SxT[:, : len(IDS)].any(axis=0))[0])
    limit = saes[1].config.max_norm
    strong, later = Change(0, place, 3, 1e2 * limit), Change(1, place, 3, 1e2 * limit)
    alone, both = run.run([[strong], [strong, later]]).logits_RxV
    assert not caplog.text and np.abs(alone - both).max() > 1e-3


def test_a_slice_of_positions_is_each_of_them(llama):
    lm, saes = llama
    run = SaeRun.of(lm, open_saes(saes), np.array(IDS, np.int32))
    each = [Change(0, position, 3, 0.5) for position in range(2, len(IDS))]
    one, several = run.run([[Change(0, slice(2, None), 3, 0.5)], each]).logits_RxV
    assert np.array_equal(one, several) and np.abs(one - run.logits_V).max() > 1e-4


def test_a_graph_that_does_not_fit_is_refused(llama, monkeypatch):
    """Before its prompt is run, and before its rows are computed, with the features of the prompt counted."""
    lm, saes = llama
    opened, counted = open_saes(saes), []
    run = SaeRun.of(lm, opened, np.array(IDS, np.int32))
    sizes = lm, opened, len(IDS), len(run.active)
    few, all_rows = (prompt.estimate_gradient_memory(*sizes, count, 3) for count in (1, len(run.active)))
    assert few.host < all_rows.host and few.device == all_rows.device > 0
    monkeypatch.setattr(prompt, "attribute_in_rounds", lambda *args: pytest.fail("rows are computed"))
    certain = int(sum(map(prompt.certain_active, opened.configs)) * (len(IDS) - 1))
    refused = r"the graph would take .* GiB, and 0\.0 GiB is free: shorten the prompt of 4"

    def estimate(lm, saes, tokens, active, *rows):
        """A graph that fits until the features of the prompt are counted."""
        counted.append(active)
        return Memory(0, 200_000 if active == len(run.active) else 0)

    monkeypatch.setattr(prompt, "estimate_gradient_memory", estimate)
    monkeypatch.setattr(prompt, "estimate_prompt_memory", lambda *sizes: Memory(0, 0))
    monkeypatch.setattr(prompt, "free_memory", lambda mesh: Memory(0, 100_000))
    with pytest.raises(UserError, match=refused):
        trace(lm, open_saes(saes), IDS)
    assert counted == [certain, len(run.active)]
    monkeypatch.undo()
    monkeypatch.setattr(prompt, "free_memory", lambda mesh: Memory(0, 100_000))
    monkeypatch.setattr(SaeRun, "of", lambda *parts: pytest.fail("the prompt is run"))
    with pytest.raises(UserError, match=refused):
        trace(lm, open_saes(saes), IDS)


@pytest.mark.usefixtures("two_devices")
def test_the_stage_writes_all_that_it_does_for_transcoders(llama, tmp_path, capsys, monkeypatch):
    lm, saes = llama
    folders = [tmp_path / sae.site for sae in saes]
    for folder, sae in zip(folders, saes, strict=True):
        save_dictionary(folder, sae)
    named = f"--graph.dictionaries={','.join(map(str, folders))}"
    flags = [f"--model.path={lm.source.folder}", f"--workdir={tmp_path / 'run'}", "--mesh.data=2"]
    (tmp_path / "mine.jsonl").write_text(json.dumps(dict(slug="mine", token_ids=IDS)))
    flags += [f"--graph.prompts={tmp_path / 'mine.jsonl'}", "--graph.top_edges=6", "--graph.max_logits=3"]
    assert command.run(["attribute"], "", ["attribute", *flags, named]) == 0
    folder = tmp_path / "run" / "attribute" / "mine"
    summary = json.loads((folder / "done.json").read_text())["results"]
    assert summary["dictionaries"] == list(map(str, folders)) and list(summary["graphs"]) == ["mine"]
    document = json.loads((folder / "graphs" / "mine.json").read_text())
    targets = [link["target"] for link in document["links"]]
    assert targets and max(map(targets.count, targets)) <= 6
    assert document["metadata"]["generation_settings"]["edges"].startswith("total gradient x activation")
    whole = trace(lm, open_saes(folders), IDS, max_logits=3)
    assert relative_error(Graph.load(folder / "mine-graph").adjacency_RxS, whole.adjacency_RxS) < 1e-4
    assert (folder / "mine.html").stat().st_size > 1000
    # Before hours are spent on the first of many prompts.
    (tmp_path / "more.jsonl").write_text(
        "".join(json.dumps(dict(slug=slug, token_ids=IDS[:3])) + "\n" for slug in "ab")
    )
    with monkeypatch.context() as patch:
        patch.setattr(prompt, "free_memory", lambda mesh: Memory(0, 100_000))
        patch.setattr("saejax.stages.attribute.run.trace_prompt", lambda *args, **options: pytest.fail("it is traced"))
        others = [flag for flag in flags if "--graph.prompts" not in flag] + [f"--graph.prompts={tmp_path}/more.jsonl"]
        assert command.run(["attribute"], "", ["attribute", *others, named]) == 2
    assert "error: a: the graph would take" in capsys.readouterr().err
    for wrong, message in (
        (["--graph.transcoders=set", named], "--graph.transcoders and --graph.dictionaries: expected one of them"),
        (["--graph.transcoders=set", "--graph.direct=true"], "are for SAEs"),
        (["--graph.dictionaries=nowhere/at/all"], "nowhere/at/all does not exist"),
    ):
        assert command.run(["attribute"], "", ["attribute", *flags, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
