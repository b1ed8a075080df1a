// What the reader does: pointer, keys, controls, downloads, the browser's own buttons.

function nodeAt(event) {
  const box = view.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left + picture.scroll, event.clientY - box.top];
  return nodeAtPoint(graph, picture.visible, picture.layout, x, y, event.pointerType === "touch" ? 18 : 10);
}
view.onpointermove = (event) => {
  if (event.pointerType === "touch") return;
  const i = nodeAt(event);
  view.style.cursor = i < 0 ? "" : "pointer";
  app.hover(i);
  // The selected node is described in the panel, and its tip would cover its edges.
  if (i < 0 || i === app.state.clicked) tip.hide();
  else tip.show(i, event.clientX, event.clientY);
};
view.onpointerleave = () => {
  app.hover(-1);
  tip.hide();
};
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

/** Where the strongest edge leads; a hidden node appears when it is selected. */
function neighbour(i, into) {
  const [e] = edgesOf(graph, i, into);
  return e === undefined ? -1 : (into ? graph.source : graph.target)[e];
}
/** The next node of the same row, to the right or to the left. */
function beside(i, step) {
  const { x, y } = picture.layout;
  const row = nodesWhere(graph, (j) => graph.row[j] === graph.row[i] && app.visible.node[j]);
  row.sort((a, b) => x[a] - x[b] || y[a] - y[b]);
  return row[row.indexOf(i) + step] ?? -1;
}
/** Where keys begin: the most probable output. */
function firstNode() {
  const chance = (i) => graph.doc.nodes[i].token_prob ?? 0;
  return picture.layout.pills.boxes.map((box) => box.node).reduce((a, b) => (chance(b) > chance(a) ? b : a), 0);
}
const STEPS = {
  ArrowUp: (i) => neighbour(i, false),
  ArrowDown: (i) => neighbour(i, true),
  ArrowLeft: (i) => beside(i, -1),
  ArrowRight: (i) => beside(i, 1),
};
stage.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in STEPS) {
    const next = app.state.clicked < 0 ? firstNode() : STEPS[event.key](app.state.clicked);
    if (next >= 0) app.select(next);
    event.preventDefault();
  } else if (event.key === "+" || event.key === "=") app.zoomTo(app.zoom * 1.5);
  else if (event.key === "-") app.zoomTo(app.zoom / 1.5);
  else if (event.key === "Backspace") history.back();
};
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    tip.hide();
    app.clear();
  } else if (event.key === "/") {
    at("search").focus();
    event.preventDefault();
  } else if (event.key.toLowerCase() === "p" && app.state.clicked >= 0) app.togglePin(app.state.clicked);
});
/** The wheel zooms with Control, which is also what a pinch on a touchpad sends; else it scrolls the page. */
function onWheel(event) {
  if (!event.ctrlKey) return;
  event.preventDefault();
  app.zoomTo(app.zoom * Math.exp(-event.deltaY / 200));
}
stage.addEventListener("wheel", onWheel, { passive: false });

at("zoom-in").onclick = () => app.zoomTo(app.zoom * 1.5);
at("zoom-out").onclick = () => app.zoomTo(app.zoom / 1.5);
for (const name of ["nodes", "edges"])
  at(name).oninput = (event) => app.change({ [name]: Number(event.target.value) });
at("link-type").onchange = (event) => app.change({ linkType: event.target.value });
at("to-panel").onclick = () => at("panel").scrollIntoView();

const slug = given.document.metadata.slug.replace(/[^\w.-]+/g, "-") || "graph";
const saveJson = (name, data) =>
  download(name, new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
at("save-state").onclick = () => saveJson(`${slug}-state.json`, qParamsOf(graph, app.state));
at("save-graph").onclick = () => {
  saveJson(`${slug}.json`, { ...given.document, qParams: qParamsOf(graph, app.state), links: linksOf(graph) });
};
at("open-state").onclick = () => at("state-file").click();
let chosen = null; // the file that is opened
at("state-file").onchange = async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  target.value = ""; // or the same file could not be opened again
  chosen = file;
  const text = await file.text();
  if (file !== chosen) return; // another one was chosen before all of it was read
  const patch = savedState(graph, app.state, listIn(text));
  at("not-opened").hidden = Boolean(patch);
  at("not-opened").textContent = `${visibleText(file.name)} holds no state of a page: expected a file that Save state wrote.`;
  if (!patch) return;
  document.querySelector(".saves").open = false;
  app.change(patch, true);
  say(`${count(patch.pinned.length)} ${patch.pinned.length === 1 ? "node is" : "nodes are"} pinned.`);
};
/** The whole picture, also where the view shows a part of it. */
at("save-picture").onclick = () => {
  const whole = new Picture(graph, document.createElement("canvas"), document.createElement("canvas"));
  whole.place(app.visible, picture.layout.worldWidth, stage.clientHeight, 1);
  whole.drawEdges();
  const finish = () => {
    if (!whole.painted) return requestAnimationFrame(finish);
    whole.drawNodes(lookOf(app));
    whole.toCanvas().toBlob((blob) => download(`${slug}.png`, blob));
  };
  finish();
};
at("save-subgraph").onclick = () =>
  download(`${slug}-subgraph.svg`, new Blob([subgraphFile()], { type: "image/svg+xml" }));

addEventListener("popstate", () => {
  clearTimeout(late);
  lateHash = "";
  app.state = fromHash(graph, location.hash);
  refresh();
});
new ResizeObserver(() => show("place", "nodes", "subgraph")).observe(stage);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  picture.ink = readInk();
  show("edges", "nodes");
});
refresh();
draw();

/** For scripts and tests: where a node is on the screen, and what is shown. */
window.attributionGraph = {
  get state() {
    return qParamsOf(graph, app.state);
  },
  get painted() {
    return picture.painted;
  },
  place(id) {
    const i = graph.index.get(id);
    const box = view.getBoundingClientRect();
    const { x, y, radius } = picture.layout;
    const [left, top] = [box.left + x[i] - picture.scroll, box.top + y[i]];
    return { x: left, y: top, radius: radius[i], shown: Boolean(app.visible.node[i]), label: graph.labels[i] };
  },
  redraw() {
    const start = performance.now();
    show("nodes");
    draw();
    return performance.now() - start;
  },
  ready: performance.now(),
};
