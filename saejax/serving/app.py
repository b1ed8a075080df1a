"""The server: its addresses, and how it runs. Pages are made for each request; work is told line by line (``jobs``)."""

import asyncio
import contextlib
import json
import math
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from saejax.attribution.forms.document import describe_sources, feature_nodes, feature_of
from saejax.attribution.forms.features import Feature, FeatureDetails
from saejax.attribution.graph.data import FEATURE
from saejax.attribution.local.state import TEXT_MODES
from saejax.attribution.settings import GraphConfig
from saejax.config import Configs
from saejax.errors import UserError
from saejax.models.settings import ModelConfig
from saejax.page.graph.page import VIEWER, PageTable, feature_data, kept_features, page_html
from saejax.page.scripts import interactive
from saejax.serving.effects import MODES, continuations, effects
from saejax.serving.guard import Guard
from saejax.serving.jobs import Job, Jobs
from saejax.serving.session import ModelSession, targets_of, trace_typed
from saejax.serving.store import GraphStore, StoredGraph
from saejax.stages.attribute.outputs import lens_note
from saejax.stages.attribute.requests import folders
from saejax.unicode import has_surrogates
from saejax.wording import counted

_OWN = Path(__file__).parent / "viewer"
_LARGEST = 1e30  # factor or activation
_LONGEST_LABEL = 1000  # characters
_MOST_TOKENS = 200  # of a generated text
_GRACE = 5  # seconds for answers that are under way when the server is to end
_FEATURE = re.compile("_".join(["[0-9]{1,9}"] * 3))  # its layer, index and position
_OUTPUTS = ("first", "second")  # in the address of a page: two logits, whose difference it explains


def address(graph: str, **query: Any) -> str:
    """Return the address of a graph's page, relative to the list of graphs."""
    return f"graph?{urlencode(dict(id=graph, **query))}"


def list_page(store: GraphStore, graphs: Sequence[StoredGraph], config: GraphConfig, note: str, why: str) -> str:
    """Return the list of graphs, with the form that traces one.

    Args:
      store: of the folder; its problems are listed, too.
      graphs: in their order.
      config: whose settings the form begins with.
      note: what traces.
      why: nothing can be traced; "": it can.
    """
    root = store.root
    listed = [
        dict(
            id=graph.id,
            address=address(graph.id),
            prompt=metadata["prompt"],
            about=", ".join([*describe_sources(metadata), counted(len(metadata["prompt_tokens"]), "token")]),
        )
        for graph in graphs
        for metadata in [graph.metadata]
    ]
    scripts = [*(VIEWER / f"{name}.js" for name in ("elements", "stream")), _OWN / "index.js"]
    return interactive(
        _OWN,
        "index",
        [path.read_text("utf-8") for path in scripts],
        dict(graphs=listed, problems=[f"{path}: {problem}" for path, problem in store.problems.items()]),
        style=(VIEWER / "graph.css").read_text("utf-8"),
        title=f"Attribution graphs of {root.resolve().name}",
        about=f"{counted(len(graphs), 'graph')} in {root}",
        note=why or note,
        why=why,
        max_features=config.max_features,
        nodes=config.node_threshold,
        edges=config.edge_threshold,
    )


