// A click on a heading sorts its table by the cells' data-key, up and then down; what has no key stays last.
for (const button of document.querySelectorAll("table.sortable th button")) button.onclick = () => {
  const head = button.parentElement, table = head.closest("table");
  const column = head.cellIndex, up = head.ariaSort !== "ascending";
  const key = row => row.cells[column].dataset.key, number = value => value === "" ? NaN : Number(value);
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = isNaN(number(a)) || isNaN(number(b)) ? a.localeCompare(b) : number(a) - number(b);
    return up ? order : -order;
  });
  for (const other of table.querySelectorAll("th")) other.ariaSort = null;
  head.ariaSort = up ? "ascending" : "descending";
  table.tBodies[0].append(...rows);
};
