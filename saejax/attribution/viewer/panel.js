// The panel beside the picture: what a node is, what feeds it and what it feeds. Every row is a button that goes on.

const ROWS_AT_FIRST = 40;

function describe(graph, i) {
  const node = graph.doc.nodes[i];
  const kind = graph.kind[i];
  const what = ["Feature", "Reconstruction error", "Token", "Output", "Other"][kind];
  return [
    ["Node", node.node_id],
    [what, kind === FEATURE ? node.node_id.split("_")[1] : kind === OTHER ? node.feature_type : null],
    ["Layer", kind === TOKEN || kind === LOGIT ? null : String(node.layer)],
    ["Token", `${visibleToken(graph.tokens[graph.pos[i]] ?? "")} (position ${graph.pos[i]})`],
    ["Probability", kind === LOGIT ? percent(node.token_prob ?? 0) : null],
    ["Activation", Number.isNaN(graph.activation[i]) ? null : magnitude(graph.activation[i])],
    ["Influence", graph.share[i] < 0 ? null : `within the first ${percent(graph.share[i])}`],
  ].filter(([, text]) => text !== null);
}

function makePanel(graph, { examples, heads }, app) {
  const panel = document.getElementById("panel");

  const row = (i, e, total) => {
    const sign = e === undefined ? "" : graph.weight[e] < 0 ? "minus" : "plus";
    const share = e === undefined ? 0 : Math.abs(graph.weight[e]) / (total || 1);
    const button = element(
      "button",
      { type: "button", class: `row ${sign}`, "data-node": graph.ids[i] },
      element("span", { class: "what" }, glyph(graph.kind[i]), element("span", { class: "name" }, graph.labels[i])),
      e === undefined ? null : element("span", { class: "weight" }, signed(graph.weight[e])),
      element("span", { class: "where" }, whereOf(graph, i)),
      e === undefined ? null : element("span", { class: "share" }, percent(share)),
      via(e),
    );
    button.style.setProperty("--share", share.toFixed(4));
    button.title = graph.labels[i];
    button.onclick = () => app.select(i);
    button.onpointerenter = button.onfocus = () => app.hover(i);
    button.onpointerleave = button.onblur = () => app.hover(-1);
    return button;
  };
  /** The attention heads that carry an edge. */
  const via = (e) => {
    const carried = e === undefined ? undefined : heads[`${graph.ids[graph.source[e]]} ${graph.ids[graph.target[e]]}`];
    return (
      carried &&
      element(
        "span",
        { class: "via" },
        "via ",
        carried
          .slice(0, 4)
          .map(([layer, head, part]) => `${layer}.${head} ${signed(part)}`)
          .join(", "),
        carried.length > 4 ? ", …" : "",
      )
    );
  };
  const list = (i, into) => {
    const all = [...edgesOf(graph, i, into)];
    const seen = app.edgesShown(i, into);
    const total = into ? graph.inTotal[i] : graph.outTotal[i];
    const end = (e) => (into ? graph.source[e] : graph.target[e]);
    const rows = element("div", { class: "rows" });
    const more = element("p", { class: "more" });
    const fill = (edges, most) => {
      rows.replaceChildren(...edges.slice(0, most).map((e) => row(end(e), e, total)));
      const left = all.length - Math.min(most, edges.length);
      more.replaceChildren(
        ...(left <= 0
          ? []
          : [
              `${count(left)} weaker ${left === 1 ? "edge is" : "edges are"} not shown. `,
              element("button", { type: "button", class: "plain", onclick: () => fill(all, Infinity) }, "Show all"),
            ]),
      );
    };
    fill(seen, ROWS_AT_FIRST);
    return element(
      "section",
      { class: into ? "inputs" : "outputs" },
      element("h3", {}, into ? "Inputs" : "Outputs", " ", element("small", {}, count(all.length))),
      all.length
        ? rows
        : element(
            "p",
            { class: "note" },
            into
              ? graph.kind[i] === FEATURE || graph.kind[i] === LOGIT
                ? "Nothing that was kept feeds it."
                : "Only features and outputs have inputs."
              : "It feeds nothing that was kept.",
          ),
      more,
    );
  };
  const neighbours = (i) => {
    const lists = { input: [true], output: [false], both: [true, false] }[app.state.linkType];
    const carried = lists.some((into) => app.edgesShown(i, into).some((e) => via(e)));
    return [
      element(
        "div",
        { class: "lists" },
        lists.map((into) => list(i, into)),
      ),
      carried &&
        element(
          "p",
          { class: "note" },
          "Via layer.head: the part of the edge that vanishes when that head's output is taken away; a path through several heads counts for each.",
        ),
    ];
  };
  const overview = () => {
    const best = [...Array(graph.n).keys()]
      .filter((i) => graph.kind[i] === FEATURE)
      .sort((a, b) => graph.share[a] - graph.share[b]);
    const outputs = [...Array(graph.n).keys()].filter((i) => graph.kind[i] === LOGIT);
    return [
      element("h2", {}, "Where to start"),
      element(
        "p",
        {},
        "Point at a node to see its edges; click it to see what feeds it and what it feeds, and go on from there.",
      ),
      element("h3", {}, "Outputs"),
      element(
        "div",
        { class: "rows" },
        outputs.map((i) => row(i)),
      ),
      element("h3", {}, "Most influential features"),
      element(
        "div",
        { class: "rows" },
        best.slice(0, 12).map((i) => row(i)),
      ),
      keys(),
    ];
  };
  const keys = () =>
    element(
      "details",
      { class: "keys" },
      element("summary", {}, "Keys"),
      element(
        "dl",
        {},
        [
          ["↑ ↓", "strongest output, strongest input"],
          ["← →", "the next node in the same layer"],
          ["P", "pin or unpin"],
          ["/", "search"],
          ["+ −", "zoom"],
          ["Backspace", "back"],
          ["Esc", "clear"],
        ].map(([key, text]) => element("div", {}, element("dt", {}, element("kbd", {}, key)), element("dd", {}, text))),
      ),
    );
  const details = (i) => {
    const pinned = app.state.pinned.includes(i);
    const known = examples[featureKey(graph.doc.nodes[i])] || [];
    const group = app.state.groups.find(([, members]) => members.includes(i));
    return [
      element(
        "div",
        { class: "head" },
        element("h2", {}, glyph(graph.kind[i]), graph.labels[i]),
        element(
          "div",
          { class: "buttons" },
          element(
            "button",
            { type: "button", id: "pin", "aria-pressed": String(pinned), onclick: () => app.togglePin(i) },
            pinned ? "Unpin" : "Pin",
          ),
          element("button", { type: "button", id: "clear", onclick: () => app.clear() }, "Clear"),
        ),
      ),
      facts([...describe(graph, i), ...(group ? [["Group", visibleText(group[0])]] : [])]),
      ...(known.length ? [element("h3", {}, "Top examples"), examplesOf(known, 8)] : []),
      ...neighbours(i),
      keys(),
    ];
  };
  return {
    show() {
      const { clicked } = app.state;
      const focused = panel.contains(document.activeElement);
      panel.replaceChildren(...(clicked < 0 ? overview() : details(clicked)).filter(Boolean));
      panel.scrollTop = 0;
      if (focused) panel.focus({ preventScroll: true }); // the button that was pressed is gone; Tab goes on from the top
    },
  };
}

