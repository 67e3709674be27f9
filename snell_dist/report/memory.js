// Draws the charts of a memory report from its data (memory.py, _entry) with Plotly; both are in the page, compressed.
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
document.head.append(Object.assign(document.createElement("script"), { textContent: await unpacked("plotly") }));
const page = JSON.parse(await unpacked("data"));
const MIB = 2 ** 20, GIB = 2 ** 30;
const chosen = { ...page.chosen }, hidden = new Set();
const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const peak = entry => sum(entry.peak);
const several = new Set(page.entries.map(entry => entry.source)).size > 1;
const name = entry => entry.labels[page.series] + (several ? `, ${entry.source}` : "");
const contender = entry => entry.labels[page.series];
const contenders = [...new Set(page.entries.map(contender))];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "x", "triangle-down"]; // with the colours 56 pairs
// Of a group's lines and dots: colour and symbol tell the contender; what was predicted and measured too is open.
const look = entry => {
  const number = contenders.indexOf(contender(entry)), open = several && entry.source === "predicted";
  return { color: page.lines[number % page.lines.length], symbol: SYMBOLS[number % SYMBOLS.length] + (open ? "-open" : ""), dash: open ? "dot" : "solid" };
};
// A contender has one entry in a legend, however many lines.
const firsts = () => { const seen = new Set(); return words => !seen.has(words) && Boolean(seen.add(words)); };
const legend = () => ({ orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11, color: ink("ink") } });
const sides = page.pair.map(([words, source]) => several ? `${words}, ${source}` : words);
let printing = false;

const probe = document.body.appendChild(document.createElement("i"));
const ink = variable => { probe.style.color = `var(--${variable})`; return getComputedStyle(probe).color; };

// As gpus.in_words.
function size(bytes) {
  const [unit, digits, word] = bytes >= GIB ? [GIB, 2, "GiB"] : bytes >= MIB ? [MIB, 1, "MiB"] : bytes >= 1024 ? [1024, 1, "KiB"] : [1, 0, "B"];
  return `${(bytes / unit).toFixed(digits)} ${word}`;
}

// Entries under the chosen filters, but for those that are free.
function matching(...free) {
  const fixed = Object.keys(page.filters).filter(label => !free.includes(label));
  return page.entries.filter(entry => fixed.every(label => entry.labels[label] === chosen[label]));
}

// A choice that no entry has with the others gives way to the nearest one that there is.
function choose(label, value) {
  chosen[label] = value;
  const labels = Object.keys(page.filters), agrees = entry => labels.filter(l => entry.labels[l] === chosen[l]).length;
  const nearest = page.entries.filter(entry => entry.labels[label] === value).reduce((a, b) => agrees(b) > agrees(a) ? b : a);
  for (const l of labels) chosen[l] = nearest.labels[l];
}

const visible = () => page.categories.map((category, i) => ({ ...category, i })).filter(category => !hidden.has(category.i));

// Powers of two on a logarithmic axis of GiB, at most eight or so.
function ticks(values) {
  const low = Math.floor(Math.log2(Math.min(...values))), high = Math.ceil(Math.log2(Math.max(...values)));
  const apart = Math.ceil((high - low + 1) / 8), many = [];
  for (let power = low; power <= high; power += apart) many.push(2 ** power);
  return { tickvals: many, ticktext: many.map(value => size(value * GIB).replace(/\.0+ /, " ")) };
}

// A chart in the page's own inks. `wide`: over the page's whole width.
function draw(place, traces, layout, wide = false) {
  const axis = { gridcolor: ink("line"), linecolor: ink("line"), zerolinecolor: ink("line"), fixedrange: true, automargin: true };
  Plotly.react(place, traces, {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink("soft") },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", dragmode: false, showlegend: false,
    margin: { l: 8, r: 12, t: 24, b: 40 }, hoverlabel: { bgcolor: ink("paper"), bordercolor: ink("line"), font: { color: ink("ink") } },
    ...layout, ...(printing ? { width: wide ? 690 : 335, autosize: false } : { autosize: true }),
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, { displayModeBar: false, responsive: true });
}

