'use strict';
// The first page: how often features fire, how many have labels, and which change answers most when ablated.

const MOST = 20;  // features of a table

function overviewPage(about, labelOf) {
  const {rate, label, by, effect, f1, words} = about.columns;
  const page = document.createDocumentFragment();
  const every = rate.map((_, i) => i), live = every.filter((i) => rate[i] > 0), named = every.filter((i) => label[i]);
  const count = (some, all) => `${some.toLocaleString('en')} of ${all.toLocaleString('en')}${all ? ` (${percent(some / all)})` : ''}`;
  const link = (i) => make('a', {href: `#${about.dictionary}/${i}`},
    `${i} ${labelOf(i) ? visible(labelOf(i)) : words[i] ? `on ${visible(words[i])}` : ''}`);
  const largest = (values, among) => among.filter((i) => values[i]).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, MOST);
  const facts = [['Fire on this text', count(live.length, every.length)], ['Labelled', count(named.length, every.length)]];
  for (const who of [...new Set(by.filter(Boolean))]) facts.push([`… by ${who}`, `${by.filter((one) => one === who).length.toLocaleString('en')}`]);
  if (live.length) {
    const sorted = live.map((i) => rate[i]).sort((a, b) => a - b);
    facts.push(['Median firing rate', `${percent(sorted[Math.floor(sorted.length / 2)])} of tokens, of features that fire`]);
  }
  page.append(make('h2', {id: 'name'}, 'Overview'),
    make('dl', {}, ...facts.flatMap(([name, text]) => [make('dt', {}, name), make('dd', {}, text)])));
  if (live.length) {
    const bins = live.map((i) => Math.floor(4 * Math.log10(rate[i])));
    // Not Math.min(...bins): a call takes no more than some 120,000 arguments.
    const [low, high] = [Math.min, Math.max].map((end) => bins.reduce((a, b) => end(a, b)));
    const counts = Array(high - low + 1).fill(0);
    for (const bin of bins) counts[bin - low]++;
    page.append(make('h3', {}, 'Firing rates'),
      make('p', {class: 'note'}, 'Features by the share of tokens on which they fire; four bins for each factor of ten.'),
      ...bars(counts, percent(10 ** (low / 4)), percent(Math.min(1, 10 ** ((high + 1) / 4))), 'Histogram of firing rates'));
  }
  const strongest = largest(effect, every), scored = largest(f1, named);
  page.append(make('h3', {}, 'Largest measured effects'));
  if (strongest.length) page.append(
    make('p', {class: 'note'}, 'Logit difference that a behaviour loses when the feature is ablated, the largest over behaviours.'),
    table(['feature', 'logits lost', 'fires on'], strongest.map((i) => [link(i), number(effect[i]), percent(rate[i])])));
  else page.append(make('p', {}, 'No feature of this dictionary was ablated: --ablate.dictionary names the one that is.'));
  if (scored.length) page.append(make('h3', {}, 'Best labels'),
    make('p', {class: 'note'}, 'F1 of the rule that predicts where the feature fires, on held-out text.'),
    table(['feature', 'F1', 'fires on'], scored.map((i) => [link(i), number(f1[i], 2), percent(rate[i])])));
  return page;
}
