// A heading's button sorts its table; clicking a cell of a heat map shows its title below, since phones do not hover.
addEventListener("click", function (event) {
  const button = event.target.closest("th button");
  if (button) sort(button.closest("th"));
  const cell = event.target.closest(".map td[title]");
  if (cell) {
    const figure = cell.closest("figure");
    for (const other of figure.querySelectorAll(".chosen")) other.classList.remove("chosen");
    cell.classList.add("chosen");
    figure.querySelector("output").textContent = cell.title;
  }
});
function sort(heading) {
  const up = heading.getAttribute("aria-sort") !== "ascending", column = heading.cellIndex;
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = heading.closest("table").tBodies[0], key = (row) => {
    const cell = row.cells[column];
    return heading.className === "number" ? parseFloat(cell.dataset.value ?? "NaN") : cell.textContent;
  };
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  const rows = Array.from(body.rows, (row) => [key(row), row]);
  const known = rows.filter(([value]) => !Number.isNaN(value)), unknown = rows.filter(([value]) => Number.isNaN(value));
  known.sort(([a], [b]) => up ? compare(a, b) : compare(b, a));
  for (const [, row] of [...known, ...unknown]) body.append(row);
}