function drawStack() {
  const entries = matching(), unit = Math.max(...entries.map(peak)) >= GIB ? [GIB, "GiB"] : [MIB, "MiB"];
  const shown = visible(), names = entries.map(name), totals = entries.map(entry => sum(shown.map(c => entry.peak[c.i])));
  const traces = shown.map(c => ({
    type: "bar", orientation: "h", name: c.name, y: names, x: entries.map(entry => entry.peak[c.i] / unit[0]),
    marker: { color: c.colour, line: { color: ink("paper"), width: 1 } },
    customdata: entries.map(entry => `${size(entry.peak[c.i])}, ${(100 * entry.peak[c.i] / peak(entry)).toFixed(0)} %`),
    hovertemplate: `<b>%{y}</b><br>${c.name}: %{customdata}<extra></extra>`,
  })).filter(trace => trace.x.some(Boolean));
  const top = Math.max(...totals) / unit[0];
  const room = document.body.clientWidth < 500 ? 1.45 : 1.15;
  const cards = page.cards.map(card => [card, card * GIB / unit[0]]).filter(([, x]) => x < room * top);
  draw("stack", traces, {
    barmode: "stack", bargap: 0.3, height: 70 + (printing ? 24 : 38) * names.length, margin: { l: 8, r: 12, t: cards.length ? 24 : 4, b: 40 },
    yaxis: { autorange: "reversed", ticksuffix: "  ", tickfont: { size: 13, color: ink("ink") }, type: "category", showgrid: false },
    xaxis: { title: { text: unit[1] }, range: [0, room * top] },
    shapes: cards.map(([, x]) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { dash: "dash", width: 1, color: ink("soft") } })),
    annotations: [
      ...entries.map((entry, i) => ({ x: totals[i] / unit[0], y: names[i], xanchor: "left", xshift: 4, showarrow: false, text: `<b>${size(totals[i])}</b>`, font: { color: ink("ink") }, bgcolor: ink("paper") })),
      ...cards.map(([card, x]) => ({ x, y: 1, yref: "paper", yanchor: "bottom", showarrow: false, text: `${card} GiB`, font: { size: 11 } })),
    ],
  }, true);
}

const recomputes = (entry, i) => entry.phases[i] === "recompute" && entry.blocks[entry.visits[i]] !== "";

// Forward, then backward with what it recomputes, then the optimizer: from where to where, and their words.
function spans(entry) {
  const phases = entry.phases, again = phases.some((_, i) => recomputes(entry, i));
  const first = phases.findIndex(phase => phase !== "forward"), step = phases.indexOf("step");
  const back = first < 0 ? phases.length : first, end = step < 0 ? phases.length : step;
  return [[0, back, "forward"], [back, end, again ? "backward, recomputing" : "backward"], [end, phases.length, "step"]].filter(([a, b]) => b > a);
}

