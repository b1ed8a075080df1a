// The panels of a cell, of a followed feature, and of the steps.

const nameOf = (text, l, f) => {
  const label = text.layers[l].labels[f];
  return label ? `${f} ${visible(label)}` : `${f}`;
};

function lensLine(text, l, t) {
  const reading = text.reading, top = reading.top_tokens[l][t], words = [];
  for (let i = 0; i < top.length; i += 2) words.push(token(text.texts[top[i]]), ` ${number(top[i + 1], 2)} `);
  return make('p', {}, `${reading.lens}: `, ...words,
    make('small', {}, `KL divergence from the model ${number(reading.kl[l][t], 2)}, on a rotated stream ${number(reading.control_kl[l][t], 2)}`));
}

function cellPanel(text, l, t, follow) {
  const cell = text.cells[l][t], rows = [];
  for (let i = 0; i < cell.length; i += 2) {
    const button = make('button', {type: 'button', 'aria-pressed': 'false'}, nameOf(text, l, cell[i]));
    button.addEventListener('click', () => follow([l, t, cell[i]]));
    const bar = make('span', {class: 'bar'});
    bar.style.width = `${80 * Math.abs(cell[i + 1] / cell[1])}px`;
    const page = text.layers[l].atlas;
    rows.push(make('li', {}, button, bar, `${number(cell[i + 1])} (${percent(Math.abs(cell[i + 1]) / text.layers[l].peaks[cell[i]])} of its maximum here)`, ...(page ? [make('a', {href: `${page}${cell[i]}`}, 'atlas')] : [])));
  }
  const none = make('p', {class: 'note'}, 'No feature is active here, or the token is an attention sink, where dictionaries are not applied.');
  return [make('h3', {}, `${text.layers[l].site}, position ${t} `, token(text.tokens[t])), lensLine(text, l, t),
    rows.length ? make('ul', {}, ...rows) : none];
}

function wayPanel(text, node, way, select, end) {
  const [l, t, f] = node;
  const others = text.cells[l].flatMap((cell, s) => cell.some((one, i) => i % 2 === 0 && one === f) && s !== t ? [s] : []);
  const into = new Map();
  for (const link of way.links) {
    const key = link.slice(3, 6).join();
    into.set(key, [...(into.get(key) || []), link]);
  }
  const nodes = [...way.nodes].sort((a, b) => b[0] - a[0] || b[1] - a[1]);
  const items = nodes.map((one) => {
    const button = make('button', {type: 'button', 'aria-pressed': String(one.join() === node.join())}, nameOf(text, one[0], one[2]));
    button.addEventListener('click', () => select(one));
    const from = (into.get(one.join()) || []).map((link) => `${nameOf(text, link[0], link[2])} (${number(link[6])})`);
    return make('li', {}, make('small', {}, `${text.layers[one[0]].site} at ${one[1]}`), button,
      make('small', {}, from.length ? `from ${from.join(', ')}` : ''));
  });
  const stop = make('button', {type: 'button'}, 'End following');
  stop.addEventListener('click', end);
  const places = others.length ? make('p', {}, 'Also at ', ...others.slice(0, 30).flatMap((s) => [token(text.tokens[s]), ` ${s} `])) : '';
  const alone = way.links.length ? '' : make('p', {class: 'note'}, 'It has no links.');
  return [make('h3', {}, `Following ${nameOf(text, l, f)} of ${text.layers[l].site} `), stop, places, alone, make('ul', {}, ...items)];
}

