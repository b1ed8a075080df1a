// The graph of pinned nodes, as boxes with places and edges with ways around them.

const BOX_HEIGHT = 38;
const BOX_GAP = 26;
const LEVEL = 92;
const MARGIN = 18;
const FEW = 30;

/** What is drawn as one box: a group, or a pin that is in none. */
function unitsOf(graph, state) {
  const grouped = new Set(state.groups.flatMap(([, members]) => members));
  const units = [
    ...state.groups.map(([name, members], k) => ({ group: k, name: visibleText(name), members })),
    ...state.pinned.filter((i) => !grouped.has(i)).map((i) => ({ group: -1, name: graph.labels[i], members: [i] })),
  ];
  const mean = (members, of) => members.reduce((sum, i) => sum + of[i], 0) / members.length;
  for (const unit of units)
    Object.assign(unit, { row: mean(unit.members, graph.row), pos: mean(unit.members, graph.pos) });
  return units.sort((a, b) => a.row - b.row || a.pos - b.pos);
}

/** Sums of edges between units: signed, and its two parts. Weights are in the units of their targets, so each counts as
 * a share of its target's input, by size; a group's sum is divided by the shares that its members have from outside of
 * it, added up, as circuit-tracer and Neuronpedia do. */
function sumsOf(graph, units) {
  const unitOf = new Map(units.flatMap((unit, u) => unit.members.map((i) => [i, u])));
  const outside = new Float64Array(units.length);
  const sums = new Map();
  for (const [node, to] of unitOf) {
    for (const e of edgesOf(graph, node, true)) {
      const from = unitOf.get(graph.source[e]);
      if (from === to) continue;
      const share = graph.weight[e] / (graph.inTotal[node] || 1);
      outside[to] += Math.abs(share);
      if (from === undefined) continue;
      const key = `${from} ${to}`;
      const sum = sums.get(key) || { from, to, plus: 0, minus: 0, edges: 0 };
      sum[share < 0 ? "minus" : "plus"] += share;
      sum.edges++;
      sums.set(key, sum);
    }
  }
  return [...sums.values()].map((sum) => {
    const [plus, minus] = [sum.plus, sum.minus].map((part) => part / (outside[sum.to] || 1));
    return { ...sum, plus, minus, net: plus + minus };
  });
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
  const positions = units.map((unit) => unit.pos);
  const first = Math.min(...positions);
  const last = Math.max(...positions);
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
  const points = [[a.x + a.width / 2, a.y]];
  const end = [b.x + b.width / 2, b.y + BOX_HEIGHT];
  for (let k = a.level + 1; k < b.level; k++) {
    const boxes = levels[k];
    const y = boxes[0].y;
    const from = points.at(-1);
    const straight = from[0] + (end[0] - from[0]) * ((from[1] - y - BOX_HEIGHT / 2) / (from[1] - end[1]));
    const free = (x) => boxes.every((box) => x < box.x - 6 || x > box.x + box.width + 6);
    const beside = boxes.flatMap((box) => [box.x - BOX_GAP / 2, box.x + box.width + BOX_GAP / 2]).filter(free);
    const x =
      free(straight) || !beside.length
        ? straight
        : beside.reduce((best, one) => (Math.abs(one - straight) < Math.abs(best - straight) ? one : best));
    points.push([x, y + BOX_HEIGHT + 4], [x, y - 4]);
  }
  return [...points, end];
}

function pathOf(points) {
  let path = `M${points[0].join(" ")}`;
  for (let k = 1; k < points.length; k++) {
    const [x1, y1] = points[k - 1];
    const [x2, y2] = points[k];
    const bend = Math.max(0, y1 - y2) * 0.5;
    path += k % 2 ? `C${x1} ${y1 - bend} ${x2} ${y2 + bend} ${x2} ${y2}` : `L${x2} ${y2}`;
  }
  return path;
}

/** A place for an edge's number on its first stretch, clear of the numbers that are there already. */
function numberPlace(points, taken) {
  const [[x1, y1], [x2, y2]] = points;
  const bend = Math.max(0, y1 - y2) * 0.5;
  let place;
  for (const t of [0.45, 0.65, 0.3, 0.8, 0.2]) {
    const s = 1 - t;
    const y = s ** 3 * y1 + 3 * s * s * t * (y1 - bend) + 3 * s * t * t * (y2 + bend) + t ** 3 * y2;
    place = { x: x1 * (s ** 3 + 3 * s * s * t) + x2 * (t ** 3 + 3 * s * t * t), y: y + 4 };
    if (taken.every(({ x, y }) => Math.abs(x - place.x) > 40 || Math.abs(y - place.y) > 13)) break;
  }
  taken.push(place);
  return place;
}
