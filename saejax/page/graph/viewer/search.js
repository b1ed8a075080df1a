// Search by label, id or token: found nodes get a ring in the picture and a row below the box.

const FOUND_AT_MOST = 50; // rows

function makeSearch(graph, app) {
  const box = at("search");
  const list = at("found");

  /** Nodes in whose texts all words are, the most influential first. */
  const matches = (query) => {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const found = nodesWhere(graph, (i) => words.every((word) => graph.searchable[i].includes(word)));
    return found.sort((a, b) => graph.share[a] - graph.share[b]);
  };
  const open = (shown) => {
    list.hidden = !shown;
    box.setAttribute("aria-expanded", String(shown));
  };
  const go = (i) => {
    open(false);
    app.select(i);
    stage.focus({ preventScroll: true });
  };
  const show = (shown) => {
    const found = matches(app.state.query);
    const asked = app.state.query.trim() !== "";
    const limit = found.length > FOUND_AT_MOST ? `; the first ${FOUND_AT_MOST}:` : "";
    const words = asked ? `${count(found.length)} ${found.length === 1 ? "node" : "nodes"} found${limit}` : "";
    const where = (i) => (app.visible.node[i] ? "" : " · below the threshold");
    const rows = found.slice(0, FOUND_AT_MOST).map((i) => nodeRow(graph, i, go, where(i)));
    app.found = new Set(found);
    list.replaceChildren(element("p", { class: "note", role: "status" }, words), ...rows);
    open(shown && asked);
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
      open(false);
      stage.focus();
      event.stopPropagation();
    }
  };
  list.onkeydown = (event) => {
    const side = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (side) {
      const to = event.target[side];
      (to && to.matches("button") ? to : box).focus();
      event.preventDefault();
    } else if (event.key === "Escape") {
      open(false);
      box.focus();
      event.stopPropagation();
    }
  };
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".finder")) open(false);
  });
  return {
    show() {
      if (document.activeElement !== box) box.value = app.state.query;
      show(!list.hidden);
    },
  };
}
