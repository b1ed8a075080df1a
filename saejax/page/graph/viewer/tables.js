// Tables that came with the graph. A cell that is a node's id becomes a button that selects the node.

function showTables(graph, tables, app) {
  const cell = (value) => {
    const i = graph.index.get(value);
    if (i !== undefined) {
      const named = { "data-node": value, title: whereOf(graph, i) };
      const button = plainButton(graph.labels[i], () => app.select(i), named);
      return element("td", {}, button, " ", element("small", {}, whereOf(graph, i)));
    }
    if (typeof value !== "number") return element("td", {}, visibleText(value ?? ""));
    return element("td", { class: "number" }, Number.isInteger(value) ? String(value) : signed(value));
  };
  const made = ({ title, note, columns, rows }) => {
    const told = note && element("p", { class: "note" }, note);
    const table = tableOf(title, columns, rows.map((row) => row.map(cell)));
    return element("details", {}, element("summary", {}, title), told, table);
  };
  at("tables").append(...tables.map(made));
}
