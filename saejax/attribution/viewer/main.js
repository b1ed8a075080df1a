// Ties the parts together: one state, one way to change it, one frame in which what changed is shown.

const given = JSON.parse(document.getElementById("graph-data").textContent);
const graph = readGraph(given.document, given.labels);
const at = (id) => document.getElementById(id);
const stage = at("stage"), view = at("view"), world = at("world");
const picture = makePicture(graph, stage, at("lower"), at("upper"));
let zoom = 1, hovered = -1, waiting = 0, addressTimer = 0;
const dirty = new Set();

const app = {
  state: fromHash(graph, location.hash), visible: null, found: new Set(), marked: new Set(),

  /** Changes the state; ``push`` makes it a step that the back button undoes. */
  change(patch, push = false) {
    app.state = { ...app.state, ...patch };
    clearTimeout(addressTimer);
    if (push) history.pushState(null, "", toHash(graph, app.state));
    // Browsers refuse addresses that change many times a second, as they would under a slider.
    else addressTimer = setTimeout(() => history.replaceState(null, "", toHash(graph, app.state)), 150);
    refresh();
  },
  select(i) {
    if (i === app.state.clicked) return;
    app.change({ clicked: i }, true);
    reveal(i);
    say(i);
  },
  /** The edges of a node that the thresholds leave, strongest first. */
  edgesShown: (i, into) => edgesShown(graph, app.state, app.visible, i, into),
  clear() { if (app.state.clicked >= 0) { app.change({ clicked: -1 }, true); at("said").textContent = "Nothing is selected."; } },
  hover(i) { if (i !== hovered) { hovered = i; show("nodes"); } },
  mark(members) { app.marked = new Set(members); show("nodes"); },
  togglePin(i) {
    const { pinned, groups } = app.state, off = pinned.includes(i);
    app.change({
      pinned: off ? pinned.filter((other) => other !== i) : [...pinned, i],
      groups: groups.map(([name, members]) => [name, members.filter((other) => other !== i)]).filter(([, members]) => members.length),
    }, true);
    at("said").textContent = `${graph.labels[i]} is ${off ? "no longer " : ""}pinned.`;
  },
  group(name, members) {
    const inside = new Set(members);
    const others = app.state.groups.map(([other, list]) => [other, list.filter((i) => !inside.has(i))]).filter(([, list]) => list.length);
    app.change({ groups: [...others, [name, members]] }, true);
    at("said").textContent = `${members.length} nodes are now the group ${name}.`;
  },
  ungroup(k) { app.change({ groups: app.state.groups.filter((_, other) => other !== k) }, true); },
  rename(k, name) {
    if (name.trim()) app.change({ groups: app.state.groups.map((group, other) => (other === k ? [name.trim(), group[1]] : group)) }, true);
  },
};
showTables(graph, given.tables, app);
const panel = makePanel(graph, given, app), tip = makeTip(graph, given.examples, app);
const search = makeSearch(graph, app), subgraph = makeSubgraph(graph, app);

function say(i) {
  const inputs = edgesOf(graph, i, true).length, outputs = edgesOf(graph, i, false).length;
  at("said").textContent = `${graph.labels[i]}, ${whereOf(graph, i)}, ${inputs} inputs, ${outputs} outputs.`;
  at("selected-name").textContent = graph.labels[i];
}

/** Scrolls the world until the node is in sight. */
function reveal(i) {
  if (!picture.layout || stage.scrollWidth <= stage.clientWidth) return;
  draw();
  const x = picture.layout.x[i];
  if (x < stage.scrollLeft + GUTTER + 10 || x > stage.scrollLeft + stage.clientWidth - 20) stage.scrollLeft = x - stage.clientWidth / 2;
}

// What is shown ---------------------------------------------------------------------------------------------------

