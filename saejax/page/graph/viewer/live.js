// What the page does with its server: the model run with features changed, the graph pruned again, labels, pins and
// groups saved.

function makeLive(graph, { live, labels, details }, app) {
  const job = makeJob();
  const [what, how, amount, list] = ["change-what", "change-how", "change-amount", "changes"].map(at);
  const written = (state) => {
    const { supernodes, pinnedIds, sg_pos } = qParamsOf(graph, state);
    return JSON.stringify({ supernodes, pinnedIds, sg_pos });
  };
  let saved = written(firstState(graph));
  let choices = [];
  const features = (members) => members.filter((i) => graph.kind[i] === FEATURE);
  const nameOf = (members) => {
    const group = app.state.groups.find((one) => features(one[1]).join() === members.join());
    if (group) return visibleText(group[0]);
    return members.length > 1 ? `${members.length} features` : `${graph.labels[members[0]]}, ${whereOf(graph, members[0])}`;
  };
  const words = ({ how, amount, members }) => {
    const done = how === "set" ? `set to ${amount}` : amount === 0 ? "ablated" : `times ${amount}`;
    return `${nameOf(members)}: ${done}`;
  };

  /** What can be changed: the selected feature, groups, pinned features. */
  const showChoices = () => {
    const { clicked, groups, pinned } = app.state;
    const named = [
      ["Selected: ", features([clicked])],
      ...groups.map(([, members]) => ["Group: ", features(members)]),
      ...features(pinned).map((i) => ["Pinned: ", [i]]),
      ["All pinned: ", features(pinned)],
    ];
    const old = JSON.stringify(choices);
    choices = named.filter(([, members]) => members.length);
    const chosen = old === JSON.stringify(choices) ? what.value : ""; // names alone may have changed
    const options = choices.map(([before, members], k) => element("option", { value: k }, clip(before + nameOf(members), 60)));
    const none = element("option", { value: "" }, "Select or pin features first");
    what.replaceChildren(...(options.length ? options : [none]));
    if (chosen) what.value = chosen;
    at("change-form").querySelector("button").disabled = !choices.length;
  };
  const showChanges = () => {
    const { changes } = app.state;
    const item = (change) => {
      const onclick = () => app.change({ changes: changes.filter((one) => one !== change) }, true);
      const button = element("button", { type: "button", "aria-label": `Remove ${words(change)}`, onclick }, "Remove");
      return element("li", {}, element("span", {}, words(change)), button);
    };
    list.replaceChildren(...changes.map(item));
    at("run-changes").disabled = !changes.length || Boolean(live.why);
    const texts = at("generate-form").querySelector("button");
    texts.disabled = at("run-changes").disabled || app.state.freeze === "all";
    texts.title = app.state.freeze === "all" ? "With all frozen there is no text: freeze nothing, or attention" : "";
    at("freeze").value = app.state.freeze;
  };
  const clearEffects = () => at("effects").replaceChildren();

  whenSent(at("change-form"), () => {
    const members = choices[what.value]?.[1];
    if (!members) return;
    const kept = app.state.changes
      .map((change) => ({ ...change, members: change.members.filter((i) => !members.includes(i)) }))
      .filter((change) => change.members.length);
    clearEffects();
    app.change({ changes: [...kept, { how: how.value, amount: Number(amount.value), members }] }, true);
  });
  for (const option of at("freeze").options) option.hidden = option.disabled = !live.freeze_modes.includes(option.value);
  at("freeze").onchange = (event) => {
    clearEffects();
    app.change({ freeze: event.target.value }, true);
  };
  /** Runs the model with the changes, and shows what comes of it in a table; gives null if nothing does. */
  const runChanges = async (path, settings, tableOfResult) => {
    const { changes, freeze } = app.state;
    const names = changes.map(words).join("; ");
    const found = await job.run(path, { graph: live.graph, changes: plainChanges(graph, changes), freeze, ...settings });
    if (!found) return null;
    at("effects").replaceChildren(...tableOfResult({ ...found, freeze }, names));
    at("effects").focus({ preventScroll: true });
    return found;
  };
  at("run-changes").onclick = async () => {
    const found = await runChanges("api/change", {}, effectsTable);
    if (found) say(`The next token is now ${visibleToken(found.tokens[0].text)}.`);
  };
  at("generate-form").hidden = live.freeze_modes.length < 2; // of SAEs
  whenSent(at("generate-form"), () => {
    const [tokens, temperature, seed] = ["tokens", "temperature", "seed"].map((id) => Number(at(`generate-${id}`).value));
    runChanges("api/generate", { tokens, temperature, seed, onward: at("generate-onward").checked }, textsTable);
  });
  /** Opens the page of this graph with other settings. */
  const openWith = (query) => location.assign(`graph?${new URLSearchParams({ id: live.graph, ...query })}${location.hash}`);
  whenSent(at("prune-form"), () => openWith({ nodes: at("prune-nodes").value, edges: at("prune-edges").value }));
  const outputs = nodesWhere(graph, (i) => graph.kind[i] === LOGIT && chanceOf(graph.doc.nodes[i]));
  const ends = ["difference-first", "difference-second"].map(at);
  ends.forEach((end, k) => {
    end.replaceChildren(...outputs.map((i) => element("option", { value: graph.ids[i] }, graph.labels[i])));
    end.selectedIndex = k;
  });
  at("difference-form").hidden = !live.whole || outputs.length < 2;
  whenSent(at("difference-form"), () => {
    const [first, second] = ends.map((end) => end.value);
    openWith({ nodes: live.nodes, edges: live.edges, first, second });
  });
  at("all-outputs").hidden = !live.difference;
  at("all-outputs").querySelector("a").href = `graph?${new URLSearchParams({ id: live.graph })}`;
  let last = Promise.resolve(); // each saving waits for the one before it, or the older could be written last
  const saving = (...all) => (last = last.then(() => save(...all)));
  const save = async (path, body, done) => {
    at("saved").textContent = "";
    try {
      const answer = await ask(path, { graph: live.graph, ...body });
      at("saved").textContent = `Saved in ${answer.file}.`;
      say("Saved.");
      done();
    } catch (error) {
      job.fail(error.message);
    }
  };
  at("save-groups").onclick = () => {
    const state = written(app.state);
    saving("api/state", { state: JSON.parse(state) }, () => {
      saved = state;
      show("live");
    });
  };
  [at("prune-nodes").value, at("prune-edges").value] = [live.nodes, live.edges];
  at("prune-form").querySelector("button").disabled = !live.whole;
  at("live-note").textContent = live.note;

  const renamed = () => {
    nameNodes(graph, namesOf(given));
    shown = {}; // names stand everywhere
    refresh();
  };
  const described = new Set(); // features that were asked for

  return {
    /** Asks for what is known of a feature, once, when its node is opened. */
    async describe(i) {
      const key = featureKey(graph.doc.nodes[i]);
      if (described.has(key)) return;
      described.add(key);
      try {
        details[key] = await ask("api/feature", { graph: live.graph, feature: key });
      } catch (error) {
        described.delete(key);
        if (app.state.clicked === i) at("missing").textContent = "What is known of this feature could not be read.";
        return job.fail(error.message);
      }
      const fields = [...document.querySelectorAll(".label-form input, .group-name")];
      const untouched = fields.every((one) => one.value === one.defaultValue && one !== document.activeElement);
      if (untouched) renamed(); // what is being typed stays
    },
    /** A field with a feature's label, which is saved for all its positions. */
    labelForm(i) {
      const key = featureKey(graph.doc.nodes[i]);
      const value = labels[key] ?? graph.doc.nodes[i].clerp ?? "";
      const asks = { type: "text", value, maxlength: 200, "aria-label": "Label of this feature", "data-feature": key };
      const field = element("input", asks);
      const before = document.querySelector(".label-form input");
      // The panel may be drawn again while a label is being typed.
      if (before?.dataset.feature === key && before.value !== before.defaultValue) field.value = before.value;
      const form = element("form", { class: "label-form" }, field, element("button", { type: "submit" }, "Save label"));
      return whenSent(form, () => {
        const label = field.value.trim();
        saving("api/label", { node: graph.ids[i], label }, () => {
          labels[key] = label;
          renamed();
        });
      });
    },
    show() {
      showChoices();
      showChanges();
      at("save-groups").disabled = written(app.state) === saved;
    },
  };
}
