"""Everything that is compared: each serves a file over a base image, and names the processes that do so."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from harness import GIB, MIB, PLYFS, TARGET, Daemon, call, end, family, mounted, start, wait_for

from .many import stop

# Writing 3 to it drops clean pages, and what is known of files and directories.
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def null_server():
    """The example of the same build as the program, or of the last release build."""
    places = [Path(PLYFS).parent / "examples" / "null-server", TARGET / "examples" / "null-server"]
    return next((str(place) for place in places if os.access(place, os.X_OK)), None)


def drop_caches():
    """Empties the kernel's caches of files, of everything that is written."""
    call("sync")
    DROP_CACHES.write_text("3")


def cached(path):
    """Reads a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(4 * MIB):
            pass


class Contender:
    """`open` returns the path of a new disk over an image; `close` removes it. `stop` ends everything."""

    # Whether it may be the best peer, of which a ratio is.
    is_peer = False
    # "plyfs", "file", "null", "peer" or "beside".
    group = "peer"
    # Whether fio opens the file with O_DIRECT, and a loop device uses it so.
    direct = True

    def __init__(self, name, label):
        self.name, self.label = name, label

    def why_not(self, row):
        """Why the contender does not do this row, or None."""
        return None

    def fresh(self, image):
        """As open, with nothing in its own caches."""
        return self.open(image)

    def pids(self):
        """The processes that serve."""
        return []

    def close(self):
        pass

    def stop(self):
        pass


class Plyfs(Contender):
    """One daemon for all runs, as in production; each run has a new disk."""

    group = "plyfs"

    def __init__(self, where):
        super().__init__("plyfs", "plyfs")
        (where / "plyfs").mkdir()
        self.daemon = Daemon(where / "plyfs", "--cache-memory", "2G")
        self.daemon.start()
        self.images = set()
        self.serial = 0
        self.disk = None

    def open(self, image):
        if self.daemon.process is None or self.daemon.process.poll() is not None:
            self.daemon.start()
        if image not in self.images:
            self.daemon.cli("base", "add", image.stem, image)
            self.images.add(image)
        self.serial += 1
        disk = f"d{self.serial}"
        self.daemon.cli("disk", "create", disk, "--base", image.stem)
        self.disk = disk
        return self.daemon.disk(disk)

    def fresh(self, image):
        # The memory of the cache is the supervisor's, so a new worker would have it.
        path = self.open(image)
        self.daemon.stop()
        self.daemon.start()
        return path

    def pids(self):
        return family(self.daemon.process.pid)

    def close(self):
        if self.disk:
            self.daemon.cli("disk", "rm", self.disk)
            self.disk = None

    def stop(self):
        stop(self.daemon)


class File(Contender):
    """The medium itself: a copy of the base, written in place."""

    group = "file"

    def __init__(self, where, direct):
        name = "file-direct" if direct else "file-buffered"
        super().__init__(name, "file, O_DIRECT" if direct else "file, buffered")
        self.where, self.direct = where / name, direct
        self.where.mkdir()

    def open(self, image):
        path = self.where / image.name
        if not path.exists():
            shutil.copyfile(image, path)
        # Otherwise the run would include the write-back of the copy, or of the run before.
        call("sync", path)
        return path

    def stop(self):
        shutil.rmtree(self.where, ignore_errors=True)


class Mounted(Contender):
    """One process, which serves the mount at `mount` as long as it lives."""

    process = mount = None

    def serve(self, argv, log):
        self.process = start(argv, log)
        wait_for(self.label, lambda: mounted(self.mount), self.process)

    def pids(self):
        return [self.process.pid]

    def stop(self):
        if self.process:
            end(self.process, self.mount)
            self.process = None


class Null(Mounted):
    """A FUSE server that answers from memory and does nothing else: examples/null-server.rs."""

    group = "null"

    def __init__(self, where):
        super().__init__("null", "null server")
        self.mount, self.log = where / "null", where / "null.log"
        self.mount.mkdir()

    def why_not(self, row):
        if row.kind == "database":
            return "it keeps nothing"
        if row.kind == "cold":
            return "it has no medium"
        if "--fsync=1" in row.arguments:
            return "its flush reaches no disk"
        return None

    def open(self, image):
        self.serve([null_server(), self.mount, image.stat().st_size], self.log)
        return self.mount / "disks" / "null.raw"

    def close(self):
        self.stop()


class Qsd(Mounted):
    """qemu-storage-daemon's FUSE export of a qcow2 overlay on the base."""

    is_peer = True
    OPTIONS = {"64k": "cluster_size=64k", "128k-el2": "cluster_size=128k,extended_l2=on"}
    TITLES = {"64k": "qcow2 64k", "128k-el2": "qcow2 128k extended_l2"}

    def __init__(self, where, qemu, clusters):
        super().__init__(f"qsd-{clusters}-{qemu.version}", f"{self.TITLES[clusters]}, QEMU {qemu.version}")
        self.qemu, self.options = qemu, self.OPTIONS[clusters]
        self.overlay, self.mount = where / f"{self.name}.qcow2", where / f"{self.name}.export"
        self.log = where / f"{self.name}.log"

    def open(self, image):
        call(self.qemu.img, "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", "-o", self.options, self.overlay)
        self.mount.touch()
        node = {
            "driver": "qcow2",
            "node-name": "disk",
            "discard": "unmap",
            "file": {"driver": "file", "filename": str(self.overlay), "discard": "unmap"},
            "backing": {
                "driver": "raw",
                "read-only": True,
                "file": {"driver": "file", "filename": str(image), "read-only": True},
            },
        }
        export = f"fuse,id=e,node-name=disk,mountpoint={self.mount},writable=on"
        self.serve([self.qemu.daemon, "--blockdev", json.dumps(node), "--export", export], self.log)
        return self.mount

    def close(self):
        self.stop()
        self.overlay.unlink(missing_ok=True)


