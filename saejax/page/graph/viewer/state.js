// What the reader has chosen. All of it stands in the address, so that a link or the browser's back button shows the
// same view; names and forms are those of the document's qParams where it has them.

const LINK_TYPES = ["both", "input", "output"];
const NODES_AT_FIRST = 40; // features and errors that a first look can take in
const EDGES_AT_FIRST = 1500; // what a first look can take in; the slider shows the rest
const AT_LEAST = 40; // of the edges of a node that is looked at

function firstState(graph) {
  const last = Math.min(EDGES_AT_FIRST, graph.m) - 1;
  const share = last < graph.m - 1 ? Math.floor(graph.before[last + 1] * 100) / 100 : 1;
  const q = graph.doc.qParams || {};
  return {
    clicked: graph.index.get(q.clickedId) ?? -1,
    ...checkedPins(graph, q.pinnedIds, q.supernodes),
    linkType: LINK_TYPES.includes(q.linkType) ? q.linkType : "both",
    nodes: firstNodes(graph, q),
    edges: Math.max(share, 0.01),
    query: "",
    places: placesIn(q.sg_pos), // of boxes of pins that were dragged, by their members
    changes: [], // what a run of the model changes: {how, amount, members}
    freeze: "none", // what stays in it as it was
  };
}

/** Places of boxes in a document or address, which may be wrong. */
function placesIn(text) {
  const entries = Object.entries(listIn(typeof text === "string" ? text : ""));
  const isPlace = ([, place]) => Array.isArray(place) && place.length === 2 && place.every(Number.isFinite);
  return Object.fromEntries(entries.filter(isPlace));
}

/** The share of nodes of the first view: none but those of groups if there are any, else the most influential ones. */
function firstNodes(graph, { supernodes }) {
  if (Array.isArray(supernodes) && supernodes.length) return 0;
  const shares = nodesWhere(graph, (i) => !isEnd(graph, i) && graph.share[i] >= 0).map((i) => graph.share[i]);
  if (shares.length <= NODES_AT_FIRST || graph.mostShare <= 0) return 1;
  shares.sort((a, b) => a - b);
  return Math.min(1, Math.ceil((1000 * shares[NODES_AT_FIRST - 1]) / graph.mostShare) / 1000);
}

/** Pins and groups of a document or address, which may be wrong: `missing` counts the nodes that this graph does not
 * have, and no node is in two groups. */
function checkedPins(graph, ids, supernodes) {
  const list = (value) => (Array.isArray(value) ? value : []);
  const known = (named) => list(named).map((id) => graph.index.get(id)).filter((i) => i !== undefined);
  const named = [...list(ids), ...list(supernodes).flatMap((item) => list(item).slice(1))];
  const missing = new Set(named.filter((id) => id && !graph.index.has(id))).size;
  const taken = new Set();
  const groups = [];
  for (const item of list(supernodes)) {
    const members = [...new Set(known(list(item).slice(1)))].filter((i) => !taken.has(i));
    members.forEach((i) => taken.add(i));
    if (members.length) groups.push([String(item[0]), members]);
  }
  return { pinned: [...new Set([...known(ids), ...taken])], groups, missing };
}

const HOWS = ["scale", "set"];

/** Changes of an address, which may be wrong: only of features that are there, of each only one. */
function checkedChanges(graph, list) {
  const taken = new Set();
  const changes = [];
  for (const item of Array.isArray(list) ? list : []) {
    if (!Array.isArray(item) || !HOWS.includes(item[0]) || !Number.isFinite(item[1])) continue;
    const known = [...new Set(item.slice(2).map((id) => graph.index.get(id)))];
    const members = known.filter((i) => i !== undefined && graph.kind[i] === FEATURE && !taken.has(i));
    members.forEach((i) => taken.add(i));
    if (members.length) changes.push({ how: item[0], amount: item[1], members });
  }
  return changes;
}

/** Changes as the address has them, and as the server takes them. */
const plainChanges = (graph, changes) =>
  changes.map(({ how, amount, members }) => [how, amount, ...members.map((i) => graph.ids[i])]);

/** Groups as documents have them. */
const plainGroups = (graph, groups) => groups.map(([name, members]) => [name, ...members.map((i) => graph.ids[i])]);

/** A list in an address; a damaged one is empty. */
function listIn(text) {
  try {
    return JSON.parse(text || "[]") ?? [];
  } catch {
    return [];
  }
}

function qParamsOf(graph, state) {
  return {
    ...graph.doc.qParams,
    pinnedIds: state.pinned.map((i) => graph.ids[i]),
    supernodes: plainGroups(graph, state.groups),
    linkType: state.linkType,
    clickedId: state.clicked < 0 ? "" : graph.ids[state.clicked],
    sg_pos: Object.keys(state.places).length ? JSON.stringify(state.places) : "",
  };
}

