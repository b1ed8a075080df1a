// The graph of pinned nodes, as boxes with places, which the reader may drag.

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

/** Replacement and completeness scores of the graph with these features alone. What other features write counts as
 * error: their edges are added to those of the error of their layer and position, as by circuit-tracer. */
function scoresWith(graph, features) {
  const kept = new Set(features);
  const row = [...graph.row];
  const errorAt = new Map(); // layer and position -> a node
  const sourceOf = (i) => {
    if (graph.kind[i] === TOKEN || (kept.has(i) && graph.kind[i] !== ERROR)) return i;
    const place = `${graph.row[i]} ${graph.pos[i]}`;
    if (!errorAt.has(place)) errorAt.set(place, row.push(graph.row[i]) - 1);
    return errorAt.get(place);
  };
  const sums = new Map(); // source and target -> weight
  for (let e = 0; e < graph.m; e++) {
    const to = graph.target[e];
    if (graph.kind[to] !== LOGIT && !kept.has(to)) continue;
    const key = `${sourceOf(graph.source[e])} ${to}`;
    sums.set(key, (sums.get(key) || 0) + graph.weight[e]);
  }
  const ends = [0, 1].map((k) => [...sums.keys()].map((key) => Number(key.split(" ")[k])));
  const { influence } = sweep({ source: ends[0], target: ends[1], weight: [...sums.values()] }, row, graph.chance);
  const sum = (counts) => influence.reduce((total, x, i) => (counts(i) ? total + x : total), 0);
  const [tokens, errors, all] = [(i) => graph.kind[i] === TOKEN, (i) => i >= graph.n, () => true].map(sum);
  return { replacement: tokens / (tokens + errors || 1), completeness: 1 - errors / (all || 1) };
}

/** What a box is called by where places are kept. */
const unitKey = (graph, unit) => unit.members.map((i) => graph.ids[i]).join(",");

/** Levels from the lowest layer up: a level holds what is less than a layer apart, as many boxes as fit, and within it
 * boxes stand from left to right as their tokens do, unless the reader dragged them. Gives each unit its place, and
 * returns the picture's height. `dragged` has the places by key: a share of the width, and pixels from the bottom. */
function placeUnits(graph, units, width, boxWidth, dragged) {
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
      unit.y = 6 + (levels.length - 1 - k) * LEVEL;
    });
    let most = width - MARGIN - boxWidth; // boxes that were pushed out at the right come back
    for (const unit of [...level].reverse()) {
      unit.x = Math.max(MARGIN, Math.min(unit.x, most));
      most = unit.x - step;
    }
  });
  const height = levels.length * LEVEL - (LEVEL - BOX_HEIGHT) + 12;
  for (const unit of units) {
    const [share, up] = dragged[unitKey(graph, unit)] || [];
    if (up === undefined) continue;
    unit.x = Math.max(0, Math.min(share * width, width - boxWidth));
    unit.y = Math.max(0, Math.min(height - up, height - BOX_HEIGHT));
  }
  return height;
}
