"""The work that scripts/bench measures, and the numbers that plyfs has to reach."""

from dataclasses import dataclass

from harness import GIB

MEDIA = {"disk": "Store on the disk", "tmpfs": "Store in memory (tmpfs)"}


@dataclass(frozen=True)
class Row:
    """One kind of work, which every contender does in every round."""

    key: str
    title: str
    # What fio does; empty for a database.
    arguments: tuple = ()
    media: tuple = ("disk", "tmpfs")
    # hot: the base is in memory, and the disk has been read once. cold: nothing is in memory. touch: a new disk, each
    # block of which is accessed once. database: a filesystem on the disk.
    kind: str = "hot"
    family: str = "reads"

    @property
    def large(self):
        """Whether it is reported in MiB/s, as large requests are."""
        return "--bs=1m" in self.arguments

    @property
    def unit(self):
        return "transactions/s" if self.kind == "database" else "MiB/s" if self.large else "IOPS"

    @property
    def depth(self):
        return next((int(a.removeprefix("--iodepth=")) for a in self.arguments if a.startswith("--iodepth=")), 1)

    @property
    def jobs(self):
        return next((int(a.removeprefix("--numjobs=")) for a in self.arguments if a.startswith("--numjobs=")), 1)

    @property
    def writes(self):
        return any(a in ("--rw=randwrite", "--rw=write") for a in self.arguments)

    @property
    def mixes(self):
        return "--rw=randrw" in self.arguments

    def fio(self):
        """The arguments of fio, without the file and the time."""
        if self.kind in ("hot", "database"):
            return [*self.arguments, f"--size={GIB}"]
        if self.jobs == 1:
            return [*self.arguments, "--time_based=0", f"--size={GIB}"]
        # Each job has a part of the disk of its own: together they access each block once.
        part = GIB // self.jobs
        return [*self.arguments, "--time_based=0", f"--size={part}", f"--offset_increment={part}"]


def reads(key, title, *arguments, kind="hot"):
    # Reads of what a disk has not written do not depend on the medium of the store.
    return Row(key, title, arguments, ("disk",), kind, "reads")


def writes(key, title, *arguments, media=("disk", "tmpfs")):
    return Row(key, title, arguments, media, "touch", "writes")


ROWS = (
    reads("read-4k-qd1", "4k random read, hot, QD1", "--rw=randread", "--bs=4k", "--iodepth=1"),
    reads("read-4k-qd32", "4k random read, hot, QD32", "--rw=randread", "--bs=4k", "--iodepth=32"),
    reads("read-4k-qd32x4", "4k random read, hot, QD32 x 4 jobs", "--rw=randread", "--bs=4k", "--iodepth=32", "--numjobs=4"),
    reads("read-1m-qd8", "1 MiB read, hot, QD8", "--rw=read", "--bs=1m", "--iodepth=8"),
    reads("cold-4k-qd32", "4k random read, cold, QD32", "--rw=randread", "--bs=4k", "--iodepth=32", kind="cold"),
    writes("write-4k-qd1", "4k random write, first touch, QD1", "--rw=randwrite", "--bs=4k", "--iodepth=1"),
    writes("write-4k-qd32", "4k random write, first touch, QD32", "--rw=randwrite", "--bs=4k", "--iodepth=32"),
    writes(
        "write-4k-qd32x4", "4k random write, first touch, QD32 x 4 jobs", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--numjobs=4"
    ),
    writes("write-1m-qd8", "1 MiB write, first touch, QD8", "--rw=write", "--bs=1m", "--iodepth=8"),
    writes("fsync-4k", "4k random write, fsync after each", "--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", media=("disk",)),
    writes("mixed-4k-qd32", "4k random, 70 % reads, 30 % first-touch writes, QD32", "--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=32"),
    Row("pgbench", "pgbench, 4 clients, in ext4 on the disk", (), ("disk",), "database", "database"),
    Row("sqlite", "sqlite, one transaction after the other, in ext4 on the disk", (), ("disk",), "database", "database"),
)
# What is measured of plyfs alone, or of one other program; benchmark/many.py and benchmark/pauses.py.
FACTS = ("create", "memory", "pause")
NAMES = tuple(row.key for row in ROWS) + FACTS


@dataclass(frozen=True)
class Goal:
    """A number to reach: `metric` of plyfs, divided by that of `against`, is at least or at most this."""

    row: str
    against: str
    at_least: float = None
    at_most: float = None
    metric: str = "value"
    media: tuple = ("disk",)


def goals_of_hot(key, peers):
    return [
        Goal(key, "peer", at_least=peers),
        Goal(key, "null", at_least=0.9),
        Goal(key, "null", at_most=1.3, metric="p99"),
    ]