/** What a file of a state, or of a graph with its state, changes; null if it is none. */
function savedState(graph, state, content) {
  const q = content.qParams ?? content;
  if (!Array.isArray(q.pinnedIds) && !Array.isArray(q.supernodes)) return null;
  return {
    ...checkedPins(graph, q.pinnedIds, q.supernodes),
    places: placesIn(q.sg_pos),
    clicked: graph.index.get(q.clickedId) ?? -1,
    linkType: LINK_TYPES.includes(q.linkType) ? q.linkType : state.linkType,
  };
}

function toHash(graph, state) {
  const q = qParamsOf(graph, state);
  const params = new URLSearchParams({
    clickedId: q.clickedId,
    pinnedIds: q.pinnedIds.join(","),
    supernodes: JSON.stringify(q.supernodes),
    linkType: q.linkType,
    nodes: state.nodes,
    edges: state.edges,
  });
  if (q.sg_pos) params.set("sg_pos", q.sg_pos);
  if (state.query) params.set("q", state.query);
  if (state.changes.length) params.set("changes", JSON.stringify(plainChanges(graph, state.changes)));
  if (state.freeze !== "none") params.set("freeze", state.freeze);
  return "#" + params;
}

let late = 0; // the timer, and
let lateHash = ""; // the address, of a change that is yet to be written

/** Puts the state into the address: as a step that the back button undoes, or else a little later. */
function writeAddress(hash, push) {
  if (!push) {
    // Browsers refuse addresses that change many times a second, as they would under a slider.
    clearTimeout(late);
    lateHash = hash;
    late = setTimeout(settleAddress, 150);
    return;
  }
  settleAddress();
  setAddress("pushState", hash);
}

/** Writes what is yet to be written. */
function settleAddress() {
  clearTimeout(late);
  if (lateHash) setAddress("replaceState", lateHash);
  lateHash = "";
}

function setAddress(how, hash) {
  try {
    history[how](null, "", hash);
  } catch {
    // A notebook may show the page in a frame that has no address of its own; then there is none to keep.
  }
}

/** The state that an address names; what it does not name is as at first. */
function fromHash(graph, hash) {
  const state = firstState(graph);
  if (hash.length < 2) return state;
  const params = new URLSearchParams(hash.slice(1));
  const number = (name) => {
    const value = parseFloat(params.get(name));
    return value >= 0 && value <= 1 ? value : state[name];
  };
  if (params.has("clickedId")) state.clicked = graph.index.get(params.get("clickedId")) ?? -1;
  if (params.has("pinnedIds") || params.has("supernodes")) {
    const ids = (params.get("pinnedIds") || "").split(",");
    Object.assign(state, checkedPins(graph, ids, listIn(params.get("supernodes"))));
  }
  if (params.has("sg_pos")) state.places = placesIn(params.get("sg_pos"));
  state.changes = checkedChanges(graph, listIn(params.get("changes")));
  if (given.live?.freeze_modes.includes(params.get("freeze"))) state.freeze = params.get("freeze");
  if (LINK_TYPES.includes(params.get("linkType"))) state.linkType = params.get("linkType");
  return Object.assign(state, { nodes: number("nodes"), edges: number("edges"), query: params.get("q") || "" });
}

/** Which nodes and edges the thresholds leave. The selected node and pins are always shown. */
function visibility(graph, state) {
  const limit = state.nodes * graph.mostShare + 1e-7;
  const node = Uint8Array.from(graph.share, (share, i) => share <= limit || isEnd(graph, i));
  for (const i of [state.clicked, ...state.pinned]) if (i >= 0) node[i] = 1;
  const edge = new Uint8Array(graph.m);
  let [edges, last] = [0, 0];
  for (; last < graph.m && (graph.before[last] < state.edges || state.edges >= 1); last++)
    if (node[graph.source[last]] && node[graph.target[last]]) edges += edge[last] = 1;
  return { node, edge, nodes: node.reduce((sum, one) => sum + one, 0), edges, last };
}

/** The edges of one node in the picture, strongest first: at least its AT_LEAST strongest, and further ones until they
 * have the slider's share of what it gets (or does); none to hidden nodes, which have no place there. */
function edgesDrawn(graph, state, visible, i, into) {
  const ends = into ? graph.source : graph.target;
  const shown = [];
  let before = 0;
  for (const e of edgesOf(graph, i, into)) {
    if (shown.length >= AT_LEAST && before >= state.edges && state.edges < 1) break;
    before += shareOf(graph, e, into);
    if (visible.node[ends[e]]) shown.push(e);
  }
  return shown;
}
