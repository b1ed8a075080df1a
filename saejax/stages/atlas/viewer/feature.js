'use strict';
// The page of one feature, made of its record. All text goes in as text, never as HTML.

// A table of cells, which may be elements; all columns but the first hold numbers.
const table = (heads, rows) => {
  const head = make('tr', {}, ...heads.map((text, i) => make('th', i ? {class: 'number', scope: 'col'} : {scope: 'col'}, text)));
  const body = rows.map((row) => make('tr', {}, ...row.map((cell, i) => make('td', i ? {class: 'number'} : {}, cell))));
  return make('div', {class: 'scroll', tabindex: '0', role: 'region', 'aria-label': heads[0]},
    make('table', {}, make('thead', {}, head), make('tbody', {}, ...body)));
};

// A histogram with the texts at its two ends.
const bars = (counts, from, to, alt) => {
  const most = Math.max(...counts, 1);
  const made = counts.map((count) => {
    const bar = make('i', {title: number(count, 15)});
    bar.style.height = `${100 * count / most}%`;
    return bar;
  });
  return [make('div', {class: 'bars', role: 'img', 'aria-label': alt}, ...made),
    make('div', {class: 'ends'}, make('span', {}, from), make('span', {}, to))];
};

const interval = (one) => `${one.mean.toFixed(2)} [${one.low.toFixed(2)}, ${one.high.toFixed(2)}]`;

// The scores of a language model's label, each beside the score of another feature's label.
const judgements = (judged) => {
  if (!judged) return [];
  const name = judged.label && !judged.kept ? `Label “${visible(judged.label)}”, not kept` : 'Judged by a language model';
  const scores = Object.entries(judged.scores).map(([score, one]) =>
    `${score} ${interval(one.value)}${one.control === null ? '' : `, control ${one.control.toFixed(2)}`}`);
  return scores.length ? [[name, `on held-out text: ${scores.join('; ')}`]] : [];
};

function featurePage(record, dictionary, labelOf) {
  const address = (feature) => `#${dictionary}/${feature}`;
  const link = (feature) => {
    const label = labelOf(feature);
    return make('a', {href: address(feature)}, `${feature}${label ? ` ${visible(label)}` : ''}`);
  };
  const page = document.createDocumentFragment();
  const section = (title, note, ...inside) => {
    page.append(make('h3', {}, title));
    if (note) page.append(make('p', {class: 'note'}, note));
    page.append(...inside);
  };
  const context = (one) => {
    const pieces = one.tokens.map((text, i) => {
      const act = one.acts[i];
      const piece = make('span', {title: act === null ? 'not scored' : `activation ${number(act)}`}, visible(text));
      if (i === one.peak) piece.classList.add('peak');
      piece.style.setProperty('--share', Math.min(1, (act || 0) / record.max));
      return piece;
    });
    const where = `activation ${number(one.acts[one.peak])}, document ${one.document}, position ${one.position}`;
    return make('div', {class: 'context'}, ...pieces, make('small', {}, where));
  };
  const codes = (rows) => table(['', 'fires on', 'mean', 'sum'], rows.map((row) => [token(row.text),
    `${number(row.hits, 9)} of ${number(row.occurrences, 9)}`, number(row.mean), number(row.sum)]));

  page.append(make('h2', {id: 'name'}, `Feature ${record.feature}`));
  const label = record.label;
  const said = label ? [visible(label.label), make('span', {class: 'by'}, ` (by ${label.by}${label.note ? `: ${label.note}` : ''})`)] : ['no label'];
  page.append(make('p', {class: 'label'}, ...said));
  const facts = [['Fires on', `${number(record.fires, 9)} tokens, ${percent(record.rate)}`]];
  if (record.fires) facts.push(['Activation', `mean ${number(record.mean)}, largest ${number(record.max)}`]);
  const rule = record.detector;
  if (rule) facts.push(['Best rule', `${visible(rule.says)}: F1 ${interval(rule.f1)} on held-out text, ${rule.search_f1.toFixed(2)} where it was searched; ` +
    `another feature's rule ${record.shuffled_f1.toFixed(2)}`]);
  facts.push(...judgements(record.judged));
  for (const [behaviour, drop] of Object.entries(record.effects || {})) facts.push([behaviour, `${number(drop)} logits lost without it`]);
  page.append(make('dl', {}, ...facts.flatMap(([name, text]) => [make('dt', {}, name), make('dd', {}, text)])));
  if (record.fires) {
    section('Strongest contexts', '', ...record.examples.map(context));
    const groups = [...new Set(record.groups.map((one) => one.group))].reverse();
    for (const group of groups) {
      const between = record.tenths ? `, activation ${number(record.tenths[group])} to ${number(record.tenths[group + 1])}` : '';
      section(`${10 * group} to ${10 * group + 10} % of firings${between}`, group === groups[0] ? 'Draws from tenths of the firings, by activation.' : '',
        ...record.groups.filter((one) => one.group === group).map(context));
    }
    const used = record.histogram.map((count, i) => [count, i]).filter(([count]) => count).map(([, i]) => i);
    const [first, last] = [used[0], used[used.length - 1] + 1];
    section('Activations', 'Firings by activation; bins of half an octave.',
      ...bars(record.histogram.slice(first, last), number(2 ** (first / 2 - 10), 2), number(2 ** (last / 2 - 10), 2), 'Histogram of activations'));
    section('Tokens', 'Mean: activation over all places of the token.', codes(record.tokens));
  }
  if ((record.categories || []).length) {
    section('Prompt categories', 'Prompts on which it fires, in the category and elsewhere; of right answers, against wrong ones of the same category. ' +
      'q: Fisher\'s exact test, Benjamini and Hochberg over all features and categories. Prompts of a category share words.',
      table(['category', 'fires on', 'elsewhere', 'q'], record.categories.map((one) => [one.category, `${one.active} of ${one.prompts}`,
        `${one.active_elsewhere} of ${one.prompts_elsewhere}`, number(one.q, 2)])));
  }
  if (record.attention) {
    const rows = record.attention.heads.map(([layer, head, looksAt, r]) => [`layer ${layer}, head ${head}: ${looksAt}`, number(r, 2)]);
    const bar = number(record.attention.bar, 2);
    section('Attention heads that go with it', `Correlation of the activation with the share of a head's attention. With activations ` +
      `of other documents at the same positions no head and class reached ${bar} in 19 tries.`,
      rows.length ? table(['head and what it looks at', 'correlation'], rows) : make('p', {}, 'None goes beyond that.'));
  }
  if (record.up) {
    section('Tokens raised and lowered', 'By the direct path: decoder row, final norm, unembedding.',
      make('p', {class: 'tokens'}, 'raised ', ...record.up.map(([text]) => token(text))),
      make('p', {class: 'tokens'}, 'lowered ', ...record.down.map(([text]) => token(text))),
      ...(record.logits ? bars(record.logits.counts, number(record.logits.low), number(record.logits.high), 'Histogram of logits of all tokens') : []));
  }
  section('Nearest decoder rows', '', table(['feature', 'cosine'], record.nearest.map(([feature, cosine]) => [link(feature), number(cosine)])));
  return page;
}
