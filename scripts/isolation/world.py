"""The environment of one attack: its namespaces, two daemons, the victim's bases and server, and tools for attackers."""

import ctypes
import errno
import fcntl
import os
import random
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

from harness import Daemon, call, children, start

from .content import BLOCK, MIB, compare, content, sha256, write_image
from .servers import FORK, Server

LOCAL, URL, ATTACKER = ("local", 100), ("url", 200), 900
LOCAL_SIZE, URL_SIZE = 16 * MIB, 256 * MIB
# An address that is neither loopback nor private nor link-local; only in this network namespace.
PUBLIC = "203.0.113.10"
# The size of /dev/shm: small enough to be filled.
SHM = "48m"
CONFIG = """
[http]
connect_timeout = "1s"
stall_timeout = "1s"
"""
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_CHILD_SUBREAPER = 36


def own_network():
    """Brings loopback up, and gives it an address that looks public."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh14x", b"lo", 0x49))
        fcntl.ioctl(probe, 0x8916, struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(PUBLIC)))


def own_memory():
    """Mounts a small /dev/shm, and /run, where daemons of root keep files in memory."""
    call("mount", "-t", "tmpfs", "-o", f"size={SHM},mode=1777", "isolation", "/dev/shm")
    call("mount", "-t", "tmpfs", "-o", "mode=755", "isolation", "/run")


class World:
    def __init__(self, where, binary, attack, quick):
        self.where, self.binary, self.quick, self.attack = where, binary, quick, attack
        self.undo, self.notes, self.problems = [], [], []
        own_network()
        own_memory()
        write_image(where / "local.img", LOCAL[1], LOCAL_SIZE)
        self.server = Server(URL_SIZE, URL[1], nice=False)
        self.digest = sha256(URL[1], URL_SIZE)
        (where / "attacked").mkdir()
        # An older binary refuses keys that it does not know.
        known = Path(binary).read_bytes()
        config = CONFIG + "".join(text for key, text in attack.newer.items() if key.encode() in known)
        self.daemon = Daemon(
            where / "attacked", "--cache-memory", "64M", *attack.arguments, binary=binary, config=config, prefix=attack.prefix
        )
        self.quiet = None

    def note(self, text):
        self.notes.append(text)

    def problem(self, text):
        if text not in self.problems:
            self.problems.append(text)

    def later(self, action):
        """Registers a clean-up; they run in reverse order."""
        self.undo.append(action)

    def clean(self):
        while self.undo:
            try:
                self.undo.pop()()
            except Exception as error:
                self.note(f"clean-up: {error}")

    def start(self, quiet=True):
        self.daemon.start()
        self.later(self.daemon.end)
        self.bases(self.daemon)
        if quiet:
            (self.where / "quiet").mkdir()
            self.quiet = Daemon(self.where / "quiet", "--cache-memory", "64M", binary=self.binary)
            self.quiet.start()
            self.later(self.quiet.end)
            self.quiet.cli("base", "add", LOCAL[0], self.where / "local.img")

    def bases(self, daemon):
        daemon.cli("base", "add", LOCAL[0], self.where / "local.img")
        daemon.cli("base", "add", URL[0], self.server.url(), "--sha256", self.digest)

    # Tools for attackers.

    def serve(self, mode="ok", size=256 * MIB, seed=ATTACKER, **kwargs):
        server = Server(size, seed, mode, **kwargs)
        self.later(server.end)
        return server

    def attacker_disk(self, base, name=None, size=None):
        name = name or f"a-{base}"
        self.daemon.cli("disk", "create", name, "--base", base, *(["--size", str(size)] if size else []))
        return self.daemon.disk(name)

    def readers(self, path, **kwargs):
        readers = Readers(path, **kwargs)
        self.later(readers.kill)
        return readers

    def storm(self, path, *arguments, name="storm"):
        """Runs fio at low priority, so that the daemon's work affects the victim and not the load on the host."""
        log = self.where / f"{name}.log"
        process = start(
            ["nice", "-n", "15", "fio", f"--name={name}", f"--filename={path}", "--direct=1", "--allow_file_create=0", "--randrepeat=0",
             "--time_based", "--runtime=600", *arguments],
            log, cwd=self.where, process_group=0,
        )  # fmt: skip
        self.later(lambda: kill_group(process))
        return process

    def loop(self, work, pace=0.0):
        """Calls `work(turn)` repeatedly in a process of low priority, until it is ended."""
        loop = Loop(work, pace)
        self.later(loop.end)
        return loop

    def nbd(self, *filters, parameters=(), size="256M", name="nbd"):
        """nbdkit with these filters and their parameters, and a file that nbdfuse makes of it: the process and the path."""
        socket_path, mount = self.where / f"{name}.sock", self.where / f"{name}.mnt"
        mount.mkdir()
        server = start(["nbdkit", "-f", "-U", socket_path, *filters, "memory", size, *parameters], self.where / f"{name}.log")
        self.later(lambda: end_now(server))
        until(socket_path.exists, 10, "nbdkit")
        fuse = start(["nbdfuse", f"{mount}/nbd", f"nbd+unix:///?socket={socket_path}"], self.where / f"{name}fuse.log")
        self.later(lambda: (end_now(fuse), call("umount", "-l", mount)))
        until(lambda: os.path.exists(mount / "nbd"), 10, "nbdfuse")
        return server, mount / "nbd"

    def cache_disk(self):
        """Moves the stopped daemon's cache to its own filesystem, on a disk that fails while a file exists and hangs while a
        process is stopped. Returns that process and the path of that file."""
        failing, cache = self.where / "failing", self.daemon.store / "cache"
        server, device = self.nbd("--filter=error", parameters=(f"error-file={failing}", "error-rate=100%"), name="cache")
        call("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)
        # The loop device ends with the mount.
        call("mount", "-o", "loop,commit=1", device, cache)
        (cache / "lost+found").rmdir()
        self.later(lambda: call("umount", "-l", cache))
        self.later(lambda: server.send_signal(signal.SIGCONT))
        return server, failing

    def state(self, base):
        return self.daemon.cli("base", "show", base, seconds=20)


def end_now(process):
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.kill()


def kill_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(0.02)


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


class Loop:
    def __init__(self, work, pace):
        self.turns, self.failed, self.text = FORK.Value("q", 0), FORK.Value("q", 0), FORK.Array("c", 400)
        self.ending, self.work, self.pace = FORK.Event(), work, pace
        self.process = FORK.Process(target=self.run, daemon=True)
        self.process.start()

    def run(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.nice(15)
        while not self.ending.is_set():
            try:
                self.work(self.turns.value)
            except Exception as error:
                self.failed.value += 1
                self.text.value = str(error).encode()[:399]
            self.turns.value += 1
            if self.pace:
                time.sleep(self.pace)

    def end(self, seconds=10):
        self.ending.set()
        self.process.join(seconds)
        self.process.kill()
        self.process.join(5)
        return not self.process.is_alive()


ERRNOS = [errno.EIO, errno.ENOSPC, errno.EINTR, errno.ETIMEDOUT, errno.ENXIO]


class Readers:
    """Threads that read 4 KiB at random places of `path`, and compare with the content of `seed` if it is given."""

    def __init__(self, path, seed=None, threads=4, size=256 * MIB, pace=0.0, direct=True, choice=0):
        self.path, self.seed, self.threads, self.size, self.pace, self.choice = path, seed, threads, size, pace, choice
        self.flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        # Good reads, wrong reads, failures by error number, other failures.
        self.counts = FORK.Array("q", 3 + len(ERRNOS))
        self.ending, self.text = FORK.Event(), FORK.Array("c", 300)
        self.process = FORK.Process(target=self.run, daemon=True)
        self.process.start()

    def run(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.nice(10)
        threads = [threading.Thread(target=self.read, args=(number,), daemon=True) for number in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def read(self, number):
        import mmap

        choice, buffer = random.Random(f"{self.choice}/{number}"), mmap.mmap(-1, BLOCK)
        try:
            fd = os.open(self.path, self.flags)
        except OSError as error:
            return self.failed(error)
        while not self.ending.is_set():
            at = choice.randrange(self.size // BLOCK) * BLOCK
            try:
                os.preadv(fd, [buffer], at)
                if self.seed is not None:
                    compare(buffer[:], content(self.seed, at, BLOCK), str(self.path))
                self.add(0)
            except OSError as error:
                self.failed(error)
                time.sleep(0.005)
            except Exception as error:
                self.add(1)
                self.text.value = str(error).encode()[:299]
            if self.pace:
                time.sleep(self.pace)

    def failed(self, error):
        self.add(2 + ERRNOS.index(error.errno) if error.errno in ERRNOS else len(self.counts) - 1)

    def add(self, place):
        with self.counts.get_lock():
            self.counts[place] += 1

    def good(self):
        return self.counts[0]

    def wrong(self):
        return self.counts[1]

    def errors(self):
        """The number of failures by error name."""
        named = [(errno.errorcode[number], self.counts[2 + place]) for place, number in enumerate(ERRNOS)] + [("other", self.counts[-1])]
        return {name: count for name, count in named if count}

    def end(self, seconds):
        """Stops; returns whether all reads ended in time."""
        self.ending.set()
        self.process.join(seconds)
        return not self.process.is_alive()

    def kill(self):
        self.process.kill()
        self.process.join(1)

    def dies(self, seconds):
        """Kills the process; returns whether it ended in time although its reads were waiting."""
        self.process.kill()
        self.process.join(seconds)
        return not self.process.is_alive()


def live_maps(daemon):
    """The directory of a daemon's live maps, where this or an older version keeps it; None if there is none."""
    status = os.stat(daemon.store)
    for parent in (Path("/dev/shm"), Path("/run/plyfs")):
        for place in parent.iterdir() if parent.is_dir() else ():
            if place.name.endswith(f"-{status.st_dev}-{status.st_ino}"):
                return place
    return None


def remove_live_maps(daemon):
    """Removes the live maps as a clean-up job would. A mount point cannot be removed."""
    if place := live_maps(daemon):
        subprocess.run(["rm", "-rf", place], stderr=subprocess.DEVNULL)
    return place


class Cgroup:
    """A memory cgroup, of version 1 or 2, whichever is writable."""

    def __init__(self, name):
        self.place = None
        unified, old = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
        for root, limit, used in ((unified, "memory.max", "memory.current"), (old, "memory.limit_in_bytes", "memory.usage_in_bytes")):
            place = root / name
            try:
                place.mkdir()
                if (place / limit).exists():
                    self.place, self.limit_file, self.used_file = place, place / limit, place / used
                    return
                place.rmdir()
            except OSError:
                continue

    def add(self, pid):
        (self.place / "cgroup.procs").write_text(str(pid))

    def limit(self, size):
        self.limit_file.write_text(str(size))

    def used(self):
        return int(self.used_file.read_text())

    def remove(self):
        if self.place is None:
            return
        deadline = time.monotonic() + 5
        while True:
            try:
                self.place.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)


def log_has(daemon, pattern):
    return re.findall(pattern, daemon.log.read_text(errors="replace"))


def worker_of(daemon):
    until(lambda: children(daemon.process.pid), 20, "a worker")
    return daemon.worker()


def as_nobody(*argv, seconds=30):
    return subprocess.run(["runuser", "-u", "nobody", "--", *map(str, argv)], capture_output=True, text=True, timeout=seconds)
