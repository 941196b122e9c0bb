"""Runs every row with every contender, round by round, and counts what the servers use."""

import json
import os
import statistics
import time
from pathlib import Path

from harness import GIB, MIB, call, say

from . import database
from .contenders import DROP_CACHES, cached, drop_caches

TICK = os.sysconf("SC_CLK_TCK")
# Processors that may be busy with other work when a row starts.
QUIET = 0.5
WINDOW = 2
PATIENCE = 60
# A row of first accesses ends when the disk has been accessed once. It is repeated on new disks until the round's time
# is nearly over, at most this often.
REPEATS = 5
PERCENTILES = {"p50": "50.000000", "p99": "99.000000", "p99.9": "99.900000"}


def busy():
    """Seconds that all processors have worked, and those that they spent on other machines' work."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq) / TICK, steal / TICK


def load():
    """The mean number of busy processors in a short time, those that another machine took included."""
    before, begin = sum(busy()), time.monotonic()
    time.sleep(WINDOW)
    return (sum(busy()) - before) / (time.monotonic() - begin)


def wait_until_quiet():
    """The load, as soon as it is low, or when the patience is over."""
    deadline = time.monotonic() + PATIENCE
    while (found := load()) > QUIET and time.monotonic() < deadline:
        pass
    return found


def processor_of(pids):
    """Seconds of processor time that these processes have used, with the children that they have waited for."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / TICK


def fio(path, row, seconds, direct):
    out = call(
        "fio", "--name=bench", f"--filename={path}", "--ioengine=libaio", f"--direct={int(direct)}", "--time_based=1",
        f"--runtime={seconds}", "--group_reporting", "--norandommap=0", "--randrepeat=1", "--allow_file_create=0",
        # A hot file stays in the page cache.
        f"--invalidate={int(row.kind == 'cold')}", "--output-format=json", *row.fio(),
        timeout=seconds + 600,
    )  # fmt: skip
    # fio prints warnings before the object.
    job = json.loads(out[out.index("{"):])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: error {job['error']}")
    sides = [side for side in (job["read"], job["write"]) if side["io_bytes"]]
    # Of a mixed run the reads are what a guest waits for; of a write that is flushed, the flush.
    waited = job["sync"]["lat_ns"] if "--fsync=1" in row.arguments else sides[0]["clat_ns"]
    found = waited.get("percentile", {})
    return {
        "bytes": sum(side["io_bytes"] for side in sides),
        "requests": sum(side["total_ios"] for side in sides),
        "seconds": max(side["runtime"] for side in sides) / 1000,
        **{name: found[key] / 1000 for name, key in PERCENTILES.items() if key in found},
    }


def run_once(contender, row, images, seconds):
    """One run on a new disk."""
    if contender.group == "beside":
        return contender.bench(row, images["base"], seconds)
    image = images["database" if row.kind == "database" else "base"]
    path = contender.fresh(image) if row.kind == "cold" else contender.open(image)
    if row.kind == "hot" and contender.group != "null":
        # The contender's own caches have to be hot too.
        cached(path)
    if row.kind == "cold":
        drop_caches()
    pids = contender.pids()
    served, host = processor_of(pids), busy()[0]
    if row.kind == "database":
        found = database.run(row.key, path, contender.direct, seconds)
    else:
        found = fio(path, row, seconds, contender.direct)
    return {**found, "cpu": processor_of(pids) - served, "host": busy()[0] - host}


def run_round(contender, row, images, seconds):
    """The figures of one contender in one round of a row."""
    runs = []
    while not runs or (row.kind in ("cold", "touch") and len(runs) < REPEATS and sum(r["seconds"] for r in runs) < 0.8 * seconds):
        # The write-back of an earlier run is not part of this one.
        os.sync()
        cached(images["base"])
        try:
            runs.append(run_once(contender, row, images, seconds))
        finally:
            contender.close()
    return combined(runs, row)


def combined(runs, row):
    def total(key):
        return sum(run.get(key, 0) for run in runs)

    seconds, requests, size = total("seconds"), total("requests"), total("bytes")
    work = size / GIB if row.large else requests / 1e6
    out = {"value": (size / MIB if row.large else requests) / seconds, "seconds": seconds, "runs": len(runs)}
    if work:
        out |= {name: total(name) / work for name in ("cpu", "host") if all(name in run for run in runs)}
    for name in PERCENTILES:
        if all(name in run for run in runs):
            out[name] = statistics.median(run[name] for run in runs)
    return out


def skipped_for(contender, row):
    """Why a cell stays empty, or None."""
    if row.kind == "cold" and not os.access(DROP_CACHES, os.W_OK):
        return "only root may empty the kernel's caches"
    if row.kind == "database" and (why := database.missing(row.key)):
        return why
    return contender.why_not(row)


def measure(medium, rows, contenders, images, options, results):
    """All rounds on one medium. `results` gets what is found, and keeps it when a later part fails."""
    for number in range(options.rounds):
        # Another one goes first in each round, so that none profits from its place.
        turn = number % len(contenders)
        order = contenders[turn:] + contenders[:turn]
        for row in rows:
            record = results.row(medium, row)
            found = wait_until_quiet()
            if found > QUIET and not options.mark:
                what = f"{row.key} on {medium}, round {number + 1}: {found:.1f} processors were busy with other work at its start"
                results.refuse(f"{medium} {row.key}", what)
                continue
            record["load"].append(round(found, 2))
            for contender in order:
                if why := skipped_for(contender, row):
                    record["empty"][contender.name] = why
                    continue
                try:
                    figures = run_round(contender, row, images, options.seconds)
                except Exception as error:  # one contender's failure must not hide the others' numbers
                    results.fail(f"{medium} {row.key} {contender.label}: {error}")
                    continue
                record["values"].setdefault(contender.name, []).append(figures)
                cpu = f"{figures['cpu']:8.2f} s CPU" if "cpu" in figures else ""
                say(f"  {number + 1}/{options.rounds} {medium:5} {row.key:16} {contender.label:46} {figures['value']:10,.0f} {row.unit:6} {cpu}")
