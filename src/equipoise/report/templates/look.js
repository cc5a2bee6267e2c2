(() => {
  const { get, parse, offerDownload } = page;
  const look = parse("look");
  offerDownload(look, "look.json");

  const maps = look.maps;
  if (!maps.layers.length) return;

  // Decodes float16, for browsers without Float16Array.
  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const rest = bits & 1023;
    if (exponent === 31) return NaN;
    return exponent ? sign * (1 + rest / 1024) * 2 ** (exponent - 15) : (sign * rest) / 2 ** 24;
  };
  const unpacked = ({ shape, float16 }) => {
    const text = atob(float16);
    const values = new Float32Array(text.length / 2);
    for (let i = 0; i < values.length; i++) {
      values[i] = half(text.charCodeAt(2 * i) | (text.charCodeAt(2 * i + 1) << 8));
    }
    return { shape, values };
  };
  const mean = unpacked(maps.mean);
  const single = unpacked(maps.by_head);
  const [, layers, keys] = mean.shape;
  const [withHeads, , heads] = single.shape;
  const targets = look.tokens.flatMap((token, place) => (token.modality === look.target ? [place] : []));

  // Attention of one query to every token. Layer 0 and head 0 select the mean over all layers or heads.
  const row = (reader, layer, head) => {
    const found = new Float32Array(keys);
    const chosen = layer ? [layer - 1] : [...Array(layers).keys()];
    const byHead = head > 0 && reader < withHeads;
    for (const l of chosen) {
      const start = byHead ? ((reader * layers + l) * heads + head - 1) * keys : (reader * layers + l) * keys;
      const values = byHead ? single.values : mean.values;
      for (let k = 0; k < keys; k++) found[k] += (values[start + k] || 0) / chosen.length;
    }
    return found;
  };
  const part = (values, places) => places.reduce((sum, place) => sum + values[place], 0);
  const percent = (value) => {
    const figure = 100 * value;
    return `${figure >= 9.95 ? figure.toFixed(0) : figure >= 0.095 ? figure.toFixed(1) : figure.toFixed(2)}\u00a0%`;
  };
  const visible = (text) => text.trim() || "a space";

  const layer = get("layer");
  const head = get("head");
  const status = get("told");
  // One scene for each image; a page of one image has no list of them.
  const described = look.scenes?.length ? look.scenes : [{ ...look, places: targets }];
  const scenes = [...document.querySelectorAll("canvas.map")].map((canvas, index) => ({
    ...described[index], canvas, cover: canvas.parentElement.classList.contains("frame") ? canvas.parentElement : null,
  }));
  const over = get("over");
  const weak = get("weak");
  const chips = [...document.querySelectorAll(".chip[data-reader]")];
  let chosen = chips.find((chip) => chip.getAttribute("aria-pressed") === "true");

  const STOPS = [[20, 19, 43], [132, 32, 105], [229, 92, 48], [246, 215, 70]];
  const shade = (value) => {
    const place = Math.min(value, 0.9999) * (STOPS.length - 1);
    const below = Math.floor(place);
    return STOPS[below].map((from, c) => from + (STOPS[below + 1][c] - from) * (place - below));
  };

  // Description of a position in words.
  const describePosition = (index, { rows, columns, known }, box) => {
    if (box) {
      const [x, y] = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2].map((part) => `${Math.round(100 * part)}\u00a0%`);
      return `at ${x} of the width and ${y} of the height`;
    }
    if (look.target === "audio") return `at ${Math.round((100 * (index + 0.5)) / columns)}\u00a0% of its duration`;
    if (!known) return `at token ${index + 1} of ${columns}`;
    return `in row ${Math.floor(index / columns) + 1} of ${rows}, column ${(index % columns) + 1} of ${columns}`;
  };

  const draw = (values, whole) => {
    const drawn = scenes.flatMap(({ places }) => places);
    const top = Math.max(...drawn.map((place) => values[place]), 0);
    let description = `No attention goes to the ${look.target}.`;
    const name = (number) => (scenes.length > 1 ? scenes[number].title || `image ${number + 1}` : `the ${look.target}`);
    scenes.forEach(({ canvas, grid, places, boxes }, number) => {
      const figures = places.map((place) => values[place]);
      const context = canvas.getContext("2d");
      const covers = canvas.classList.contains("strip");
      const colors = figures.map((figure) => {
        const value = top ? (weak.checked ? Math.sqrt(figure / top) : figure / top) : 0;
        return [...shade(value), covers ? 255 : Math.round(255 * (0.3 + 0.5 * value))];
      });
      const image = context.createImageData(canvas.width, canvas.height);
      if (boxes?.length) {
        boxes.forEach((box, i) => {
          const [left, right] = [box[0], box[2]].map((edge) => Math.round(edge * canvas.width));
          const [upper, lower] = [box[1], box[3]].map((edge) => Math.round(edge * canvas.height));
          for (let y = upper; y < lower; y++) {
            for (let x = left; x < right; x++) image.data.set(colors[i], 4 * (y * canvas.width + x));
          }
        });
      } else {
        colors.forEach((color, i) => image.data.set(color, 4 * i));
      }
      context.putImageData(image, 0, 0);
      const brightest = figures.indexOf(top);
      let own = top ? "" : description;
      if (top && brightest >= 0) {
        const where = scenes.length > 1 ? `${name(number)}, ` : "";
        own = `The maximum is ${where}${describePosition(brightest, grid, boxes?.[brightest])}: ${percent(top)}.`;
        description = own;
      }
      canvas.setAttribute("aria-label", `Attention of ${whole} over ${name(number)}. ${own}`.trim());
    });
    get("high").textContent = `${percent(top)} per token`;
    if (scenes.length > 1) {
      const parts = scenes.map(({ places }, number) => `${name(number)} ${percent(part(values, places))}`);
      description += ` By map: ${parts.join("; ")}.`;
    }
    for (const [places, what] of [
      [look.unplaced ?? [], "of the image that cover no single region"],
      [look.separators ?? [], "of text between the tiles"],
    ]) {
      if (places.length) description += ` Tokens ${what} (${places.length}): ${percent(part(values, places))}.`;
    }
    return description;
  };

  const color = (values, l, h) => {
    const mode = document.querySelector("input[name=color]:checked")?.value ?? "read";
    const scored = [];
    document.querySelectorAll(".chip").forEach((chip) => {
      let value = null;
      if (mode === "looks" && chip.dataset.reader !== undefined) value = part(row(Number(chip.dataset.reader), l, h), targets);
      else if (mode === "read" && chip.dataset.place !== undefined) value = values[Number(chip.dataset.place)];
      scored.push([chip, value]);
    });
    const top = Math.max(...scored.map(([, value]) => value ?? 0), 1e-12);
    for (const [chip, value] of scored) {
      chip.classList.toggle("read", mode === "read");
      chip.style.setProperty("--part", `${Math.round((44 * (value ?? 0)) / top)}%`);
      chip.title = value === null ? "" : mode === "looks" ? `${percent(value)} of its attention goes to the ${look.target}` : `receives ${percent(value)}`;
    }
  };

  const show = () => {
    const reader = Number(chosen.dataset.reader);
    head.disabled = reader >= withHeads;
    const l = Number(layer.value);
    const h = head.disabled ? 0 : Number(head.value);
    get("layer-said").textContent = l ? String(maps.layers[l - 1]) : "all, mean";
    get("head-said").textContent = head.disabled ? (withHeads ? "all; single heads for the whole answer only" : "all, mean") : h ? String(h - 1) : "all, mean";
    const values = row(reader, l, h);
    const { text, place } = maps.readers[reader];
    const who = place === null ? text : `“${visible(text)}”`;
    const where = `in ${l ? `layer ${maps.layers[l - 1]}` : "all layers"}, ${h ? `head ${h - 1}` : "all heads"}`;
    const parts = look.modalities.map((name) => {
      const places = look.tokens.flatMap((token, i) => (token.modality === name ? [i] : []));
      // An encoder-decoder's cross-attention has no keys of text.
      const unread = look.by_construction && name !== look.target;
      return places.length && !unread ? `${percent(part(values, places))} to ${places.length === 1 ? "the 1 token" : `the ${places.length} tokens`} of ${name}` : null;
    });
    let summary = `Attention of ${who} ${where}: ${parts.filter(Boolean).join(", ")}.`;
    if (scenes.length) summary += ` ${draw(values, `${who} ${where}`)}`;
    status.textContent = summary;
    color(values, l, h);
  };

  const choose = (chip) => {
    chosen.setAttribute("aria-pressed", "false");
    chosen.tabIndex = -1;
    chosen = chip;
    chosen.setAttribute("aria-pressed", "true");
    chosen.tabIndex = 0;
    show();
  };
  chosen.tabIndex = 0;
  for (const chip of chips) {
    chip.addEventListener("click", () => choose(chip));
    // The list is one tab stop; arrow keys move between tokens.
    chip.addEventListener("keydown", (event) => {
      const index = chips.indexOf(chip);
      const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: chips.length - 1 }[event.key];
      if (next === undefined || !chips[next]) return;
      event.preventDefault();
      choose(chips[next]);
      chips[next].focus();
    });
  }
  for (const input of document.querySelectorAll(".explorer input")) {
    input.addEventListener("input", show);
  }

  const cover = () => {
    for (const { canvas, cover: frame } of scenes) {
      if (!frame) continue;
      frame.classList.toggle("over", over.checked);
      canvas.hidden = !over.checked;
    }
  };
  for (const { canvas, cover: box, frame, boxes } of scenes) {
    canvas.hidden = false;
    if (boxes?.length) {
      const picture = box.querySelector("img");
      const size = () => {
        [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
        box.closest(".frames").classList.toggle("wide", scenes.length === 2 && canvas.width > canvas.height);
      };
      if (picture.complete) size();
      else picture.addEventListener("load", () => (size(), show()));
    }
    if (!box || !over) continue;
    const [left, upper, right, lower] = frame.map((edge) => 100 * edge);
    Object.assign(canvas.style, { left: `${left}%`, top: `${upper}%`, width: `${right - left}%`, height: `${lower - upper}%` });
  }
  if (over) {
    over.addEventListener("input", cover);
    cover();
  }
  document.querySelectorAll(".sliders, .scale, .switches, .colors").forEach((part) => (part.hidden = false));
  show();
})();
