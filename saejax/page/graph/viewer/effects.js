// What changes did to the next token: old beside new, and beside what random features do.

function effectsTable({ tokens, differences, kl, random_kl, draws, no_draws, freeze }, names) {
  const nats = (x) => `${magnitude(x)} nats`;
  const span = (values, written) => [...new Set([Math.min(...values), Math.max(...values)].map(written))].join(" to ");
  const row = (token) => {
    const cells = [
      visibleToken(token.text),
      ...token.logit.map((x) => plain(x)),
      signed(token.logit[1] - token.logit[0]),
      ...token.probability.map(percent),
      token.random ? span(token.random, percent) : "–",
    ];
    return cells.map((cell, k) => element(k ? "td" : "th", k ? { class: "number" } : { scope: "row" }, cell));
  };
  const plain = (x) => (x < 0 ? "−" : "") + magnitude(x);
  const named = differences.map(({ text, value, random }) => {
    const told = random ? `; random sets ${span(random, plain)}` : "";
    return element("p", {}, `${text.map(visibleToken).join(" − ")}: ${plain(value[0])} before, ${plain(value[1])} after${told}.`);
  });
  const heads = ["Token", "Logit before", "after", "change", "Probability before", "after", "after random ones"];
  const said = draws
    ? `${draws === 1 ? "The only set" : `${draws} different random sets`} of as many other active features of the same ` +
      `layers, changed at equal dose: ${span(random_kl, nats)}.`
    : `No random features to compare with: ${no_draws}`;
  return [
    element("h3", {}, `The next token, with ${names}`),
    element("p", {}, `Divergence from the model as it is (KL): ${nats(kl)}. ${said}`),
    ...named,
    freeze === "all" ? element("p", { class: "note" }, "With all else frozen this is what the edges say, not the model.") : [],
    tableOf("Tokens", heads, tokens.map(row)),
  ].flat();
}

/** The text that follows as the model is, with the changes, and with random features changed at equal dose. */
function textsTable({ texts, no_draws }, names) {
  const kinds = { clean: "as it is", changed: "changed", random: "random features" };
  const row = ([kind, text]) => [element("th", { scope: "row" }, kinds[kind]), element("td", {}, visibleText(text) || "(the text ends)")];
  const said = "Random features are active ones of the same layers, changed so that as much is added to the stream.";
  return [
    element("h3", {}, `The text that follows, with ${names}`),
    element("p", {}, no_draws ? `No random features to compare with: ${no_draws}` : said),
    tableOf("Texts", ["Model", "Text"], texts.map(row)),
  ];
}
