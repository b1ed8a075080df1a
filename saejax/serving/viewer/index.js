// The list of graphs, and the form that traces a prompt. What is typed stands in the address, so that reloading the
// page keeps it.

const given = JSON.parse(at("page-data").textContent);
const job = makeJob();
const FIELDS = ["prompt", "target", "minus", "max-features", "node-threshold", "edge-threshold"];

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
    minus: at("minus").value,
    max_features: Number(at("max-features").value),
    nodes: Number(at("node-threshold").value),
    edges: Number(at("edge-threshold").value),
    chat: at("chat").checked,
  });
  if (found) location.assign(found.address);
};

at("graphs").replaceChildren(
  ...given.graphs.map((graph) => {
    const link = element("a", { href: graph.address }, graph.prompt || graph.id);
    return element("li", {}, element("div", {}, link, element("div", {}, element("small", {}, `${graph.id}, ${graph.about}`))));
  }),
);
at("problems").replaceChildren(...given.problems.map((problem) => element("li", {}, problem)));
