// One state, one way to change it, and one frame in which what changed is shown.

const given = JSON.parse(at("graph-data").textContent);
const graph = readGraph(given.document, namesOf(given), given.edges);
const [stage, view, world] = ["stage", "view", "world"].map(at);
const picture = new Picture(graph, at("lower"), at("upper"));

const app = {
  state: fromHash(graph, location.hash),
  visible: null, // which nodes and edges the thresholds leave
  found: new Set(), // by the search
  marked: new Set(), // members of the group that the pointer is on
  hovered: -1,
  zoom: 1,

  /** Changes the state; `push` makes it a step that the back button undoes. */
  change(patch, push = false) {
    app.state = { ...app.state, ...patch };
    writeAddress(toHash(graph, app.state), push);
    refresh();
  },
  select(i) {
    if (i === app.state.clicked) return;
    app.change({ clicked: i }, true);
    reveal(i);
    const counts = [true, false].map((into) => edgesOf(graph, i, into).length);
    say(`${graph.labels[i]}, ${whereOf(graph, i)}, ${counts[0]} inputs, ${counts[1]} outputs.`);
  },
  clear() {
    if (app.state.clicked < 0) return;
    app.change({ clicked: -1 }, true);
    say("Nothing is selected.");
  },
  /** The edges of a node that the picture shows, strongest first. */
  edgesDrawn: (i, into) => edgesDrawn(graph, app.state, app.visible, i, into),
  hover(i) {
    if (i === app.hovered) return;
    app.hovered = i;
    show("nodes");
  },
  mark(members) {
    app.marked = new Set(members);
    show("nodes");
  },
  zoomTo(zoom) {
    app.zoom = Math.max(1, Math.min(20, zoom));
    at("zoom-out").disabled = app.zoom === 1;
    show("place", "nodes");
  },

  togglePin(i) {
    const { pinned: old, groups } = app.state;
    const off = old.includes(i);
    app.change({ pinned: off ? old.filter((node) => node !== i) : [...old, i], groups: without(groups, [i]) }, true);
    say(`${graph.labels[i]} is ${off ? "no longer " : ""}pinned.`);
  },
  group(name, members) {
    app.change({ groups: [...without(app.state.groups, members), [name, members]] }, true);
    say(`${members.length} nodes are now the group ${name}.`);
  },
  ungroup(k) {
    app.change({ groups: app.state.groups.filter((_, index) => index !== k) }, true);
  },
  rename(k, name) {
    if (!name.trim()) return;
    const groups = app.state.groups.map((group, index) => (index === k ? [name.trim(), group[1]] : group));
    app.change({ groups }, true);
  },
};

/** The groups without some nodes; a group that has none left is gone. */
function without(groups, nodes) {
  return groups
    .map(([name, members]) => [name, members.filter((i) => !nodes.includes(i))])
    .filter(([, members]) => members.length);
}

/** Says something to readers who listen. */
function say(words) {
  at("said").textContent = words;
}

/** Scrolls the world until the node is in sight. */
function reveal(i) {
  if (!picture.layout || stage.scrollWidth <= stage.clientWidth) return;
  draw();
  const x = picture.layout.x[i] - stage.scrollLeft;
  if (x < GUTTER + 10 || x > stage.clientWidth - 20) stage.scrollLeft += x - stage.clientWidth / 2;
}

showTables(graph, given.tables, app);
const panel = makePanel(graph, given, app);
const tip = makeTip(graph, given.details, app);
const search = makeSearch(graph, app);
const subgraph = makeSubgraph(graph, app);
const live = given.live ? makeLive(graph, given, app) : null;

let shown = {}; // what each part was last shown for
const dirty = new Set();
let waiting = 0;

/** Works out what the state changed, and has only that drawn again. */
function refresh() {
  const { state } = app;
  const nodes = `${state.nodes} ${state.pinned} ${state.clicked}`;
  const now = {
    visible: `${nodes} ${state.edges}`,
    panel: state.clicked < 0 ? "start" : `${nodes} ${state.edges} ${state.linkType} ${JSON.stringify(state.groups)}`,
    subgraph: JSON.stringify([state.groups, state.pinned, state.clicked, state.places, state.missing]),
    search: state.query ? `${nodes} ${state.query}` : "",
  };
  if (now.visible !== shown.visible) {
    const old = app.visible;
    app.visible = visibility(graph, state);
    const sameNodes = old && old.node.every((value, i) => value === app.visible.node[i]);
    if (!sameNodes) show("place");
    else if (old.edges !== app.visible.edges) show("edges");
  }
  if (live) now.live = `${now.subgraph} ${JSON.stringify(state.changes)} ${state.freeze}`;
  for (const part of ["panel", "subgraph", "search", "live"]) if (now[part] !== shown[part]) show(part);
  shown = now;
  show("nodes", "controls");
}

function show(...parts) {
  parts.forEach((part) => dirty.add(part));
  if (!waiting) waiting = requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(waiting);
  waiting = 0;
  const { state, hovered } = app;
  if (dirty.has("place")) place();
  picture.visible = app.visible;
  if (dirty.has("search")) search.show();
  if (dirty.has("place") || dirty.has("edges")) picture.drawEdges();
  if (dirty.has("controls")) showControls();
  if (dirty.has("panel")) panel.show();
  if (dirty.has("subgraph")) subgraph.show();
  if (live && dirty.has("live")) live.show();
  dirty.clear();
  view.classList.toggle("lit", state.clicked >= 0 || hovered >= 0);
  picture.drawNodes(lookOf(app));
}

/** What the upper canvas shows. */
function lookOf({ state: { clicked, linkType, pinned }, hovered, found, marked, edgesDrawn }) {
  return { focus: clicked, linkType, pinned: new Set(pinned), hovered, found, marked, edgesDrawn };
}

/** Gives nodes their places. The world may be wider than the stage, which then scrolls. */
function place() {
  const wasWide = picture.layout ? picture.layout.worldWidth : 0;
  const middle = stage.scrollLeft + stage.clientWidth / 2;
  picture.place(app.visible, stage.clientWidth, stage.clientHeight, app.zoom);
  const wide = picture.layout.worldWidth;
  world.style.width = `${wide}px`;
  // At first the end of the prompt is in sight, where the outputs are; later what was in the middle stays there.
  if (wide !== wasWide) stage.scrollLeft = wasWide ? middle * (wide / wasWide) - stage.clientWidth / 2 : wide;
  picture.scroll = stage.scrollLeft;
}

function showControls() {
  const { state, visible } = app;
  at("nodes").value = state.nodes;
  at("edges").value = state.edges;
  at("nodes-share").textContent = percent(state.nodes * graph.mostShare);
  at("edges-share").textContent = percent(state.edges);
  const counts = [visible.nodes, graph.n, visible.edges, graph.m].map(count);
  at("counts").textContent = `${counts[0]} of ${counts[1]} nodes, ${counts[2]} of ${counts[3]} edges`;
  at("link-type").value = state.linkType;
  at("selected").hidden = state.clicked < 0;
  if (state.clicked >= 0) at("selected-name").textContent = graph.labels[state.clicked];
}
