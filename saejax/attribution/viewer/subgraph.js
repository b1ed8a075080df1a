// Pinned nodes as a small graph of their own. Groups of pins are supernodes; an edge between two of them is the sum of
// the edges between their members.

const BOX_HEIGHT = 38, BOX_GAP = 26, LEVEL = 92, MARGIN = 18, FEW = 30;

/** What is drawn as one box: a group, or a pin that is in none. */
function unitsOf(graph, state) {
  const grouped = new Set(state.groups.flatMap(([, members]) => members));
  const units = [
    ...state.groups.map(([name, members], k) => ({ group: k, name: visibleText(name), members })),
    ...state.pinned.filter((i) => !grouped.has(i)).map((i) => ({ group: -1, name: graph.labels[i], members: [i] })),
  ];
  const mean = (members, of) => members.reduce((sum, i) => sum + of[i], 0) / members.length;
  for (const unit of units) Object.assign(unit, { row: mean(unit.members, graph.row), pos: mean(unit.members, graph.pos) });
  return units.sort((a, b) => a.row - b.row || a.pos - b.pos);
}

/** Sums of edges between units: signed, and its two parts. */
function sumsOf(graph, units) {
  const unitOf = new Map(units.flatMap((unit, u) => unit.members.map((i) => [i, u])));
  const sums = new Map();
  for (const [node, to] of unitOf) {
    for (const e of edgesOf(graph, node, true)) {
      const from = unitOf.get(graph.source[e]);
      if (from === undefined || from === to) continue;
      const key = `${from} ${to}`, sum = sums.get(key) || { from, to, plus: 0, minus: 0, edges: 0 };
      sum[graph.weight[e] < 0 ? "minus" : "plus"] += graph.weight[e];
      sum.edges++;
      sums.set(key, sum);
    }
  }
  return [...sums.values()].map((sum) => ({ ...sum, net: sum.plus + sum.minus }));
}

/** Levels from the lowest layer up: a level holds what is less than a layer apart, as many boxes as fit, and within it
 * boxes stand from left to right as their tokens do. Gives each unit its place, and the picture's height. */
function placeUnits(units, width, boxWidth) {
  const room = width - 2 * MARGIN; // edges may pass at the sides, too
  const perLevel = Math.max(1, Math.floor((room + BOX_GAP) / (boxWidth + BOX_GAP)));
  const levels = [];
  for (const unit of units) {
    const level = levels.at(-1);
    if (level && unit.row - level[0].row < 1 && level.length < perLevel) level.push(unit);
    else levels.push([unit]);
  }
  const positions = units.map((unit) => unit.pos), first = Math.min(...positions), last = Math.max(...positions);
  const step = boxWidth + BOX_GAP;
  levels.forEach((level, k) => {
    level.sort((a, b) => a.pos - b.pos);
    level.forEach((unit, c) => {
      const wanted = MARGIN + (room - boxWidth) * (last > first ? (unit.pos - first) / (last - first) : 0.5);
      unit.width = boxWidth;
      unit.x = c ? Math.max(wanted, level[c - 1].x + step) : wanted;
      unit.level = k;
      unit.y = 6 + (levels.length - 1 - k) * LEVEL;
    });
    let most = width - MARGIN - boxWidth; // boxes that were pushed out at the right come back
    for (const unit of [...level].reverse()) {
      unit.x = Math.max(MARGIN, Math.min(unit.x, most));
      most = unit.x - step;
    }
  });
  return { levels, height: levels.length * LEVEL - (LEVEL - BOX_HEIGHT) + 12 };
}

/** The points of an edge: it passes between the boxes of the levels that it crosses, not behind them. */
function route(levels, a, b) {
  const points = [[a.x + a.width / 2, a.y]], end = [b.x + b.width / 2, b.y + BOX_HEIGHT];
  for (let k = a.level + 1; k < b.level; k++) {
    const boxes = levels[k], y = boxes[0].y, from = points.at(-1);
    const straight = from[0] + (end[0] - from[0]) * ((from[1] - y - BOX_HEIGHT / 2) / (from[1] - end[1]));
    const free = (x) => boxes.every((box) => x < box.x - 6 || x > box.x + box.width + 6);
    const beside = boxes.flatMap((box) => [box.x - BOX_GAP / 2, box.x + box.width + BOX_GAP / 2]).filter(free);
    const x = free(straight) || !beside.length ? straight
      : beside.reduce((best, one) => (Math.abs(one - straight) < Math.abs(best - straight) ? one : best));
    points.push([x, y + BOX_HEIGHT + 4], [x, y - 4]);
  }
  return [...points, end];
}

