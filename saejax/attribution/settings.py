"""Settings of attribution graphs: prompts, transcoders or SAEs, pruning, and what the page shows."""

import dataclasses

from saejax import shared_settings as shared
from saejax.config import Config, Place, Text, setting

GRAPH_ESTIMATES = ("gradient", "relp")


@dataclasses.dataclass(frozen=True)
class GraphConfig(Config):
    """Attribution graphs of prompts."""

    transcoders: Place = setting(
        "",
        "transcoders of all layers: a folder or hub id of a set (circuit-tracer's or Gemma Scope's, per layer or "
        "cross-layer; org/name/subfolder, org/name@revision), a short name such as qwen3-4b, or the folder of a "
        "set trained here, such as runs/mine/train/topk",
    )
    l0: tuple[str, ...] = setting(
        (),
        "choice among several Gemma Scope transcoders per layer: words of their names, such as small, or "
        "16k,big,affine; or a number such as 100, for the transcoder with the nearest L0 in each layer",
    )
    dictionaries: tuple[Place, ...] = setting(
        (),
        "folders of SAEs to use in place of transcoders, such as runs/mine/train/topk, at most one SAE per layer; "
        "edges are then first-order estimates (activation x gradient)",
    )
    estimate: str = setting(
        "gradient",
        "backward pass with SAEs: the model's gradient (gradient), or the rules of relevance patching (relp)",
        choices=GRAPH_ESTIMATES,
    )
    direct: bool = setting(
        False,
        "with SAEs: freeze the sites in between, so that an effect through their features counts only in the edges "
        "from those features; otherwise it also counts in the edge from the source",
    )
    prompt: Text = setting("", "the text to trace")
    prompts: Place = setting(
        "",
        '.jsonl file of prompts, in place of --graph.prompt: {"slug": "paris", "prompt": "...", "targets": [" '
        'Paris"]}, or "token_ids"; a target is a text, or a list of two for the difference of their logits; a line '
        "without targets uses --graph.target",
    )
    behaviours: tuple[str, ...] = setting(
        (), "behaviours whose first test prompt is traced, with the logit difference as target"
    )
    chat_template: bool = shared.chat_template()
    target: Text = setting(
        "",
        "token to explain, such as ' Paris', as it is written; empty: the most probable next tokens",
    )
    minus: Text = setting(
        "",
        "token whose logit is subtracted from that of --graph.target, such as ' Rome', to explain the difference; "
        "empty: none",
    )
    max_logits: int = setting(10, "maximum number of next tokens to explain", low=1)
    max_features: int = setting(4096, "maximum number of features to trace, the most influential first; 0: all", low=0)
    node_threshold: float = setting(0.8, "share of the total influence that the kept nodes have", low=0.0, high=1.0)
    edge_threshold: float = setting(0.98, "share of the total influence that the kept edges have", low=0.0, high=1.0)
    top_edges: int = setting(0, "maximum number of edges kept per target, the largest first; 0: all", low=0)
    min_weight: float = setting(
        0.0, "smallest size of the edges that are kept, in units of the target's pre-activation", low=0.0
    )
    slug: str = setting("", "name of the graph and of its folder; empty: derived from the prompt or the file name")
    supernodes: Place = setting(
        "",
        'file of groups of nodes that the page and Neuronpedia show, .json: {"paris": [["cities", "3_17_4", '
        '"5_208_4"]]} ("*": all graphs), or a state saved by the page; empty: none',
    )
    labels: Place = setting(
        "",
        'file of labels of features, .json: {"3_17": "cities"}, by layer and index; or a sheet that a person filled '
        "in, .csv, as the stages atlas and circuits write them; or a folder of such sheets",
    )
    features: Place = setting(
        "",
        "folder of feature files, whose contexts and labels the page shows: circuit-tracer's or Neuronpedia's, or "
        "hf://org/name/folder for packed ones on the hub; those in the set's folder features/ and those of interpret "
        "are always shown",
    )
    source_set: str = shared.source_set()
    contexts: int = setting(
        8,
        "number of texts of the embedded corpus in which features without a description are searched, so that the page "
        "names them by the tokens on which they fire (transcoders only); 0: none",
        low=0,
    )
    lens: Place = shared.lens()
    query_key: tuple[str, ...] = setting(
        (),
        "heads whose query-key scores are split over pairs of sources, each layer.head or layer.head@position of the "
        "query (default -1, the last), such as 12.3,14.0@5",
    )