function drawLine(side, entry, top) {
  const unit = top >= GIB ? [1024, "GiB"] : [1, "MiB"], shown = visible(), visits = entry.phases.length;
  const step = values => [...values, values[values.length - 1]], x = step(entry.phases).map((_, i) => i);
  const lines = shown.map(c => ({ ...c, values: entry.line[c.i].map(v => v / unit[0]) })).filter(c => c.values.some(Boolean));
  const total = entry.phases.map((_, i) => sum(lines.map(c => c.values[i])));
  const traces = lines.map(c => ({
    type: "scatter", mode: "lines", stackgroup: "bytes", name: c.name, x, y: step(c.values), fillcolor: c.colour, line: { shape: "hv", width: 0.5, color: ink("paper") },
    hovertemplate: `%{y:,.2f} ${unit[1]}`,
  }));
  traces.push({ type: "scatter", mode: "lines", name: "all", x, y: step(total), line: { shape: "hv", width: 1.2, color: ink("ink") }, hovertemplate: `<b>%{y:,.2f} ${unit[1]}</b>, %{customdata}`,
    customdata: step(entry.phases.map((phase, i) => [phase, entry.blocks[entry.visits[i]]].filter(Boolean).join(", "))) });
  const at = entry.at.moment + 0.5, height = 1.25 * top / MIB / unit[0], held = entry.held / MIB / unit[0];
  const strip = (a, b, y0, y1, fillcolor, opacity) => ({ type: "rect", xref: "x", yref: "paper", x0: a, x1: b, y0, y1, fillcolor, opacity, line: { width: 0 }, layer: "below" });
  const bands = spans(entry);
  draw(document.querySelector(`[data-line="${side}"]`), traces, {
    height: 330, hovermode: "x", margin: { l: 8, r: 8, t: 30, b: 30 },
    xaxis: { range: [0, visits], showticklabels: false, showgrid: false, title: { text: "time: blocks visited, in order" } },
    yaxis: { range: [0, height], ticksuffix: ` ${unit[1]}` },
    shapes: [
      ...bands.map(([a, b], i) => strip(a, b, 0, 1, ink(i % 2 ? "line" : "wash"), 0.7)),
      ...entry.phases.flatMap((_, i) => recomputes(entry, i) ? [strip(i, i + 1, 0.97, 1, ink("soft"), 0.9)] : []),
      { type: "line", x0: 0, x1: visits, y0: held, y1: held, line: { dash: "dash", width: 1, color: ink("ink") } },
      { type: "line", x0: at, x1: at, y0: 0, y1: peak(entry) / MIB / unit[0], line: { dash: "dot", width: 1.5, color: ink("ink") } },
    ],
    annotations: [
      ...bands.map(([a, b, word]) => ({ x: word === "step" ? visits : (a + b) / 2, xanchor: word === "step" ? "right" : "center", y: 1, yref: "paper", yanchor: "bottom", showarrow: false, text: word })),
      { x: at, y: peak(entry) / MIB / unit[0], yanchor: "bottom", xanchor: at < visits / 4 ? "left" : at > 0.75 * visits ? "right" : "center", showarrow: false,
        text: `<b>peak ${size(peak(entry))}</b><br>${entry.at.words}`, font: { color: ink("ink") } },
    ],
  });
}

function drawLayers(side, entry, top) {
  const unit = top >= GIB ? [GIB, "GiB"] : [MIB, "MiB"], blocks = entry.layers.map(([i]) => entry.blocks[i] || "outside");
  const traces = visible().map(c => ({
    type: "bar", name: c.name, x: blocks, y: entry.layers.map(([, bytes]) => bytes[c.i] / unit[0]), marker: { color: c.colour },
    customdata: entry.layers.map(([, bytes]) => size(bytes[c.i])), hovertemplate: `<b>%{x}</b><br>${c.name}: %{customdata}<extra></extra>`,
  })).filter(trace => trace.y.some(Boolean));
  draw(document.querySelector(`[data-layers="${side}"]`), traces, {
    barmode: "stack", bargap: 0.12, height: 260, margin: { l: 8, r: 8, t: 10, b: 60 },
    xaxis: { type: "category", tickangle: -45, tickfont: { size: 11 } }, yaxis: { range: [0, 1.05 * top / unit[0]], ticksuffix: ` ${unit[1]}` },
  });
  document.querySelector(`[data-name="${side}"]`).textContent = name(entry);
  document.querySelector(`[data-owners="${side}"] tbody`).replaceChildren(...entry.owners.map(([module, category, bytes]) => {
    const row = document.createElement("tr"), dot = document.createElement("i");
    row.insertCell().textContent = module || "outside";
    const cell = row.insertCell();
    cell.className = "text";
    dot.style.background = page.categories[category].colour;
    cell.append(dot, page.categories[category].name);
    row.insertCell().textContent = size(bytes);
    return row;
  }));
}

function drawSides() {
  const entries = matching(), pair = [0, 1].map(side => entries.find(entry => name(entry) === sides[side]) ?? entries[Math.min(side, entries.length - 1)]);
  document.querySelectorAll("[data-side]").forEach((select, side) => {
    select.replaceChildren(...entries.map(entry => new Option(name(entry), name(entry), false, entry === pair[side])));
  });
  const top = Math.max(...pair.map(peak)), block = Math.max(...pair.flatMap(entry => entry.layers.map(([, bytes]) => sum(bytes))));
  pair.forEach((entry, side) => { drawLine(side, entry, top); drawLayers(side, entry, block); });
}

