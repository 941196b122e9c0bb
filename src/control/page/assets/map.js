// The map of a disk or a base: a canvas of cells, a legend, and the cell under the cursor as text.

import { make, setText, share, size } from "./format.js";

// In the order in which they fill a cell from below.
const PLACES = [
  ["delta", "in the delta"],
  ["cached", "cached"],
  ["fetching", "being fetched"],
  ["local", "in a local file"],
  ["absent", "on the server only"],
  ["unknown", "unknown"],
  ["zero", "zeros"],
];
const OVERLAYS = [
  ["memory", "in memory"],
  ["read", "read by the recorded boot"],
  ["prefetched", "prefetched at a boot"],
];
const CELL = 14;
const GAP = 1;

// So many cells fit the width of the page in a few lines.
export function cellsThatFit(canvas) {
  const columns = Math.max(16, Math.floor(canvas.parentElement.clientWidth / CELL));
  return Math.min(4096, columns * 8);
}

export class MapView {
  constructor() {
    this.canvas = document.getElementById("map");
    this.cell = document.getElementById("cell");
    this.legend = document.querySelector("#legend tbody");
    this.map = null;
    this.at = 0;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(map) {
    if (this.map?.name !== map?.name) {
      this.at = 0;
      setText(this.cell, "");
    }
    this.map = map;
    this.draw();
    this.drawLegend();
  }

  count() {
    return this.map?.absent.length ?? 0;
  }

  draw() {
    const width = this.canvas.parentElement.clientWidth;
    if (!this.map || !width) return;
    const scale = window.devicePixelRatio || 1;
    this.columns = Math.max(1, Math.floor(width / CELL));
    const lines = Math.ceil(this.count() / this.columns);
    const height = Math.max(1, lines) * CELL;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const styles = getComputedStyle(document.documentElement);
    const colour = Object.fromEntries(PLACES.map(([key]) => [key, styles.getPropertyValue(`--${key}`).trim()]));
    const text = styles.getPropertyValue("--text").trim();
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    for (let cell = 0; cell < this.count(); cell += 1) {
      const x = (cell % this.columns) * CELL;
      let y = Math.floor(cell / this.columns) * CELL + CELL - GAP;
      const top = y - (CELL - GAP);
      const bytes = this.bytesOf(cell);
      const parts = PLACES.map(([key]) => [key, this.map[key]?.[cell] ?? 0]).filter(([, part]) => part > 0);
      for (const [key, part] of parts) {
        // What is there can be seen, however little it is.
        const tall = Math.max((part / bytes) * (CELL - GAP), key === "zero" || key === "absent" ? 0 : 2);
        context.fillStyle = colour[key];
        context.fillRect(x, Math.max(top, y - tall), CELL - GAP, Math.min(tall, y - top));
        y -= tall;
        if (y <= top) break;
      }
      if (this.map.read?.[cell] > 0) {
        context.fillStyle = text;
        context.fillRect(x + 2, top + CELL - GAP - 3, Math.max(1, (CELL - GAP - 4) * (this.map.read[cell] / bytes)), 2);
      }
      if (this.map.memory?.[cell] > 0) {
        context.fillStyle = text;
        context.fillRect(x + 2, top + 1, Math.max(1, (CELL - GAP - 4) * (this.map.memory[cell] / bytes)), 2);
      }
      if (cell === this.at && document.activeElement === this.canvas) {
        context.strokeStyle = text;
        context.strokeRect(x + 0.5, top + 0.5, CELL - GAP - 1, CELL - GAP - 1);
      }
    }
    this.canvas.setAttribute("aria-label", this.summary());
  }

  bytesOf(cell) {
    return Math.min(this.map.cell_bytes, this.map.size - cell * this.map.cell_bytes) || 1;
  }

  summary() {
    const { total, size: all, name } = this.map;
    const parts = PLACES.filter(([key]) => total[key] > 0);
    return `Map of ${name}: ${parts.map(([key, text]) => `${share(total[key], all)} ${text}`).join(", ")}`;
  }

  drawLegend() {
    const { total, size: all } = this.map ?? { total: {}, size: 0 };
    const shown = [...PLACES, ...OVERLAYS].filter(([key]) => total[key] > 0);
    const rows = shown.map(([key, text]) => {
      const row = make("tr");
      const kind = make("td");
      const overlay = OVERLAYS.some(([other]) => other === key);
      kind.append(make("span", "", `swatch ${overlay ? "overlay" : key}`), text);
      row.append(kind, make("td", size(total[key]), "number"), make("td", share(total[key], all), "number"));
      return row;
    });
    if (this.map && !this.map.exact) {
      const row = make("tr");
      const cell = make("td", "Approximate: a part of it was looked at.");
      cell.colSpan = 3;
      row.append(cell);
      rows.push(row);
    }
    this.legend.replaceChildren(...rows);
  }

  describe() {
    if (!this.map || this.at >= this.count()) return;
    const from = this.at * this.map.cell_bytes;
    const parts = [...PLACES, ...OVERLAYS].filter(([key]) => this.map[key]?.[this.at] > 0);
    const texts = parts.map(([key, text]) => `${size(this.map[key][this.at])} ${text}`);
    setText(this.cell, `${size(from)} to ${size(from + this.bytesOf(this.at))}: ${texts.join(", ")}`);
  }

  point(event) {
    if (!this.map) return;
    const column = Math.floor(event.offsetX / CELL);
    const cell = Math.floor(event.offsetY / CELL) * this.columns + column;
    if (column >= this.columns || cell < 0 || cell >= this.count()) return;
    this.at = cell;
    this.describe();
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    let at = this.at;
    if (event.key in moves) at += moves[event.key];
    else if (event.key === "Home") at = 0;
    else if (event.key === "End") at = this.count() - 1;
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (at < 0 || at >= this.count()) return;
    this.at = at;
    this.draw();
    this.describe();
  }
}
