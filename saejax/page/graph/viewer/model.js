// The graph as typed arrays. Nodes keep the order of the document; edges are sorted by score, strongest first,
// so that "edge e is among the strongest" is a comparison of integers, and each node's lists of edges are sorted.

const FEATURE = 0;
const ERROR = 1;
const TOKEN = 2;
const LOGIT = 3;
const OTHER = 4;
const KIND_OF = { "cross layer transcoder": FEATURE, "mlp reconstruction error": ERROR, embedding: TOKEN, logit: LOGIT };

/** The kind of a node of another program: "lorsa error" is an error, "lorsa" a feature. */
const kindNamed = (type) => (/error/i.test(type) ? ERROR : /transcoder|feature|lorsa|sae/i.test(type) ? FEATURE : OTHER);

/** The layer of a node that is no token; "E" stands below layer 0. */
const layerOf = (node) => (Number.isFinite(Number(node.layer)) ? Number(node.layer) : -1);

/** What nodes are called and found by; ``labels`` go before the document's own. */
function nameNodes(graph, labels) {
  const { doc, kind, tokens, pos } = graph;
  graph.labels = doc.nodes.map((node, i) => labelOf(graph, node, i, labels));
  graph.named = doc.nodes.map((node, i) => Boolean(labels[featureKey(node)] || node.clerp) && kind[i] === FEATURE);
  graph.searchable = doc.nodes.map((node, i) =>
    `${graph.labels[i]}\n${node.node_id}\n${visibleToken(tokens[pos[i]] ?? "")}\n${tokens[pos[i]] ?? ""}`.toLowerCase(),
  );
}

/** Names of features by layer and number: labels that were saved, then the document's own, then those of files. */
function namesOf({ document: doc, labels, details }) {
  const names = { ...labels };
  for (const node of doc.nodes) {
    const key = featureKey(node);
    if (!names[key] && !node.clerp && details[key]?.name) names[key] = details[key].name;
  }
  return names;
}

/** Tokens and outputs, the ends of all paths: whatever the thresholds, they are shown. */
const isEnd = (graph, i) => graph.kind[i] === TOKEN || graph.kind[i] === LOGIT;

/** The nodes of which something is true. */
const nodesWhere = (graph, holds) => [...graph.kind.keys()].filter(holds);

function readGraph(doc, labels, edges) {
  const { nodes } = doc;
  const tokens = doc.metadata.prompt_tokens;
  const kind = Uint8Array.from(nodes, (node) => KIND_OF[node.feature_type] ?? kindNamed(node.feature_type));
  const inner = nodesWhere({ kind }, (i) => !isEnd({ kind }, i));
  const layers = inner.reduce((most, i) => Math.max(most, layerOf(nodes[i]) + 1), 0);
  const rowOf = { [TOKEN]: 0, [LOGIT]: layers + 1 };
  const row = Int16Array.from(nodes, (node, i) => rowOf[kind[i]] ?? layerOf(node) + 1);
  const share = Float32Array.from(nodes, (node) => node.influence ?? -1); // below every threshold: always shown
  const chance = Float64Array.from(nodes, (node, i) => (kind[i] === LOGIT ? (node.token_prob ?? 0) : 0));
  // So improbable that all are 0: they count alike, as in Python.
  if (!chance.some((p) => p > 0)) kind.forEach((of, i) => (chance[i] = of === LOGIT ? 1 : 0));
  const graph = { doc, n: nodes.length, tokens, rows: layers + 2, columns: tokens.length, kind, row, share, chance };
  Object.assign(graph, {
    pos: Int32Array.from(nodes, (node) => node.ctx_idx),
    activation: Float32Array.from(nodes, (node) => node.activation ?? NaN),
    ids: nodes.map((node) => node.node_id),
    index: new Map(nodes.map((node, i) => [node.node_id, i])),
    mostShare: inner.reduce((most, i) => Math.max(most, share[i]), 0), // where the slider ends
    ...readEdges(edges, row, chance),
  });
  nameNodes(graph, labels);
  return graph;
}

/** Weights are in the units of their targets, so weights of different targets do not compare. The score of an edge does:
 * it is the edge's share of its target's input, by size, times the target's influence on the outputs over all paths.
 * Edges go up, so one sweep from the top row down finds it. `chance`: the outputs' own influence. */
function sweep({ source, target, weight }, row, chance) {
  const inTotal = new Float64Array(row.length); // of |weight|
  for (let e = 0; e < weight.length; e++) inTotal[target[e]] += Math.abs(weight[e]);
  const influence = Float64Array.from(row, (_, i) => chance[i] ?? 0);
  const score = new Float64Array(weight.length);
  for (const e of [...score.keys()].sort((a, b) => row[target[b]] - row[target[a]])) {
    score[e] = (influence[target[e]] * Math.abs(weight[e])) / (inTotal[target[e]] || 1);
    influence[source[e]] += score[e];
  }
  return { score, influence, inTotal };
}

