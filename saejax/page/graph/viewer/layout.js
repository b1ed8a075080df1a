// Where nodes stand: rows are layers, columns are positions of the prompt. A column is as wide as its fullest cell asks
// for; the nodes of a cell stand in lines, so that none covers another. A graph that would not fit even with the
// smallest nodes makes the world wider than the view, which then scrolls.

const GUTTER = 40; // pixels of room for the names of layers
const EDGE = 8; // pixels at the right edge
const LARGEST = 15; // pixels between nodes, where there is room
const SMALLEST = 7;
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";

function layOut(graph, visible, width, height, zoom, measure) {
  const cells = new Map(); // row and column -> nodes
  for (const i of nodesWhere(graph, (i) => visible.node[i] && graph.kind[i] !== LOGIT)) {
    const key = graph.row[i] * graph.columns + graph.pos[i];
    if (cells.has(key)) cells.get(key).push(i);
    else cells.set(key, [i]);
  }
  const pills = layPills(graph, width, measure);
  const columns = layColumns(graph, cells, (width - GUTTER - EDGE) * zoom, height - pills.height, measure);
  const left = Float64Array.from({ length: graph.columns + 1 }, () => GUTTER);
  for (let c = 0; c < graph.columns; c++) left[c + 1] = left[c] + columns.widths[c];
  const worldWidth = Math.max(width, left[graph.columns] + EDGE);
  const rowY = (r) => height - columns.bottom - (r + 0.5) * columns.rowHeight;
  const layout = { ...columns, left, rowY, width, height, worldWidth, pills };
  for (const name of ["x", "y", "radius"]) layout[name] = new Float32Array(graph.n);
  for (const [key, members] of cells) {
    placeCell(graph, layout, members, Math.floor(key / graph.columns), key % graph.columns);
  }
  for (const pill of pills.boxes) {
    pill.x += worldWidth - EDGE;
    layout.x[pill.node] = pill.x + pill.width / 2;
    layout.y[pill.node] = pill.y + pill.height / 2;
    layout.radius[pill.node] = pill.height / 2;
  }
  return layout;
}

/** Widths of the columns and height of the rows; tokens are written upright below, or on a slope for want of room. */
function layColumns(graph, cells, plot, height, measure) {
  const texts = graph.tokens.map((token) => clip(visibleToken(token), 14));
  const textWidths = texts.map((text) => measure(text, 11));
  const within = (bottom, widest) => {
    const rowHeight = (height - bottom) / (graph.rows - 1);
    return { ...columnWidths(graph, cells, plot, rowHeight, widest), rowHeight, bottom, texts, tilted: !widest };
  };
  const upright = within(24, textWidths);
  return upright.fits ? upright : within(14 + Math.min(74, Math.max(...textWidths) * 0.72), null);
}

/** The nodes of a cell in lines, features before errors, the most influential first. */
function placeCell(graph, layout, members, r, c) {
  const { pitch, rowHeight, widths, left } = layout;
  members.sort((a, b) => graph.kind[a] - graph.kind[b] || graph.share[a] - graph.share[b] || a - b);
  const perLine = Math.max(1, Math.floor((widths[c] - 4) / pitch));
  const lines = Math.ceil(members.length / perLine);
  const step = Math.min(pitch, lines > 1 ? (rowHeight - 1) / lines : pitch);
  members.forEach((i, k) => {
    const line = Math.floor(k / perLine);
    const inLine = Math.min(perLine, members.length - line * perLine);
    layout.x[i] = left[c] + widths[c] / 2 + ((k % perLine) - (inLine - 1) / 2) * pitch;
    layout.y[i] = layout.rowY(r) + (line - (lines - 1) / 2) * step;
    layout.radius[i] = radiusOf(graph, i, Math.min(pitch, rowHeight) / 2 - 0.75);
  });
}

/** The largest distance between nodes with which all columns fit, and the columns' widths. */
function columnWidths(graph, cells, plot, rowHeight, textWidths) {
  for (let pitch = LARGEST; ; pitch -= 0.5) {
    const lines = Math.max(1, Math.floor((rowHeight - 1) / pitch));
    const widths = new Float64Array(graph.columns).fill(textWidths ? 18 : 16);
    for (const [key, members] of cells) {
      const c = key % graph.columns;
      widths[c] = Math.max(widths[c], Math.ceil(members.length / lines) * pitch + 6);
    }
    textWidths?.forEach((text, c) => (widths[c] = Math.max(widths[c], text + 8)));
    const total = widths.reduce((a, b) => a + b, 0);
    if (total <= plot || pitch <= SMALLEST) {
      const stretch = Math.max(0, plot - total) / graph.columns;
      const scale = plot > total ? (plot - stretch * graph.columns * 0.5) / total : 1;
      for (let c = 0; c < graph.columns; c++) widths[c] = widths[c] * scale + stretch * 0.5;
      return { widths, pitch, fits: total <= plot && (pitch > 10 || !textWidths) };
    }
  }
}

/** Outputs as labelled boxes at the top right, most probable first, in as many lines as they need. */
function layPills(graph, width, measure) {
  const boxes = [];
  const gap = 6;
  const boxHeight = 22;
  const room = width - GUTTER - EDGE;
  const logits = nodesWhere(graph, (i) => graph.kind[i] === LOGIT);
  logits.sort((a, b) => (graph.doc.nodes[b].token_prob ?? 0) - (graph.doc.nodes[a].token_prob ?? 0));
  const lines = [[]];
  let used = 0;
  for (const node of logits) {
    const probability = chanceOf(graph.doc.nodes[node]);
    const text = clip(graph.labels[node], 22);
    const wide = Math.min(room, measure(text, 12, true) + measure(probability, 11) + 22);
    if (used + wide > room && used) {
      lines.push([]);
      used = 0;
    }
    lines.at(-1).push({ node, text, probability, width: wide, height: boxHeight });
    used += wide + gap;
  }
  lines.forEach((line, k) => {
    let right = 0; // from the world's right edge
    for (const box of [...line].reverse()) {
      boxes.push({ ...box, x: right - box.width, y: 8 + k * (boxHeight + gap) });
      right -= box.width + gap;
    }
  });
  return { boxes, height: 14 + lines.length * (boxHeight + gap) };
}

/** More influential nodes (smaller cumulative share) are larger; a token's square is always large. */
function radiusOf(graph, i, most) {
  if (graph.kind[i] === TOKEN) return Math.max(2.5, Math.min(most, 6));
  return Math.max(2, most * (1 - 0.45 * weakness(graph, i)));
}

/** 0 for the most influential nodes, 1 for the least. */
function weakness(graph, i) {
  return graph.mostShare > 0 && graph.share[i] >= 0 ? Math.min(1, graph.share[i] / graph.mostShare) : 0;
}

const clip = (text, most) => {
  const letters = [...text];
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : text;
};

/** The node under the pointer, or the nearest one within reach; -1: there is none. */
function nodeAtPoint(graph, visible, layout, px, py, reach) {
  for (const box of layout.pills.boxes) {
    if (px >= box.x && px <= box.x + box.width && py >= box.y && py <= box.y + box.height) return box.node;
  }
  let best = -1;
  let nearest = reach * reach;
  for (let i = 0; i < graph.n; i++) {
    const distance = (layout.x[i] - px) ** 2 + (layout.y[i] - py) ** 2;
    if (distance < nearest && visible.node[i] && graph.kind[i] !== LOGIT) [nearest, best] = [distance, i];
  }
  return best;
}