let shown = {};
/** Works out what the state changed, and has only that drawn again. */
function refresh() {
  const { state } = app, before = shown;
  const nodesKey = `${state.nodes} ${state.pinned.join()} ${state.clicked}`;
  if (before.nodesKey !== nodesKey || before.edges !== state.edges) {
    const old = app.visible;
    app.visible = visibility(graph, state);
    const same = old && old.nodes === app.visible.nodes && old.edges === app.visible.edges && old.last === app.visible.last
      && old.node.every((value, i) => value === app.visible.node[i]);
    if (!same) show(old && old.nodes === app.visible.nodes && old.node.every((value, i) => value === app.visible.node[i]) ? "edges" : "place");
  }
  const parts = { panel: `${state.clicked} ${state.linkType} ${nodesKey} ${state.edges}`, subgraph: `${JSON.stringify(state.groups)} ${state.pinned.join()} ${state.clicked}`, search: state.query + nodesKey };
  for (const part of Object.keys(parts)) if (before[part] !== parts[part]) show(part);
  shown = { ...parts, nodesKey, edges: state.edges };
  show("nodes", "controls");
}
function show(...parts) {
  parts.forEach((part) => dirty.add(part));
  if (!waiting) waiting = requestAnimationFrame(draw);
}
function draw() {
  cancelAnimationFrame(waiting);
  waiting = 0;
  if (dirty.has("place")) {
    const wasWide = picture.layout ? picture.layout.worldWidth : 0, middle = stage.scrollLeft + stage.clientWidth / 2;
    picture.place(app.visible, stage.clientWidth, stage.clientHeight, zoom);
    const wide = picture.layout.worldWidth;
    world.style.width = `${wide}px`;
    // At first the end of the prompt is in sight, where the outputs are; later what was in the middle stays there.
    if (wide !== wasWide) stage.scrollLeft = wasWide ? middle * (wide / wasWide) - stage.clientWidth / 2 : wide;
    picture.scroll = stage.scrollLeft;
  }
  const { state } = app, focus = state.clicked;
  picture.visible = app.visible;
  if (dirty.has("search")) search.show();
  if (dirty.has("place") || dirty.has("edges")) picture.drawEdges();
  if (dirty.has("controls")) showControls();
  if (dirty.has("panel")) panel.show();
  if (dirty.has("subgraph")) subgraph.show();
  dirty.clear();
  view.classList.toggle("lit", focus >= 0 || hovered >= 0);
  picture.drawNodes({ focus, hovered, pinned: new Set(state.pinned), found: app.found, linkType: state.linkType, marked: app.marked, edgesShown: app.edgesShown });
}
function showControls() {
  const { state, visible } = app;
  at("nodes").value = state.nodes;
  at("edges").value = state.edges;
  at("nodes-share").textContent = percent(state.nodes * graph.mostShare);
  at("edges-share").textContent = percent(state.edges);
  at("counts").textContent = `${count(visible.nodes)} of ${count(graph.n)} nodes, ${count(visible.edges)} of ${count(graph.m)} edges`;
  at("link-type").value = state.linkType;
  at("selected").hidden = state.clicked < 0;
  if (state.clicked >= 0) at("selected-name").textContent = graph.labels[state.clicked];
}

// What the reader does --------------------------------------------------------------------------------------------

