// What the pointer is on, said beside the pointer.

function makeTip(graph, details, app) {
  const tip = document.getElementById("tip");
  const margin = 14;

  /** Its edges with the selected node. */
  const edgesWith = (i, focus) => {
    if (focus < 0 || focus === i) return [];
    const find = (into) => edgesOf(graph, focus, into).find((e) => (into ? graph.source : graph.target)[e] === i);
    const [to, from] = [find(true), find(false)];
    const lines = [];
    if (to !== undefined) lines.push(`${signed(graph.weight[to])} to the selected node`);
    if (from !== undefined) lines.push(`${signed(graph.weight[from])} from the selected node`);
    return lines.map((line) => element("p", { class: "edge" }, line));
  };
  return {
    hide() {
      tip.hidden = true;
    },
    show(i, x, y) {
      const known = details[featureKey(graph.doc.nodes[i])]?.examples || [];
      tip.replaceChildren(
        element("strong", {}, graph.labels[i]),
        factList(describe(graph, i)),
        ...edgesWith(i, app.state.clicked),
        ...(known.length ? [exampleList(known, 2)] : []),
      );
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      const fits = x + margin + box.width <= innerWidth;
      tip.style.left = `${fits ? x + margin : Math.max(4, x - margin - box.width)}px`;
      tip.style.top = `${Math.max(4, Math.min(y + margin, innerHeight - box.height - 4))}px`;
    },
  };
}
