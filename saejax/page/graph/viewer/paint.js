// Pieces of the picture, each drawn on a canvas as it is told: ``ink`` holds the page's colours by name.

/** The page's colours, and ``shades`` of a node's from the most influential to the least. */
function readInk() {
  const style = getComputedStyle(document.documentElement);
  const ink = {};
  for (const name of ["paper", "ink", "soft", "line", "card", "link", "plus", "minus", "node"]) {
    ink[name] = style.getPropertyValue(`--${name}`).trim();
  }
  // Mixed once, because a canvas reads colours slowly.
  const channels = (colour) => [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
  const [full, paper] = [channels(ink.node), channels(ink.paper)];
  const mixed = (part) => full.map((channel, k) => Math.round(channel + (paper[k] - channel) * part));
  ink.shades = Array.from({ length: 12 }, (_, k) => `rgb(${mixed(0.05 * k)})`);
  return ink;
}

/** The outline of a node's kind about a point. */
function outline(context, kind, x, y, r) {
  context.beginPath();
  if (kind === FEATURE) context.arc(x, y, r, 0, 2 * Math.PI);
  else if (kind === TOKEN) context.rect(x - r, y - r, 2 * r, 2 * r);
  else {
    const wide = r * 1.25;
    const diamond = [[x, y - wide], [x + wide, y], [x, y + wide], [x - wide, y]];
    const triangle = [[x - r, y + r], [x + r, y + r], [x, y - r]];
    for (const corner of kind === ERROR ? diamond : triangle) context.lineTo(...corner);
    context.closePath();
  }
}

function paintNode(context, kind, x, y, r, colour, ink) {
  outline(context, kind, x, y, r);
  context.fillStyle = kind === ERROR ? ink.paper : colour; // hollow: nobody can say what is in an error
  context.fill();
  if (kind === ERROR) paintLine(context, colour, 1.4);
}

function paintLine(context, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke();
}

/** An output: its text and its probability in a box. */
function paintPill(context, box, edgeColour, edgeWidth, ink) {
  context.beginPath();
  context.roundRect(box.x, box.y, box.width, box.height, 4);
  context.fillStyle = ink.card;
  context.fill();
  paintLine(context, edgeColour, edgeWidth);
  const middle = box.y + box.height / 2 + 0.5;
  Object.assign(context, { font: `600 12px ${FONT}`, fillStyle: ink.ink, textAlign: "left", textBaseline: "middle" });
  context.fillText(box.text, box.x + 8, middle, box.width - 16);
  Object.assign(context, { font: `11px ${FONT}`, fillStyle: ink.soft, textAlign: "right" });
  context.fillText(box.probability, box.x + box.width - 7, middle);
}

/** A name beside a node, on a halo of paper; ``toLeft`` where there is no room at its right. */
function paintName(context, name, x, y, toLeft, ink) {
  const textAlign = toLeft ? "right" : "left";
  Object.assign(context, { font: `600 11px ${FONT}`, fillStyle: ink.ink, textAlign, textBaseline: "middle" });
  Object.assign(context, { strokeStyle: ink.paper, lineWidth: 4, lineJoin: "round" });
  context.strokeText(name, x, y);
  context.fillText(name, x, y);
}

/** Thin lines between rows and between columns. */
function paintGrid(context, graph, layout, ink) {
  context.globalAlpha = 0.55;
  context.beginPath();
  for (let r = 0; r <= graph.rows - 2; r++) {
    const y = Math.round(layout.rowY(r) + layout.rowHeight / 2) + 0.5;
    context.moveTo(0, y);
    context.lineTo(layout.worldWidth, y);
  }
  for (let c = 1; c < graph.columns; c++) {
    const x = Math.round(layout.left[c]) + 0.5;
    context.moveTo(x, layout.pills.height);
    context.lineTo(x, layout.height - layout.bottom);
  }
  paintLine(context, ink.line, 0.5);
  context.globalAlpha = 1;
}

/** Names of layers at the left edge of the view, tokens below; both stay in sight when the world scrolls. */
function paintGutters(context, graph, layout, scroll, ink) {
  Object.assign(context, { font: `11px ${FONT}`, fillStyle: ink.soft, textAlign: "right", textBaseline: "middle" });
  const every = Math.ceil(13 / layout.rowHeight);
  for (let r = 0; r <= graph.rows - 2; r++) {
    const clear = r === 0 || ((r - 1) % every === 0 && r * layout.rowHeight >= 12); // of each other's names
    if (clear) context.fillText(rowName(graph, r), GUTTER - 12, layout.rowY(r));
  }
  context.fillText("out", GUTTER - 12, 19);
  Object.assign(context, { fillStyle: ink.ink, textAlign: layout.tilted ? "right" : "center", textBaseline: "top" });
  for (let c = 0; c < graph.columns; c++) {
    const x = layout.left[c] + layout.widths[c] / 2 - scroll;
    if (x < 4 || x > layout.width + 40) continue;
    context.save();
    context.globalAlpha = x < GUTTER - 6 ? 0.25 : 1;
    context.translate(x, layout.height - layout.bottom + 5);
    if (layout.tilted) context.rotate(-Math.PI / 4);
    context.fillText(layout.texts[c], layout.tilted ? 3 : 0, 0);
    context.restore();
  }
}
