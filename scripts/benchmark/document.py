"""The section of docs/benchmarks.md."""

import statistics

from .measure import QUIET, REPEATS
from .pauses import KILLS, UPGRADES
from .rows import ELSEWHERE, FACT_LIST, FACTS, GOALS, MEDIA, ROWS

BY_KEY = {row.key: row for row in ROWS}
METRICS = {"value": "", "p99": "p99 latency, ", "cpu": "CPU, "}
# What a full run has at least.
ROUNDS, SECONDS = 5, 5


class Medians:
    """The medians of one row on one medium."""

    def __init__(self, results, medium, row):
        self.results, self.medium, self.row = results, medium, row
        self.record = results.rows.get(f"{medium} {row.key}", {"load": [], "values": {}, "empty": {}})

    def of(self, name, metric="value"):
        values = [figures[metric] for figures in self.record["values"].get(name, []) if metric in figures]
        return statistics.median(values) if values else None

    def names(self, wanted):
        return [name for name, one in self.results.contenders.items() if wanted(name, one) and self.of(name) is not None]

    def best(self, against):
        """The name of the contender that is fastest, of those that a ratio is of."""
        wanted = {
            "peer": lambda _, one: one["is_peer"],
            "qcow2": lambda name, one: one["is_peer"] and name.startswith("qsd-"),
            "file": lambda _, one: one["group"] == "file",
            "null": lambda _, one: one["group"] == "null",
        }[against]
        return max(self.names(wanted), key=self.of, default=None)

    def rounds(self):
        return min((len(values) for values in self.record["values"].values()), default=0)

    @property
    def mark(self):
        """A sign behind figures that were measured beside other work."""
        return " [1]" if max(self.record["load"], default=0) > QUIET else ""


def number(value):
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def columns(results, rows, medium):
    """The contenders that have a figure in one of the rows, or a reason why not."""
    records = [results.rows.get(f"{medium} {row.key}", {}) for row in rows]
    return [name for name in results.contenders if any(name in r.get("values", {}) for r in records)]


def grid(results, medium, rows, metric, title, cell):
    """A table with a line for each row that has this metric, and a column for each contender; None when it is empty."""
    names = columns(results, rows, medium)
    lines = []
    for row in rows:
        medians = Medians(results, medium, row)
        cells = [cell(medians, name) for name in names]
        if any(medians.of(name, metric) is not None for name in names):
            lines.append(f"| {row.title}, {title(row)}{medians.mark} | " + " | ".join(cells) + " |")
    if not lines:
        return []
    labels = [results.contenders[name]["label"] for name in names]
    return ["| work | " + " | ".join(labels) + " |", "| --- |" + " ---: |" * len(labels), *lines, ""]


def throughput(medians, name):
    if (value := medians.of(name)) is not None:
        return number(value)
    return "-" if name in medians.record["empty"] else "failed"


def latency(medians, name):
    values = [medians.of(name, metric) for metric in ("p50", "p99", "p99.9")]
    return " / ".join(f"{value:,.0f}" for value in values) if None not in values else "-"


def processor(medians, name):
    served, host = medians.of(name, "cpu"), medians.of(name, "host")
    if served is None:
        return "-"
    if medians.results.contenders[name]["group"] == "file":
        return f"- ({number(host)})"
    return number(served) if host is None else f"{number(served)} ({number(host)})"


