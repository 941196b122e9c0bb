"""The tenant that must not be affected: fio with verification, and probes that time single operations at a steady rate."""

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import statistics
import struct
import subprocess
import time
import traceback

from harness import Control

from .content import BLOCK, KIB, MIB, WrongBytes, compare, content
from .servers import FORK

libc = ctypes.CDLL(None, use_errno=True)
ENTRY = struct.Struct("<QQI4x")
ENTRIES = 1 << 18
SLOTS = 16
# The allowed ratio of the 99th percentile during an attack to that before, by the kind of the probe. `names`: stat and open.
# `fetch` and `create` are rare, a few times a second: the 99th percentile of a hundred is the second worst.
LIMITS = {"local": 1.5, "async": 1.5, "url": 1.5, "names": 1.5, "fetch": 3.0, "create": 3.0}
KINDS = list(LIMITS)
INTERVAL = {"local": 0.004, "async": 0.006, "url": 0.004, "names": 0.006, "fetch": 0.05, "create": 0.06}


class Probe:
    """A process that does one operation after the other, and a shared table of their durations.

    The campaign itself has no threads: a process forked while another thread starts a program would keep that program's
    pipe open, and the start would not return.
    """

    def __init__(self, name, kind, operation):
        """`operation` is called in the process; it returns the operation, which is called with its number."""
        self.name, self.kind, self.operation = name, kind, operation
        self.memory = mmap.mmap(-1, 64 + ENTRIES * ENTRY.size)
        self.ending = FORK.Event()
        self.errors, self.theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self.run, daemon=True)

    def begin(self):
        self.process.start()

    def run(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            operation = self.operation()
        except Exception:
            self.theirs.send(("error", traceback.format_exc(limit=-2)))
            return
        turn, interval, reported = 0, INTERVAL[self.kind], 0
        due = time.monotonic()
        while not self.ending.is_set() and turn < ENTRIES:
            begun = time.monotonic_ns()
            struct.pack_into("<Q", self.memory, 8, begun)
            try:
                operation(turn)
            except Exception as error:
                # More would not say more.
                if (reported := reported + 1) <= 20:
                    self.theirs.send(("wrong" if isinstance(error, WrongBytes) else "error", f"{self.name}: {error or type(error).__name__}"))
            ENTRY.pack_into(self.memory, 64 + turn * ENTRY.size, begun, time.monotonic_ns() - begun, 0)
            struct.pack_into("<Q", self.memory, 8, 0)
            turn += 1
            struct.pack_into("<Q", self.memory, 0, turn)
            due = max(due + interval, time.monotonic() - interval)
            time.sleep(max(0, due - time.monotonic()))

    def samples(self):
        """Begin and duration of each operation, including the one still running. An operation that took longer than the
        interval also counts for those that would have begun meanwhile."""
        count, running = struct.unpack_from("<QQ", self.memory)
        entries = [ENTRY.unpack_from(self.memory, 64 + turn * ENTRY.size)[:2] for turn in range(count)]
        if running:
            entries.append((running, time.monotonic_ns() - running))
        interval = int(INTERVAL[self.kind] * 1e9)
        for begun, took in entries:
            for late in range(0, max(took, 1), interval):
                yield begun + late, took - late

    def stuck(self):
        """Seconds for which the current operation has been running."""
        running = struct.unpack_from("<Q", self.memory, 8)[0]
        return (time.monotonic_ns() - running) / 1e9 if running else 0

    def take(self):
        """Errors since the last call."""
        found = []
        try:
            while self.errors.poll():
                found.append(self.errors.recv())
        except EOFError:
            pass
        return found

    def end(self, seconds):
        self.ending.set()
        self.process.join(seconds)
        ended = not self.process.is_alive()
        self.process.kill()
        return ended


def direct(path, mode=os.O_RDWR):
    return os.open(path, mode | os.O_DIRECT)


class Blocks:
    """4 KiB reads and writes of a disk on base `seed`; even blocks are written and read again."""

    def __init__(self, path, seed, offset, blocks, choice):
        self.path, self.seed, self.offset, self.blocks = path, seed, offset, blocks
        self.random, self.known = random.Random(choice), {}
        self.fd, self.buffer = direct(path), mmap.mmap(-1, BLOCK)

    def __call__(self, turn):
        number = self.random.randrange(self.blocks)
        at = self.offset + number * BLOCK
        if turn % 2 == 0 and number % 2 == 0:
            # Until the write is acknowledged, both contents are right.
            new = content(turn + 1000, at, BLOCK)
            self.buffer[:] = new
            old, self.known[number] = self.known.get(number), None
            if os.pwritev(self.fd, [self.buffer], at) != BLOCK:
                self.known[number] = old
                raise OSError(errno.EIO, "short write")
            self.known[number] = turn + 1000
        else:
            if os.preadv(self.fd, [self.buffer], at) != BLOCK:
                raise OSError(errno.EIO, "short read")
            seed = self.known.get(number, self.seed)
            if seed is not None:
                compare(self.buffer[:], content(seed, at, BLOCK), self.path)


class Async:
    """Reads with io_submit(2), as a hypervisor does; the kernel limits their number for the mount."""

    def __init__(self, path, seed, blocks):
        self.path, self.seed, self.blocks, self.random = path, seed, blocks, random.Random(4)
        self.fd, self.buffer, self.context = direct(path, os.O_RDONLY), mmap.mmap(-1, BLOCK), ctypes.c_ulong()
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.call(206, 1, ctypes.byref(self.context))

    def call(self, *arguments):
        done = libc.syscall(*arguments)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return done

    def __call__(self, turn):
        offset = self.random.randrange(self.blocks) * BLOCK
        # struct iocb: data, key and flags, IOCB_CMD_PREAD, file, buffer, length, offset.
        request = ctypes.create_string_buffer(struct.pack("<QIiHhIQQqQII", 0, 0, 0, 0, 0, self.fd, self.at, BLOCK, offset, 0, 0, 0), 64)
        pointer, event = ctypes.c_void_p(ctypes.addressof(request)), ctypes.create_string_buffer(32)
        self.call(209, self.context, ctypes.c_long(1), ctypes.byref(pointer))
        while self.call(208, self.context, ctypes.c_long(1), ctypes.c_long(1), event, None) != 1:
            pass
        result = struct.unpack("<QQqq", event.raw)[2]
        if result != BLOCK:
            raise OSError(-result, os.strerror(-result) if result < 0 else "short read")
        compare(self.buffer[:], content(self.seed, offset, BLOCK), self.path)


class FirstReads:
    """Reads places of the base that were never read, so that each read is fetched from the server."""

    def __init__(self, path, seed, size):
        self.path, self.seed = path, seed
        self.places = list(range(4 * MIB, size, 128 * KIB))
        random.Random(1).shuffle(self.places)
        self.fd, self.buffer = direct(path, os.O_RDONLY), mmap.mmap(-1, BLOCK)

    def __call__(self, turn):
        at = self.places[turn % len(self.places)]
        if os.preadv(self.fd, [self.buffer], at) != BLOCK:
            raise OSError(errno.EIO, "short read")
        compare(self.buffer[:], content(self.seed, at, BLOCK), self.path)


class Names:
    """stat and open of a disk, and stat of a name that does not exist."""

    def __init__(self, path):
        self.path = path

    def __call__(self, turn):
        if turn % 3 == 0:
            os.stat(self.path)
        elif turn % 3 == 1:
            os.close(os.open(self.path, os.O_RDWR))
        else:
            try:
                os.stat(f"{self.path}{turn}.raw")
                raise OSError(errno.EIO, "a disk exists that was never created")
            except FileNotFoundError:
                pass


class Creations:
    """Creates and removes a small disk through the control socket."""

    def __init__(self, socket, base):
        self.socket, self.base = socket, base

    def ask(self, method, path, body=None):
        connection = Control(self.socket, 30)
        try:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            return answer.status, text
        finally:
            connection.close()

    def __call__(self, turn):
        name = f"victim-{turn // 2}"
        # A takeover of a worker breaks connections; the command line retries, and so does a program.
        for last in (False, False, True):
            try:
                if turn % 2 == 0:
                    status, text = self.ask("POST", "/v1/disks", {"name": name, "base": self.base})
                    good = status == 200 or (status == 409 and not last)
                else:
                    status, text = self.ask("DELETE", f"/v1/disks/{name}")
                    good = status in (200, 404)
            except TimeoutError as error:
                raise OSError(errno.ETIMEDOUT, f"{name}: no answer in 30 s") from error
            except OSError as error:
                if last:
                    raise
                status, good, text = 0, False, str(error)
            if good or status not in (0, 503):
                break
            time.sleep(0.2)
        if not good:
            raise OSError(errno.EIO, f"{name}: status {status}: {text[:300]}")


class Fio:
    """fio with verification on one disk, repeatedly, at a steady rate; in its own process, see `Probe`."""

    name = "fio"

    def __init__(self, where, path, rate):
        self.where, self.path, self.rate = where, path, rate
        self.ending, self.passes = FORK.Event(), FORK.Value("q", 0)
        self.errors, self.theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self.run, daemon=True)

    def begin(self):
        self.process.start()

    def run(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        argv = [
            "fio", "--name=victim", f"--filename={self.path}", "--size=4M", "--bs=4k", "--rw=randrw", "--iodepth=16", "--ioengine=libaio",
            "--direct=1", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", f"--rate_iops={self.rate},{self.rate}",
            "--randrepeat=0", "--output-format=terse", "--allow_file_create=0",
        ]  # fmt: skip
        while not self.ending.is_set():
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=self.where)
            if done.returncode != 0:
                text = done.stderr + done.stdout
                lines = [line for line in text.splitlines() if "verify" in line or "error" in line or "fio:" in line]
                kind = "wrong" if "verify: bad" in text or "verify failed" in text else "error"
                self.theirs.send((kind, f"fio: status {done.returncode}: {' / '.join(lines[:3])[:400] or text[-200:]}"))
                time.sleep(0.2)
            self.passes.value += 1

    take, end = Probe.take, Probe.end