class GraphServer:
    """The answers to requests."""

    def __init__(self, store: GraphStore, session: ModelSession, jobs: Jobs):
        self._store, self._session, self._jobs = store, session, jobs

    def application(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/", self._page(self._list)),
            Route("/graph", self._page(self._graph)),
            Route("/api/trace", self._work(self._trace), methods=["POST"]),
            Route("/api/change", self._work(self._change), methods=["POST"]),
            Route("/api/generate", self._work(self._generate), methods=["POST"]),
            Route("/api/feature", self._told(self._feature), methods=["PUT"]),
            Route("/api/label", self._told(self._label), methods=["PUT"]),
            Route("/api/state", self._told(self._state), methods=["PUT"]),
        ]
        return Starlette(routes=routes, exception_handlers={UserError: _refuse, ClientDisconnect: _left})

    def _page(self, make: Callable[[Mapping[str, str]], str]) -> Callable:
        async def answer(request: Request) -> Response:
            return HTMLResponse(await asyncio.to_thread(make, request.query_params))

        return answer

    def _told(self, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Callable:
        async def respond(request: Request) -> Response:
            return JSONResponse(await asyncio.to_thread(answer, _fields(await request.body())))

        return respond

    def _work(self, do: Callable[[Mapping[str, Any], Job], Any]) -> Callable:
        async def answer(request: Request) -> Response:
            fields = _fields(await request.body())
            return StreamingResponse(self._jobs.lines(lambda job: do(fields, job)), media_type="application/x-ndjson")

        return answer

    def _list(self, query: Mapping[str, str]) -> str:
        graphs, why = list(self._store.graphs().values()), ""
        try:
            configs = self._configs()
            config = configs[GraphConfig]
            note = f"With {_parts(configs)}."
        except UserError as error:
            config, note, why = self._session.defaults[GraphConfig], "", _line(error)
        return list_page(self._store, graphs, config, note, why)

    def _graph(self, query: Mapping[str, str]) -> str:
        graph = self._store.find(query.get("id", ""))
        document, note, why, missing, lens = self._store.document(graph), "", "", "", ""
        freeze_modes: tuple[str, ...] = MODES
        settings = document["metadata"].get("pruning_settings") or {}
        shares = dict(nodes=settings.get("node_threshold", 0.8), edges=settings.get("edge_threshold", 0.98))
        labels: dict[tuple[int, int], str] = {}
        details: dict[Feature, FeatureDetails] = {}
        tables: list[PageTable] = []
        config, outputs = self._session.graph_config(graph), [query[name] for name in _OUTPUTS if name in query]
        if len(outputs) == 1:
            raise UserError(f"one output has no difference: give both, {' and '.join(_OUTPUTS)}")
        if outputs or not shares.keys().isdisjoint(query):
            shares = {name: _share({**shares, **query}, name) for name in shares}
            document = self._session.prune(graph, document, shares["nodes"], shares["edges"], outputs)
        try:
            configs = self._session.configs_of(graph)
            freeze_modes = MODES[:1] if config.dictionaries else MODES
            note = f"With {_parts(configs)}."
            note += "" if graph.whole else " It cannot be pruned again, as the whole graph is not saved here."
        except UserError as error:
            why = _line(error)
        try:  # a damaged file of labels or features hides neither the graph nor what can be done with it
            tables = self._store.tables(graph)
            labels = {} if why else self._store.labels(folders(config))
            details, lens = self._details(graph, kept_features(document), config), self._store.lens(graph)
        except UserError as error:
            missing = f" Labels or contexts are missing: {_line(error)}"
        live: dict[str, Any] = dict(graph=graph.id, note=f"{why or note}{missing}", why=why, freeze_modes=freeze_modes)
        live |= dict(shares, whole=graph.whole is not None, difference=bool(outputs))
        return page_html(document, labels=labels, details=details, live=live, tables=tables, note=lens_note(lens))

    def _trace(self, fields: Mapping[str, Any], job: Job) -> Any:
        prompt, target, minus = (_text(fields, name) for name in ("prompt", "target", "minus"))
        if not prompt:
            raise UserError("the prompt is empty: expected a text")
        most = fields.get("max_features")
        if type(most) is not int or most < 0:
            raise UserError(f"max_features is {most!r}: expected a number of features, 0 for all")
        thresholds = dict(node_threshold=_share(fields, "nodes"), edge_threshold=_share(fields, "edges"))
        settings: dict[str, Any] = dict(
            prompt=prompt, target=target, minus=minus, max_features=most, chat_template=fields.get("chat") is True
        )
        settings |= thresholds
        return dict(address=address(trace_typed(self._session, self._configs(), self._store, settings, job)))

    def _change(self, fields: Mapping[str, Any], job: Job) -> Any:
        graph = self._find_graph(fields)
        document, freeze, changes = self._store.document(graph), fields.get("freeze"), _changes(fields.get("changes"))
        if freeze not in MODES:
            raise UserError(f"freeze is {freeze!r}: expected one of {', '.join(MODES)}")
        run = self._session.run(graph, document, job)
        job.say("Running the model")
        return effects(run, changes, freeze, targets_of(document), job.progress)

    def _generate(self, fields: Mapping[str, Any], job: Job) -> Any:
        graph, changes, freeze = self._find_graph(fields), _changes(fields.get("changes")), fields.get("freeze")
        tokens: Any = fields.get("tokens")
        temperature: Any = fields.get("temperature")
        seed: Any = fields.get("seed")
        if type(tokens) is not int or not 1 <= tokens <= _MOST_TOKENS:
            raise UserError(f"tokens is {tokens!r:.40}: expected a number of tokens, 1 to {_MOST_TOKENS}")
        if type(temperature) not in (int, float) or not 0 <= temperature <= 10:
            raise UserError(f"temperature is {temperature!r:.40}: expected a number, 0 to 10")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed!r:.40}: expected a whole number, 0 to {2**32 - 1}")
        if freeze not in TEXT_MODES:
            raise UserError(
                f"freeze is {freeze!r:.40}: expected one of {', '.join(TEXT_MODES)} where text is generated"
            )
        run, onward = self._session.run(graph, self._store.document(graph), job), fields.get("onward") is True
        job.say("Generating")
        return continuations(run, changes, freeze, tokens, float(temperature), seed, onward, job.progress)

    def _details(
        self, graph: StoredGraph, features: Sequence[Feature], config: GraphConfig, fetched: int = 0
    ) -> dict[Feature, FeatureDetails]:
        """Return what is known of features, by the graph's set or else by the command line's."""
        defaults = self._session.defaults[GraphConfig]
        details = self._store.details(graph, features, config, fetched)
        return details or self._store.details(graph, features, defaults, fetched)

    def _feature(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        graph, name = self._find_graph(fields), _text(fields, "feature")
        if not re.fullmatch(r"[0-9]{1,4}_[0-9]{1,9}", name):
            raise UserError(f"{name!r} is no feature: expected layer_index, such as 3_17")
        feature, config = feature_of(dict(node_id=name)), self._session.graph_config(graph)
        return feature_data(self._details(graph, [feature], config, fetched=1).get(feature, FeatureDetails()))

    def _label(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        graph, name, label = self._find_graph(fields), _text(fields, "node"), _text(fields, "label").strip()
        features = {node["node_id"] for node in feature_nodes(self._store.document(graph))}
        # One that was pruned away is on the page with other thresholds.
        if name not in features and graph.whole:
            whole = graph.load_whole()
            features = set(whole.ids[whole.slice_of(FEATURE)])
        if name not in features:
            raise UserError(f"{name!r} is no feature of the graph")
        if len(label) > _LONGEST_LABEL:
            raise UserError(f"the label has {len(label):,} characters: expected at most {_LONGEST_LABEL}")
        layer, feature = feature_of(dict(node_id=name))
        named = folders(self._session.configs_of(graph)[GraphConfig])
        return dict(file=str(self._store.save_label(named, layer, feature, label)))

    def _state(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return dict(file=str(self._store.save_state(self._find_graph(fields), fields.get("state"))))

    def _configs(self) -> Configs:
        """Return the configuration for new prompts: the command line's, or the newest traced graph's."""
        traced = [graph for graph in self._store.graphs().values() if graph.unit]
        for graph in traced[:-1]:
            with contextlib.suppress(UserError):  # a damaged unit, or one of an older version
                return self._session.configs_of(graph)
        return self._session.configs_of(traced[-1] if traced else None)

    def _find_graph(self, fields: Mapping[str, Any]) -> StoredGraph:
        return self._store.find(_text(fields, "graph"))


async def _left(request: Request, error: Exception) -> Response:
    """Answer a request that was broken off before all of it came; nobody reads this."""
    return Response(status_code=400)


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer a request that cannot be met: in words for a reader, as JSON for a page."""
    if request.method == "GET":
        return PlainTextResponse(_line(error), 404)
    return JSONResponse(dict(error=_line(error)), 400)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fields(body: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UserError("expected a JSON object")
    return parsed


def _text(fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(fields.get(name), str):
        raise UserError(f"{name} is {fields.get(name)!r:.40}: expected a text")
    if has_surrogates(fields[name]):
        raise UserError(f"{name} has an unpaired surrogate: expected valid Unicode")
    return fields[name]


def _share(fields: Mapping[str, Any], name: str) -> float:
    try:
        value = float(fields.get(name, "nan"))
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {fields.get(name)!r:.40}: expected a share, 0 to 1")
    return value


def _changes(entries: Any) -> list[tuple[str, float, list[str]]]:
    """Return the changes that a page sent, each a list such as ["scale", 0.0, "3_17_4", ...]."""
    changes: list[tuple[str, float, list[str]]] = []
    for item in entries if isinstance(entries, list) else [entries]:
        match item:
            case ["scale" | "set" as how, int() | float() as amount, first, *rest] if -_LARGEST < amount < _LARGEST:
                if all(isinstance(name, str) and _FEATURE.fullmatch(name) for name in (first, *rest)):
                    changes.append((how, float(amount), [first, *rest]))
                    continue
        raise UserError('changes are lists such as ["scale", 0.0, "3_17_4"]: how, a number, and ids of features')
    return changes


def _parts(configs: Configs) -> str:
    """Return the names of a model and its dictionaries."""
    return f"{configs[ModelConfig].path} and {', '.join(folders(configs[GraphConfig]))}"


class StoppingServer(uvicorn.Server):
    """A server that stops its work before it waits for answers to end.

    Args:
      config: of uvicorn.
    """

    def __init__(self, config: uvicorn.Config, jobs: Jobs):
        super().__init__(config)
        self._jobs = jobs

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop all work, then the server."""
        self._jobs.stop()
        super().handle_exit(sig, frame)


def serve(
    folder: Path, configs: Configs, named: bool, token: str, listening: socket.socket, hosts: Sequence[str] = ()
) -> None:
    """Answer requests until the process is stopped.

    Args:
      folder: folder with the graphs.
      configs: configuration of the model and the dictionaries.
      named: whether it names a set of dictionaries, which is then used for all graphs.
      token: secret first part of the address.
      listening: a socket of 127.0.0.1.
      hosts: further names by which a tunnel or proxy asks; see ``Guard``.

    Raises:
      UserError: there is no graph, and no model and dictionaries to trace one with.
    """
    store, jobs = GraphStore(folder), Jobs()
    graphs = len(store.graphs())
    if not graphs and not named:
        raise UserError(
            f"{folder} holds no graphs: expected a workdir in which experiments.attribute made some, or graphs in "
            "Neuronpedia's format; to make the first here, name --model.path=MODEL --graph.transcoders=SET"
        )
    port = listening.getsockname()[1]
    server = make_server(store, ModelSession(configs, named), jobs, token, port, hosts)
    print(f"{counted(graphs, 'graph')}: open http://127.0.0.1:{port}/{token}/ (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(jobs):
        server.run(sockets=[listening])


def make_server(
    store: GraphStore, session: ModelSession, jobs: Jobs, token: str, port: int, hosts: Sequence[str] = ()
) -> StoppingServer:
    """Return the server, which is not running yet.

    Args:
      store: the graphs.
      session: the model and its dictionaries.
      jobs: the work in progress.
      token: in the address.
      port: of the address.
      hosts: further names by which a tunnel or proxy asks; see ``Guard``.
    """
    own_hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
    config = uvicorn.Config(
        Guard(GraphServer(store, session, jobs).application(), token, own_hosts, hosts),
        http="h11",  # says when a reader has left, on which work ends
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,  # addresses have the token
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    return StoppingServer(config, jobs)
