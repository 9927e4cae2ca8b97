// What the report does in a browser: tables are sorted by a click on a column, loss curves of a task are drawn when it is
// chosen. Without scripts the page is whole but for the curves.
"use strict";

// ---- Tables ---------------------------------------------------------------------------------------------------------

// The number that a cell begins with, after names of one word or none; NaN where there is none.
const numberIn = (text) => parseFloat(text.replace(/,/g, ""));

function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].textContent;
  const order = (a, b) => {
    const [x, y] = [numberIn(value(a)), numberIn(value(b))];
    if (isNaN(x) && isNaN(y)) return value(a).localeCompare(value(b)) * (descending ? -1 : 1);
    if (isNaN(x) || isNaN(y)) return isNaN(x) ? 1 : -1; // what has no number comes last, either way
    return (x - y) * (descending ? -1 : 1);
  };
  body.append(...[...body.rows].sort(order));
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    head.setAttribute("aria-sort", index !== column ? "none" : descending ? "descending" : "ascending");
  });
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const sort = () => sortBy(table, column, head.getAttribute("aria-sort") === "ascending");
    head.tabIndex = 0;
    head.title = "sort";
    head.setAttribute("aria-sort", "none");
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        sort();
      }
    });
  });
}

// ---- Curves ---------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 720, HEIGHT = 380, LEFT = 64, RIGHT = 24, TOP = 12, BOTTOM = 40;

function add(parent, name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Some round numbers between two, at equal distances, or of equal ratios.
function ticks(low, high, logarithmic) {
  if (logarithmic) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    const within = found.filter((x) => x >= low && x <= high);
    const whole = within.filter((x) => Number.isInteger(Math.round(1e6 * Math.log10(x)) / 1e6));
    return within.length <= 6 || whole.length < 2 ? within.slice(0, 9) : whole;
  }
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high; x += step) found.push(x);
  return found;
}

// Draw lines {name: {steps, losses}} into `place`; those in `hidden` by their names alone.
function draw(place, lines, styles, hidden) {
  place.replaceChildren();
  const shown = Object.entries(lines).filter(([name]) => !hidden.has(name));
  const losses = shown.flatMap(([, line]) => line.losses).filter((x) => x !== null);
  const steps = shown.flatMap(([, line]) => line.steps);
  if (!losses.length) return;
  const logarithmic = Math.min(...losses) > 0;
  const scale = logarithmic ? Math.log : (x) => x;
  let [low, high] = [Math.min(...losses), Math.max(...losses)];
  if (low === high) [low, high] = logarithmic ? [low / 2, high * 2] : [low - 1, high + 1];
  const last = Math.max(...steps);
  const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / last;
  const y = (loss) => TOP + ((HEIGHT - TOP - BOTTOM) * (scale(high) - scale(loss))) / (scale(high) - scale(low));
  const svg = add(place, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  for (const loss of ticks(low, high, logarithmic)) {
    add(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(loss), y2: y(loss), class: "grid" });
    add(svg, "text", { x: LEFT - 6, y: y(loss) + 4, "text-anchor": "end" }, String(+loss.toPrecision(3)));
  }
  for (const step of ticks(0, last, false)) {
    add(svg, "text", { x: x(step), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, String(step));
  }
  add(svg, "text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "step");
  for (const [name, line] of shown.reverse()) {
    const points = line.steps.map((step, i) => [step, line.losses[i]]).filter(([, loss]) => loss !== null);
    const at = points.map(([step, loss]) => `${x(step).toFixed(2)},${y(loss).toFixed(2)}`).join(" ");
    add(add(svg, "polyline", { points: at, "data-name": name, ...styles[name] }), "title", {}, name);
  }
}

for (const part of document.querySelectorAll(".curves")) {
  const { tasks, styles } = JSON.parse(part.querySelector("script").textContent);
  const hidden = new Set(), place = document.createElement("div"), legend = document.createElement("div");
  const choose = (label, options) => {
    const made = document.createElement("select");
    made.setAttribute("aria-label", label);
    for (const option of options) made.add(new Option(option));
    made.addEventListener("change", show);
    return made;
  };
  function show() {
    const found = tasks[task.value] ?? {};
    const lines = Object.entries(found).map(([name, line]) => [name, { steps: line.steps, losses: line[measure.value] }]);
    draw(place, Object.fromEntries(lines), styles, hidden);
    legend.replaceChildren(
      ...Object.keys(found).map((name) => {
        const button = document.createElement("button");
        button.textContent = name;
        button.style.borderBottomColor = styles[name].stroke;
        button.style.borderBottomStyle = styles[name]["stroke-dasharray"] ? "dashed" : "solid";
        button.setAttribute("aria-pressed", String(!hidden.has(name)));
        button.addEventListener("click", () => {
          hidden.has(name) ? hidden.delete(name) : hidden.add(name);
          show();
        });
        return button;
      }),
    );
  }
  const task = choose("task", ["choose a task", ...Object.keys(tasks)]), measure = choose("loss", ["test", "train"]);
  legend.className = "legend";
  part.append(task, " ", measure, place, legend);
}
