// The status page: asks the daemon every two seconds while it can be seen, and draws what it says.

import { Detail } from "./detail.js";
import { ago, plain, setText, size, span } from "./format.js";
import { Rates, duration, perSecond, throughput } from "./stats.js";
import { drawSummary, drawTroubles } from "./summary.js";
import { Table } from "./table.js";

const INTERVAL = 2000;
const PATIENCE = 15000;

const state = { status: {}, bases: [], disks: [], at: 0, error: null, paused: false };
const rates = new Rates();
const rate = (disk) => rates.of(disk.name);
const tone = (row) => (row.state === "ok" ? "good" : ["failed", "refused", "failing"].includes(row.state) ? "bad" : "warn");
const word = (row) => row.state.replaceAll("_", " ");

const bases = new Table(
  "bases",
  [
    { key: "name", title: "Name", text: (base) => base.name },
    { key: "state", title: "State", text: word, tone },
    { key: "size", title: "Size", text: (base) => size(base.size), sort: (base) => base.size, number: true },
    { key: "cached", title: "Cached", sort: (base) => base.cached_bytes, number: true,
      text: (base) => (base.cached_percent === null ? size(base.cached_bytes) : `${base.cached_percent} %`) },
    { key: "memory", title: "In memory", text: (base) => size(base.memory_bytes), sort: (base) => base.memory_bytes, number: true },
    { key: "disks", title: "Disks", text: (base) => String(base.disks), sort: (base) => base.disks, number: true },
    { key: "pinned", title: "Pinned", text: (base) => (base.pinned ? "pinned" : "") },
    { key: "source", title: "Source", text: (base) => base.source },
  ],
  (base) => go("base", base.name),
);
const disks = new Table(
  "disks",
  [
    { key: "name", title: "Name", text: (disk) => disk.name },
    { key: "base", title: "Base", text: (disk) => plain(disk.base) },
    { key: "state", title: "State", text: word, tone },
    { key: "size", title: "Size", text: (disk) => size(disk.size), sort: (disk) => disk.size, number: true },
    { key: "delta", title: "Delta", text: (disk) => size(disk.delta_bytes), sort: (disk) => disk.delta_bytes, number: true },
    { key: "requests", title: "Requests/s", text: (disk) => perSecond(rate(disk).perSecond), sort: (disk) => rate(disk).perSecond ?? -1, number: true },
    { key: "rate", title: "Throughput", text: (disk) => throughput(rate(disk).bytesPerSecond), sort: (disk) => rate(disk).bytesPerSecond ?? -1, number: true },
    { key: "latency", title: "Latency", text: (disk) => duration(rate(disk).latency), sort: (disk) => rate(disk).latency ?? -1, number: true },
    { key: "open", title: "Open", text: (disk) => plain(disk.open_handles ?? "?"), sort: (disk) => disk.open_handles ?? -1, number: true },
    { key: "modified", title: "Modified", text: (disk) => ago(disk.modified), sort: (disk) => Date.parse(disk.modified) },
  ],
  (disk) => go("disk", disk.name),
);
const detail = new Detail(() => go());

// The address says what is shown, so that it can be kept and sent.
function go(kind, name) {
  const hash = kind ? `#${kind}/${encodeURIComponent(name)}` : "#";
  if (location.hash === hash) showSubject();
  else if (kind) location.hash = hash;
  else {
    history.pushState(null, "", location.pathname);
    showSubject();
  }
}

function showSubject() {
  const [, kind, name] = /^#(disk|base)\/(.+)$/.exec(location.hash) ?? [];
  const before = detail.subject;
  if (kind) {
    detail.open(kind, decodeURIComponent(name));
    drawSubject();
    updateMap();
  } else if (before) {
    detail.close();
    (before.kind === "disk" ? disks : bases).focusRow(0);
  }
  disks.select(kind === "disk" ? detail.subject.name : null);
  bases.select(kind === "base" ? detail.subject.name : null);
}

function drawSubject() {
  const { subject } = detail;
  if (!subject || !state.at) return;
  const all = subject.kind === "disk" ? state.disks : state.bases;
  const counted = subject.kind === "disk" ? rates.stats.disks : rates.stats.bases;
  const named = (object) => object.name === subject.name;
  detail.show(all.find(named), counted.find(named)?.counters);
}

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(PATIENCE), headers: { accept: "application/json" } });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error?.message ?? `status ${answer.status}`);
  return body;
}

async function update() {
  try {
    const paths = ["/v1/status", "/v1/bases", "/v1/disks", "/v1/stats"];
    const [status, all, disksNow, stats] = await Promise.all(paths.map(ask));
    Object.assign(state, { status, bases: all, disks: disksNow });
    state.at = Date.now();
    rates.update(stats, performance.now());
    state.error = null;
    drawSummary(state.status, rates);
    drawTroubles(state.status, state.bases, state.disks);
    bases.show(state.bases);
    disks.show(state.disks);
    drawSubject();
  } catch (error) {
    state.error = error.message;
  }
  await updateMap();
  drawLive();
}

async function updateMap() {
  const { subject } = detail;
  if (!subject) return;
  try {
    const map = await ask(detail.mapPath());
    // Another one may have been opened meanwhile.
    if (detail.subject === subject) detail.showMap(map);
  } catch (error) {
    if (detail.subject === subject) setText(document.getElementById("cell"), `No map: ${error.message}`);
  }
}

function drawLive() {
  const live = document.getElementById("live");
  const age = state.at ? span((Date.now() - state.at) / 1000) : null;
  const stale = Boolean(state.error);
  let text = "connecting";
  if (stale) text = `no answer${age ? ` for ${age}` : ""}: ${state.error}`;
  else if (state.paused) text = age ? `paused, as of ${age} ago` : "paused";
  else if (age) text = "live";
  setText(live, text);
  live.classList.toggle("stale", stale);
}

// One update at a time, and none while the page is hidden or paused.
let timer = 0;
let busy = false;
async function tick() {
  clearTimeout(timer);
  if (busy) return;
  busy = true;
  if (!state.paused && document.visibilityState === "visible") await update();
  else drawLive();
  busy = false;
  timer = setTimeout(tick, INTERVAL);
}

function wake() {
  if (!state.paused) tick();
}

function pause() {
  state.paused = !state.paused;
  const button = document.getElementById("pause");
  button.setAttribute("aria-pressed", String(state.paused));
  setText(button, state.paused ? "Go on" : "Pause");
  drawLive();
  wake();
}

const keys = document.getElementById("keys");
document.getElementById("help").addEventListener("click", () => keys.showModal());
document.getElementById("pause").addEventListener("click", pause);
document.addEventListener("visibilitychange", wake);
window.addEventListener("hashchange", showSubject);
window.addEventListener("popstate", showSubject);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || keys.open) return;
  if (event.key === "Escape") {
    if (document.activeElement?.matches("input")) document.activeElement.blur();
    else go();
    return;
  }
  if (event.target.matches("input")) return;
  const actions = {
    "/": () => disks.filter.focus(),
    b: () => bases.focusRow(0),
    d: () => disks.focusRow(0),
    p: pause,
    "?": () => keys.showModal(),
  };
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

showSubject();
tick();
