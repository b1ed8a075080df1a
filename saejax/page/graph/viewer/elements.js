// Small pieces of the page. All text goes in as text, never as HTML.

const at = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A button that looks like a link. */
const plainButton = (words, onclick, more = {}) =>
  element("button", { type: "button", class: "plain", onclick, ...more }, words);

/** Tells when the pointer or the keys come to a piece, and when they leave it. */
function watch(made, come, leave) {
  made.onpointerenter = made.onfocus = come;
  made.onpointerleave = made.onblur = leave;
  return made;
}

/** Does something instead of sending a form. */
function whenSent(form, act) {
  form.onsubmit = (event) => {
    event.preventDefault();
    act();
  };
  return form;
}

/** The shape of a node's kind, as on the canvas. */
function glyph(kind) {
  const shapes = {
    [FEATURE]: ["circle", { cx: 6, cy: 6, r: 4.5 }],
    [ERROR]: ["path", { d: "M6 .9 11.1 6 6 11.1 .9 6Z", class: "hollow" }],
    [TOKEN]: ["rect", { x: 2, y: 2, width: 8, height: 8 }],
    [OTHER]: ["path", { d: "M1.5 10.5h9L6 1.5Z" }],
    [LOGIT]: ["rect", { x: 0.8, y: 2.8, width: 10.4, height: 6.4, rx: 2, class: "hollow" }],
  };
  return drawn("svg", { viewBox: "0 0 12 12", class: "glyph", "aria-hidden": "true" }, drawn(...shapes[kind]));
}

/** A node as a button: its shape, its label, and where it stands. */
function nodeRow(graph, i, onclick, more = "") {
  const name = element("span", { class: "name" }, graph.labels[i]);
  return element(
    "button",
    { type: "button", class: "row", "data-node": graph.ids[i], title: graph.labels[i], onclick: () => onclick(i) },
    element("span", { class: "what" }, glyph(graph.kind[i]), name),
    element("span", { class: "where" }, whereOf(graph, i) + more),
  );
}

/** One context of a feature: stronger activation, warmer colour. */
function strip(example) {
  const tokens = example.tokens;
  const values = example.activations || [];
  const most = Math.max(0, ...values.filter((value) => value !== null));
  const peak = values.indexOf(most);
  return element(
    "span",
    { class: "strip" },
    tokens.map((token, k) => {
      const text = visibleInLine(token);
      const share = most > 0 ? (values[k] || 0) / most : 0;
      if (!(share > 0)) return text;
      const piece = element(k === peak ? "b" : "span", { title: `activation ${magnitude(values[k])}` }, text);
      piece.style.setProperty("--heat", share.toFixed(2));
      return piece;
    }),
  );
}

function exampleList(examples, most) {
  const items = examples.slice(0, most).map((example) => element("li", {}, strip(example)));
  return element("ol", { class: "contexts" }, items);
}

/** How often a feature is active, by activation: bars, and the activations of the first and the last. */
function histogramOf(bars) {
  const most = Math.max(...bars.map(([, height]) => height)) || 1;
  const wide = 100 / bars.length;
  const said = ([x, height]) => `${magnitude(height)} at activation ${magnitude(x)}`;
  const rects = bars.map(([x, height], k) => {
    const tall = (40 * height) / most;
    return drawn("rect", { x: k * wide, y: 40 - tall, width: 0.9 * wide, height: tall }, drawn("title", {}, said([x, height])));
  });
  const name = `Histogram of activations: ${bars.map(said).join(", ")}`;
  const svg = drawn("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": name }, ...rects);
  const ends = [bars[0], bars.at(-1)].map(([x]) => element("small", {}, magnitude(x)));
  return element("div", { class: "histogram" }, svg, element("div", {}, ends));
}

function factList(pairs) {
  const fact = ([term, text]) => element("div", {}, element("dt", {}, term), element("dd", {}, text));
  return element("dl", { class: "facts" }, pairs.map(fact));
}

function download(name, blob) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** A table that scrolls sideways where it is too wide; cells are elements. */
function tableOf(label, heads, rows) {
  const row = (cells) => element("tr", {}, cells);
  const head = row(heads.map((name) => element("th", { scope: "col" }, name)));
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, rows.map(row)));
  return element("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label }, table);
}
