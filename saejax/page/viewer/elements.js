// What pages are made of. All text goes in as text, never as HTML.

const make = (tag, attributes = {}, ...inside) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
};

const visible = visibleInLine;
const number = (value, digits = 3) => {
  if (value === null || value === undefined) return '–';
  const small = value !== 0 && Math.abs(value) < 1e-3;
  const text = small ? value.toExponential(digits - 1) : value.toLocaleString('en', {maximumSignificantDigits: digits});
  return text.replaceAll('-', '−');
};
const percent = (share) => `${number(100 * share)} %`;
const token = (text) => make('span', {class: 'token'}, visible(text));
