// One disk or base: its fields and its map.

import { ago, make, plain, setText, size } from "./format.js";
import { MapView, cellsThatFit } from "./map.js";
import { drawOperations, duration, origins } from "./stats.js";

const DISK = [
  ["Base", (disk) => plain(disk.base)],
  ["Size", (disk) => size(disk.size)],
  ["Delta", (disk) => size(disk.delta_bytes)],
  ["State", (disk) => disk.state.replaceAll("_", " ")],
  ["Error", (disk) => disk.error],
  ["Refuses writes", (disk) => disk.refuses_writes],
  ["Open handles", (disk) => plain(disk.open_handles ?? "unknown since an earlier worker")],
  ["Map in memory", (disk) => size(disk.map_bytes)],
  ["Created", (disk) => `${disk.created} (${ago(disk.created)})`],
  ["Modified", (disk) => `${disk.modified} (${ago(disk.modified)})`],
  ["File", (disk) => disk.path],
];
const BASE = [
  ["Source", (base) => base.source],
  ["Mirrors", (base) => base.mirrors.join(", ")],
  ["Format", (base) => base.format],
  ["Size", (base) => size(base.size)],
  ["Disks", (base) => plain(base.disks)],
  ["State", (base) => base.state.replaceAll("_", " ")],
  ["Error", (base) => base.error],
  ["Waits for", (base) => base.waiting_for],
  ["Cached", (base) => `${size(base.cached_bytes)}${base.cached_percent === null ? "" : ` (${base.cached_percent} %)`}`],
  ["In memory", (base) => size(base.memory_bytes)],
  ["Pinned", (base) => (base.pinned ? "yes" : "no")],
  ["Complete", (base) => (base.complete ? "yes" : "no")],
  ["Work", (base) => base.work && `${base.work.what}: ${base.work.state}, ${size(base.work.bytes)} of ${size(base.work.total)}`],
  ["SHA-256", (base) => base.sha256],
  ["Created", (base) => `${base.created} (${ago(base.created)})`],
];

export class Detail {
  constructor(onClose) {
    this.section = document.getElementById("detail");
    this.title = document.getElementById("detail-title");
    this.fields = document.getElementById("fields");
    this.mapView = new MapView();
    this.subject = null;
    document.getElementById("close").addEventListener("click", onClose);
  }

  // kind: "disk" or "base".
  open(kind, name) {
    if (this.subject?.kind === kind && this.subject?.name === name) return;
    this.subject = { kind, name };
    this.section.hidden = false;
    this.fields.replaceChildren();
    setText(this.title, `${kind === "disk" ? "Disk" : "Base"} ${name}`);
    this.title.focus();
  }

  close() {
    this.subject = null;
    this.section.hidden = true;
  }

  // Where the map of the subject is.
  mapPath() {
    const { kind, name } = this.subject;
    return `/v1/${kind}s/${encodeURIComponent(name)}/map?cells=${cellsThatFit(this.mapView.canvas)}`;
  }

  showMap(map) {
    this.mapView.show(map);
  }

  show(object, counters) {
    const fields = this.subject.kind === "disk" ? DISK : BASE;
    const lines = object ? fields.map(([title, of]) => [title, of(object)]) : [["State", "removed"]];
    lines.push(["Reads from", origins(counters)]);
    if (counters?.waits) {
      lines.push(["Waits", `${counters.waits}, ${duration(counters.waited_ns / 1e3 / counters.waits)} on average`]);
    }
    drawOperations(object ? counters : null);
    const shown = lines.filter(([, text]) => text !== null && text !== undefined && text !== "");
    while (this.fields.children.length > 2 * shown.length) this.fields.lastChild.remove();
    shown.forEach(([title, text], at) => {
      const term = this.fields.children[2 * at] ?? this.fields.appendChild(make("dt"));
      const value = this.fields.children[2 * at + 1] ?? this.fields.appendChild(make("dd"));
      setText(term, title);
      setText(value, text);
    });
  }
}