class Victim:
    """The probes and fio on one daemon."""

    def __init__(self, where, daemon, local, url, size, quick):
        """`local` and `url` are name and seed of the two bases."""
        for name, base in (("fio", local), ("local", local), ("url", url), ("fetch", url), ("names", local)):
            daemon.cli("disk", "create", f"v-{name}", "--base", base[0])
        socket = daemon.store / "control.sock"
        disk = {name: str(daemon.disk(f"v-{name}")) for name in ("fio", "local", "url", "fetch", "names")}
        # Warms the cache: the first read of the base is not to be measured.
        fd = os.open(disk["url"], os.O_RDONLY)
        compare(os.pread(fd, 2 * MIB, 0), content(url[1], 0, 2 * MIB), disk["url"])
        os.close(fd)
        self.probes = [
            Probe("local", "local", lambda: Blocks(disk["local"], local[1], 0, 512, 1)),
            Probe("async", "async", lambda: Async(disk["names"], local[1], 512)),
            Probe("url", "url", lambda: Blocks(disk["url"], url[1], 0, 512, 2)),
            Probe("fetch", "fetch", lambda: FirstReads(disk["fetch"], url[1], size)),
            Probe("names", "names", lambda: Names(disk["names"])),
            Probe("create", "create", lambda: Creations(socket, local[0])),
        ]
        self.fio = Fio(where, disk["fio"], 200 if quick else 300)
        self.parts = [*self.probes, self.fio]

    def begin(self):
        for part in self.parts:
            part.begin()

    def stuck(self):
        return max((probe.stuck(), probe.name) for probe in self.probes)

    def end(self, seconds):
        """Ends all parts; returns the names of those that did not end in time."""
        for part in self.parts:
            part.ending.set()
        deadline = time.monotonic() + seconds
        return [
            part.name for part in self.parts if not part.end(max(0.1, deadline - time.monotonic()))
        ]

    def take(self):
        return [found for part in self.parts for found in part.take()]