/** The edges, strongest first, of the graph and of each node. */
function readEdges(edges, row, chance) {
  const { score: found, influence, inTotal } = sweep(edges, row, chance);
  const size = (e) => Math.abs(edges.weight[e]);
  const order = [...found.keys()].sort((a, b) => found[b] - found[a] || size(b) - size(a));
  const ranked = (column) => column && order.map((e) => column[e]);
  const [source, target, weight, score, more] = [edges.source, edges.target, edges.weight, found, edges.more].map(ranked);
  const m = order.length;
  const before = new Float64Array(m); // share of all scores that stronger edges have
  const [ins, outs] = [0, 1].map(() => Array.from(row, () => []));
  const total = score.reduce((sum, value) => sum + value, 0) || 1;
  let sum = 0;
  for (let e = 0; e < m; e++) {
    before[e] = sum / total;
    sum += score[e];
    ins[target[e]].push(e);
    outs[source[e]].push(e);
  }
  return { m, source, target, weight, score, more, before, inTotal, influence, ins, outs };
}

/** The edges as the document has them, keys of other programs included. */
const linksOf = ({ ids, source, target, weight, more }) =>
  weight.map((_, e) => ({ source: ids[source[e]], target: ids[target[e]], weight: weight[e], ...more?.[e] }));

/** "layer_feature" of a transcoder's feature, by which labels and examples are keyed; else "". */
function featureKey(node) {
  return KIND_OF[node.feature_type] === FEATURE ? node.node_id.split("_").slice(0, 2).join("_") : "";
}

/** The two tokens of an output that is a difference of logits; else null. */
function differenceOf(node) {
  const pair = /^Output "(['"])([\s\S]*)\1 - (['"])([\s\S]*)\3" \(p=[\d.e+-]+\)$/.exec(node.clerp);
  return pair && [pair[2], pair[4]];
}

/** The probability of an output; a difference and a direction are no tokens and have none. */
const chanceOf = (node) => (/^\d+_-/.test(node.node_id) ? "" : percent(node.token_prob ?? 0));

const valueOf = (node) => (differenceOf(node) ? "difference of logits" : "direction");

function labelOf(graph, node, i, labels) {
  const token = visibleToken(graph.tokens[graph.pos[i]] ?? "");
  if (graph.kind[i] === TOKEN) return token;
  if (graph.kind[i] === LOGIT) {
    const pair = differenceOf(node);
    if (pair) return pair.map(visibleToken).join(" − ");
    const quoted = /^Output "([\s\S]*)" \(p=[\d.e+-]+\)$/.exec(node.clerp);
    return quoted ? visibleToken(quoted[1]) : visibleText(node.clerp || node.node_id);
  }
  if (graph.kind[i] === ERROR) return "error";
  const label = labels[featureKey(node)] || node.clerp;
  return label ? visibleText(label) : `feature ${node.node_id.split("_")[1] ?? node.feature}`;
}

/** The share that an edge has of its target's input, or of all that its source does. */
const shareOf = (graph, e, into) =>
  into
    ? Math.abs(graph.weight[e]) / (graph.inTotal[graph.target[e]] || 1)
    : graph.score[e] / (graph.influence[graph.source[e]] || 1);

/** The edges into (or out of) a node, strongest first. */
const edgesOf = (graph, i, into) => (into ? graph.ins : graph.outs)[i];

const rowName = (graph, r) => (r === 0 ? "E" : r === graph.rows - 1 ? "out" : String(r - 1));
const whereOf = (graph, i) => {
  if (graph.kind[i] === LOGIT) return `output · ${chanceOf(graph.doc.nodes[i]) || valueOf(graph.doc.nodes[i])}`;
  const place = graph.kind[i] === TOKEN ? "token" : `layer ${graph.row[i] - 1}`;
  return `${place} · ${visibleToken(graph.tokens[graph.pos[i]] ?? "")} (${graph.pos[i]})`;
};
const signed = (x) => (x < 0 ? "−" : "+") + magnitude(x);
const signedShare = (x) => (x < 0 ? "−" : "+") + percent(Math.abs(x));
function magnitude(x) {
  const size = Math.abs(x);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return size.toExponential(1).replace("-", "−");
  return size.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : 3);
}
const percent = (x) => (x > 0 && x < 0.001 ? "<0.1 %" : `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`);
const count = (x) => x.toLocaleString("en-GB");
