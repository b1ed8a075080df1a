// Layers by positions of one text, on a canvas: layer 0 at the bottom. Cells can be chosen by mouse and by arrow keys.

const WIDE = 18, HIGH = 14;  // of a cell, pixels

function makeGrid(text, choose) {
  const layers = text.layers.length, tokens = text.tokens.length;
  const canvas = make('canvas'), scroll = make('div', {class: 'scroll', tabindex: '0', role: 'application',
    'aria-label': 'Layers by positions: arrow keys move, Enter goes to the features, Escape ends following'});
  const row = make('div', {class: 'tokens', 'aria-hidden': 'true'});
  const starts = new Set(text.steps.map((step) => step.start));
  const columns = text.tokens.map((one, t) => {
    const span = make('span', {title: `${t}`}, visible(one));
    span.style.width = `${WIDE}px`;
    if (starts.has(t)) span.classList.add('begins');
    return span;
  });
  row.append(...columns);
  scroll.append(canvas, row);
  const sites = make('div', {class: 'sites', 'aria-hidden': 'true'});
  for (let l = layers - 1; l >= 0; l--) {
    const name = make('div', {}, text.layers[l].site);
    name.style.height = name.style.lineHeight = `${HIGH}px`;
    sites.append(name);
  }
  const largest = text.cells.map((cells) => {  // all but the strongest fiftieth of the cells differ in colour
    const sizes = cells.map((cell) => Math.abs(cell[1] || 0)).sort((a, b) => a - b);
    return Math.max(1e-9, sizes[Math.floor(0.98 * (sizes.length - 1))]);
  });
  const shares = {
    strength: (l, t) => Math.abs(text.cells[l][t][1] || 0) / largest[l],
    answer: (l, t) => text.reading.answer[l][t],
    agrees: (l, t) => 1 / (1 + text.reading.kl[l][t]),
  };
  let at = null, way = null, colour = 'strength';

  function draw() {
    const scale = devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
    const ink = (name) => style.getPropertyValue(name).trim();
    canvas.width = tokens * WIDE * scale;
    canvas.height = layers * HIGH * scale;
    canvas.style.width = `${tokens * WIDE}px`;
    canvas.style.height = `${layers * HIGH}px`;
    const pen = canvas.getContext('2d');
    pen.scale(scale, scale);
    const corner = (l, t) => [t * WIDE, (layers - 1 - l) * HIGH];
    pen.fillStyle = ink('--cell');
    for (let l = 0; l < layers; l++) {
      for (let t = 0; t < tokens; t++) {
        pen.globalAlpha = (way ? 0.35 : 1) * Math.min(1, shares[colour](l, t));
        pen.fillRect(...corner(l, t), WIDE - 1, HIGH - 1);
      }
    }
    canvas.dataset.marked = way ? way.nodes.length : 0;
    pen.globalAlpha = 1;
    pen.strokeStyle = pen.fillStyle = ink('--mark');
    if (way) {
      const middle = (l, t) => [t * WIDE + WIDE / 2 - 0.5, (layers - 1 - l) * HIGH + HIGH / 2 - 0.5];
      for (const [l, t] of way.nodes) pen.fillRect(...corner(l, t), WIDE - 1, HIGH - 1);
      pen.lineWidth = 2;
      for (const [l, t, , m, s] of way.links) {
        pen.beginPath();
        pen.moveTo(...middle(l, t));
        pen.lineTo(...middle(m, s));
        pen.stroke();
      }
    }
    if (at) {
      pen.strokeStyle = ink('--ink');
      pen.lineWidth = 2;
      pen.strokeRect(...corner(...at).map((place) => place + 1), WIDE - 3, HIGH - 3);
    }
  }

  function select(l, t, reveal) {
    at = [Math.max(0, Math.min(layers - 1, l)), Math.max(0, Math.min(tokens - 1, t))];
    columns.forEach((column, i) => column.classList.toggle('at', i === at[1]));
    if (reveal) {
      const left = at[1] * WIDE;
      if (left < scroll.scrollLeft || left + WIDE > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = left - scroll.clientWidth / 2;
    }
    draw();
    choose(...at);
  }

  canvas.addEventListener('click', (event) => {
    const box = canvas.getBoundingClientRect();
    select(layers - 1 - Math.floor((event.clientY - box.top) / HIGH), Math.floor((event.clientX - box.left) / WIDE));
  });
  scroll.addEventListener('keydown', (event) => {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]}[event.key];
    if (step && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      const [l, t] = at || [0, 0];
      select(l + (at ? step[0] : 0), t + (at ? step[1] : 0), true);
    }
  });
  return {
    element: make('div', {class: 'grid'}, sites, scroll), scroll, draw, select,
    follow: (found) => { way = found; draw(); },
    paint: (name) => { colour = name; draw(); },
    at: () => at,
  };
}

// The features that one comes from and passes on to, by links: nodes [layer, position, feature] and links.
function chainOf(text, node) {
  const key = (l, t, f) => `${l},${t},${f}`;
  const found = new Map([[key(...node), node]]), links = new Set();
  for (const [from, to] of [[0, 3], [3, 0]]) {
    const waiting = [node], seen = new Set([key(...node)]);
    while (waiting.length) {
      const own = key(...waiting.pop());
      for (const link of text.links) {
        if (key(...link.slice(from, from + 3)) !== own) continue;
        const other = link.slice(to, to + 3);
        links.add(link);
        if (seen.has(key(...other))) continue;
        seen.add(key(...other));
        found.set(key(...other), other);
        waiting.push(other);
      }
    }
  }
  return {nodes: [...found.values()], links: [...links]};
}
