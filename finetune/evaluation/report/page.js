"use strict";
const filter = document.getElementById("filter");
if (filter) {
  const [task, side, text, count] = ["task", "side", "text", "count"].map((id) => document.getElementById(id));
  const groups = [...document.querySelectorAll(".group")];
  const apply = () => {
    const words = text.value.trim().toLowerCase();
    let shown = 0;
    for (const group of groups) {
      const fits = (!task.value || group.dataset.task === task.value) && (!side.value || group.dataset.side === side.value);
      let inside = 0;
      for (const card of group.querySelectorAll(".example")) {
        card.hidden = !fits || !card.textContent.toLowerCase().includes(words);
        inside += !card.hidden;
      }
      group.hidden = !inside;
      for (const more of group.querySelectorAll("details")) more.open = Boolean(words);
      shown += inside;
    }
    count.textContent = `${shown} shown`;
  };
  for (const control of [task, side, text]) control.addEventListener("input", apply);
  filter.hidden = false;
  apply();
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[place].textContent;
      const number = (text) => (text === "–" ? -Infinity : Number(text.replaceAll(",", "")));
      const compare = place ? (a, b) => number(value(a)) - number(value(b)) : (a, b) => value(a).localeCompare(value(b));
      const rows = [...body.rows].sort(compare);
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}