class Quiet:
    """A second daemon that is not attacked, with a probe of each kind that it can have: effects of the host show there too."""

    def __init__(self, daemon, local):
        for name in ("quiet", "quiet-names"):
            daemon.cli("disk", "create", name, "--base", local[0])
        path, names, socket = str(daemon.disk("quiet")), str(daemon.disk("quiet-names")), daemon.store / "control.sock"
        self.probes = [
            Probe("quiet", "local", lambda: Blocks(path, local[1], 0, 512, 3)),
            Probe("quiet", "names", lambda: Names(names)),
            Probe("quiet", "create", lambda: Creations(socket, local[0])),
        ]

    def begin(self):
        for probe in self.probes:
            probe.begin()

    def end(self, seconds):
        for probe in self.probes:
            probe.end(seconds)


def p99(values):
    values = sorted(values)
    return values[min(len(values) - 1, len(values) * 99 // 100)] / 1e6 if values else None


def by_window(probe, windows):
    """For each phase the median and the maximum over its windows of the 99th percentile, ms, and the longest operation."""
    samples = list(probe.samples())
    result = {}
    for phase, spans in windows.items():
        inside = [[took for begun, took in samples if first <= begun < last] for first, last in spans]
        values = [value for value in map(p99, inside) if value is not None]
        # A window in which nothing began is covered by `samples`, by the operation that was running.
        result[phase] = {
            "p99": statistics.median(values) if values else None,
            "most": max(values, default=None),
            "worst": max((max(window) / 1e6 for window in inside if window), default=None),
            "count": sum(map(len, inside)),
        }
    return result
