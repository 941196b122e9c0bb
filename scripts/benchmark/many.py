"""Many disks on one base: time, space and memory."""

import json
import os
import shutil
import time

from harness import MIB, Daemon, call, directory, wait_for

# In one call; the body of a larger one would be refused.
BATCH = 10_000
OVERLAYS = 100


def usage(path):
    return int(call("du", "-s", "--block-size=1", path).split()[0])


def timed(action):
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def stop(daemon):
    """Ends a daemon, in order where it can, so that it leaves no memory of live maps behind."""
    try:
        daemon.stop()
    except Exception:
        daemon.end()


class Store:
    """A daemon of its own with one base."""

    def __init__(self, disk, image):
        self.where = directory(disk, "many.")
        self.daemon = Daemon(self.where, "--cache-memory", "64M")
        self.image = image

    def __enter__(self):
        try:
            self.daemon.start()
            self.daemon.cli("base", "add", "bench", self.image)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        stop(self.daemon)
        shutil.rmtree(self.where, ignore_errors=True)

    def create(self, prefix, number):
        self.daemon.cli("disk", "create", "--base", "bench", *[f"{prefix}{n}" for n in range(number)], seconds=600)

    def memory(self):
        return self.daemon.usage()["memory"]


def create(disk, image, qemu):
    """Figures of one round, by the keys of the facts."""
    found = {}
    with Store(disk, image) as store:
        before = usage(store.daemon.store)
        found["create-1000"] = timed(lambda: store.create("m", 1000))
        found["create-1000-disk"] = (usage(store.daemon.store) - before) / 1000 / 1024
        each = [timed(lambda: store.daemon.cli("disk", "create", f"s{n}", "--base", "bench")) * 1e3 for n in range(100)]
        found["create-cli"], found["create-cli-slowest"] = sum(each) / len(each), max(each)
    with Store(disk, image) as store:
        found["create-10000"] = timed(lambda: store.create("m", 10_000))
        listed = []
        found["list-10000"] = timed(lambda: listed.extend(store.daemon.cli("disk", "ls")))
        if len(listed) != 10_000:
            raise RuntimeError(f"10,000 disks were created, {len(listed)} are listed")
        found["stop-10000"] = timed(store.daemon.stop) * 1e3
        found["start-10000"] = timed(store.daemon.start) * 1e3
        if (number := len(store.daemon.cli("disk", "ls"))) != 10_000:
            raise RuntimeError(f"10,000 disks were created, {number} exist after the restart")
    overlays = directory(disk, "overlays.")
    spent = timed(
        lambda: [
            call(qemu.img, "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", overlays / f"{n}.qcow2") for n in range(OVERLAYS)
        ]
    )
    found["qemu-create"] = spent / OVERLAYS * 1e3
    found["qemu-create-disk"] = usage(overlays) / OVERLAYS / 1024
    shutil.rmtree(overlays)
    return found


def touch(path):
    """One read and one write through the mount."""
    with open(path, "r+b", buffering=0) as file:
        os.pread(file.fileno(), 4096, MIB)
        os.pwrite(file.fileno(), b"\1" * 4096, 0)


def memory(disk, image):
    """Memory of the daemon's processes: disks in use lately, disks that are not, and very many."""
    found, number = {}, 1000
    with Store(disk, image) as store:
        store.create("w", 1)
        touch(store.daemon.disk("w0"))
        before = store.memory()
        store.create("m", number)
        created = store.memory()
        for n in range(number):
            touch(store.daemon.disk(f"m{n}"))
        found["memory-attached"] = (store.memory() - before) / number / 1024
        attached = store.daemon.cli("status")["attached_disks"]
        if attached < number:
            raise RuntimeError(f"{number} disks were read and written, {attached} are attached")
        wait_for("the disks to be detached", lambda: store.daemon.cli("status")["attached_disks"] == 0, store.daemon.process, 300)
        found["memory-detached"] = (store.memory() - created) / number / 1024
        found["memory-created"] = (created - before) / number / 1024
    with Store(disk, image) as store:
        for batch in range(100_000 // BATCH):
            store.create(f"b{batch}-", BATCH)
        # As after a start: without what the creation left behind.
        store.daemon.stop()
        store.daemon.start(seconds=300)
        if (listed := len(json.loads(call(store.daemon.binary, "--store", store.daemon.store, "--json", "disk", "ls")))) != 100_000:
            raise RuntimeError(f"100,000 disks were created, {listed} exist after the restart")
        found["memory-100000"] = store.memory() / MIB
    return found
