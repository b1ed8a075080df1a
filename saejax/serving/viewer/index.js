// The list of graphs, the form that traces a prompt, and the choice of two to compare. What is typed stands in the
// address, so that reloading the page keeps it.

const given = JSON.parse(document.getElementById("page-data").textContent);
const at = (id) => document.getElementById(id);
const job = makeJob();
const FIELDS = ["prompt", "target", "max-features", "node-threshold", "edge-threshold"];

const old = new URLSearchParams(location.hash.slice(1));
for (const id of FIELDS) if (old.has(id)) at(id).value = old.get(id);
at("chat").checked = old.has("chat");
at("trace").oninput = () => {
  const typed = new URLSearchParams(FIELDS.map((id) => [id, at(id).value]));
  if (at("chat").checked) typed.set("chat", "");
  history.replaceState(null, "", `#${typed}`);
};
at("trace").onsubmit = async (event) => {
  event.preventDefault();
  const found = await job.run("api/trace", {
    prompt: at("prompt").value,
    target: at("target").value,
    max_features: Number(at("max-features").value),
    nodes: Number(at("node-threshold").value),
    edges: Number(at("edge-threshold").value),
    chat: at("chat").checked,
  });
  if (found) location.assign(found.address);
};

const ticked = () => [...document.querySelectorAll("#graphs input:checked")].map((box) => box.value);
const showTicked = () => {
  at("compare-ticked").disabled = ticked().length !== 2;
};
at("graphs").replaceChildren(
  ...given.graphs.map((graph) => {
    const box = element("input", { type: "checkbox", value: graph.id, onchange: showTicked, "aria-label": `Compare ${graph.id}` });
    const link = element("a", { href: graph.address }, graph.id);
    const texts = [element("div", {}, graph.prompt), element("small", {}, graph.about)];
    return element("li", {}, box, element("div", {}, link, texts));
  }),
);
at("compare").onsubmit = (event) => {
  event.preventDefault();
  const [a, b] = ticked();
  location.assign(`compare?${new URLSearchParams({ a, b })}`);
};
showTicked();
