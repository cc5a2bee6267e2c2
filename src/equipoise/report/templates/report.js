(() => {
  const { get, parse, offerDownload } = page;
  offerDownload(parse("results"), "results.json", 1);

  const table = get("figures");
  if (!table) return;
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const status = get("sorted");

  // Cells without a value stay at the bottom in both directions.
  const compare = (a, b, sign) => {
    if (a.dataset.number === undefined) return sign * a.dataset.order.localeCompare(b.dataset.order);
    if (a.dataset.number === "" || b.dataset.number === "") return (a.dataset.number === "") - (b.dataset.number === "");
    return sign * (Number(a.dataset.number) - Number(b.dataset.number));
  };

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = heading.classList.contains("number");
      const current = heading.getAttribute("aria-sort");
      const first = numeric ? "descending" : "ascending";
      const next = current === "none" ? first : current === "ascending" ? "descending" : "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], sign));
      body.append(...rows);
      status.textContent = `Sorted by ${heading.textContent.trim()}, ${next}.`;
    });
  });
})();
