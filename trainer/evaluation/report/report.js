"use strict";

// A heading's button sorts by its column, a second click the other way; what has no value stays below.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      const key = row => row.cells[column].dataset.key;
      const numbers = head.classList.contains("number");
      const order = (a, b) => numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
      const rows = [...body.rows].sort((a, b) => {
        if (key(a) === undefined || key(b) === undefined) return (key(a) === undefined) - (key(b) === undefined);
        return order(key(a), key(b)) * (ascending ? 1 : -1);
      });
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}

// A table that needs more room than its box has becomes blocks, whatever its cells were estimated to need.
const fit = () => {
  for (const box of document.querySelectorAll(".tablebox")) {
    const table = box.querySelector("table");
    if (table.dataset.stacked) table.classList.remove("fit-always");
    const spills = table.scrollWidth > box.clientWidth + 1;
    table.dataset.stacked = spills ? "1" : "";
    if (spills) table.classList.add("fit-always");
  }
};
fit();
window.addEventListener("resize", fit);

// The controls choose over which axis and in which look curves are shown; a figure without it shows the nearest it has.
const controls = document.querySelector(".controls");
const chosen = {};

const choose = () => {
  for (const chart of document.querySelectorAll(".chart")) {
    const looks = [...chart.querySelectorAll(".look")];
    const fits = look => 2 * (look.dataset.look === chosen.look) + (look.dataset.axis === chosen.axis);
    const best = looks.reduce((a, b) => fits(b) > fits(a) ? b : a);
    looks.forEach(look => { look.hidden = look !== best; });
  }
  const ofRuns = chosen.look === "smooth" || chosen.look === "logged";
  for (const run of document.querySelectorAll(".legend .run")) run.hidden = !ofRuns;
};

if (controls) {
  controls.hidden = false;
  for (const button of controls.querySelectorAll("button")) {
    const { kind, value } = button.dataset;
    if (button.getAttribute("aria-pressed") === "true") chosen[kind] = value;
    button.addEventListener("click", () => {
      chosen[kind] = value;
      for (const other of controls.querySelectorAll(`[data-kind="${kind}"]`)) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      choose();
    });
  }
  choose();
}

// The legend hides and shows a method's lines.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shows = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shows));
    for (const part of document.querySelectorAll(`.chart [data-n="${button.dataset.n}"]`)) {
      part.style.display = shows ? "" : "none";
    }
  });
}

// A chart shows each line's value nearest to the pointer, or to where the arrow keys have moved.
for (const chart of document.querySelectorAll(".chart")) {
  const tip = chart.querySelector(".tip"), values = JSON.parse(chart.querySelector("script").textContent);
  for (const look of chart.querySelectorAll(".look")) {
    const svg = look.querySelector("svg"), guide = look.querySelector(".guide");
    const { x: name, lines } = values[look.dataset.look];
    const places = [...look.querySelectorAll(".line")].map(path =>
      path.getAttribute("d").slice(1).split("L").map(point => Number(point.split(" ")[0])));
    const all = [...new Set(places.flat())].sort((a, b) => a - b);
    let at = all.length - 1;

    const nearest = (of, px) => of.reduce((best, x, i) => Math.abs(x - px) < Math.abs(of[best] - px) ? i : best, 0);

    const show = px => {
      const rows = lines.map((line, i) => ({ line, i, point: nearest(places[i], px) }));
      const closest = rows.reduce((a, b) =>
        Math.abs(places[b.i][b.point] - px) < Math.abs(places[a.i][a.point] - px) ? b : a);
      const x = places[closest.i][closest.point];
      guide.setAttribute("x1", x);
      guide.setAttribute("x2", x);
      guide.setAttribute("visibility", "visible");
      const heading = document.createElement("strong");
      heading.textContent = `${name} ${closest.line.at[closest.point].toLocaleString("en")}`;
      tip.replaceChildren(heading, ...rows.map(({ line, point }) => {
        const row = document.createElement("div"), label = document.createElement("span"), dot = document.createElement("i");
        dot.style.background = line.colour;
        label.append(dot, line.label);
        const value = document.createElement("b");
        value.textContent = Number(line.y[point].toPrecision(4)).toString();
        row.append(label, value);
        return row;
      }));
      tip.hidden = false;
      const right = x > svg.viewBox.baseVal.width / 2;
      tip.style.left = right ? "12px" : "auto";
      tip.style.right = right ? "auto" : "12px";
    };
    const hide = () => { tip.hidden = true; guide.setAttribute("visibility", "hidden"); };

    const follow = event => {
      const box = svg.getBoundingClientRect();
      show((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      at = Math.min(all.length - 1, Math.max(0, at + step));
      show(all[at]);
    });
  }
}

// A click shows an image large; arrow keys move to the next one, and to the same one of the next run.
const large = document.querySelector("dialog.large");
const rows = [...document.querySelectorAll(".strip-row")].map(row => [...row.querySelectorAll("button[data-title]")]);
let open = null;

const enlarge = button => {
  open = button;
  large.querySelector("img").src = button.querySelector("img").src;
  large.querySelector("img").alt = large.querySelector("p").textContent = button.dataset.title;
  if (!large.open) large.showModal();
};
for (const button of document.querySelectorAll("button[data-title]")) {
  button.addEventListener("click", () => enlarge(button));
}
large.addEventListener("click", event => { if (event.target === large) large.close(); });
large.querySelector(".close").addEventListener("click", () => large.close());
large.addEventListener("keydown", event => {
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
  const row = rows.findIndex(buttons => buttons.includes(open));
  if (row < 0 || (!down && !right)) return;
  event.preventDefault();
  const isSample = button => !button.classList.contains("all");
  const column = rows[row].filter(isSample).indexOf(open);
  const next = isSample(open) ? rows[row + down]?.filter(isSample)[column + right] : rows[row + down]?.find(b => !isSample(b));
  if (next) enlarge(next);
});
