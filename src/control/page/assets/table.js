// A table that stays usable with thousands of rows: one page of rows is in the document; filter and sort work on all.

import { make, setText } from "./format.js";

const PAGE = 50;

export class Table {
  // columns: {key, title, text(row), sort(row), number, tone(row)}
  constructor(name, columns, onOpen) {
    this.name = name;
    this.columns = columns;
    this.onOpen = onOpen;
    this.rows = [];
    this.page = 0;
    this.sortKey = columns[0].key;
    this.descending = false;
    this.current = 0;
    this.selected = null;
    const part = (suffix) => document.getElementById(`${name}-${suffix}`);
    this.table = part("table");
    this.filter = part("filter");
    this.count = part("count");
    this.before = part("before");
    this.next = part("next");
    this.head = this.table.createTHead().insertRow();
    this.body = this.table.createTBody();
    for (const column of columns) {
      const cell = make("th", "", column.number ? "number" : "");
      cell.scope = "col";
      const button = make("button", column.title);
      button.type = "button";
      button.addEventListener("click", () => this.sortBy(column.key));
      cell.append(button);
      this.head.append(cell);
    }
    this.filter.addEventListener("input", () => {
      this.page = 0;
      this.current = 0;
      this.draw();
    });
    this.filter.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "Enter") {
        event.preventDefault();
        this.focusRow(0);
      }
    });
    this.before.addEventListener("click", () => this.turn(-1));
    this.next.addEventListener("click", () => this.turn(1));
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row) this.open([...this.body.rows].indexOf(row));
    });
    this.body.addEventListener("focusin", (event) => {
      const at = [...this.body.rows].indexOf(event.target.closest("tr"));
      if (at >= 0) this.setCurrent(at);
    });
    this.body.addEventListener("keydown", (event) => this.key(event));
  }

  show(rows) {
    this.rows = rows;
    this.draw();
  }

  select(name) {
    this.selected = name;
    this.draw();
  }

  sortBy(key) {
    this.descending = this.sortKey === key ? !this.descending : false;
    this.sortKey = key;
    this.page = 0;
    this.draw();
  }

  turn(by) {
    this.page += by;
    this.current = 0;
    this.draw();
  }

  focusRow(at) {
    const rows = this.body.rows;
    if (!rows.length) return;
    this.setCurrent(Math.min(Math.max(at, 0), rows.length - 1));
    rows[this.current].focus();
  }

  setCurrent(at) {
    this.current = at;
    [...this.body.rows].forEach((row, index) => {
      row.tabIndex = index === at ? 0 : -1;
    });
  }

  open(at) {
    const row = this.shown[at];
    if (row) this.onOpen(row);
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const moves = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 };
    if (event.key in moves) this.focusRow(this.current + moves[event.key]);
    else if (event.key === "Home") this.focusRow(0);
    else if (event.key === "End") this.focusRow(PAGE);
    else if (event.key === "PageDown" || event.key === "PageUp") {
      this.turn(event.key === "PageDown" ? 1 : -1);
      this.focusRow(0);
    } else if (event.key === "Enter" || event.key === " ") this.open(this.current);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // The rows that the filter lets through, in order.
  matching() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const tests = words.map((word) => {
      const [key, rest] = [word.slice(0, word.indexOf(":")), word.slice(word.indexOf(":") + 1)];
      const column = word.includes(":") && this.columns.find((column) => column.key === key);
      const columns = column ? [column] : this.columns;
      const wanted = column ? rest : word;
      return (row) => columns.some((column) => column.text(row).toLowerCase().includes(wanted));
    });
    const rows = this.rows.filter((row) => tests.every((test) => test(row)));
    const column = this.columns.find((column) => column.key === this.sortKey);
    const value = column.sort ?? column.text;
    const sign = this.descending ? -1 : 1;
    const order = new Intl.Collator("en", { numeric: true });
    return rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const by = typeof x === "number" && typeof y === "number" ? x - y : order.compare(String(x), String(y));
      return sign * by || order.compare(a.name, b.name);
    });
  }

  draw() {
    const rows = this.matching();
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    const first = this.page * PAGE;
    this.shown = rows.slice(first, first + PAGE);
    const last = first + this.shown.length;
    const of = rows.length === this.rows.length ? `${rows.length}` : `${rows.length} of ${this.rows.length}`;
    setText(this.count, rows.length > PAGE ? `${first + 1} to ${last} of ${of}` : of);
    this.before.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
    [...this.head.cells].forEach((cell, at) => {
      const sorted = this.columns[at].key === this.sortKey;
      if (sorted) cell.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    while (this.body.rows.length > this.shown.length) this.body.deleteRow(-1);
    while (this.body.rows.length < this.shown.length) {
      const row = this.body.insertRow();
      for (const column of this.columns) row.insertCell().className = column.number ? "number" : "";
    }
    this.current = Math.min(this.current, Math.max(0, this.shown.length - 1));
    this.shown.forEach((row, at) => {
      const line = this.body.rows[at];
      line.tabIndex = at === this.current ? 0 : -1;
      line.dataset.name = row.name;
      line.setAttribute("aria-selected", String(row.name === this.selected));
      this.columns.forEach((column, index) => {
        const cell = line.cells[index];
        setText(cell, column.text(row));
        const tone = column.tone?.(row) ?? "";
        const className = [column.number ? "number" : "", tone].filter(Boolean).join(" ");
        if (cell.className !== className) cell.className = className;
      });
    });
  }
}
