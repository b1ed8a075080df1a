// The panel beside the picture: what a node is, what feeds it and what it feeds. Every row is a button that goes on.

const START =
  "Point at a node to see its edges; click it to see what feeds it and what it feeds, and go on from there.";

/** What is known of a node, as pairs of a term and a text. */
function describe(graph, i) {
  const node = graph.doc.nodes[i];
  const kind = graph.kind[i];
  const facts = [["Node", node.node_id]];
  if (kind === FEATURE) facts.push(["Feature", node.node_id.split("_")[1]]);
  if (kind === OTHER) facts.push(["Kind", node.feature_type]);
  if (!isEnd(graph, i)) facts.push(["Layer", String(node.layer)]);
  facts.push(["Token", `${visibleToken(graph.tokens[graph.pos[i]])} (position ${graph.pos[i]})`]);
  if (kind === LOGIT) facts.push(chanceOf(node) ? ["Probability", chanceOf(node)] : ["Value", valueOf(node)]);
  if (!Number.isNaN(graph.activation[i])) facts.push(["Activation", magnitude(graph.activation[i])]);
  if (graph.share[i] >= 0) facts.push(["Influence", `within the first ${percent(graph.share[i])}`]);
  return facts;
}

function makePanel(graph, { details: known, source }, app) {
  const panel = at("panel");
  const keys = panel.querySelector(".keys");

  const row = (i, more = "") =>
    watch(nodeRow(graph, i, app.select, more), () => app.hover(i), () => app.hover(-1));
  const edgeRow = (e, into) => {
    const i = into ? graph.source[e] : graph.target[e];
    const share = shareOf(graph, e, into);
    const made = row(i, app.visible.node[i] ? "" : " · hidden");
    made.classList.add(graph.weight[e] < 0 ? "minus" : "plus");
    made.style.setProperty("--share", share.toFixed(4));
    made.children[0].after(element("span", { class: "weight" }, signed(graph.weight[e])));
    made.append(element("span", { class: "share" }, percent(share)));
    return made;
  };
  /** Rows that are made when what they are in is opened: there may be thousands. */
  const rowsWhenOpen = (nodes) => {
    const made = element("div", { class: "rows" });
    requestAnimationFrame(() => {
      if (made.parentNode) made.parentNode.ontoggle = () => made.replaceChildren(...nodes.map((i) => row(i)));
    });
    return made;
  };

  /** The edges of a node in one direction, whatever the thresholds: the strongest, and on demand the others. */
  const edgeList = (i, into) => {
    const all = edgesOf(graph, i, into);
    const rows = element("div", { class: "rows" });
    const more = element("p", { class: "more" });
    const fill = (edges) => {
      rows.replaceChildren(...edges.map((e) => edgeRow(e, into)));
      const left = all.length - edges.length;
      more.replaceChildren();
      if (left === 0) return;
      const words = `${count(left)} weaker ${left === 1 ? "edge is" : "edges are"} not shown. `;
      more.append(words, plainButton("Show all", () => fill(all)));
    };
    fill(all.slice(0, AT_LEAST));
    const title = element("h3", {}, into ? "Inputs " : "Outputs ", element("small", {}, count(all.length)));
    const body = all.length ? [rows, more] : [element("p", { class: "note" }, nothing(i, into))];
    return element("section", { class: into ? "inputs" : "outputs" }, title, body);
  };
  /** Where Neuronpedia shows a feature; "" where the set is not there. */
  const addressOf = (i) => {
    if (!featureKey(graph.doc.nodes[i])) return "";
    const [layer, index] = graph.ids[i].split("_");
    return source.replace("{layer}", layer).replace("{index}", index);
  };
  const quantileOf = ([name, contexts]) =>
    element("details", {}, element("summary", {}, visibleText(name)), exampleList(contexts, 8));
  /** What is not told of a feature. */
  const missing = ({ examples, quantiles, histogram }) => {
    if (!examples) return live ? "Its contexts are being read." : "This page has contexts of its most influential features alone.";
    const parts = { contexts: examples, "contexts by quantile of activation": quantiles, "histogram of activations": histogram };
    const none = Object.keys(parts).filter((name) => !parts[name]?.length);
    return none.length ? `What was read of this feature has no ${none.join(", no ")}.` : "";
  };
  const aboutFeature = (about, address) => [
    ...(about.examples?.length ? [element("h3", {}, "Top contexts"), exampleList(about.examples, 8)] : []),
    ...(about.quantiles?.length ? [element("h3", {}, "Contexts by activation"), ...about.quantiles.map(quantileOf)] : []),
    ...(about.histogram?.length ? [element("h3", {}, "Activations"), histogramOf(about.histogram)] : []),
    element("p", { class: "note", id: "missing" }, missing(about)),
    ...(about.top_logits?.length ? [element("p", {}, `Raises: ${about.top_logits.slice(0, 8).map(visibleToken).join(" ")}`)] : []),
    ...(about.bottom_logits?.length ? [element("p", {}, `Lowers: ${about.bottom_logits.slice(0, 8).map(visibleToken).join(" ")}`)] : []),
    ...(address ? [element("p", {}, element("a", { href: address, target: "_blank", rel: "noreferrer" }, "This feature at Neuronpedia"))] : []),
  ];
  const nothing = (i, into) => {
    if (!into) return "It feeds nothing that was kept.";
    const target = graph.kind[i] === FEATURE || graph.kind[i] === LOGIT;
    return target ? "Nothing that was kept feeds it." : "Only features and outputs have inputs.";
  };

  const overview = () => {
    const ofKind = (kind) => nodesWhere(graph, (i) => graph.kind[i] === kind);
    const ranked = ofKind(FEATURE).sort((a, b) => graph.share[a] - graph.share[b]);
    const listed = new Map(); // at most two features of a layer and position, so that one token does not fill the list
    const best = ranked.filter((i) => {
      const place = graph.row[i] * graph.columns + graph.pos[i];
      listed.set(place, (listed.get(place) || 0) + 1);
      return listed.get(place) <= 2;
    });
    const nameless = ranked.filter((i) => !graph.named[i]);
    const words = `Without a name: ${count(nameless.length)} of ${count(ranked.length)} nodes of features, for want of a ` +
      "label or of a text in which the feature fires.";
    return [
      element("h2", {}, "Where to start"),
      element("p", {}, START),
      element("h3", {}, "Outputs"),
      element("div", { class: "rows" }, ofKind(LOGIT).map((i) => row(i))),
      element("h3", {}, "Most influential features"),
      element("div", { class: "rows" }, best.slice(0, 12).map((i) => row(i))),
      nameless.length ? element("details", { id: "nameless" }, element("summary", {}, words), rowsWhenOpen(nameless)) : "",
    ];
  };
  const details = (i) => {
    const pinned = app.state.pinned.includes(i);
    const about = known[featureKey(graph.doc.nodes[i])] || {};
    const group = app.state.groups.find(([, members]) => members.includes(i));
    const directions = { input: [true], output: [false], both: [true, false] }[app.state.linkType];
    const pin = { type: "button", id: "pin", "aria-pressed": String(pinned), onclick: () => app.togglePin(i) };
    const clear = { type: "button", id: "clear", onclick: () => app.clear() };
    if (live && featureKey(graph.doc.nodes[i])) live.describe(i);
    const buttons = [element("button", pin, pinned ? "Unpin" : "Pin"), element("button", clear, "Clear")];
    const title = element("h2", {}, glyph(graph.kind[i]), graph.labels[i]);
    return [
      element("div", { class: "head" }, title, element("div", { class: "buttons" }, buttons)),
      factList(group ? [...describe(graph, i), ["Group", visibleText(group[0])]] : describe(graph, i)),
      live && featureKey(graph.doc.nodes[i]) ? [live.labelForm(i)] : [],
      graph.kind[i] === FEATURE ? aboutFeature(about, addressOf(i)) : [],
      element("div", { class: "lists" }, directions.map((into) => edgeList(i, into))),
    ].flat();
  };
  return {
    show() {
      const focused = panel.contains(document.activeElement);
      panel.replaceChildren(...(app.state.clicked < 0 ? overview() : details(app.state.clicked)), keys);
      panel.scrollTop = 0;
      // The button that was pressed is gone; Tab goes on from the top.
      if (focused) panel.focus({ preventScroll: true });
    },
  };
}
