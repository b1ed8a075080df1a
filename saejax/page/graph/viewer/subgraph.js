// Pinned nodes as a small graph of their own. Groups of pins are supernodes; an edge between two of them is the sum of
// the edges between their members, as a share of the target's input.

const NUMBERED = 60; // edges; among more of them, numbers would cover everything

function makeSubgraph(graph, app) {
  const figure = document.getElementById("subgraph-figure");
  const pins = makePins(graph, app);

  const drawFigure = (units) => {
    const width = Math.max(200, figure.clientWidth - 4);
    const { levels, height } = placeUnits(units, width, width < 420 ? 138 : 158);
    const all = sumsOf(graph, units).sort((a, b) => Math.abs(b.net) - Math.abs(a.net));
    const most = all.length ? Math.abs(all[0].net) || 1 : 1;
    // Where there are many, sums that one could hardly see would only hide the others.
    const sums = all.length > FEW ? all.filter((sum) => sum.plus - sum.minus >= 0.03) : all;
    const left = all.length - sums.length;
    document.getElementById("weak-sums").textContent =
      left > 0 ? ` ${count(left)} sums below 3 % of their target's input are not drawn.` : "";
    const name = "Pinned nodes and the sums of the edges between them";
    const size = { viewBox: `0 0 ${width} ${height}`, width, height };
    const svg = drawn("svg", { ...size, id: "subgraph", role: "group", "aria-label": name });
    const numbers = [];
    const taken = [];
    for (const sum of sums) {
      const points = route(levels, units[sum.from], units[sum.to]);
      svg.prepend(drawSum(sum, units, points, Math.abs(sum.net) / most)); // the strongest on top
      if (sums.length <= NUMBERED) numbers.push(drawNumber(numberPlace(points, taken), sum));
    }
    svg.append(...units.map(drawUnit), ...numbers.reverse().flat());
    figure.replaceChildren(svg);
  };
  const signOf = (sum) => (sum.net < 0 ? "minus" : "plus");
  const drawSum = (sum, units, points, strength) => {
    const parts = sum.edges === 1 ? "1 edge" : `${sum.edges} edges (${signedShare(sum.plus)} and ${signedShare(sum.minus)})`;
    const words = `${units[sum.from].name} → ${units[sum.to].name}: ${signedShare(sum.net)} of its input, the sum of ${parts}`;
    const look = { class: `link ${signOf(sum)}`, "stroke-width": (1 + 5 * strength).toFixed(2) };
    return drawn("path", { d: pathOf(points), ...look }, drawn("title", {}, words));
  };
  const drawNumber = ({ x, y }, sum) => {
    const words = signedShare(sum.net);
    const wide = words.length * 6.4 + 6;
    return [
      drawn("rect", { x: x - wide / 2, y: y - 10.5, width: wide, height: 14, rx: 3, class: "under" }),
      drawn("text", { x, y, class: `sum ${signOf(sum)}`, "text-anchor": "middle" }, words),
    ];
  };
  const drawUnit = (unit) => {
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
    box.onclick = () => app.select(members[0]);
    box.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      app.select(members[0]);
      event.preventDefault();
    };
    box.onpointerenter = box.onfocus = () => app.mark(members);
    box.onpointerleave = box.onblur = () => app.mark([]);
    return box;
  };
  return {
    show() {
      const units = unitsOf(graph, app.state);
      const none = units.length === 0;
      document.getElementById("no-pins").hidden = !none;
      document.getElementById("some-pins").hidden = none;
      document.getElementById("save-subgraph").disabled = none;
      pins.show(units);
      if (!none) drawFigure(units);
    },
  };
}

/** The subgraph as a file of its own: its colours are written into it. */
function subgraphFile() {
  const svg = document.getElementById("subgraph");
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
