"""Attribution graphs: of which prompts, with which transcoders or SAEs, and how much of them is kept."""

import dataclasses

from saejax.runner.config import Config, setting

GRAPH_ESTIMATES = ("gradient", "relp")
CLUSTER = "cluster"  # in place of a file of supernodes


@dataclasses.dataclass(frozen=True)
class GraphConfig(Config):
    """Attribution graphs of prompts."""

    transcoders: str = setting(
        "",
        "transcoders of all layers: a folder or hub id of a set (circuit-tracer's or Gemma Scope's, of each layer or "
        "cross-layer), or the folder of ours, such as runs/mine/train/topk",
    )
    revision: str = setting("main", "revision of a set on the hub")
    subfolder: str = setting("", "folder of the set within its repository")
    l0: tuple[str, ...] = setting(
        (),
        "which transcoders of a Gemma Scope folder that holds several of each layer: words of their names, such as "
        "small, or 16k,big,affine; a number: of each layer the one with the nearest L0, such as 100",
    )
    dictionaries: tuple[str, ...] = setting(
        (),
        "SAEs instead, where there are no transcoders: their folders, such as runs/mine/train/topk, at most one SAE of "
        "each layer; edges are then activation x gradient, first-order estimates",
    )
    estimate: str = setting(
        "gradient",
        "with SAEs: the gradient of the model, or relp, by the rules of relevance patching",
        choices=GRAPH_ESTIMATES,
    )
    direct: bool = setting(
        False,
        "with SAEs: hold the sites between, so that what goes through their features is counted in the edges from "
        "these alone; otherwise in both",
    )
    prompt: str = setting("", "the text to trace")
    token_ids: tuple[int, ...] = setting((), "its token ids instead, taken as they are", low=0)
    prompts: str = setting(
        "",
        'file of prompts instead, .jsonl: {"slug": "paris", "prompt": "...", "targets": [" Paris"]}, or "token_ids"; '
        "without targets that of --graph.target",
    )
    behaviours: tuple[str, ...] = setting(
        (), "behaviours instead: of each the first test prompt, whose target is the logit difference"
    )
    chat_template: bool = setting(
        False, "put prompts that are texts into the tokenizer's chat template, as what a user says"
    )
    target: str = setting(
        "",
        "what is explained: a token as it is written, such as ' Paris', or ' Paris> Rome' for the difference of their "
        "logits; empty: the most probable next tokens",
    )
    max_logits: int = setting(10, "most tokens that are explained", low=1)
    logit_mass: float = setting(
        0.95, "as few of the most probable tokens as have this probability together", low=0.0, high=1.0
    )
    max_features: int = setting(4096, "most features that are traced, the most influential ones (0: all)", low=0)
    node_threshold: float = setting(0.8, "share of all influence of the nodes that are kept", low=0.0, high=1.0)
    edge_threshold: float = setting(0.98, "share of all influence of the edges that are kept", low=0.0, high=1.0)
    top_edges: int = setting(0, "of each target only so many of its edges are kept, the largest (0: all)", low=0)
    slug: str = setting(
        "", "name of the graph, and of the folder of the results; empty: made of the prompt or the file's name"
    )
    doubled: int = setting(
        32,
        "features raised with all held, and doubled with nothing held, to see whether edges are right (0: none)",
        low=0,
    )
    circuits: bool = setting(
        True,
        "run parts of the graph alone, and all the rest alone, to see whether they do the work (with transcoders)",
    )
    circuit_rest: str = setting(
        "zero",
        "what the features that are left out then are: zero, or mean, their mean activation over the positions of all "
        "prompts of this run",
        choices=("zero", "mean"),
    )
    kept_prompts: int = setting(
        0,
        "test prompts of each behaviour on which circuits of growing numbers of features are run, kept in the order of "
        "their effect and in circuit-tracer's: CPR and CMD of both (with transcoders; 0: none)",
        low=0,
    )
    supernodes: str = setting(
        "",
        'groups of features that the page and Neuronpedia show: empty for none, "cluster" for those that are alike, or '
        'a file, .json: {"paris": [["cities", "3_17_4", "5_208_4"]]} ("*": all graphs), or a state that the page saved',
    )
    labels: str = setting(
        "", 'file of names of features, .json: {"3_17": "cities"}, by layer and number; pages and Neuronpedia show them'
    )
    source_set: str = setting(
        "",
        "the name that Neuronpedia has for the set, such as gemmascope-transcoder-16k: graphs are then "
        "written for Neuronpedia, which takes files of 100 MB at the most; else for circuit-tracer's viewer",
    )
    scan: str = setting(
        "",
        "where a viewer looks for the features; empty: the model's id at Neuronpedia, its name in small letters, or "
        "without --graph.source_set the address of a set on the hub",
    )
    heads: bool = setting(True, "find the attention heads that carry each edge of the pruned graph")
    query_key: tuple[str, ...] = setting(
        (),
        "heads whose query-key scores are split over pairs of sources, each layer.head or layer.head@position of the "
        "query (by default -1, the last), such as 12.3,14.0@5; empty: with --graph.heads the one that carries most "
        "into the last position; none: none",
    )
    seed: int = setting(456, "seed of the choice of features that are doubled", low=0)