GOALS = (
    *goals_of_hot("read-4k-qd1", 1),
    *goals_of_hot("read-4k-qd32", 3),
    *goals_of_hot("read-4k-qd32x4", 3),
    Goal("read-1m-qd8", "peer", at_least=3),
    Goal("read-1m-qd8", "null", at_least=0.8),
    Goal("cold-4k-qd32", "file", at_least=0.8),
    Goal("write-4k-qd1", "peer", at_least=2, media=("disk", "tmpfs")),
    Goal("write-4k-qd1", "file", at_least=0.9),
    Goal("write-4k-qd32", "peer", at_least=2),
    Goal("write-4k-qd32", "peer", at_least=3, media=("tmpfs",)),
    Goal("write-4k-qd32", "file", at_least=0.9),
    Goal("write-4k-qd32x4", "peer", at_least=2),
    Goal("write-4k-qd32x4", "peer", at_least=3, media=("tmpfs",)),
    Goal("write-4k-qd32x4", "file", at_least=0.9),
    Goal("write-1m-qd8", "file", at_least=0.9, media=("disk", "tmpfs")),
    Goal("write-1m-qd8", "peer", at_least=1.3),
    Goal("write-1m-qd8", "peer", at_most=0.5, metric="cpu"),
    Goal("fsync-4k", "file", at_least=0.8),
    Goal("pgbench", "qcow2", at_least=2),
    Goal("pgbench", "file", at_least=0.8),
    Goal("sqlite", "qcow2", at_least=2),
    Goal("sqlite", "file", at_least=0.8),
)


@dataclass(frozen=True)
class Fact:
    """One figure that is not compared in rounds. `at_most`: what it has to be."""

    key: str
    title: str
    unit: str
    at_most: float = None
    digits: int = 1
    # The row of --only that measures it.
    row: str = "create"
    # What the figure is of, where it is not of plyfs.
    of: str = "plyfs"


FACT_LIST = (
    Fact("create-1000", "1000 disks in one call, each", "ms", 1, 3),
    Fact("create-1000-disk", "space of a new disk on the store's medium, each", "KiB", 8, 2),
    Fact("create-cli", "100 disks in 100 calls of the command line, each", "ms", 5, 2),
    Fact("create-cli-slowest", "the slowest of those calls", "ms"),
    Fact("create-10000", "10,000 disks in one call", "s", 5, 2),
    Fact("list-10000", "`plyfs disk ls` of 10,000 disks", "s", 0.2, 3),
    Fact("stop-10000", "stop with 10,000 disks", "ms"),
    Fact("start-10000", "start until mounted, 10,000 disks", "ms"),
    Fact("qemu-create", "qemu-img create, 100 overlays, each", "ms", None, 2, of="peer"),
    Fact("qemu-create-disk", "the same, on disk, each", "KiB", None, 0, of="peer"),
    Fact("memory-created", "memory of a new disk that nothing has opened yet, each", "KiB", None, 2, "memory"),
    Fact("memory-attached", "memory of an idle disk that is attached, one block read and one written, each", "KiB", 16, 2, "memory"),
    Fact("memory-detached", "memory that a disk keeps when it is detached again, above a new one, each", "KiB", 0.5, 2, "memory"),
    Fact("memory-100000", "memory of the daemon with 100,000 disks", "MiB", 256, 0, "memory"),
    Fact("pause-death", "pause of a reader when the worker is killed, median", "ms", 100, 0, "pause"),
    Fact("pause-death-worst", "the same, worst", "ms", 1000, 0, "pause"),
    Fact("pause-death-10000", "pause when the worker is killed, with 10,000 disks, median", "ms", 100, 0, "pause"),
    Fact("pause-death-10000-worst", "the same, worst", "ms", 1000, 0, "pause"),
    Fact("pause-upgrade-10000", "pause at an upgrade, with 10,000 disks, median", "ms", 100, 0, "pause"),
    Fact("pause-upgrade-10000-worst", "the same, worst", "ms", 1000, 0, "pause"),
)
# Rows of the contract that other programs measure, or none: work, goal, where.
ELSEWHERE = (
    ("first boot over HTTP, 10 ms away, 1 Gbit/s", "at most 50 MiB and 2.5 s cold, 0.4 s traced", "scripts/bench-lazy, below"),
    ("second boot, any disk, after a restart too", "0 bytes", "scripts/bench-lazy, below"),
    ("next build of an image that the host has", "a boot fetches only blocks that changed", "not measured"),
    ("pause with 1 TiB cached", "median under 100 ms, worst under 1 s", "not measured: needs a cache of 1 TiB"),
)
