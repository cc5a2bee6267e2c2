"use strict";
(() => {
  const root = document.documentElement;
  const get = (id) => document.getElementById(id);

  const theme = get("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const show = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  prefersDark.addEventListener("change", show);
  show();

  const { diagnoses, names } = JSON.parse(get("diagnoses").textContent);

  const download = get("download");
  download.hidden = false;
  download.addEventListener("click", () => {
    const content = diagnoses.length === 1 ? diagnoses[0] : diagnoses;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1) + "\n"], { type: "application/json" }));
    link.download = "diagnosis.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  const explorer = get("explorer");
  if (!explorer) return;
  explorer.hidden = false;
  const pick = { model: get("pick-model"), layer: get("pick-layer"), head: get("pick-head") };
  const colors = getComputedStyle(root);
  const shades = [0, 1, 2, 3, 4, 5].filter((i) => colors.getPropertyValue(`--fig-${i}`)).length;

  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== null) made.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    return made;
  };

  // Heads of one layer; the first place of the slider is their mean.
  const mean = (heads) => {
    if (!Array.isArray(heads[0])) {
      const known = heads.filter((value) => value !== null);
      return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
    }
    return heads[0].map((_, place) => mean(heads.map((head) => head[place])));
  };
  const of = (heads, head) => (head === 0 ? mean(heads) : heads[head - 1]);

  const cell = (value, name) => {
    const made = element("td", value === null ? "–" : `${(100 * value).toFixed(1)} %`);
    const meter = element("span", null, { class: "meter", "aria-hidden": "true" });
    const filled = element("i", null);
    filled.style.width = `${100 * Math.min(Math.max(value ?? 0, 0), 1)}%`;
    const place = names.indexOf(name);
    filled.style.background = place < 0 ? "var(--fig-muted)" : `var(--fig-${place % shades})`;
    meter.append(filled);
    made.append(meter);
    return made;
  };

  const row = (title, shares, modalities, rest) => {
    const made = element("tr", null);
    made.append(element("th", title, { scope: "row" }));
    shares.forEach((value, place) => made.append(cell(value, modalities[place])));
    made.append(cell(rest, null));
    return made;
  };

  const left = (shares) => (shares.includes(null) ? null : Math.max(1 - shares.reduce((sum, value) => sum + value, 0), 0));

  const draw = () => {
    const layers = diagnoses[Number(pick.model.value)].details.attention.layers;
    pick.layer.max = layers.length - 1;
    const layer = layers[Number(pick.layer.value)];
    pick.head.max = layer.share.length;
    const head = Number(pick.head.value);
    const who = head === 0 ? "mean of all" : `${head} of ${layer.share.length}`;
    get("layer-said").textContent = `${Number(pick.layer.value) + 1} of ${layers.length}`;
    get("head-said").textContent = who;
    pick.layer.setAttribute("aria-valuetext", get("layer-said").textContent);
    pick.head.setAttribute("aria-valuetext", who);
    get("explorer-said").textContent = `${layer.site}: who reads (rows), and what is read (columns)`;
    const title = element("tr", null);
    ["", ...layer.names, "special"].forEach((name) => title.append(element("th", name, { scope: "col" })));
    get("explorer-head").replaceChildren(title);
    const shares = of(layer.share, head);
    const rows = [row("all queries", shares, layer.names, left(shares))];
    if (layer.by_query) {
      of(layer.by_query, head).forEach((reads, place) => {
        if (reads.some((value) => value !== null)) rows.push(row(layer.names[place], reads, layer.names, left(reads)));
      });
    }
    get("explorer-body").replaceChildren(...rows);
  };

  pick.model.addEventListener("change", () => {
    pick.layer.value = pick.head.value = 0;
    draw();
  });
  pick.layer.addEventListener("input", draw);
  pick.head.addEventListener("input", draw);
  draw();
})();