function drawGrowth() {
  const groups = Map.groupBy(matching(page.over), name), first = firsts();
  const traces = [...groups].map(([words, entries]) => {
    const sorted = [...entries].sort((a, b) => a.labels[page.over] - b.labels[page.over]), { color, symbol, dash } = look(sorted[0]);
    return {
      type: "scatter", mode: "lines+markers", name: contender(sorted[0]), legendgroup: contender(sorted[0]), showlegend: first(contender(sorted[0])), x: sorted.map(entry => entry.labels[page.over]), y: sorted.map(entry => peak(entry) / GIB),
      line: { color, dash, width: 2 }, marker: { size: 8, symbol },
      customdata: sorted.map(entry => size(peak(entry))), hovertemplate: `<b>${words}</b>, ${page.over} %{x}: %{customdata}<extra></extra>`,
    };
  });
  const steps = [...new Set(traces.flatMap(trace => trace.x))].sort((a, b) => a - b);
  draw("growth", traces, {
    height: 380, showlegend: true, legend: legend(),
    xaxis: { title: { text: page.over }, type: "log", tickvals: steps, ticktext: steps.map(String) }, yaxis: { type: "log", ...ticks(traces.flatMap(trace => trace.y)) },
  });
}

function drawPareto() {
  const more = !page.against, value = entry => more ? entry.trainable : entry.figures[page.against];
  const first = firsts(), [facet] = Object.keys(page.filters), here = matching(), rest = matching(facet).filter(entry => !here.includes(entry));
  const dots = ([, entries], opacity) => ({
    type: "scatter", mode: "markers", name: contender(entries[0]), legendgroup: contender(entries[0]), showlegend: opacity === 1 && first(contender(entries[0])), x: entries.map(value), y: entries.map(entry => peak(entry) / GIB), opacity,
    marker: { size: opacity === 1 ? 12 : 7, symbol: look(entries[0]).symbol, color: look(entries[0]).color },
    customdata: entries.map(entry => [[name(entry), ...Object.keys(page.filters).map(label => `${label} ${entry.labels[label]}`)].join(", "), size(peak(entry))]),
    hovertemplate: `<b>%{customdata[0]}</b><br>%{customdata[1]}, %{x:,}<extra></extra>`,
  });
  const sorted = [...here].sort((a, b) => (more ? value(b) - value(a) : value(a) - value(b)) || peak(a) - peak(b));
  const front = sorted.filter((entry, i) => sorted.slice(0, i).every(other => peak(other) > peak(entry)));
  const traces = [...Map.groupBy(rest, name)].map(group => dots(group, 0.25));
  traces.push({ type: "scatter", mode: "lines", showlegend: false, hoverinfo: "skip", x: front.map(value), y: front.map(entry => peak(entry) / GIB), line: { color: ink("soft"), width: 1.5, dash: "dot" } });
  traces.push(...[...Map.groupBy(here, name)].map(group => dots(group, 1)));
  draw("pareto", traces, {
    height: 380, showlegend: true, legend: legend(),
    xaxis: { type: "log", title: { text: page.against || "trainable parameters" }, dtick: 1 }, yaxis: { type: "log", ...ticks(traces.flatMap(trace => trace.y)) },
  });
}

function drawAll() {
  document.querySelectorAll("select[data-label]").forEach(select => { select.value = page.filters[select.dataset.label].indexOf(chosen[select.dataset.label]); });
  drawStack();
  drawSides();
  drawGrowth();
  drawPareto();
}

document.querySelectorAll("select[data-label]").forEach(select => {
  select.onchange = () => { choose(select.dataset.label, page.filters[select.dataset.label][select.value]); drawAll(); };
});
document.querySelectorAll("[data-side]").forEach((select, side) => {
  select.onchange = () => { sides[side] = select.value; drawSides(); };
});
document.querySelectorAll("[data-category]").forEach(button => button.onclick = () => {
  const category = Number(button.dataset.category), hide = !hidden.has(category);
  hidden[hide ? "add" : "delete"](category);
  button.ariaPressed = String(!hide);
  drawStack();
  drawSides();
});
document.getElementById("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "light dark" ? matchMedia("(prefers-color-scheme: dark)").matches : document.documentElement.dataset.theme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  drawAll();
};
matchMedia("(prefers-color-scheme: dark)").onchange = drawAll;
addEventListener("beforeprint", () => { printing = true; document.querySelectorAll("details").forEach(part => { part.open = true; }); drawAll(); });
addEventListener("afterprint", () => { printing = false; drawAll(); });
drawAll();
