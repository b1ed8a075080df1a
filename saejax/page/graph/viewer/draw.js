// The picture: two canvases, one above the other. The lower one holds all edges and is drawn again only when they
// change; the upper one holds axes, nodes, and the edges of what the reader looks at. Pointing at a node redraws only
// the upper one and lets the lower one fade.

const FRAME = 9; // milliseconds of drawing at a time, so that the page answers while thousands of edges appear
const NAMED_AT_MOST = 60; // features and errors

class Picture {
  constructor(graph, lower, upper) {
    Object.assign(this, { graph, lower, upper, layout: null, visible: null, scroll: 0, painted: null, job: 0 });
    const measurer = document.createElement("canvas").getContext("2d");
    this.measure = (text, size, bold) => {
      measurer.font = `${bold ? "600 " : ""}${size}px ${FONT}`;
      return measurer.measureText(text).width;
    };
    this.ink = readInk();
  }

  /** Gives nodes their places in a view of this size, and the canvases theirs. */
  place(visible, width, height, zoom) {
    this.visible = visible;
    this.layout = layOut(this.graph, visible, width, height, zoom, this.measure);
    const scale = window.devicePixelRatio || 1;
    for (const canvas of [this.lower, this.upper]) {
      Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
      Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    }
  }

  /** A clean canvas whose origin is the world's, clipped to what is right of the names of layers. */
  begin(canvas) {
    const context = canvas.getContext("2d");
    const scale = window.devicePixelRatio || 1;
    context.restore(); // what a drawing that was cut short had set
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.layout.width, this.layout.height);
    context.save();
    context.beginPath();
    context.rect(GUTTER - 6, 0, this.layout.width, this.layout.height);
    context.clip();
    context.translate(-this.scroll, 0);
    return context;
  }

  /** All edges, strongest first, each further one beneath those before it, a frame's worth at a time. */
  drawEdges() {
    cancelAnimationFrame(this.job);
    const { graph, visible } = this;
    const context = this.begin(this.lower);
    context.globalCompositeOperation = "destination-over";
    const most = (graph.m && graph.score[0]) || 1;
    const crowd = Math.min(1, 20 / Math.sqrt(visible.edges + 1)); // the more edges, the fainter the weak ones
    let e = 0;
    let spent = 0;
    const some = () => {
      const start = performance.now();
      for (; e < visible.last && performance.now() - start < FRAME; e++) {
        if (!visible.edge[e]) continue;
        const strength = Math.sqrt(graph.score[e] / most);
        context.globalAlpha = 0.04 + 0.05 * crowd + 0.7 * strength ** (2.4 - 1.4 * crowd);
        this.strokeEdge(context, e, 0.5 + 1.8 * strength);
      }
      spent += performance.now() - start;
      if (e < visible.last) this.job = requestAnimationFrame(some);
      else this.painted = { edges: visible.edges, milliseconds: spent };
    };
    this.painted = null;
    some();
  }

  strokeEdge(context, e, width) {
    const { graph, layout, scroll } = this;
    const [a, b] = [graph.source[e], graph.target[e]];
    const [x1, y1, x2, y2] = [layout.x[a], layout.y[a], layout.x[b], layout.y[b]];
    const right = scroll + layout.width;
    if ((x1 < scroll && x2 < scroll) || (x1 > right && x2 > right)) return;
    const bend = Math.max(12, Math.abs(y1 - y2) * 0.45);
    context.beginPath();
    context.moveTo(x1, y1);
    context.bezierCurveTo(x1, y1 - bend, x2, y2 + bend, x2, y2);
    paintLine(context, this.signColour(e), width);
  }

  signColour(e) {
    return this.graph.weight[e] < 0 ? this.ink.minus : this.ink.plus;
  }

  /** Axes and nodes; the edges of ``focus`` and of ``hovered``; rings about pins and what a search found. */
  drawNodes(look) {
    const { graph, layout, visible, scroll } = this;
    const { focus, hovered, pinned } = look;
    const context = this.begin(this.upper);
    paintGrid(context, graph, layout, this.ink);
    const touched = new Map(); // node -> its edge with what the reader looks at
    if (hovered >= 0 && hovered !== focus) this.drawEdgesOf(context, hovered, focus >= 0 ? 0.45 : 0.9, look, touched);
    if (focus >= 0) this.drawEdgesOf(context, focus, 0.9, look, touched);
    for (let i = 0; i < graph.n; i++) {
      if (!visible.node[i] || graph.kind[i] === LOGIT) continue;
      if (layout.x[i] > scroll - 20 && layout.x[i] < scroll + layout.width + 20)
        this.drawNode(context, i, look, touched);
    }
    context.globalAlpha = 1;
    const names = []; // their boxes
    for (const i of new Set([focus, ...pinned, ...this.namedNodes()])) this.drawName(context, i, names);
    for (const box of layout.pills.boxes) this.drawPill(context, box, look, touched);
    context.restore();
    paintGutters(context, graph, layout, scroll, this.ink);
  }

  drawEdgesOf(context, node, alpha, { linkType, edgesDrawn }, touched) {
    const { graph } = this;
    for (const into of [true, false]) {
      if (linkType === (into ? "output" : "input")) continue;
      const edges = edgesDrawn(node, into);
      const most = (edges.length && shareOf(graph, edges[0], into)) || 1;
      for (const e of edges.reverse()) { // the strongest on top
        const strength = shareOf(graph, e, into) / most;
        context.globalAlpha = alpha * (0.25 + 0.75 * strength);
        this.strokeEdge(context, e, 0.6 + 3.4 * strength);
        touched.set(into ? graph.source[e] : graph.target[e], e);
      }
    }
  }

  drawNode(context, i, { focus, hovered, pinned, found, marked }, touched) {
    const { graph, layout, ink } = this;
    const edge = touched.get(i);
    const own = i === focus || i === hovered || marked.has(i);
    const shade = graph.kind[i] === TOKEN ? ink.ink : ink.shades[Math.round(11 * weakness(graph, i))];
    const colour = own ? ink.ink : edge === undefined ? shade : this.signColour(edge);
    const [kind, x, y, r] = [graph.kind[i], layout.x[i], layout.y[i], layout.radius[i]];
    context.globalAlpha = (focus >= 0 || hovered >= 0) && edge === undefined && !own ? 0.22 : 1;
    paintNode(context, kind, x, y, r, colour, ink);
    context.globalAlpha = 1;
    const ring = (ringColour, width, away) => {
      outline(context, kind, x, y, r + away);
      paintLine(context, ringColour, width);
    };
    if (found.has(i)) ring(ink.link, 2, 4);
    if (pinned.has(i)) ring(ink.ink, 1.5, 2.5);
    if (i === focus) ring(ink.link, 2.5, 3.5);
  }

  /** Labelled features, where few enough nodes are shown for their names to be read. */
  namedNodes() {
    const { graph, visible } = this;
    const shown = nodesWhere(graph, (i) => visible.node[i] && !isEnd(graph, i));
    if (shown.length > NAMED_AT_MOST) return [];
    return shown.filter((i) => graph.named[i]).sort((a, b) => graph.share[a] - graph.share[b]); // most influential first
  }

  /** Names a node where no other name is. Tokens and outputs have their names already. */
  drawName(context, i, names) {
    const { graph, layout } = this;
    if (i < 0 || !this.visible.node[i] || isEnd(graph, i)) return;
    const name = clip(graph.labels[i], 26);
    const away = layout.radius[i] + 7;
    const width = this.measure(name, 11, true);
    const sides = [layout.x[i] + away, layout.x[i] - away - width];
    const beyond = (left) => left < this.scroll || left + width > this.scroll + layout.width;
    const near = nodesWhere(graph, (k) => k !== i && this.visible.node[k] && Math.abs(layout.y[k] - layout.y[i]) < 10);
    const hides = (left) => near.filter((k) => layout.x[k] > left - 4 && layout.x[k] < left + width + 4).length;
    const toLeft = beyond(sides[0]) || (!beyond(sides[1]) && hides(sides[1]) < hides(sides[0]));
    const left = sides[Number(toLeft)];
    const box = { left, right: left + width, y: layout.y[i] };
    const meets = (other) => Math.abs(other.y - box.y) < 12 && other.left < box.right && box.left < other.right;
    if (names.some(meets)) return;
    names.push(box);
    paintName(context, name, layout.x[i] + (toLeft ? -away : away), layout.y[i], toLeft, this.ink);
  }

  drawPill(context, box, { focus, hovered, pinned, found, marked }, touched) {
    const { ink } = this;
    const edge = touched.get(box.node);
    const own = box.node === focus || box.node === hovered || marked.has(box.node);
    let colour = own || pinned.has(box.node) ? ink.ink : ink.soft;
    if (edge !== undefined) colour = this.signColour(edge);
    if (box.node === focus || found.has(box.node)) colour = ink.link;
    context.globalAlpha = (focus >= 0 || hovered >= 0) && !own && edge === undefined ? 0.4 : 1;
    paintPill(context, box, colour, own ? 2.5 : pinned.has(box.node) ? 2 : 1.2, ink);
    context.globalAlpha = 1;
  }

  /** Both canvases as one picture, on the page's paper. */
  toCanvas() {
    const canvas = Object.assign(document.createElement("canvas"), { width: this.upper.width, height: this.upper.height });
    const context = canvas.getContext("2d");
    context.fillStyle = this.ink.paper;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.lower, 0, 0);
    context.drawImage(this.upper, 0, 0);
    return canvas;
  }
}