def contract(results):
    """A line for each number to reach."""
    lines = [
        "| work | store | plyfs | of | its figure | ratio | goal | |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    reached = missed = 0

    def verdict(value, at_least, at_most):
        nonlocal reached, missed
        if value is None:
            return "not measured"
        good = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        reached, missed = reached + good, missed + (not good)
        return "reached" if good else "**not reached**"

    for goal in GOALS:
        row = BY_KEY[goal.row]
        for medium in goal.media:
            medians = Medians(results, medium, row)
            other = medians.best(goal.against)
            ours, theirs = medians.of("plyfs", goal.metric), medians.of(other, goal.metric) if other else None
            ratio = ours / theirs if ours is not None and theirs else None
            unit = {"value": row.unit, "p99": "us", "cpu": "s per GiB" if row.large else "s per million"}[goal.metric]
            wanted = f"at least {goal.at_least:g}" if goal.at_least is not None else f"at most {goal.at_most:g}"
            label = results.contenders[other]["label"] if other else {"peer": "best peer", "qcow2": "qcow2"}.get(goal.against, goal.against)
            lines.append(
                f"| {row.title}, {METRICS[goal.metric]}{unit}{medians.mark} | {medium} | {number(ours)} | {label} | {number(theirs)} | "
                f"{'' if ratio is None else f'{ratio:.2f}'} | {wanted} | {verdict(ratio, goal.at_least, goal.at_most)} |"
            )
    for fact in FACT_LIST:
        if fact.at_most is None:
            continue
        value = figure(results, fact)
        shown = "" if value is None else f"{value:,.{fact.digits}f}"
        lines.append(f"| {fact.title}, {fact.unit}{fact_mark(results, fact)} | disk | {shown} | | | | at most {fact.at_most:g} | {verdict(value, None, fact.at_most)} |")
    for work, goal, where in ELSEWHERE:
        lines.append(f"| {work} | | | | | | {goal} | {where} |")
    return [f"{reached} numbers are reached, {missed} are not.", "", *lines, ""]


def figure(results, fact):
    """The median of the rounds, or the worst of them where the fact is the worst case; None without a figure."""
    values = results.facts.get(fact.key)
    if not values:
        return None
    return max(values) if fact.key.endswith(("-worst", "-slowest")) else statistics.median(values)


def fact_mark(results, fact):
    return " [1]" if results.fact_loads.get(fact.row, 0) > QUIET else ""


def facts(results):
    lines = []
    for fact in FACT_LIST:
        if (value := figure(results, fact)) is not None:
            title = f"peer: {fact.title}" if fact.of == "peer" else fact.title
            lines.append(f"| {title}{fact_mark(results, fact)} | {value:,.{fact.digits}f} {fact.unit} | {len(results.facts[fact.key])} |")
    if not lines:
        return []
    return [
        "## Many disks, memory, pauses",
        "",
        "Memory is the Pss of all processes of the daemon. A pause is the longest time between two answers to a client that reads",
        f"4 KiB after 4 KiB without the page cache, at each of {KILLS} kills with SIGKILL, and {UPGRADES} upgrades, in a round.",
        "",
        "| | median | rounds |",
        "| --- | ---: | ---: |",
        *lines,
        "",
    ]


def reasons(results, medium, rows):
    """Why cells are empty, each reason once."""
    found = {}
    for row in rows:
        for name, why in results.rows.get(f"{medium} {row.key}", {}).get("empty", {}).items():
            found.setdefault((results.contenders[name]["label"], why), []).append(row.title)
    return [f"- {label}: {why} ({'; '.join(titles)})." for (label, why), titles in found.items()]


def is_full(results):
    """Whether a run has what the contract asks for: all rows, rounds, time, and a quiet machine."""
    measured = [Medians(results, *_place(key)) for key in results.rows]
    return (
        all(f"{medium} {row.key}" in results.rows for row in ROWS for medium in row.media)
        and all(name in results.fact_loads for name in FACTS)
        and not results.failures
        and not results.still_refused()
        and all(part["seconds"] >= SECONDS for part in results.parts)
        and all(medians.rounds() >= ROUNDS and not medians.mark for medians in measured)
        and not any(load > QUIET for load in results.fact_loads.values())
    )


def _place(key):
    medium, row = key.split(" ", 1)
    return medium, BY_KEY[row]


def header(results):
    first = results.parts[0]
    commands = [f"`{part['command']}` ({part['date']} UTC)" for part in results.parts]
    rows = [Medians(results, *_place(key)) for key in results.rows]
    rounds = sorted({medians.rounds() for medians in rows})
    text = [
        "# Benchmarks",
        "",
        "`scripts/bench` measured and wrote this section. Not edited by hand.",
        "",
        f"- Measured by {', '.join(commands)}.",
        f"- Machine: {first['machine']}.",
        f"- Versions: {'; '.join(first['versions'])}.",
        f"- Rounds: {' to '.join(map(str, rounds[:1] + rounds[1:][-1:])) or 'none'}, interleaved, the order rotated; medians."
        f" {first['seconds']} s a",
        "  round; a row of first accesses ends when the disk has been accessed once, and is repeated on new disks up to",
        f"  {REPEATS} times until the round's time is nearly over.",
        f"- Load: at a row's start at most {QUIET:g} processors were busy, measured for two seconds in which no contender works;",
        "  a row that started with more has the mark [1].",
    ]
    if not is_full(results):
        text.append(f"- **A trial**: a full run has {ROUNDS} rounds of {SECONDS} s on a quiet machine, and no row is missing.")
    return text + [
        "- Base: 1 GiB of random data on the disk. Hot: in the page cache, and read once through each contender before the",
        "  time starts. Cold: a new daemon, and the kernel's caches are dropped. plyfs has 2 GiB of cache memory, which holds the",
        "  base. Every run starts on a new disk or overlay; these, and the copy that is `file`, are on the medium that a table",
        "  names. Overlays and nbdkit work buffered, as they do by default. `file` is a copy of the base that is written in",
        "  place: the medium without copy-on-write. A null server answers from one mebibyte of memory, with the FUSE crate, the",
        "  threads and the flags of plyfs: the limit of the transport. qemu-img bench works in the process that asks, through",
        "  no mount, in order of a fixed stride instead of a random one.",
        "- fio: `--ioengine=libaio --direct=1` on the served file (`file, buffered`: `--direct=0`), and",
        *(f"  - {row.title}: `{' '.join(row.arguments)}`" for row in ROWS if row.arguments),
        "- Databases: ext4 on a loop device on the served file, direct where fio is; 300 MB of pgbench (scale 20, 4 clients),",
        "  100,000 accounts of sqlite (rollback journal, synchronous=full).",
        "- Latency is that of the request, of the reads where a row mixes, of the flush where a row flushes.",
        "- CPU: what the serving processes used (/proc/PID/stat, all threads, with plyfs's supervisor and worker), for each GiB",
        "  of large requests and each million of small ones or of transactions. In parentheses: what the entire host used, with",
        "  the client and the kernel's write-back; of a file there is no other figure.",
        "",
    ]


def write(results, plots):
    """The text of the section. `plots`: family, medium, path of the picture from the document."""
    text = header(results) + ["## What is to be reached", "", *contract(results)]
    for medium, title in MEDIA.items():
        rows = [row for row in ROWS if f"{medium} {row.key}" in results.rows]
        if not rows:
            continue
        text += [f"## {title}", ""]
        text += [f"![{alt}]({path})\n" for alt, where, path in plots if where == medium]
        text += grid(results, medium, rows, "value", lambda row: row.unit, throughput)
        if why := reasons(results, medium, rows):
            text += ["Cells with a dash:", "", *why, ""]
        if lines := grid(results, medium, rows, "p50", lambda row: "us", latency):
            text += ["Latency, p50 / p99 / p99.9:", "", *lines]
        if lines := grid(results, medium, rows, "cpu", lambda row: "s per GiB" if row.large else "s per million", processor):
            text += ["CPU seconds of the servers (of the host):", "", *lines]
    text += facts(results)
    marked = [key for key in results.rows if Medians(results, *_place(key)).mark]
    if marked or any(load > QUIET for load in results.fact_loads.values()):
        loads = [f"{key} {max(results.rows[key]['load']):.1f}" for key in marked]
        loads += [f"{row} {load:.1f}" for row, load in results.fact_loads.items() if load > QUIET]
        text += [f"[1] Other work kept processors busy when the row started, at most: {', '.join(loads)}.", ""]
    if results.failures:
        text += ["## Failures of this run", "", *(f"- {failure}" for failure in results.failures), ""]
    return "\n".join(text)
