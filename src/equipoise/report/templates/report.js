"use strict";
(() => {
  const root = document.documentElement;

  const theme = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const show = () => {
    theme.setAttribute("aria-pressed", String(isDark()));
  };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  prefersDark.addEventListener("change", show);
  show();

  const download = document.getElementById("download");
  download.hidden = false;
  download.addEventListener("click", () => {
    const text = document.getElementById("results").textContent;
    const pretty = JSON.stringify(JSON.parse(text), null, 1) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([pretty], { type: "application/json" }));
    link.download = "results.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  const table = document.getElementById("figures");
  if (!table) return;
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const status = document.getElementById("sorted");

  // Cells without a figure stay below, whichever way the rest is sorted.
  const compare = (a, b, way) => {
    if (a.dataset.number === undefined) return way * a.dataset.order.localeCompare(b.dataset.order);
    if (a.dataset.number === "" || b.dataset.number === "") return (a.dataset.number === "") - (b.dataset.number === "");
    return way * (Number(a.dataset.number) - Number(b.dataset.number));
  };

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = heading.classList.contains("number");
      const now = heading.getAttribute("aria-sort");
      const first = numeric ? "descending" : "ascending";
      const next = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", next);
      const way = next === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], way));
      body.append(...rows);
      status.textContent = `Sorted by ${heading.textContent.trim()}, ${next}.`;
    });
  });
})();