class Nbdkit(Contender):
    """nbdkit's cow filter over the base, as a file through nbdfuse."""

    is_peer = True

    def __init__(self, where, version):
        super().__init__("nbdkit", f"nbdkit {version} cow, nbdfuse")
        self.where, self.socket, self.mount = where, where / "nbdkit.sock", where / "nbdkit.mnt"
        self.log = where / "nbdkit.log"
        self.mount.mkdir()
        self.server = self.process = None

    def why_not(self, row):
        if row.kind == "database" or "--fsync=1" in row.arguments:
            return "its flush reaches no disk: the overlay is gone when it ends"
        return None

    def open(self, image):
        # The filter keeps its overlay in an unlinked file in TMPDIR; so it is on the medium under test.
        self.server = start(
            ["nbdkit", "-f", "-U", self.socket, "--filter=cow", "file", image], self.log, env={**os.environ, "TMPDIR": str(self.where)}
        )
        wait_for("nbdkit", self.socket.exists, self.server)
        self.process = start(["nbdfuse", f"{self.mount}/nbd", f"nbd+unix:///?socket={self.socket}"], self.log)
        wait_for(self.label, lambda: mounted(self.mount), self.process)
        return self.mount / "nbd"

    def pids(self):
        return [self.server.pid, self.process.pid]

    def close(self):
        self.stop()

    def stop(self):
        if self.process:
            # nbdfuse ends by itself once it is unmounted.
            subprocess.run(["fusermount3", "-u", str(self.mount)], stderr=subprocess.DEVNULL)
            end(self.process, self.mount)
        if self.server:
            end(self.server)
        self.server = self.process = None
        self.socket.unlink(missing_ok=True)


class QemuImg(Contender):
    """QEMU's own qcow2 driver in the process that asks: `qemu-img bench`, through no mount. It is no peer."""

    group = "beside"
    # Odd, so that a walk in steps of this many blocks comes to each block of a disk of 2^n blocks once.
    STRIDE = 101_537

    def __init__(self, where, qemu):
        super().__init__(f"qemu-img-{qemu.version}", f"qcow2 64k in the process, qemu-img bench {qemu.version}")
        self.qemu, self.overlay = qemu, where / f"{self.name}.qcow2"

    def why_not(self, row):
        if row.kind == "database":
            return "it serves no file"
        if row.mixes:
            return "qemu-img bench cannot mix reads and writes"
        if row.jobs > 1:
            return "qemu-img bench has one job"
        return None

    def open(self, image):
        call(self.qemu.img, "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", "-o", Qsd.OPTIONS["64k"], self.overlay)
        return self.overlay

    def bench(self, row, image, seconds):
        """One run of about this time, on a new overlay that it makes. The same figures as those of a run of fio."""
        size = MIB if row.large else 4096
        command = [self.qemu.img, "bench", "-f", "qcow2", "-t", "writeback", "-s", size, "-d", row.depth]
        command += ["-S", size if row.large else self.STRIDE * size]
        if row.writes:
            command.append("-w")
        if "--fsync=1" in row.arguments:
            command.append("--flush-interval=1")

        def run(count):
            """Seconds that passed, and seconds of processor time."""
            self.open(image)
            if row.kind == "cold":
                drop_caches()
            begin = os.times()
            out = call(*command, "-c", count, self.overlay, timeout=600)
            after = os.times()
            processor = after.children_user - begin.children_user + after.children_system - begin.children_system
            return float(re.search(r"Run completed in ([0-9.]+) seconds", out)[1]), processor

        # qemu-img takes a number of requests and no time, so shorter runs tell how many there are room for.
        most = GIB // size * (64 * seconds if row.kind == "hot" else 1)
        count = 16 if row.large else 128
        while (passed := run(count)[0]) < 0.1 and count < most:
            count = min(8 * count, most)
        count = max(1, min(most, int(count / max(passed, 1e-3) * seconds)))
        passed, processor = run(count)
        return {"bytes": count * size, "requests": count, "seconds": passed, "cpu": processor}

    def close(self):
        self.overlay.unlink(missing_ok=True)

    def stop(self):
        self.close()


class Qemu:
    """One build of QEMU's programs."""

    def __init__(self, daemon, img):
        self.daemon, self.img = str(daemon), str(img)
        self.text = call(daemon, "--version").splitlines()[0]
        found = re.search(r"version ([0-9.]+)", self.text)
        self.version = found[1] if found else "unknown"


def all_of(where, qemus, nbdkit):
    """Every contender, on the medium of `where`."""
    made = []
    try:
        made += [Plyfs(where), File(where, direct=False), File(where, direct=True), Null(where)]
        for qemu in qemus:
            made += [Qsd(where, qemu, clusters) for clusters in Qsd.OPTIONS]
        made += [Nbdkit(where, nbdkit), *(QemuImg(where, qemu) for qemu in qemus)]
    except BaseException:
        for contender in made:
            contender.stop()
        raise
    return made
