// Pinned nodes as a small graph of their own. Groups of pins are supernodes; an edge between two of them is the sum of
// the edges between their members, as a share of the target's input.

const NUMBERED = 60; // edges; among more of them, numbers would cover everything

function makeSubgraph(graph, app) {
  const figure = at("subgraph-figure");
  const pins = makePins(graph, app);

  const drawFigure = (units) => {
    const width = Math.max(200, figure.clientWidth - 4);
    const height = placeUnits(graph, units, width, width < 420 ? 138 : 158, app.state.places);
    const all = sumsOf(graph, units).sort((a, b) => Math.abs(b.net) - Math.abs(a.net));
    const most = all.length ? Math.abs(all[0].net) || 1 : 1;
    // Where there are many, sums that one could hardly see would only hide the others.
    const sums = all.length > FEW ? all.filter((sum) => sum.plus - sum.minus >= 0.03) : all;
    const left = all.length - sums.length;
    at("weak-sums").textContent =
      left > 0 ? ` ${count(left)} sums below 3 % of their target's input are not drawn.` : "";
    const name = "Pinned nodes and the sums of the edges between them";
    const size = { viewBox: `0 0 ${width} ${height}`, width, height };
    const svg = drawn("svg", { ...size, id: "subgraph", role: "group", "aria-label": name });
    for (const sum of sums) svg.prepend(drawSum(sum, units, Math.abs(sum.net) / most)); // the strongest on top
    if (sums.length <= NUMBERED) svg.append(...sums.map((sum) => drawNumber(sum, units)).reverse());
    svg.append(...units.map((unit) => drawUnit(unit, { width, height })));
    figure.replaceChildren(svg);
  };
  const written = (features) => {
    const { replacement, completeness } = scoresWith(graph, features);
    return `replacement ${replacement.toFixed(3)} and completeness ${completeness.toFixed(3)}`;
  };
  const all = nodesWhere(graph, (i) => graph.kind[i] !== ERROR);
  let whole = ""; // once: of a large graph it takes a while
  const showScores = () => {
    whole ||= written(all);
    at("pin-scores").textContent =
      `With the pinned features alone, this graph has ${written(app.state.pinned)}; with all of its features, ${whole}. ` +
      "What the others write counts as error.";
  };
  const endsOf = ({ from, to }, units) => [
    [units[from].x + units[from].width / 2, units[from].y],
    [units[to].x + units[to].width / 2, units[to].y + BOX_HEIGHT],
  ];
  const signOf = (sum) => (sum.net < 0 ? "minus" : "plus");
  const drawSum = (sum, units, strength) => {
    const parts = sum.edges === 1 ? "1 edge" : `${sum.edges} edges (${signedShare(sum.plus)} and ${signedShare(sum.minus)})`;
    const words = `${units[sum.from].name} → ${units[sum.to].name}: ${signedShare(sum.net)} of its input, the sum of ${parts}`;
    const look = { class: `link ${signOf(sum)}`, "stroke-width": (1 + 5 * strength).toFixed(2) };
    const [[x1, y1], [x2, y2]] = endsOf(sum, units);
    const bend = Math.max(0, y1 - y2) * 0.5;
    const d = `M${x1} ${y1}C${x1} ${y1 - bend} ${x2} ${y2 + bend} ${x2} ${y2}`;
    return drawn("path", { d, ...look }, drawn("title", {}, words));
  };
  const drawNumber = (sum, units) => {
    const [[x1, y1], [x2, y2]] = endsOf(sum, units);
    const middle = { x: (x1 + x2) / 2, y: (y1 + y2) / 2 + 4 };
    return drawn("text", { ...middle, class: "sum", "text-anchor": "middle" }, signedShare(sum.net));
  };
  /** Moves a box with the pointer; a press that does not move it selects its node. */
  const drag = (box, unit, room) => {
    box.onpointerdown = (down) => {
      if (down.pointerType === "touch") return; // it scrolls
      box.setPointerCapture(down.pointerId);
      box.onpointermove = (move) => {
        const [dx, dy] = [move.clientX - down.clientX, move.clientY - down.clientY];
        if (Math.hypot(dx, dy) < 4 && !box.hasAttribute("transform")) return;
        box.setAttribute("transform", `translate(${dx} ${dy})`);
        box.place = [(unit.x + dx) / room.width, room.height - unit.y - dy].map((x) => Number(x.toFixed(3)));
      };
      box.onpointerup = box.onpointercancel = () => {
        box.onpointermove = null;
        if (box.place) app.change({ places: { ...app.state.places, [unitKey(graph, unit)]: box.place } }, true);
      };
    };
  };
  const drawUnit = (unit, room) => {
    const { x, y, width, members, name } = unit;
    const grouped = unit.group >= 0;
    const under = grouped ? `${members.length} ${members.length === 1 ? "node" : "nodes"}` : whereOf(graph, members[0]);
    const classes = ["unit", grouped && "group", members.includes(app.state.clicked) && "chosen"];
    const box = drawn(
      "g",
      { class: classes.filter(Boolean).join(" "), tabindex: 0, role: "button", "aria-label": `${name}, ${under}` },
      drawn("rect", { x, y, width, height: BOX_HEIGHT, rx: 5 }),
      drawn("text", { x: x + 9, y: y + 16, class: "name" }, clip(name, Math.floor(width / 7.4))),
      drawn("text", { x: x + 9, y: y + 30, class: "where" }, clip(under, Math.floor(width / 6))),
      drawn("title", {}, `${name} (${under})`),
    );
    box.onclick = () => box.place || app.select(members[0]);
    box.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      app.select(members[0]);
      event.preventDefault();
    };
    drag(box, unit, room);
    return watch(box, () => app.mark(members), () => app.mark([]));
  };
  return {
    show() {
      const units = unitsOf(graph, app.state);
      const none = units.length === 0;
      const { missing } = app.state;
      at("missing-pins").hidden = !missing;
      at("missing-pins").textContent =
        `${count(missing)} pinned or grouped ${missing === 1 ? "node is" : "nodes are"} not in this graph: pruned away, or of another prompt.`;
      at("no-pins").hidden = !none;
      at("some-pins").hidden = at("save-subgraph").disabled = none;
      pins.show(units);
      if (none) return;
      drawFigure(units);
      showScores();
    },
  };
}

/** The subgraph as a file of its own: its colours are written into it. */
function subgraphFile() {
  const svg = at("subgraph");
  const copy = svg.cloneNode(true);
  const [originals, copies] = [svg, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  const text = ["font-family", "font-size", "font-weight"];
  originals.forEach((from, k) => {
    const style = getComputedStyle(from);
    for (const name of ["fill", "stroke", "stroke-width", "stroke-opacity", ...text]) {
      copies[k].setAttribute(name, style.getPropertyValue(name));
    }
    for (const name of ["class", "tabindex", "role"]) copies[k].removeAttribute(name);
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  return new XMLSerializer().serializeToString(copy);
}
