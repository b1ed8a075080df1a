// The list of pins and groups, and the tools that group, merge, rename and ungroup them.

function makePins(graph, app) {
  const list = at("pins");
  const tools = at("pin-tools");
  const [field, button] = [tools.querySelector("input"), tools.querySelector("button")];
  const ticked = new Set(); // keys of units
  const keyOf = (unit) => unitKey(graph, unit);

  const toolOf = (unit, words, act) => plainButton(words, act, { "aria-label": `${words} ${unit.name}` });
  const pinRow = (unit) => {
    const [i] = unit.members;
    return [nodeRow(graph, i, app.select), toolOf(unit, "Unpin", () => app.togglePin(i))];
  };
  const groupRow = (unit) => {
    const [value] = app.state.groups[unit.group];
    const name = element("input", { type: "text", class: "group-name", value, "aria-label": "Name of the group" });
    name.onchange = () => app.rename(unit.group, name.value);
    const members = unit.members.map((i) => nodeRow(graph, i, app.select));
    const folded = element("details", {}, element("summary", {}, `${unit.members.length} nodes`), members);
    const ungroup = toolOf(unit, "Ungroup", () => app.ungroup(unit.group));
    return [element("div", { class: "group-row" }, name, folded), ungroup];
  };
  const unitRow = (unit, units) => {
    const tick = element("input", { type: "checkbox", "aria-label": `Tick ${unit.name}` });
    tick.checked = ticked.has(keyOf(unit));
    tick.onchange = () => {
      ticked[tick.checked ? "add" : "delete"](keyOf(unit));
      showTools(units);
    };
    return element("li", { "data-units": keyOf(unit) }, tick, unit.group < 0 ? pinRow(unit) : groupRow(unit));
  };
  const showTools = (units) => {
    const chosen = units.filter((unit) => ticked.has(keyOf(unit)));
    const members = chosen.flatMap((unit) => unit.members);
    const old = chosen.find((unit) => unit.group >= 0);
    button.disabled = members.length < 2;
    button.textContent = old ? "Merge ticked" : "Group ticked";
    whenSent(tools, () => {
      const name = field.value.trim() || (old ? app.state.groups[old.group][0] : chosen[0].name);
      field.value = "";
      ticked.clear();
      app.group(name, members);
    });
  };
  return {
    show(units) {
      const known = new Set(units.map(keyOf));
      for (const key of ticked) if (!known.has(key)) ticked.delete(key);
      const focused = list.contains(document.activeElement);
      list.replaceChildren(...units.map((unit) => unitRow(unit, units)));
      if (focused) list.focus();
      showTools(units);
    },
  };
}
