// Rates and latencies: the differences between two answers of the daemon's counters.

import { make, setText, share, size } from "./format.js";

const NONE = { perSecond: null, bytesPerSecond: null, latency: null };

function sums(counters) {
  const all = Object.values(counters?.operations ?? {});
  const sum = (key) => all.reduce((total, operation) => total + operation[key], 0);
  return { count: sum("count"), bytes: sum("bytes"), latency: sum("latency_ns") };
}

// What happened between two states of the same counters.
function between(before, now, seconds) {
  if (!before || seconds <= 0) return NONE;
  const count = now.count - before.count;
  return {
    perSecond: count / seconds,
    bytesPerSecond: (now.bytes - before.bytes) / seconds,
    latency: count > 0 ? (now.latency - before.latency) / count / 1e3 : null,
  };
}

export class Rates {
  constructor() {
    this.before = null;
    this.disks = new Map();
    this.all = NONE;
    this.stats = null;
  }

  update(stats, at) {
    const now = { at, worker: stats.worker, since: stats.since, all: sums(stats.all_disks), disks: new Map() };
    for (const disk of stats.disks) now.disks.set(disk.name, sums(disk.counters));
    // The counters of another worker began anew.
    const before = this.before?.worker === now.worker && this.before.since === now.since ? this.before : null;
    const seconds = before ? (at - before.at) / 1000 : 0;
    this.all = between(before?.all, now.all, seconds);
    this.disks = new Map();
    // A disk that was not there before was not used before.
    const unused = before ? { count: 0, bytes: 0, latency: 0 } : undefined;
    for (const [name, sum] of now.disks) {
      this.disks.set(name, between(before?.disks.get(name) ?? unused, sum, seconds));
    }
    this.idle = before ? { perSecond: 0, bytesPerSecond: 0, latency: null } : NONE;
    this.before = now;
    this.stats = stats;
  }

  of(name) {
    return this.disks.get(name) ?? this.idle ?? NONE;
  }
}

export function perSecond(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 || Number.isInteger(value) ? Math.round(value).toString() : value.toFixed(1);
}

export function throughput(value) {
  return value === null || value === undefined ? "–" : `${size(Math.round(value))}/s`;
}

export function duration(us) {
  if (us === null || us === undefined) return "–";
  if (us < 1000) return `${Math.round(us)} µs`;
  if (us < 1e6) return `${(us / 1000).toFixed(us < 1e4 ? 1 : 0)} ms`;
  return `${(us / 1e6).toFixed(1)} s`;
}

// The bound that 99 of 100 requests kept, by the buckets.
function slowest(operation) {
  let left = Math.ceil(operation.count * 0.99);
  for (const bucket of operation.latency) {
    left -= bucket.count;
    if (left <= 0) return bucket.up_to_us === null ? "longer" : `≤ ${duration(bucket.up_to_us)}`;
  }
  return "–";
}

const ORIGINS = { delta: "delta", zero: "zeros", memory: "memory cache", disk: "cache in the store", fetched: "fetched" };

// Where reads were answered from, as one line.
export function origins(counters) {
  const from = Object.entries(counters?.read_from ?? {});
  const all = from.reduce((sum, [, total]) => sum + total.bytes, 0);
  return from.map(([key, total]) => `${ORIGINS[key] ?? key} ${share(total.bytes, all)}`).join(", ");
}

// Fills the table of operations.
export function drawOperations(counters) {
  const table = document.getElementById("operations");
  const all = Object.entries(counters?.operations ?? {});
  table.hidden = !all.length;
  const body = table.tBodies[0];
  while (body.rows.length > all.length) body.deleteRow(-1);
  all.forEach(([kind, operation], at) => {
    const row = body.rows[at] ?? body.insertRow();
    while (row.cells.length < 6) row.append(make("td", "", row.cells.length ? "number" : ""));
    const mean = operation.count ? operation.latency_ns / operation.count / 1e3 : null;
    const texts = [kind, String(operation.count), size(operation.bytes), duration(mean), slowest(operation), String(operation.errors)];
    texts.forEach((text, index) => setText(row.cells[index], text));
    row.cells[5].className = operation.errors ? "number bad" : "number";
  });
}
