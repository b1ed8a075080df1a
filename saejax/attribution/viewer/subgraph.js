// Pinned nodes as a small graph of their own. Groups of pins are supernodes; an edge between two of them is the sum of
// the edges between their members.

function makeSubgraph(graph, app) {
  const figure = document.getElementById("subgraph-figure");
  const list = document.getElementById("pins");
  const tools = document.getElementById("pin-tools");
  const ticked = new Set();

  const drawUnits = (units) => {
    const width = Math.max(200, figure.clientWidth - 4);
    const boxWidth = width < 420 ? 138 : 158;
    const { levels, height } = placeUnits(units, width, boxWidth);
    const all = sumsOf(graph, units);
    const most = Math.max(...all.map((sum) => Math.abs(sum.net)), 1e-12);
    // Where many boxes stand, sums that one could hardly see would only hide the others.
    const sums = all.length > FEW ? all.filter((sum) => Math.abs(sum.net) >= 0.03 * most) : all;
    document.getElementById("weak-sums").textContent =
      sums.length < all.length
        ? ` ${count(all.length - sums.length)} sums below 3 % of the largest are not drawn.`
        : "";
    const svg = drawn("svg", {
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      id: "subgraph",
      role: "group",
      "aria-label": "Pinned nodes and the sums of the edges between them",
    });
    const numbers = [];
    const taken = [];
    for (const sum of sums.sort((a, b) => Math.abs(b.net) - Math.abs(a.net))) {
      const a = units[sum.from];
      const b = units[sum.to];
      const sign = sum.net < 0 ? "minus" : "plus";
      const points = route(levels, a, b);
      const path = drawn("path", {
        d: pathOf(points),
        class: `link ${sign}`,
        "stroke-width": (1 + (5 * Math.abs(sum.net)) / most).toFixed(2),
      });
      path.append(
        drawn(
          "title",
          {},
          `${a.name} → ${b.name}: ${signed(sum.net)}, the sum of ${count(sum.edges)} ${sum.edges === 1 ? "edge" : `edges (${signed(sum.plus)} and ${signed(sum.minus)})`}`,
        ),
      );
      svg.prepend(path); // the strongest on top
      if (sums.length <= 60) numbers.push(number(numberPlace(points, taken), signed(sum.net), sign));
    }
    svg.append(...units.map(drawUnit), ...numbers.reverse().flat());
    figure.replaceChildren(svg);
  };
  const number = ({ x, y }, words, sign) => {
    const wide = words.length * 6.4 + 6;
    return [
      drawn("rect", { x: x - wide / 2, y: y - 10.5, width: wide, height: 14, rx: 3, class: "under" }),
      drawn("text", { x, y, class: `sum ${sign}`, "text-anchor": "middle" }, words),
    ];
  };
  const drawUnit = (unit) => {
    const many = unit.members.length > 1;
    const first = unit.members[0];
    const under = unit.group >= 0 ? `${unit.members.length} ${many ? "nodes" : "node"}` : whereOf(graph, first);
    const box = drawn(
      "g",
      {
        class: `unit${unit.group >= 0 ? " group" : ""}${unit.members.includes(app.state.clicked) ? " chosen" : ""}`,
        tabindex: 0,
        role: "button",
        "aria-label": `${unit.name}, ${under}`,
      },
      drawn("rect", { x: unit.x, y: unit.y, width: unit.width, height: BOX_HEIGHT, rx: 5 }),
      drawn("text", { x: unit.x + 9, y: unit.y + 16, class: "name" }, clip(unit.name, Math.floor(unit.width / 7.4))),
      drawn("text", { x: unit.x + 9, y: unit.y + 30, class: "where" }, clip(under, Math.floor(unit.width / 6))),
      drawn("title", {}, `${unit.name} (${under})`),
    );
    box.onclick = () => app.select(first);
    box.onkeydown = (event) => {
      if (event.key === "Enter" || event.key === " ") {
        app.select(first);
        event.preventDefault();
      }
    };
    box.onpointerenter = () => app.mark(unit.members);
    box.onpointerleave = () => app.mark([]);
    return box;
  };

  const listUnits = (units) => {
    list.replaceChildren(
      ...units.map((unit) => {
        const key = unit.group >= 0 ? `g${unit.group}` : graph.ids[unit.members[0]];
        const tick = element("input", {
          type: "checkbox",
          "aria-label": `Tick ${unit.name}`,
          onchange: () => {
            ticked[tick.checked ? "add" : "delete"](key);
            showTools(units);
          },
        });
        tick.checked = ticked.has(key);
        unit.key = key;
        return element(
          "li",
          { "data-units": unit.members.map((i) => graph.ids[i]).join(",") },
          tick,
          ...(unit.group < 0 ? pinRow(unit) : groupRow(unit)),
        );
      }),
    );
  };
  const pinRow = (unit) => [
    element(
      "button",
      { type: "button", class: "row", onclick: () => app.select(unit.members[0]) },
      element(
        "span",
        { class: "what" },
        glyph(graph.kind[unit.members[0]]),
        element("span", { class: "name" }, unit.name),
      ),
      element("span", { class: "where" }, whereOf(graph, unit.members[0])),
    ),
    element(
      "button",
      {
        type: "button",
        class: "plain",
        "aria-label": `Unpin ${unit.name}`,
        onclick: () => app.togglePin(unit.members[0]),
      },
      "Unpin",
    ),
  ];
  const groupRow = (unit) => {
    const name = element("input", {
      type: "text",
      value: app.state.groups[unit.group][0],
      "aria-label": "Name of the group",
      class: "group-name",
      onchange: () => app.rename(unit.group, name.value),
    });
    return [
      element(
        "div",
        { class: "group-row" },
        name,
        element(
          "details",
          {},
          element("summary", {}, `${unit.members.length} nodes`),
          unit.members.map((i) =>
            element(
              "button",
              { type: "button", class: "row", onclick: () => app.select(i) },
              element(
                "span",
                { class: "what" },
                glyph(graph.kind[i]),
                element("span", { class: "name" }, graph.labels[i]),
              ),
              element("span", { class: "where" }, whereOf(graph, i)),
            ),
          ),
        ),
      ),
      element(
        "button",
        {
          type: "button",
          class: "plain",
          "aria-label": `Ungroup ${unit.name}`,
          onclick: () => app.ungroup(unit.group),
        },
        "Ungroup",
      ),
    ];
  };
  const showTools = (units) => {
    const chosen = units.filter((unit) => ticked.has(unit.key));
    const button = tools.querySelector("button[type=submit]");
    button.disabled = chosen.reduce((sum, unit) => sum + unit.members.length, 0) < 2;
    button.textContent = chosen.some((unit) => unit.group >= 0) ? "Merge ticked" : "Group ticked";
    tools.onsubmit = (event) => {
      event.preventDefault();
      const field = tools.querySelector("input");
      const old = chosen.find((unit) => unit.group >= 0);
      const name = field.value.trim() || (old ? app.state.groups[old.group][0] : chosen[0].name);
      field.value = "";
      ticked.clear();
      app.group(
        name,
        chosen.flatMap((unit) => unit.members),
      );
    };
  };
  return {
    show() {
      const units = unitsOf(graph, app.state);
      const some = units.length > 0;
      document.getElementById("no-pins").hidden = some;
      document.getElementById("some-pins").hidden = !some;
      document.getElementById("save-subgraph").disabled = !some;
      if (!some) return;
      listUnits(units);
      showTools(units);
      drawUnits(units);
    },
  };
}

/** The subgraph as a file of its own: its colours are written into it. */
function subgraphFile() {
  const svg = document.getElementById("subgraph");
  const copy = svg.cloneNode(true);
  const pairs = [
    [svg, copy],
    ...[...svg.querySelectorAll("*")].map((from, k) => [from, copy.querySelectorAll("*")[k]]),
  ];
  for (const [from, to] of pairs) {
    const style = getComputedStyle(from);
    for (const name of [
      "fill",
      "stroke",
      "font-family",
      "font-size",
      "font-weight",
      "paint-order",
      "stroke-width",
      "stroke-opacity",
    ]) {
      to.setAttribute(name, style.getPropertyValue(name));
    }
    for (const name of ["class", "tabindex", "role"]) to.removeAttribute(name);
  }
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  return new XMLSerializer().serializeToString(copy);
}
