"""How long a reader of a disk waits when its worker dies, and at an upgrade."""

import mmap
import os
import signal
import statistics
import threading
import time

from harness import MIB, wait_for

from .many import Store

SPAN = 64 * MIB
# Seconds without an answer after which a measurement has failed.
PATIENCE = 60
# In a round.
KILLS, UPGRADES = 5, 2


class Reader(threading.Thread):
    """Reads a disk without the page cache, and keeps the longest time between two answers."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, 4096)
        self.longest, self.answers, self.error, self.ended = 0.0, 0, None, False

    def run(self):
        at, last = 0, time.monotonic()
        try:
            while not self.ended:
                if os.preadv(self.file, [self.buffer], at) != 4096:
                    raise OSError("a short read")
                now = time.monotonic()
                self.longest, last = max(self.longest, now - last), now
                self.answers += 1
                at = (at + 4096 * 977) % SPAN
        except OSError as error:
            self.error = error

    def pause(self, action):
        """The longest time between two answers while the action runs, in ms."""
        self.longest = 0.0
        action()
        # The answer that is waited for meanwhile counts too.
        answered, deadline = self.answers, time.monotonic() + PATIENCE
        while self.answers < answered + 2:
            if self.error or time.monotonic() > deadline:
                raise RuntimeError(f"a read failed: {self.error or 'no answer'}")
            time.sleep(0.001)
        return self.longest * 1e3

    def end(self):
        self.ended = True
        self.join(60)
        os.close(self.file)


def prepared(store):
    """The worker, once a standby worker is prepared."""
    found = {}

    def ready():
        found.update(store.daemon.cli("status"))
        standby = found.get("standby") or {}
        return standby.get("prepared") is True

    wait_for("a prepared standby worker", ready, store.daemon.process)
    return found["worker_pid"]


def kill(store, worker):
    os.kill(worker, signal.SIGKILL)
    wait_for("another worker", lambda: store.daemon.cli("status")["worker_pid"] != worker, store.daemon.process)


def upgrade(store, _):
    store.daemon.cli("upgrade")


def series(store, reader, action, number):
    found = []
    for _ in range(number):
        worker = prepared(store)
        found.append(reader.pause(lambda: action(store, worker)))
    return found


def pauses(disk, image):
    """Figures by the keys of the facts."""
    found = {}

    def note(key, values):
        found[key], found[f"{key}-worst"] = statistics.median(values), max(values)

    for suffix, disks in (("", 1), ("-10000", 10_000)):
        with Store(disk, image) as store:
            store.create("m", disks)
            reader = Reader(store.daemon.disk("m0"))
            reader.start()
            try:
                note(f"pause-death{suffix}", series(store, reader, kill, KILLS))
                if disks > 1:
                    note(f"pause-upgrade{suffix}", series(store, reader, upgrade, UPGRADES))
            finally:
                reader.end()
    return found