/** What the pointer is on, beside the pointer. */
function makeTip(graph, examples, app) {
  const tip = document.getElementById("tip");
  return {
    hide() {
      tip.hidden = true;
    },
    show(i, x, y) {
      const focus = app.state.clicked;
      const known = examples[featureKey(graph.doc.nodes[i])] || [];
      const lines = [];
      if (focus >= 0 && focus !== i) {
        for (const [into, words] of [
          [true, "to the selected node"],
          [false, "from the selected node"],
        ]) {
          const e = edgesOf(graph, focus, into).find((edge) => (into ? graph.source : graph.target)[edge] === i);
          if (e !== undefined) lines.push(`${signed(graph.weight[e])} ${words}`);
        }
      }
      tip.replaceChildren(
        element("strong", {}, graph.labels[i]),
        facts(describe(graph, i)),
        ...lines.map((line) => element("p", { class: "edge" }, line)),
        ...(known.length ? [examplesOf(known, 2)] : []),
      );
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      const margin = 14;
      const left = x + margin + box.width > innerWidth ? Math.max(4, x - margin - box.width) : x + margin;
      tip.style.left = `${left}px`;
      tip.style.top = `${Math.max(4, Math.min(y + margin, innerHeight - box.height - 4))}px`;
    },
  };
}