function pathOf(points) {
  let path = `M${points[0].join(" ")}`;
  for (let k = 1; k < points.length; k++) {
    const [x1, y1] = points[k - 1], [x2, y2] = points[k], bend = Math.max(0, y1 - y2) * 0.5;
    path += k % 2 ? `C${x1} ${y1 - bend} ${x2} ${y2 + bend} ${x2} ${y2}` : `L${x2} ${y2}`;
  }
  return path;
}

/** A place for an edge's number on its first stretch, clear of the numbers that are there already. */
function numberPlace(points, taken) {
  const [[x1, y1], [x2, y2]] = points, bend = Math.max(0, y1 - y2) * 0.5;
  let place;
  for (const t of [0.45, 0.65, 0.3, 0.8, 0.2]) {
    const s = 1 - t, y = s ** 3 * y1 + 3 * s * s * t * (y1 - bend) + 3 * s * t * t * (y2 + bend) + t ** 3 * y2;
    place = { x: x1 * (s ** 3 + 3 * s * s * t) + x2 * (t ** 3 + 3 * s * t * t), y: y + 4 };
    if (taken.every((other) => Math.abs(other.x - place.x) > 40 || Math.abs(other.y - place.y) > 13)) break;
  }
  taken.push(place);
  return place;
}

function makeSubgraph(graph, app) {
  const figure = document.getElementById("subgraph-figure"), list = document.getElementById("pins");
  const tools = document.getElementById("pin-tools"), ticked = new Set();

  const drawUnits = (units) => {
    const width = Math.max(200, figure.clientWidth - 4), boxWidth = width < 420 ? 138 : 158;
    const { levels, height } = placeUnits(units, width, boxWidth);
    const all = sumsOf(graph, units), most = Math.max(...all.map((sum) => Math.abs(sum.net)), 1e-12);
    // Where many boxes stand, sums that one could hardly see would only hide the others.
    const sums = all.length > FEW ? all.filter((sum) => Math.abs(sum.net) >= 0.03 * most) : all;
    document.getElementById("weak-sums").textContent = sums.length < all.length ? ` ${count(all.length - sums.length)} sums below 3 % of the largest are not drawn.` : "";
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, id: "subgraph", role: "group", "aria-label": "Pinned nodes and the sums of the edges between them" });
    const numbers = [], taken = [];
    for (const sum of sums.sort((a, b) => Math.abs(b.net) - Math.abs(a.net))) {
      const a = units[sum.from], b = units[sum.to], sign = sum.net < 0 ? "minus" : "plus", points = route(levels, a, b);
      const path = drawn("path", { d: pathOf(points), class: `link ${sign}`, "stroke-width": (1 + 5 * Math.abs(sum.net) / most).toFixed(2) });
      path.append(drawn("title", {}, `${a.name} → ${b.name}: ${signed(sum.net)}, the sum of ${count(sum.edges)} ${sum.edges === 1 ? "edge" : `edges (${signed(sum.plus)} and ${signed(sum.minus)})`}`));
      svg.prepend(path); // the strongest on top
      if (sums.length <= 60) numbers.push(number(numberPlace(points, taken), signed(sum.net), sign));
    }
    svg.append(...units.map(drawUnit), ...numbers.reverse().flat());
    figure.replaceChildren(svg);
  };
  const number = ({ x, y }, words, sign) => {
    const wide = words.length * 6.4 + 6;
    return [drawn("rect", { x: x - wide / 2, y: y - 10.5, width: wide, height: 14, rx: 3, class: "under" }),
      drawn("text", { x, y, class: `sum ${sign}`, "text-anchor": "middle" }, words)];
  };
  const drawUnit = (unit) => {
    const many = unit.members.length > 1, first = unit.members[0];
    const under = unit.group >= 0 ? `${unit.members.length} ${many ? "nodes" : "node"}` : whereOf(graph, first);
    const box = drawn("g", { class: `unit${unit.group >= 0 ? " group" : ""}${unit.members.includes(app.state.clicked) ? " chosen" : ""}`, tabindex: 0, role: "button", "aria-label": `${unit.name}, ${under}` },
      drawn("rect", { x: unit.x, y: unit.y, width: unit.width, height: BOX_HEIGHT, rx: 5 }),
      drawn("text", { x: unit.x + 9, y: unit.y + 16, class: "name" }, clip(unit.name, Math.floor(unit.width / 7.4))),
      drawn("text", { x: unit.x + 9, y: unit.y + 30, class: "where" }, clip(under, Math.floor(unit.width / 6))),
      drawn("title", {}, `${unit.name} (${under})`));
    box.onclick = () => app.select(first);
    box.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { app.select(first); event.preventDefault(); } };
    box.onpointerenter = () => app.mark(unit.members);
    box.onpointerleave = () => app.mark([]);
    return box;
  };

  const listUnits = (units) => {
    list.replaceChildren(...units.map((unit) => {
      const key = unit.group >= 0 ? `g${unit.group}` : graph.ids[unit.members[0]];
      const tick = element("input", { type: "checkbox", "aria-label": `Tick ${unit.name}`, onchange: () => { ticked[tick.checked ? "add" : "delete"](key); showTools(units); } });
      tick.checked = ticked.has(key);
      unit.key = key;
      return element("li", { "data-units": unit.members.map((i) => graph.ids[i]).join(",") }, tick, ...(unit.group < 0 ? pinRow(unit) : groupRow(unit)));
    }));
  };
  const pinRow = (unit) => [
    element("button", { type: "button", class: "row", onclick: () => app.select(unit.members[0]) },
      element("span", { class: "what" }, glyph(graph.kind[unit.members[0]]), element("span", { class: "name" }, unit.name)),
      element("span", { class: "where" }, whereOf(graph, unit.members[0]))),
    element("button", { type: "button", class: "plain", "aria-label": `Unpin ${unit.name}`, onclick: () => app.togglePin(unit.members[0]) }, "Unpin"),
  ];
  const groupRow = (unit) => {
    const name = element("input", { type: "text", value: app.state.groups[unit.group][0], "aria-label": "Name of the group", class: "group-name", onchange: () => app.rename(unit.group, name.value) });
    return [
      element("div", { class: "group-row" }, name, element("details", {}, element("summary", {}, `${unit.members.length} nodes`),
        unit.members.map((i) => element("button", { type: "button", class: "row", onclick: () => app.select(i) },
          element("span", { class: "what" }, glyph(graph.kind[i]), element("span", { class: "name" }, graph.labels[i])),
          element("span", { class: "where" }, whereOf(graph, i)))))),
      element("button", { type: "button", class: "plain", "aria-label": `Ungroup ${unit.name}`, onclick: () => app.ungroup(unit.group) }, "Ungroup"),
    ];
  };
  const showTools = (units) => {
    const chosen = units.filter((unit) => ticked.has(unit.key));
    const button = tools.querySelector("button[type=submit]");
    button.disabled = chosen.reduce((sum, unit) => sum + unit.members.length, 0) < 2;
    button.textContent = chosen.some((unit) => unit.group >= 0) ? "Merge ticked" : "Group ticked";
    tools.onsubmit = (event) => {
      event.preventDefault();
      const field = tools.querySelector("input"), old = chosen.find((unit) => unit.group >= 0);
      const name = field.value.trim() || (old ? app.state.groups[old.group][0] : chosen[0].name);
      field.value = "";
      ticked.clear();
      app.group(name, chosen.flatMap((unit) => unit.members));
    };
  };
  return {
    show() {
      const units = unitsOf(graph, app.state), some = units.length > 0;
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
  const svg = document.getElementById("subgraph"), copy = svg.cloneNode(true);
  const pairs = [[svg, copy], ...[...svg.querySelectorAll("*")].map((from, k) => [from, copy.querySelectorAll("*")[k]])];
  for (const [from, to] of pairs) {
    const style = getComputedStyle(from);
    for (const name of ["fill", "stroke", "font-family", "font-size", "font-weight", "paint-order", "stroke-width", "stroke-opacity"]) {
      to.setAttribute(name, style.getPropertyValue(name));
    }
    for (const name of ["class", "tabindex", "role"]) to.removeAttribute(name);
  }
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  return new XMLSerializer().serializeToString(copy);
}