// The answer's probability layer by layer, beside the control's.
function answerCurve(text) {
  const svg = (tag, attributes, ...inside) => {
    const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...inside);
    return element;
  };
  const wide = 420, high = 130, left = 34, down = 18;
  const lens = text.lens, layers = lens.answer.length;
  const x = (i) => left + (wide - left - 6) * (layers > 1 ? i / (layers - 1) : 0.5), y = (p) => 6 + (high - down - 6) * (1 - p);
  const path = (values) => values.map((p, i) => `${i ? 'L' : 'M'}${x(i).toFixed(1)} ${y(p).toFixed(1)}`).join('');
  const lines = [svg('path', {class: 'logit', d: path(lens.answer)}), svg('path', {class: 'logit control', d: path(lens.control)})];
  const axis = [0, 0.5, 1].flatMap((p) => [svg('line', {x1: left, x2: wide - 6, y1: y(p), y2: y(p)}), svg('text', {x: 4, y: y(p) + 4}, `${p}`)]);
  const ends = [svg('text', {x: left, y: high - 4}, 'layer 0'), svg('text', {x: wide - 6, y: high - 4, 'text-anchor': 'end'}, `layer ${layers - 1}`)];
  return [make('h3', {}, 'Probability of ', token(text.answer), ` after position ${text.position}, by layer`),
    svg('svg', {viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, role: 'img', 'aria-label': 'Probability of the answer by layer'}, ...axis, ...ends, ...lines),
    make('p', {class: 'note'}, `${text.reading.lens.replace(/^l/, "L")}; dashed: on randomly rotated streams. At the last layer ${number(lens.answer[layers - 1])}; ${number(lens.rank[layers - 1], 9)} tokens are more likely.`)];
}

// The measured chains: each feature of a chain, what is lost of it without the one below, and the answer; and how many
// others have no controls.
function chainsTable(text) {
  const left = text.chains_left_out;
  if (!text.chains.length && !left) return [];
  const layerOf = (site) => text.layers.findIndex((one) => one.site === site);
  const named = (site, f) => `${nameOf(text, layerOf(site), f)} (${site})`;
  const items = text.chains.map((chain) => {
    const first = chain.links[0], last = chain.links[chain.links.length - 1];
    const links = chain.links.map((link) => ` \u2192 ${named(link.upper, link.target)}: loses ${percent(link.lost)}, ` +
      `${percent(link.random_lost)} with random features (${link.holds === null ? 'not testable' : link.holds ? 'holds' : 'does not hold'})`);
    return make('li', {}, `At position ${first.position}, `, token(first.token), `: ${named(first.lower, first.source)}`, ...links,
      ` \u2192 answer: loses ${number(last.answer_drop, 2)} nats, ${number(last.random_drop, 2)} with random features; without the first feature ` +
      `${number(chain.answer_drop, 2)}, ${number(chain.random_drop, 2)} with random ones. `, make('strong', {}, `The chain ${chain.holds === null ? 'is not testable: too few other features are active.' : chain.holds ? 'holds.' : 'does not hold.'}`));
  });
  const note = left ? [make('p', {class: 'note'}, `Left out: ${left} of the strongest chains, at positions where a dictionary has ` +
    'no other active feature to compare with.')] : [];
  return [make('h3', {}, 'Chains of features, measured'), make('ul', {}, ...items), ...note];
}

function stepsTable(text, layer, follow) {
  const heads = ['', 'Text', 'Its features', 'Effect of ablating them'];
  const rows = text.steps.map((step, s) => {
    const chips = text.belongs[layer][s].map((one) => {
      const button = make('button', {type: 'button'}, nameOf(text, layer, one.feature));
      button.title = `mean ${one.mean.toPrecision(3)}, ${one.contrast.toPrecision(3)} above its mean elsewhere`;
      button.addEventListener('click', () => follow(layer, step, one.feature));
      return button;
    });
    const test = step.test;
    const effect = test ? make('p', {}, make('span', test.hurt === 'yes' ? {class: 'yes'} : {}, test.hurt),
      ` at ${text.tested}: ${number(test.drop, 2)} nats per token; random lists of the same dose ${number(test.random_drop, 2)}; p ${number(test.p_holm, 2)}; ${test.sets} random lists, ${test.needed} needed`)
      : step.untested ? make('p', {class: 'note'}, `not tested at ${text.tested}: ${step.untested}`) : '\u2013';
    const cells = [step.name, visible(step.text), make('div', {class: 'chips'}, ...chips), effect];
    return make('tr', {}, ...cells.map((inside, i) => make('td', {'data-head': heads[i]}, make('div', {}, inside))));
  });
  return make('div', {class: 'wide', tabindex: '0', role: 'region', 'aria-label': 'Steps'}, make('table', {},
    make('thead', {}, make('tr', {}, ...heads.map((head) => make('th', {scope: 'col'}, head)))), make('tbody', {}, ...rows)));
}