function nodeAt(event) {
  const box = view.getBoundingClientRect();
  return picture.find(event.clientX - box.left + picture.scroll, event.clientY - box.top, event.pointerType === "touch" ? 18 : 10);
}
view.onpointermove = (event) => {
  if (event.pointerType === "touch") return;
  const i = nodeAt(event);
  view.style.cursor = i < 0 ? "" : "pointer";
  app.hover(i);
  // The selected node is described in the panel, and its tip would cover its edges.
  if (i < 0 || i === app.state.clicked) tip.hide(); else tip.show(i, event.clientX, event.clientY);
};
view.onpointerleave = () => { app.hover(-1); tip.hide(); };
view.onclick = (event) => {
  const i = nodeAt(event);
  tip.hide();
  if (i < 0) app.clear();
  else if (event.shiftKey || event.ctrlKey || event.metaKey) app.togglePin(i);
  else app.select(i);
};
stage.onscroll = () => {
  if (!picture.layout || picture.scroll === stage.scrollLeft) return;
  picture.scroll = stage.scrollLeft;
  show("edges", "nodes");
};
/** Where the strongest edge leads that no threshold hides. */
function neighbour(i, into) {
  const [e] = app.edgesShown(i, into);
  return e === undefined ? -1 : into ? graph.source[e] : graph.target[e];
}
function beside(i, step) {
  const row = [...Array(graph.n).keys()].filter((j) => graph.row[j] === graph.row[i] && app.visible.node[j]);
  row.sort((a, b) => picture.layout.x[a] - picture.layout.x[b] || picture.layout.y[a] - picture.layout.y[b]);
  return row[row.indexOf(i) + step] ?? -1;
}
function firstNode() {
  const outputs = picture.layout.pills.boxes;
  return outputs.length ? outputs.reduce((a, b) => (graph.doc.nodes[b.node].token_prob > graph.doc.nodes[a.node].token_prob ? b : a)).node : 0;
}
stage.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !graph.n) return;
  const i = app.state.clicked;
  const to = { ArrowUp: () => neighbour(i, false), ArrowDown: () => neighbour(i, true), ArrowLeft: () => beside(i, -1), ArrowRight: () => beside(i, 1) }[event.key];
  if (to) {
    const next = i < 0 ? firstNode() : to();
    if (next >= 0) app.select(next);
    event.preventDefault();
  } else if (event.key === "+" || event.key === "=") setZoom(zoom * 1.5);
  else if (event.key === "-") setZoom(zoom / 1.5);
  else if (event.key === "Backspace") history.back();
};
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { tip.hide(); app.clear(); }
  else if (event.key === "/") { at("search").focus(); event.preventDefault(); }
  else if (event.key.toLowerCase() === "p" && app.state.clicked >= 0) app.togglePin(app.state.clicked);
});
function setZoom(to) {
  zoom = Math.max(1, Math.min(20, to));
  at("zoom-out").disabled = zoom === 1;
  show("place", "nodes");
}
stage.addEventListener("wheel", (event) => { // with Control, or a pinch on a touchpad
  if (!event.ctrlKey) return;
  event.preventDefault();
  setZoom(zoom * Math.exp(-event.deltaY / 200));
}, { passive: false });
at("zoom-in").onclick = () => setZoom(zoom * 1.5);
at("zoom-out").onclick = () => setZoom(zoom / 1.5);
at("nodes").oninput = (event) => app.change({ nodes: Number(event.target.value) });
at("edges").oninput = (event) => app.change({ edges: Number(event.target.value) });
at("link-type").onchange = (event) => app.change({ linkType: event.target.value });
at("to-panel").onclick = () => at("panel").scrollIntoView();

const slug = given.document.metadata.slug.replace(/[^\w.-]+/g, "-") || "graph";
const withState = () => ({ ...given.document, qParams: qParamsOf(graph, app.state) });
at("save-state").onclick = () => download(`${slug}-state.json`, "application/json", JSON.stringify(qParamsOf(graph, app.state), null, 1));
at("save-graph").onclick = () => download(`${slug}.json`, "application/json", JSON.stringify(withState(), null, 1));
at("save-picture").onclick = () => picture.toCanvas().toBlob((blob) => download(`${slug}.png`, "image/png", blob));
at("save-subgraph").onclick = () => download(`${slug}-subgraph.svg`, "image/svg+xml", subgraphFile());

addEventListener("popstate", () => { app.state = fromHash(graph, location.hash); refresh(); });
new ResizeObserver(() => { show("place", "nodes", "subgraph"); }).observe(stage);
const repaint = () => { picture.readColours(); show("edges", "nodes"); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
matchMedia(`(resolution: ${devicePixelRatio}dppx)`).addEventListener("change", () => show("place", "nodes"));

picture.readColours();
refresh();
draw();
/** For scripts and tests: where a node is on the screen, and what is shown. */
window.attributionGraph = {
  get state() { return qParamsOf(graph, app.state); },
  get painted() { return picture.painted; },
  place(id) {
    const i = graph.index.get(id), box = view.getBoundingClientRect();
    return { x: box.left + picture.layout.x[i] - picture.scroll, y: box.top + picture.layout.y[i], shown: Boolean(app.visible.node[i]), radius: picture.layout.radius[i], label: graph.labels[i] };
  },
  redraw() { const start = performance.now(); show("nodes"); draw(); return performance.now() - start; },
  ready: performance.now(),
};
