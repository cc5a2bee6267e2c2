"use strict";
const page = (() => {
  const root = document.documentElement;
  const get = (id) => document.getElementById(id);

  const theme = get("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const updateTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    updateTheme();
  });
  prefersDark.addEventListener("change", updateTheme);
  updateTheme();

  // Enables the download button for a JSON file with the given content.
  const offerDownload = (content, name, indent) => {
    const button = get("download");
    button.hidden = false;
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      const text = JSON.stringify(content, null, indent) + "\n";
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  };

  const parse = (id) => JSON.parse(get(id).textContent);
  return { root, get, parse, offerDownload };
})();
