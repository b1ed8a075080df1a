"""Made-up graphs in Neuronpedia's format; what they say is invented, their form is not."""

import numpy as np

WORDS = ["<bos>", "Fact", ":", " the", " capital", " of", " the", " state", " containing", " Dallas", " is"]
WORDS += ["\n", "\t", "  ", "</script>", " Texas"]
NAMES = ["Texas", "capitals of states", "say a city", "cities in the south", "geography <b>bold</b>", "Dallas", ""]


def made_up_document(features=120, edges=900, layers=12, positions=11, seed=0, errors=20, outputs=5):
    """A random graph: weights fall off like those of real graphs, and later positions hold more features."""
    rng = np.random.default_rng(seed)
    tokens = [WORDS[k % len(WORDS)] for k in range(positions)]
    nodes, seen = [], set()

    def add(node_id, layer, position, kind, feature, clerp="", **more):
        plain = dict(token_prob=0.0, is_target_logit=False, run_idx=0, reverse_ctx_idx=0, influence=None)
        plain |= dict(activation=None, jsNodeId=f"{layer}_{feature}-0", clerp=clerp) | more
        nodes.append(
            dict(node_id=node_id, feature=feature, layer=str(layer), ctx_idx=position, feature_type=kind, **plain)
        )

    while len(seen) < features:
        layer = int(rng.integers(layers))
        position = int(1 + (positions - 1) * rng.beta(2.2, 1.1))
        seen.add((layer, min(position, positions - 1), int(rng.integers(16384))))
    influence = np.sort(rng.uniform(0.05, 0.8, features) ** 0.6 * 0.8 / 0.8**0.6)
    for share, (layer, position, feature) in zip(influence, sorted(seen, key=lambda _: rng.random())):
        paired = (layer + feature) * (layer + feature + 1) // 2 + feature
        name = NAMES[int(rng.integers(len(NAMES)))] if rng.random() < 0.5 else ""
        add(
            f"{layer}_{feature}_{position}", layer, position, "cross layer transcoder", paired, name,
            influence=float(share), activation=float(rng.gamma(2.0, 3.0)),
        )  # fmt: skip
    cells = [(layer, position) for layer in range(layers) for position in range(1, positions)]
    for k in rng.permutation(len(cells))[:errors]:
        layer, position = cells[k]
        share = float(rng.uniform(0.2, 0.8))
        add(f"{layer}_-1_{position}", layer, position, "mlp reconstruction error", -1, influence=share)
    for position in range(positions):
        add(
            f"E_{100 + position}_{position}", "E", position, "embedding", position, influence=float(rng.uniform(0.1, 1))
        )
    chances = rng.dirichlet(np.full(outputs, 0.6)) * 0.95
    for k, chance in enumerate(sorted(chances, reverse=True)):
        text = [" Austin", " Dallas", " Houston", " located", " the"][k % 5]
        add(
            f"{layers + 1}_{500 + k}_{positions - 1}", layers + 1, positions - 1, "logit", 500 + k,
            f'Output "{text}" (p={chance:.3f})', token_prob=float(chance), is_target_logit=k == 0,
        )  # fmt: skip
    links = _links(rng, nodes, layers, edges)
    metadata = dict(
        slug="made-up", scan="made-up-model", prompt_tokens=tokens, prompt="".join(tokens), node_threshold=0.8
    )
    metadata |= dict(schema_version=1, pruning_settings=dict(node_threshold=0.8, edge_threshold=0.98))
    params = dict(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos="")
    return dict(metadata=metadata, qParams=params, nodes=nodes, links=links)


def _links(rng, nodes, layers, edges):
    """Edges from lower layers to higher ones, and never from a later position to an earlier one."""
    height = np.array([-1 if node["layer"] == "E" else int(node["layer"]) for node in nodes])
    place = np.array([node["ctx_idx"] for node in nodes])
    target_kind = np.array([node["feature_type"] in ("cross layer transcoder", "logit") for node in nodes])
    is_logit = height > layers
    pairs = np.argwhere(
        (height[:, None] < height[None]) & (place[:, None] <= place[None]) & target_kind[None] & ~is_logit[:, None]
    )
    chance = np.where(place[pairs[:, 0]] == place[pairs[:, 1]], 3.0, 1.0)
    chosen = pairs[np.sort(rng.choice(len(pairs), min(edges, len(pairs)), replace=False, p=chance / chance.sum()))]
    weights = rng.lognormal(-1.5, 1.2, len(chosen)) * np.where(rng.random(len(chosen)) < 0.27, -1, 1)
    names = [node["node_id"] for node in nodes]
    return [dict(source=names[a], target=names[b], weight=float(w)) for (a, b), w in zip(chosen, weights)]
