// The summary, and what waits for which server.

import { duration, origins, perSecond, throughput } from "./stats.js";
import { ago, make, plain, setText, share, size, span } from "./format.js";

function cards(status, rates) {
  const { space, cache, requests, live_maps: maps, standby } = status;
  const disk = cache?.disk;
  const found = (hits, misses) => `${share(hits, hits + misses)} found`;
  const ends = status.worker_ends?.at(-1);
  return [
    ["Disks", plain(status.disks), `${status.attached_disks ?? 0} in use`],
    ["Bases", plain(status.bases), `${status.waiting?.length ?? 0} waiting, ${status.failing?.length ?? 0} failing`],
    ["Requests", `${perSecond(rates.all.perSecond)}/s`, `${throughput(rates.all.bytesPerSecond)}, ${duration(rates.all.latency)} on average`],
    ["Reads from", origins(rates.stats?.all_disks).split(", ")[0] || "–", origins(rates.stats?.all_disks).split(", ").slice(1).join(", ")],
    ["Requests waiting", plain(requests?.waiting), requests ? `${size(requests.waiting_bytes)} of writes` : ""],
    ["Refused, interrupted", requests ? `${requests.refused}, ${requests.interrupted}` : "–", "since the worker began"],
    ["Free space", size(space?.available_bytes), space?.full ? "full: writes are refused" : `of ${size(space?.total_bytes)}`,
      space?.full ? "bad" : ""],
    ["Memory cache", size(cache?.memory_used), cache ? `of ${size(cache.memory_limit)}, ${found(cache.hits, cache.misses)}` : ""],
    ["Cache in the store", size(disk?.used_bytes), disk ? `of ${size(disk.limit_bytes)}, ${found(disk.hits, disk.misses)}` : "",
      disk?.degraded ? "bad" : ""],
    ["Maps in memory", size(maps?.bytes), maps?.limit_bytes ? `of ${size(maps.limit_bytes)}` : ""],
    ["Worker", `number ${plain(status.worker_starts)}`, ends ? `the last one ended ${ago(ends.at)}: ${ends.why}` : "none has ended"],
    ["Standby worker", standby?.prepared ? "prepared" : "not prepared", plain(standby?.problem ?? ""),
      standby?.prepared ? "" : "warn"],
    ["Up for", span(status.uptime_seconds ?? 0), `version ${status.version}`],
  ];
}

export function drawSummary(status, rates) {
  const list = document.getElementById("summary");
  cards(status, rates).forEach(([title, value, note, tone], at) => {
    let card = list.children[at];
    if (!card) {
      card = make("div");
      card.append(make("dt"), make("dd"));
      card.lastChild.append(make("span"), make("small"));
      list.append(card);
    }
    setText(card.firstChild, title);
    const [text, small] = card.lastChild.children;
    setText(text, value);
    text.className = tone ?? "";
    setText(small, note === "–" ? "" : note);
  });
  setText(document.getElementById("where"), `${status.mount} on ${status.store}`);
}

// Everything that an operator should look at, the worst first.
function troubles(status, bases, disks) {
  const all = [];
  const add = (tone, text) => all.push([tone, text]);
  if (status.worker_not_answering_since) {
    add("bad", `The worker has not answered since ${ago(status.worker_not_answering_since)}: ${status.worker_not_answering_why}`);
  }
  for (const disk of disks.filter((disk) => disk.error)) add("bad", `Disk ${disk.name}: ${disk.error}`);
  for (const disk of disks.filter((disk) => disk.refuses_writes)) {
    add("bad", `Disk ${disk.name} refuses writes: ${disk.refuses_writes}`);
  }
  for (const file of [...(status.damaged ?? []), ...(status.unread ?? [])]) add("bad", `${file.file}: ${file.error}`);
  for (const base of bases) {
    if (base.waiting_since) {
      const why = base.waiting_for ? `: ${base.waiting_for}` : "";
      add("warn", `Base ${base.name}: reads have waited since ${ago(base.waiting_since)}${why}`);
    } else if (base.error) {
      add("bad", `Base ${base.name} (${base.state.replaceAll("_", " ")}): ${base.error}`);
    }
    for (const server of base.servers.filter((server) => server.trouble)) {
      add("warn", `Base ${base.name}, ${server.url}: ${server.trouble}`);
    }
    if (base.cache_error) add("warn", `Base ${base.name}, cache: ${base.cache_error}`);
  }
  if (status.space?.full) add("bad", "The store's filesystem is full: writes that need space are refused");
  if (status.cache?.disk?.degraded) add("warn", `Nothing new is cached: ${status.cache.disk.degraded}`);
  if (status.metrics?.trouble) add("warn", `Metrics at ${status.metrics.listen}: ${status.metrics.trouble}`);
  if (status.live_maps?.problem) add("warn", `Maps in memory: ${status.live_maps.problem}`);
  return all.sort(([a], [b]) => (a === b ? 0 : a === "bad" ? -1 : 1));
}

const MOST = 20;

export function drawTroubles(status, bases, disks) {
  const list = document.getElementById("waiting");
  const all = troubles(status, bases, disks);
  const shown = all.slice(0, MOST);
  if (all.length > MOST) shown.push(["", `and ${all.length - MOST} more`]);
  if (!all.length) shown.push(["good", "Nothing waits, and nothing fails."]);
  while (list.children.length > shown.length) list.lastChild.remove();
  shown.forEach(([tone, text], at) => {
    const item = list.children[at] ?? list.appendChild(make("li"));
    setText(item, text);
    item.className = tone;
  });
}
