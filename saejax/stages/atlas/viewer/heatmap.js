'use strict';
// Features by tokens of a document. All text goes in as text, never as HTML.

const cell = (share, text, title) => {
  const made = make('td', {class: 'cell', title}, text);
  made.style.setProperty('--share', Math.max(0, Math.min(1, share || 0)));
  return made;
};

// A table of one document: a row for each feature, coloured by activation over the row's largest.
function tokenMap(one, dictionary, labelOf) {
  const heads = one.tokens.map((text) => make('th', {scope: 'col'}, make('span', {}, visible(text))));
  const rows = one.features.map((feature, i) => {
    const most = Math.max(...one.acts[i], 1e-30), label = labelOf(feature);
    const name = make('th', {scope: 'row'}, make('a', {href: `#${dictionary}/${feature}`}, `${feature}${label ? ` ${visible(label)}` : ''}`));
    return make('tr', {}, name, ...one.acts[i].map((act, t) => cell(act / most, '',
      `${feature} on ${visible(one.tokens[t])}: ${act === null ? 'not scored' : number(act)}`)));
  });
  const table = make('table', {class: 'heat'}, make('thead', {}, make('tr', {}, make('td', {}), ...heads)), make('tbody', {}, ...rows));
  return make('div', {class: 'scroll', tabindex: '0', role: 'region', 'aria-label': `Features by tokens of document ${one.document}`}, table);
}

function mapsPage(texts, dictionary, labelOf) {
  const page = document.createDocumentFragment();
  page.append(make('h2', {}, 'Features by tokens'), make('p', {class: 'note'},
    'Documents of the training text, drawn; in each the features that are more active than in all text, by what they add. ' +
    'Colour: activation over the largest of the row. A name leads to the feature.'));
  for (const one of texts) page.append(make('h3', {}, `Document ${one.document}`), tokenMap(one, dictionary, labelOf));
  return page;
}
