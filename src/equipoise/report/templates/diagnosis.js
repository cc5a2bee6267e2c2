(() => {
  const { root, get, parse, offerDownload } = page;
  const { diagnoses, names } = parse("diagnoses");
  offerDownload(diagnoses.length === 1 ? diagnoses[0] : diagnoses, "diagnosis.json", 1);

  const explorer = get("explorer");
  if (!explorer) return;
  explorer.hidden = false;
  const pick = { model: get("pick-model"), layer: get("pick-layer"), head: get("pick-head") };
  const colors = getComputedStyle(root);
  const shades = [0, 1, 2, 3, 4, 5].filter((i) => colors.getPropertyValue(`--fig-${i}`)).length;

  const element = (tag, text, attributes = {}) => {
    const node = document.createElement(tag);
    if (text !== null) node.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
    return node;
  };

  // Mean over the heads of one layer, ignoring missing values. Position 0 of the head slider shows it.
  const mean = (heads) => {
    if (!Array.isArray(heads[0])) {
      const known = heads.filter((value) => value !== null);
      return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
    }
    return heads[0].map((_, index) => mean(heads.map((head) => head[index])));
  };
  const selectHead = (heads, head) => (head === 0 ? mean(heads) : heads[head - 1]);

  const cell = (value, name) => {
    const node = element("td", value === null ? "–" : `${(100 * value).toFixed(1)} %`);
    const meter = element("span", null, { class: "meter", "aria-hidden": "true" });
    const filled = element("i", null);
    filled.style.width = `${100 * Math.min(Math.max(value ?? 0, 0), 1)}%`;
    const index = names.indexOf(name);
    filled.style.background = index < 0 ? "var(--fig-muted)" : `var(--fig-${index % shades})`;
    meter.append(filled);
    node.append(meter);
    return node;
  };

  const row = (title, shares, modalities, rest) => {
    const node = element("tr", null);
    node.append(element("th", title, { scope: "row" }));
    shares.forEach((value, index) => node.append(cell(value, modalities[index])));
    node.append(cell(rest, null));
    return node;
  };

  const remainder = (shares) => (shares.includes(null) ? null : Math.max(1 - shares.reduce((sum, value) => sum + value, 0), 0));

  const draw = () => {
    const layers = diagnoses[Number(pick.model.value)].details.attention.layers;
    pick.layer.max = layers.length - 1;
    const layer = layers[Number(pick.layer.value)];
    pick.head.max = layer.share.length;
    const head = Number(pick.head.value);
    const headText = head === 0 ? "mean of all" : `${head} of ${layer.share.length}`;
    get("layer-said").textContent = `${Number(pick.layer.value) + 1} of ${layers.length}`;
    get("head-said").textContent = headText;
    pick.layer.setAttribute("aria-valuetext", get("layer-said").textContent);
    pick.head.setAttribute("aria-valuetext", headText);
    get("explorer-said").textContent = `${layer.site}: attention of the queries (rows) to the keys (columns)`;
    const title = element("tr", null);
    ["", ...layer.names, "special"].forEach((name) => title.append(element("th", name, { scope: "col" })));
    get("explorer-head").replaceChildren(title);
    const shares = selectHead(layer.share, head);
    const rows = [row("all queries", shares, layer.names, remainder(shares))];
    if (layer.by_query) {
      selectHead(layer.by_query, head).forEach((reads, index) => {
        if (reads.some((value) => value !== null)) rows.push(row(layer.names[index], reads, layer.names, remainder(reads)));
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
