'use strict';
// The list of features and the address: #<dictionary>/<feature>. Data come from scripts, which call ``atlas``.

const atlas = (() => {
  const at = (id) => document.getElementById(id);
  const waiting = new Map();  // chunk -> what to do once it is there
  const chunks = new Map();
  let about, texts, order = [], matches = [], shown = 0;
  const ROWS = 100, KEPT = 40;  // rows of the list added at a time; chunks kept

  function index(data) {
    about = data;
    document.title = `Features of ${data.dictionary}`;
    at('title').textContent = document.title;
    at('about').textContent = `${data.features.toLocaleString('en')} features. Left and right arrow: neighbours by number.`;
    at('maps').hidden = !data.maps;
    at('maps').href = `#${data.dictionary}/maps`;
    at('overview').href = `#${data.dictionary}/overview`;
    if (!data.columns.effect.some(Boolean)) at('sort').value = 'f1';  // what matters first, as far as it was measured
    data.searched = data.columns.label.map((label, i) => `${i} ${label} ${data.columns.words[i]}`.toLowerCase());
    sort();
    route();
    atlas.ready = performance.now();
  }

  function chunk(number, records) {
    chunks.set(number, records);
    if (chunks.size > KEPT) chunks.delete(chunks.keys().next().value);
    for (const then of waiting.get(number) || []) then(records);
    waiting.delete(number);
  }

  function load(number, then) {
    if (chunks.has(number)) return then(chunks.get(number));
    if (waiting.has(number)) return waiting.get(number).push(then);
    waiting.set(number, [then]);
    const isAsked = () => waiting.delete(number) && Math.floor(current() / about.chunk) === number;
    fetchScript(`data/${String(number).padStart(5, '0')}.js`, isAsked);
  }

  function fetchScript(source, isAsked) {
    const script = document.createElement('script');
    script.src = source;
    script.onload = () => script.remove();
    script.onerror = () => isAsked() && say(`The file ${script.src} is missing.`);
    document.head.append(script);
  }

  function maps(data) {
    texts = data;
    route();
  }

  const labelOf = (i) => about.columns.label[i];
  const onMaps = () => Boolean(about.maps) && location.hash.endsWith('/maps');
  const say = (text) => at('feature').replaceChildren(make('p', {}, text));

  function current() {
    const parts = decodeURIComponent(location.hash.slice(1)).split('/');
    const text = parts.pop();
    return /^\d+$/.test(text) && Number(text) < about.features ? Number(text) : -1;
  }

  function route() {
    const feature = current();
    if (onMaps()) {
      if (texts) at('feature').replaceChildren(mapsPage(texts, about.dictionary, labelOf));
      else fetchScript('data/maps.js', onMaps);
      atlas.painted = 'maps';
      return mark();
    }
    if (feature < 0 && (!location.hash || location.hash.endsWith('/overview'))) {
      at('feature').replaceChildren(overviewPage(about, labelOf));
      atlas.painted = 'overview';
      return mark();
    }
    if (feature < 0) return say('There is no feature of this number.');
    load(Math.floor(feature / about.chunk), (records) => {
      if (feature !== current()) return;
      const record = records.find((one) => one.feature === feature);
      at('feature').replaceChildren(featurePage(record, about.dictionary, labelOf));
      atlas.painted = feature;
      mark();
    });
  }

  function mark() {
    for (const link of at('list').querySelectorAll('a')) {
      if (Number(link.dataset.feature) === current()) link.setAttribute('aria-current', 'true');
      else link.removeAttribute('aria-current');
    }
  }

  function sort() {
    const by = at('sort').value, values = about.columns[by];
    order = Array.from({length: about.features}, (_, i) => i);
    if (values) order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b);
    filter();
  }

  function filter() {
    const wanted = at('search').value.trim().toLowerCase();
    matches = order.filter((i) => about.searched[i].includes(wanted));
    if (/^\d+$/.test(wanted) && Number(wanted) < about.features) matches = [Number(wanted), ...matches.filter((i) => i !== Number(wanted))];
    at('count').textContent = `${matches.length.toLocaleString('en')} of ${about.features.toLocaleString('en')}`;
    shown = 0;
    at('list').replaceChildren();
    more();
  }

  function more() {
    const {label, words, rate, effect} = about.columns;
    for (const i of matches.slice(shown, shown + ROWS)) {
      const what = label[i] ? visible(label[i]) : words[i] ? `on ${visible(words[i])}` : rate[i] ? '' : 'never fires';
      const facts = [percent(rate[i]), ...(effect[i] ? [`effect ${number(effect[i])}`] : [])].join(', ');
      const link = make('a', {href: `#${about.dictionary}/${i}`, 'data-feature': i}, `${i} `, what, ' ', make('small', {}, facts));
      at('list').append(make('li', {}, link));
    }
    shown = Math.min(shown + ROWS, matches.length);
    at('more').hidden = shown >= matches.length;
    mark();
  }

  addEventListener('hashchange', route);
  at('search').addEventListener('input', filter);
  at('sort').addEventListener('change', sort);
  at('more').addEventListener('click', more);
  addEventListener('keydown', (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const typing = ['INPUT', 'SELECT'].includes(event.target.tagName);
    if (event.key === 'Enter' && event.target === at('search') && matches.length) location.hash = `#${about.dictionary}/${matches[0]}`;
    if (typing) return;
    if (event.key === '/') { event.preventDefault(); at('search').focus(); }
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step && !event.target.closest('.scroll')) {
      const next = current() + step;
      if (next >= 0 && next < about.features) location.hash = `#${about.dictionary}/${next}`;
    }
  });
  return {index, chunk, maps};
})();
