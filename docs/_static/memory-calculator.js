// The memory calculator: controls, bars and a table of devices, from the numbers in memory-data.js.
(() => {
  const CARDS = {
    "TPU v5e, 16 GB": 16e9,
    "RTX 4090, A10G, 24 GB": 24e9,
    "RTX 5090, TPU v6e, 32 GB": 32e9,
    "A100, 40 GB": 40e9,
    "A6000, L40S, 48 GB": 48e9,
    "A100, H100, 80 GB": 80e9,
    "TPU v5p, 95 GB": 95e9,
    "H200, 141 GB": 141e9,
    "B200, 180 GB": 180e9,
  };
  const KINDS = ["weights", "gradients", "state"];
  const CONTROLS = {
    model: ["Llama", Object.keys(MEMORY.models), "7b"],
    rank: ["rank", [], "1024"],
    dtype: ["weights", ["bfloat16", "float32"], "bfloat16"],
    bits: ["state", [["8", "8 bits"], ["32", "float32"]], "8"],
    gradients: ["gradients", [["cores", "low-rank"], ["full", "full"]], "cores"],
    devices: ["devices", MEMORY.devices.map(String), "1"],
  };

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const gigabytes = (n) => (n < 1e9 ? `${(n / 1e9).toFixed(2)} GB` : `${(n / 1e9).toFixed(1)} GB`);
  const options = (list) => // "value", or ["value", "text"]
    list.map((x) => element("option", { value: [x].flat()[0], textContent: [x].flat().at(-1) }));

  const root = document.getElementById("calculator");
  const selects = {};
  const form = element("form", { className: "calculator-controls" });
  for (const [name, [label, list, chosen]] of Object.entries(CONTROLS)) {
    selects[name] = element("select", { name }, ...options(list));
    selects[name].value = chosen;
    form.append(element("label", {}, label, selects[name]));
  }
  const bars = element("div", { className: "calculator-bars" });
  const table = element("table", { className: "calculator-devices" });
  root.append(form, bars, table);

  // Ranks depend on the model: keep the chosen fraction of the width.
  let place = 2;
  const fillRanks = () => {
    const ranks = Object.keys(MEMORY.models[selects.model.value].ranks);
    selects.rank.replaceChildren(...options(ranks));
    selects.rank.value = ranks[place];
  };

  const rows = () => {
    const { model, rank, dtype, bits, gradients, devices } = Object.fromEntries(
      Object.entries(selects).map(([name, select]) => [name, select.value]),
    );
    const numbers = MEMORY.models[model];
    const at = MEMORY.devices.indexOf(Number(devices));
    const weights = numbers.weights[dtype][at];
    const core = gradients === "cores" ? numbers.ranks[rank].gradients[dtype][at] : weights;
    return {
      AdamW: [weights, weights, numbers.adamw[dtype]["32"][at]],
      "8-bit AdamW": [weights, weights, numbers.adamw[dtype]["8"][at]],
      [`GaLore, rank ${rank}`]: [weights, core, numbers.ranks[rank].state[bits][at]],
    };
  };

  const draw = () => {
    const counted = Object.entries(rows());
    const total = (counts) => counts.reduce((a, b) => a + b, 0);
    const largest = Math.max(...counted.map(([, counts]) => total(counts)));
    bars.replaceChildren(
      ...counted.map(([name, counts]) => {
        const bar = element("div", { className: "calculator-bar" });
        counts.forEach((bytes, i) => {
          const part = element("span", { className: KINDS[i], title: `${KINDS[i]}: ${gigabytes(bytes)}` });
          part.style.width = `${(100 * bytes) / largest}%`;
          part.dataset.bytes = bytes;
          bar.append(part);
        });
        const sum = element("strong", { textContent: gigabytes(total(counts)) });
        const parts = counts.map((bytes, i) => `${KINDS[i]} ${gigabytes(bytes)}`).join(", ");
        return element(
          "div",
          { className: "calculator-row" },
          element("div", {}, element("b", { textContent: name }), " ", sum, element("small", { textContent: ` ${parts}` })),
          bar,
        );
      }),
      element("div", { className: "calculator-legend" }, ...KINDS.flatMap((kind) => [element("span", { className: kind }), ` ${kind} `])),
    );
    const cell = (room) => {
      const text = room < 0 ? `${gigabytes(-room)} too much` : `${gigabytes(room)} left`;
      return element("td", { textContent: text, className: room < 0 ? "too-much" : "fits" });
    };
    table.replaceChildren(
      element("thead", {}, element("tr", {}, ...["each device", ...counted.map(([name]) => name)].map((x) => element("th", { textContent: x })))),
      element(
        "tbody",
        {},
        ...Object.entries(CARDS).map(([card, size]) =>
          element("tr", {}, element("th", { textContent: card }), ...counted.map(([, counts]) => cell(size - total(counts)))),
        ),
      ),
    );
  };

  form.addEventListener("change", (event) => {
    if (event.target === selects.model) fillRanks();
    if (event.target === selects.rank) place = selects.rank.selectedIndex;
    draw();
  });
  fillRanks();
  draw();
})();
