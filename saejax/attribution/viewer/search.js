// Search by label, id or token: found nodes get a ring in the picture and a row below the box.

function makeSearch(graph, app) {
  const box = document.getElementById("search");
  const list = document.getElementById("found");
  const most = 50;
  const matches = (query) => {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    if (!words.length) return found;
    for (let i = 0; i < graph.n; i++) if (words.every((word) => graph.searchable[i].includes(word))) found.push(i);
    return found.sort((a, b) => graph.share[a] - graph.share[b]);
  };
  const hide = () => {
    list.hidden = true;
    box.setAttribute("aria-expanded", "false");
  };
  const go = (i) => {
    hide();
    app.select(i);
    document.getElementById("stage").focus({ preventScroll: true });
  };
  const show = (open) => {
    const found = matches(app.state.query);
    app.found = new Set(found);
    list.replaceChildren(
      element(
        "p",
        { class: "note", role: "status" },
        app.state.query.trim()
          ? `${count(found.length)} ${found.length === 1 ? "node" : "nodes"} found${found.length > most ? `; the first ${most}:` : ""}`
          : "",
      ),
      ...found
        .slice(0, most)
        .map((i) =>
          element(
            "button",
            { type: "button", class: "row", onclick: () => go(i), "data-node": graph.ids[i] },
            element(
              "span",
              { class: "what" },
              glyph(graph.kind[i]),
              element("span", { class: "name" }, graph.labels[i]),
            ),
            element(
              "span",
              { class: "where" },
              whereOf(graph, i) + (app.visible.node[i] ? "" : " · below the threshold"),
            ),
          ),
        ),
    );
    list.hidden = !(open && app.state.query.trim());
    box.setAttribute("aria-expanded", String(!list.hidden));
  };
  box.oninput = () => {
    app.change({ query: box.value });
    show(true);
  };
  box.onfocus = () => show(true);
  box.onkeydown = (event) => {
    const first = list.querySelector("button");
    if (event.key === "Enter" && first) first.click();
    else if (event.key === "ArrowDown" && first) {
      first.focus();
      event.preventDefault();
    } else if (event.key === "Escape") {
      box.value = "";
      app.change({ query: "" });
      hide();
      document.getElementById("stage").focus();
      event.stopPropagation();
    }
  };
  list.onkeydown = (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (step) {
      const to = event.target[step];
      (to && to.matches("button") ? to : box).focus();
      event.preventDefault();
    } else if (event.key === "Escape") {
      hide();
      box.focus();
      event.stopPropagation();
    }
  };
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".finder")) hide();
  });
  return {
    show() {
      if (document.activeElement !== box) box.value = app.state.query;
      show(!list.hidden);
    },
  };
}
