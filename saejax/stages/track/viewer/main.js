// Puts the page together: a grid, a panel, the answer's curve and the steps for each text.

const data = JSON.parse(document.getElementById('track-data').textContent);
const grids = [];

function show(text) {
  const panel = make('div', {class: 'panel', tabindex: '-1', 'aria-live': 'polite'},
    make('p', {class: 'note'}, 'Choose a cell to see its features, and a feature to follow it up and down.'));
  const follow = (node) => {
    const way = chainOf(text, node);
    grid.select(node[0], node[1], true);
    grid.follow(way);
    panel.replaceChildren(...wayPanel(text, node, way, follow, end));
  };
  const end = () => {
    grid.follow(null);
    if (grid.at()) grid.select(...grid.at());
    grid.scroll.focus();
  };
  const grid = makeGrid(text, (l, t) => {
    grid.follow(null);
    panel.replaceChildren(...cellPanel(text, l, t, follow));
  });
  grid.scroll.addEventListener('keydown', (event) => {
    if (event.key === 'Enter') (panel.querySelector('button') || panel).focus();
  });
  panel.addEventListener('keydown', (event) => { if (event.key === 'Escape') end(); });
  grids.push(grid);
  const about = `${number(text.tokens.length, 9)} tokens, ${text.layers.length} layers with dictionaries (${text.layers[0].name} and on), ` +
    `${number(text.links.length, 9)} links between shown features, by the similarity of their directions.`;
  const chooser = make('select', {'aria-label': 'Layer whose features are listed'});
  text.layers.forEach((one, l) => chooser.append(make('option', {value: l}, one.site)));
  chooser.value = Math.max(0, text.layers.findIndex((one) => one.site === text.tested));
  const table = make('div');
  const steps = () => {
    const layer = Number(chooser.value);
    table.replaceChildren(stepsTable(text, layer, (l, step, feature) => {
      const own = text.cells[l].slice(step.start, step.stop).map((cell, i) => [cell[cell.findIndex((one, j) => j % 2 === 0 && one === feature) + 1], i])
        .filter(([, i]) => text.cells[l][step.start + i].some((one, j) => j % 2 === 0 && one === feature));
      if (!own.length) return;
      own.sort((a, b) => b[0] - a[0]);
      follow([l, step.start + own[0][1], feature]);
      panel.scrollIntoView({block: 'nearest'});
    }));
  };
  chooser.addEventListener('change', steps);
  steps();
  const output = text.output ? [make('p', {}, make('strong', {}, 'Output of the model: '), visible(text.output))] : [];
  const section = make('section', {class: 'text'}, make('h2', {}, text.slug), make('p', {class: 'note'}, about), ...output, grid.element, panel,
    ...answerCurve(text), ...chainsTable(text), make('h3', {}, 'Steps, by features of ', chooser), table);
  document.getElementById('texts').append(section);
  grid.draw();
}

document.getElementById('about').textContent = `Model ${data.model}. Layers by positions; the strip below has the tokens, and a line where a step begins.`;
const colour = document.getElementById('colour');
const {lens} = data.texts[0].reading;
const choices = [['strength', 'strongest feature'], ['answer', `${lens}: probability of the answer`], ['agrees', `${lens}: agreement with the model`]];
for (const [value, says] of choices) colour.append(make('option', {value}, says));
colour.addEventListener('change', () => { for (const grid of grids) grid.paint(colour.value); });
data.texts.forEach(show);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { for (const grid of grids) grid.draw(); });
document.body.dataset.ready = 'true';
