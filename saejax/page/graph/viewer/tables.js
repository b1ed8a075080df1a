// Tables that came with the graph. A cell that is a node's id becomes a button that selects the node.

function showTables(graph, tables, app) {
  const cell = (value) => {
    const i = graph.index.get(value);
    if (i !== undefined) {
      const button = element(
        "button",
        { type: "button", class: "plain", "data-node": value, title: whereOf(graph, i), onclick: () => app.select(i) },
        graph.labels[i],
      );
      return element("td", {}, button, " ", element("small", {}, whereOf(graph, i)));
    }
    return typeof value === "number"
      ? element("td", { class: "number" }, Number.isInteger(value) ? String(value) : signed(value))
      : element("td", {}, visibleText(value ?? ""));
  };
  const made = (table) =>
    element(
      "details",
      {},
      element("summary", {}, table.title),
      table.note && element("p", { class: "note" }, table.note),
      tableOf(table.title, table.columns, table.rows.map((row) => row.map(cell))),
    );
  document.getElementById("tables").append(...tables.map(made));
}
