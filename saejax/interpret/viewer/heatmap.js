'use strict';
// Features by tokens of a document, and a feature's row by layers. All text goes in as text, never as HTML.

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

// What other layers' dictionaries have for a feature: a cell for each layer, with a link to the feature there.
function layerMap(layers, dictionary, bar) {
  const kind = dictionary.split('/')[0];
  const cells = layers.map(([member, feature, cosine]) => {
    const link = make('a', {href: `../${member}/index.html#${kind}/${member}/${feature}`}, number(cosine, 2));
    return cell(cosine, link, `${member}, feature ${feature}: cosine ${number(cosine)}${cosine <= bar ? ', as of random directions' : ''}`);
  });
  const heads = layers.map(([member]) => make('th', {scope: 'col'}, make('span', {}, member)));
  const table = make('table', {class: 'heat'}, make('thead', {}, make('tr', {}, ...heads)), make('tbody', {}, make('tr', {}, ...cells)));
  return make('div', {class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'The feature by layers'}, table);
}
