// What the pointer is on, said beside the pointer.

function makeTip(graph, details, app) {
  const tip = at("tip");
  const margin = 14;

  /** A node's edge to or from the selected one. */
  const edgeWith = (i, focus, into) => {
    if (focus < 0 || focus === i) return [];
    const found = edgesOf(graph, focus, into).filter((e) => (into ? graph.source : graph.target)[e] === i);
    const words = `${into ? "to" : "from"} the selected node`;
    return found.slice(0, 1).map((e) => element("p", { class: "edge" }, `${signed(graph.weight[e])} ${words}`));
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
        ...[true, false].flatMap((into) => edgeWith(i, app.state.clicked, into)),
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
