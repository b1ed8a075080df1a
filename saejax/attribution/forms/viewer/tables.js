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
  document.getElementById("tables").append(
    ...tables.map((table) =>
      element(
        "details",
        {},
        element("summary", {}, table.title),
        table.note && element("p", { class: "note" }, table.note),
        element(
          "div",
          { class: "wide", tabindex: 0, role: "region", "aria-label": table.title },
          element(
            "table",
            {},
            element(
              "thead",
              {},
              element(
                "tr",
                {},
                table.columns.map((name) => element("th", { scope: "col" }, name)),
              ),
            ),
            element(
              "tbody",
              {},
              table.rows.map((row) => element("tr", {}, row.map(cell))),
            ),
          ),
        ),
      ),
    ),
  );
}
