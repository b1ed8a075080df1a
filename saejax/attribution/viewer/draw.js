// The picture: two canvases, one above the other. The lower one holds all edges and is drawn again only when they
// change; the upper one holds axes, nodes, and the edges of what the reader looks at. Pointing at a node redraws only
// the upper one and lets the lower one fade.

const FRAME = 9; // milliseconds of drawing at a time, so that the page answers while thousands of edges appear

function makePicture(graph, stage, lower, upper) {
  const picture = { layout: null, visible: null, find: () => -1, scroll: 0, painted: null };
  const contexts = [lower, upper].map((canvas) => canvas.getContext("2d"));
  const measurer = document.createElement("canvas").getContext("2d");
  const measure = (text, size, bold) => {
    measurer.font = `${bold ? "600 " : ""}${size}px ${FONT}`;
    return measurer.measureText(text).width;
  };
  let ink = {}, shades = [], job = 0;

  picture.readColours = () => {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["paper", "ink", "soft", "line", "card", "link", "plus", "minus", "node"]) {
      ink[name] = style.getPropertyValue(`--${name}`).trim();
    }
    // Darker where the influence is greater; mixed once, because a canvas reads colours slowly.
    const channels = (colour) => [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
    const full = channels(ink.node), paper = channels(ink.paper);
    shades = Array.from({ length: 12 }, (_, k) => `rgb(${full.map((c, j) => Math.round(c + (paper[j] - c) * 0.55 * (k / 11))).join()})`);
  };
  picture.place = (visible, width, height, zoom) => {
    picture.layout = layOut(graph, visible, width, height, zoom, measure);
    picture.find = buildIndex(graph, visible, picture.layout);
    const scale = window.devicePixelRatio || 1;
    for (const canvas of [lower, upper]) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
  };
  const begin = (context) => {
    const scale = window.devicePixelRatio || 1, { width, height } = picture.layout;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.save();
    context.beginPath();
    context.rect(GUTTER - 6, 0, width, height);
    context.clip();
    context.translate(-picture.scroll, 0);
  };

  /** All edges, strongest first, each further one beneath those before it, a frame's worth at a time. */
  picture.drawEdges = () => {
    cancelAnimationFrame(job);
    const context = contexts[0], { visible, layout } = picture;
    begin(context);
    context.globalCompositeOperation = "destination-over";
    const most = graph.m ? Math.abs(graph.weight[0]) : 1, crowd = Math.min(1, 20 / Math.sqrt(visible.edges + 1));
    let e = 0, spent = 0;
    const some = () => {
      const start = performance.now();
      while (e < visible.last) {
        if (visible.edge[e]) {
          const strength = Math.sqrt(Math.abs(graph.weight[e]) / most);
          context.globalAlpha = 0.04 + 0.05 * crowd + 0.7 * strength ** (2.4 - 1.4 * crowd);
          strokeEdge(context, layout, e, 0.5 + 1.8 * strength);
        }
        if (++e % 64 === 0 && performance.now() - start > FRAME) break;
      }
      spent += performance.now() - start;
      if (e < visible.last) job = requestAnimationFrame(some);
      else { context.restore(); picture.painted = { edges: visible.edges, milliseconds: spent }; }
    };
    picture.painted = null;
    some();
  };
  const strokeEdge = (context, layout, e, width) => {
    const a = graph.source[e], b = graph.target[e];
    const x1 = layout.x[a], y1 = layout.y[a], x2 = layout.x[b], y2 = layout.y[b];
    const right = picture.scroll + layout.width;
    if ((x1 < picture.scroll && x2 < picture.scroll) || (x1 > right && x2 > right)) return;
    const bend = Math.max(12, Math.abs(y1 - y2) * 0.45);
    context.strokeStyle = graph.weight[e] < 0 ? ink.minus : ink.plus;
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(x1, y1);
    context.bezierCurveTo(x1, y1 - bend, x2, y2 + bend, x2, y2);
    context.stroke();
  };

  /** Axes and nodes; the edges of ``focus`` and of ``hovered``; rings about pins and what a search found. */
  picture.drawNodes = ({ focus, hovered, pinned, found, linkType, marked, edgesShown }) => {
    const context = contexts[1], { layout } = picture;
    const touched = new Map();
    begin(context);
    drawRows(context);
    for (const [node, alpha] of [[hovered, focus >= 0 && focus !== hovered ? 0.45 : 0.9], [focus, 0.9]]) {
      if (node >= 0) drawEdgesOf(context, node, alpha, linkType, edgesShown, touched);
    }
    const lit = focus >= 0 || hovered >= 0;
    for (let i = 0; i < graph.n; i++) {
      if (!picture.visible.node[i] || graph.kind[i] === LOGIT) continue;
      if (layout.x[i] < picture.scroll - 20 || layout.x[i] > picture.scroll + layout.width + 20) continue;
      const edge = touched.get(i), own = i === focus || i === hovered || marked.has(i);
      context.globalAlpha = lit && edge === undefined && !own ? 0.22 : 1;
      const colour = own ? ink.ink : edge === undefined ? shade(i) : graph.weight[edge] < 0 ? ink.minus : ink.plus;
      drawNode(context, i, colour);
      if (found.has(i)) ring(context, i, ink.link, 2, 4);
      if (pinned.has(i)) ring(context, i, ink.ink, 1.5, 2.5);
      if (i === focus) ring(context, i, ink.link, 2.5, 3.5);
    }
    context.globalAlpha = 1;
    drawNames(context, new Set([...pinned, ...(focus >= 0 ? [focus] : [])]));
    for (const box of layout.pills.boxes) drawPill(context, box, { focus, hovered, pinned, found, lit, touched, marked });
    context.restore();
    drawGutters(context);
  };
  const drawEdgesOf = (context, node, alpha, linkType, edgesShown, touched) => {
    for (const into of [true, false]) {
      if (linkType === (into ? "output" : "input")) continue;
      const edges = edgesShown(node, into), most = edges.length ? Math.abs(graph.weight[edges[0]]) : 1;
      for (let k = edges.length - 1; k >= 0; k--) { // the strongest on top
        const e = edges[k];
        const strength = Math.abs(graph.weight[e]) / most;
        context.globalAlpha = alpha * (0.25 + 0.75 * strength);
        strokeEdge(context, picture.layout, e, 0.6 + 3.4 * strength);
        touched.set(into ? graph.source[e] : graph.target[e], e);
      }
    }
  };
  const shade = (i) => (graph.kind[i] === TOKEN ? ink.ink : shades[Math.round(11 * weakness(graph, i))]);
  /** Names of what is selected or pinned, on a halo of paper, beside the node where there is room. */
  const drawNames = (context, nodes) => {
    context.font = `600 11px ${FONT}`; context.textBaseline = "middle"; context.lineJoin = "round";
    for (const i of nodes) {
      if (!picture.visible.node[i] || graph.kind[i] === LOGIT || graph.kind[i] === TOKEN) continue;
      const name = clip(graph.labels[i], 26), away = picture.layout.radius[i] + 7;
      const left = picture.layout.x[i] + away + measure(name, 11, true) > picture.scroll + picture.layout.width;
      context.textAlign = left ? "right" : "left";
      const x = picture.layout.x[i] + (left ? -away : away), y = picture.layout.y[i];
      context.lineWidth = 4; context.strokeStyle = ink.paper; context.strokeText(name, x, y);
      context.fillStyle = ink.ink; context.fillText(name, x, y);
    }
  };
  const trace = (context, i, more) => {
    const x = picture.layout.x[i], y = picture.layout.y[i], r = picture.layout.radius[i] + more;
    context.beginPath();
    if (graph.kind[i] === FEATURE) context.arc(x, y, r, 0, 2 * Math.PI);
    else if (graph.kind[i] === TOKEN) context.rect(x - r, y - r, 2 * r, 2 * r);
    else if (graph.kind[i] === ERROR) {
      context.moveTo(x, y - r * 1.25); context.lineTo(x + r * 1.25, y); context.lineTo(x, y + r * 1.25);
      context.lineTo(x - r * 1.25, y); context.closePath();
    } else {
      context.moveTo(x - r, y + r); context.lineTo(x + r, y + r); context.lineTo(x, y - r); context.closePath();
    }
  };
  const drawNode = (context, i, colour) => {
    trace(context, i, 0);
    if (graph.kind[i] === ERROR) { // hollow: nobody can say what is in it
      context.fillStyle = ink.paper; context.fill();
      context.lineWidth = 1.4; context.strokeStyle = colour; context.stroke();
    } else { context.fillStyle = colour; context.fill(); }
  };
  const ring = (context, i, colour, width, more) => {
    trace(context, i, more);
    context.globalAlpha = 1; context.lineWidth = width; context.strokeStyle = colour; context.stroke();
  };
  const drawPill = (context, box, { focus, hovered, pinned, found, lit, touched, marked }) => {
    const own = box.node === focus || box.node === hovered || marked.has(box.node), edge = touched.get(box.node);
    context.globalAlpha = lit && !own && edge === undefined ? 0.4 : 1;
    context.beginPath();
    context.roundRect(box.x, box.y, box.width, box.height, 4);
    context.fillStyle = ink.card; context.fill();
    context.lineWidth = own ? 2.5 : pinned.has(box.node) ? 2 : 1.2;
    context.strokeStyle = box.node === focus || found.has(box.node) ? ink.link
      : edge !== undefined ? (graph.weight[edge] < 0 ? ink.minus : ink.plus) : own || pinned.has(box.node) ? ink.ink : ink.soft;
    context.stroke();
    context.textBaseline = "middle"; context.textAlign = "left"; context.fillStyle = ink.ink;
    context.font = `600 12px ${FONT}`;
    context.fillText(box.text, box.x + 8, box.y + box.height / 2 + 0.5, box.width - 16);
    context.textAlign = "right"; context.fillStyle = ink.soft; context.font = `11px ${FONT}`;
    context.fillText(box.probability, box.x + box.width - 7, box.y + box.height / 2 + 0.5);
    context.globalAlpha = 1;
  };
  const drawRows = (context) => {
    const { layout } = picture;
    context.strokeStyle = ink.line; context.lineWidth = 0.5; context.globalAlpha = 0.55;
    context.beginPath();
    for (let r = 0; r <= graph.rows - 2; r++) {
      const y = Math.round(layout.rowY(r) + layout.rowHeight / 2) + 0.5;
      context.moveTo(0, y); context.lineTo(layout.worldWidth, y);
    }
    for (let c = 1; c < graph.columns; c++) {
      const x = Math.round(layout.left[c]) + 0.5;
      context.moveTo(x, layout.pills.height); context.lineTo(x, layout.height - layout.bottom);
    }
    context.stroke();
    context.globalAlpha = 1;
  };
  /** Names of layers at the left edge of the view, tokens below; both stay in sight when the world scrolls. */
  const drawGutters = (context) => {
    const { layout } = picture;
    context.font = `11px ${FONT}`; context.fillStyle = ink.soft; context.textBaseline = "middle"; context.textAlign = "right";
    const every = Math.ceil(13 / layout.rowHeight);
    for (let r = 0; r <= graph.rows - 2; r++) {
      const clear = r * layout.rowHeight >= 12; // of the name of the lowest row
      if (r === 0 || ((r - 1) % every === 0 && clear)) context.fillText(rowName(graph, r), GUTTER - 12, layout.rowY(r));
    }
    context.fillText("out", GUTTER - 12, 19);
    const y = layout.height - layout.bottom + 5;
    for (let c = 0; c < graph.columns; c++) {
      const x = layout.left[c] + layout.widths[c] / 2 - picture.scroll;
      if (x < 4 || x > layout.width + 40) continue;
      context.save();
      context.fillStyle = ink.ink;
      context.globalAlpha = x < GUTTER - 6 ? 0.25 : 1;
      context.translate(x, y);
      context.textBaseline = "top";
      if (layout.tilted) { context.rotate(-Math.PI / 4); context.textAlign = "right"; context.fillText(layout.texts[c], 3, 0); }
      else { context.textAlign = "center"; context.fillText(layout.texts[c], 0, 0); }
      context.restore();
    }
  };
  /** Both canvases as one picture, on the page's paper. */
  picture.toCanvas = () => {
    const canvas = document.createElement("canvas");
    canvas.width = upper.width; canvas.height = upper.height;
    const context = canvas.getContext("2d");
    context.fillStyle = ink.paper;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalAlpha = Number(getComputedStyle(lower).opacity);
    context.drawImage(lower, 0, 0);
    context.globalAlpha = 1;
    context.drawImage(upper, 0, 0);
    return canvas;
  };
  return picture;
}
