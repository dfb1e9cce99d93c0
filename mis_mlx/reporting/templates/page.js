// Numbers sort as numbers, also with a unit or ± behind; a second press turns the order round.
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const text = row => row.cells[at].textContent.trim(), number = row => parseFloat(text(row).replace(/,/g, ""));
  const order = (a, b) => {
    const x = number(a), y = number(b);
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    return (up ? 1 : -1) * (isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
  };
  body.append(...[...body.rows].sort(order));
});
