// Every table sorts by a click on a heading, or by Enter on it; a second one turns the order.
const number = text => {
  const found = text.replace(/[−–]/g, "-").replace(/,(?=\d{3})/g, "").match(/-?\d+(\.\d+)?(e[-+]?\d+)?/i);
  return found && /^[^a-z]*\d/i.test(text.replace(/^n = /, "")) ? Number(found[0]) : null;
};
const order = (a, b) => {
  const [x, y] = [number(a), number(b)];
  if (x !== null && y !== null) return x - y;
  return (x === null) - (y === null) || a.localeCompare(b);
};
for (const heading of document.querySelectorAll("table.sorts th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    const body = heading.closest("table").tBodies[0];
    const text = row => row.cells[heading.cellIndex].textContent;
    const rows = [...body.rows].sort((a, b) => (down ? order(text(b), text(a)) : order(text(a), text(b))));
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
}
