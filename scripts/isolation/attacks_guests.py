"""Attacks by guests, images and filesystems: floods of requests and changes, hostile images, hangs below a base."""

import os
import subprocess
import time

from harness import GIB, MIB, ROOT, call

from .content import KIB, content
from .fusefs import FileSystem
from .run import Attack
from .world import ATTACKER, LOCAL, end_now, kill_group, until

PUNCH_HOLE, KEEP_SIZE, ZERO_RANGE = 2, 1, 16


class Nothing(Attack):
    row = "no attack: the noise of these measurements"


class AsyncReads(Attack):
    """Asynchronous reads of a disk whose server hangs."""

    depth, jobs = 300, 1

    def before(self, world):
        self.bad = world.serve(size=1 * GIB)
        world.daemon.cli("base", "add", "bad", self.bad.url())
        self.path = world.attacker_disk("bad")

    def begin(self, world):
        self.bad.mode("hang")
        self.fio = world.storm(
            self.path, "--ioengine=libaio", "--rw=randread", "--bs=4k", f"--iodepth={self.depth}", f"--numjobs={self.jobs}", "--thread",
            "--norandommap",
        )  # fmt: skip
        until(lambda: self.bad.requests.value > 1, 20, "fio's first read")
        time.sleep(1)

    def end(self, world):
        kill_group(self.fio)
        try:
            self.fio.wait(2)
        except subprocess.TimeoutExpired:
            world.problem("fio does not end when it is killed while the server hangs")
        self.bad.mode("ok")
        until(lambda: self.fio.poll() is not None, 20, "fio")


class Async300(AsyncReads):
    row = "300 asynchronous reads of a disk whose server hangs"
    quick = True


class Async10000(AsyncReads):
    row = "10,000 asynchronous reads of a disk whose server hangs"
    depth, jobs = 2500, 4


class KilledReader(Attack):
    row = "a process that waits for a server is killed, and ends at once"
    quick = True

    def before(self, world):
        self.bad = world.serve()
        world.daemon.cli("base", "add", "bad", self.bad.url())
        self.path = world.attacker_disk("bad")

    def begin(self, world):
        self.bad.mode("hang")
        self.readers = world.readers(self.path, threads=64)
        time.sleep(0.5)

    def during(self, world):
        if not self.readers.dies(2):
            world.problem("a killed reader has not ended within 2 s")
        self.readers = world.readers(self.path, threads=64)
        time.sleep(0.2)

    def end(self, world):
        self.readers.kill()
        self.bad.mode("ok")


class ManyOpens(Attack):
    row = "one disk is opened 10,000 times and kept open"

    def before(self, world):
        self.path = world.attacker_disk(LOCAL[0])

    def begin(self, world):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        count = min(10_000, hard - 200)
        path = self.path

        def hold(turn):
            if turn == 0:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                hold.kept = [os.open(path, os.O_RDWR) for _ in range(count)]
            fd = hold.kept[turn % count]
            os.close(fd)
            hold.kept[turn % count] = os.open(path, os.O_RDWR)

        self.loop = world.loop(hold)
        until(lambda: self.loop.turns.value > 0, 60, "the opens")
        world.note(f"{count} opens")

    def end(self, world):
        if not self.loop.end():
            world.problem("the process does not end")
        if self.loop.failed.value:
            world.problem(self.loop.text.value.decode())


class ManyDisks(Attack):
    row = "3,000 disks, each opened, written and closed"

    count = 3000

    def before(self, world):
        for first in range(0, self.count, 500):
            status, answer = world.daemon.ask(
                "POST", "/v1/disks", {"names": [f"m{number}" for number in range(first, first + 500)], "base": LOCAL[0]}, seconds=120
            )
            assert status == 200, answer

    def begin(self, world):
        def work(turn):
            fd = os.open(world.daemon.disk(f"m{turn % self.count}"), os.O_RDWR)
            os.pwrite(fd, b"x" * 4096, 0)
            os.close(fd)

        self.loop = world.loop(work)
        until(lambda: self.loop.turns.value > 0, 20, "")

    def end(self, world):
        self.loop.end()
        world.note(f"{self.loop.turns.value} opens; {world.daemon.usage()['files']} descriptors")
        if self.loop.failed.value:
            world.problem(self.loop.text.value.decode())
        # Disks are detached 30 s after they are closed.
        if self.loop.turns.value > 500:
            until(lambda: world.daemon.usage()["files"] < 500, 45, "closed disks are detached")


class Create10000(Attack):
    row = "10,000 disks are created in one call, and removed"

    def begin(self, world):
        names = [f"c{number}" for number in range(10_000)]

        def work(turn):
            status, answer = world.daemon.ask("POST", "/v1/disks", {"names": names, "base": LOCAL[0]}, seconds=200)
            if status != 200:
                raise RuntimeError(str(answer)[:300])
            for name in names:
                world.daemon.ask("DELETE", f"/v1/disks/{name}?force=true")

        self.loop = world.loop(work)
        time.sleep(0.3)

    def end(self, world):
        if not self.loop.end(120):
            world.problem("the call has not ended within 120 s")
        if self.loop.failed.value:
            world.problem(self.loop.text.value.decode())

    def healed(self, world):
        begin = time.monotonic()
        while names := [disk["name"] for disk in world.daemon.ask("GET", "/v1/disks")[1] if disk["name"].startswith("c")]:
            for name in names:
                world.daemon.ask("DELETE", f"/v1/disks/{name}?force=true")
            if time.monotonic() - begin > 90:
                world.problem(f"{len(names)} disks remain after 90 s of removals")
                return


class CreateRemove(Attack):
    row = "eight clients create and remove disks as fast as possible"
    quick = True

    def begin(self, world):
        def work(number):
            def one(turn):
                name = f"r{number}-{turn}"
                if world.daemon.ask("POST", "/v1/disks", {"name": name, "base": LOCAL[0]})[0] != 200:
                    raise RuntimeError("not created")
                if world.daemon.ask("DELETE", f"/v1/disks/{name}?force=true")[0] != 200:
                    raise RuntimeError("not removed")

            return one

        self.loops = [world.loop(work(number)) for number in range(8)]
        self.begun = time.monotonic()
        time.sleep(0.3)

    def end(self, world):
        took = time.monotonic() - self.begun
        for loop in self.loops:
            loop.end()
            if loop.failed.value:
                world.problem(f"{loop.failed.value} of {loop.turns.value} failed: {loop.text.value.decode()}")
        world.note(f"{sum(loop.turns.value for loop in self.loops) / took:.0f} creations and removals a second")


class PunchStorm(Attack):
    row = "endless punches, zeroes and writes on one disk"

    def before(self, world):
        self.path = world.attacker_disk(LOCAL[0])

    def begin(self, world):
        import ctypes
        import random

        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

        def work(turn):
            fd = os.open(self.path, os.O_RDWR)
            for _ in range(200):
                offset, length = random.randrange(0, 15 * MIB, 512), random.randrange(512, 512 * KIB, 512)
                if libc.fallocate(fd, random.choice([PUNCH_HOLE, ZERO_RANGE]) | KEEP_SIZE, offset, length) != 0:
                    raise OSError(ctypes.get_errno(), "fallocate")
                os.pwrite(fd, content(5, offset, 4096), offset)
            os.close(fd)

        self.loops = [world.loop(work) for _ in range(4)]

    def end(self, world):
        for loop in self.loops:
            loop.end()
            if loop.failed.value:
                world.problem(loop.text.value.decode())


class TruncateStorm(PunchStorm):
    row = "endless truncation to 4 KiB and to 1 TiB"

    def begin(self, world):
        def work(turn):
            os.truncate(self.path, 1 << 40 if turn % 2 else 4096)
            with open(self.path, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"y" * 4096, 0 if turn % 2 == 0 else (1 << 40) - 4096)

        self.loops = [world.loop(work) for _ in range(4)]


class FsyncStorm(PunchStorm):
    row = "sixteen processes write to sixteen disks, with fsync after each write"

    def before(self, world):
        self.paths = [world.attacker_disk(LOCAL[0], f"f{number}") for number in range(16)]

    def begin(self, world):
        def work(path):
            def one(turn):
                with open(path, "r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), b"z" * 4096, turn % 4000 * 4096)
                    os.fsync(file.fileno())

            return one

        self.loops = [world.loop(work(path)) for path in self.paths]


class HugeMap(Attack):
    row = "on a disk of 64 TiB one block is written in each 62 MiB, so that live maps grow, with frequent fsync"
    quick = True
    newer = {"map_memory_per_disk": '[runtime]\nmap_memory = "48M"\n'}

    def before(self, world):
        self.path = world.attacker_disk(LOCAL[0], size="64T")
        self.bystander = os.open(world.attacker_disk(LOCAL[0], "bystander", size="64G"), os.O_RDWR)
        self.places = iter(range(0, 64 * GIB, 64 * MIB))

    def during(self, world):
        # Another guest writes to new places.
        try:
            for _ in range(20):
                os.pwrite(self.bystander, b"b" * 4096, next(self.places))
        except OSError as error:
            world.problem(f"another guest's write: {error}")

    def begin(self, world):
        def work(turn):
            fd = os.open(self.path, os.O_RDWR)
            for number in range(turn * 500, turn * 500 + 500):
                os.pwrite(fd, b"w" * 4096, number * 62 * MIB % (1 << 46))
            os.fsync(fd)
            os.close(fd)

        self.loop = world.loop(work)
        time.sleep(1)

    def end(self, world):
        self.loop.end(30)
        os.close(self.bystander)
        used = os.statvfs("/dev/shm")
        world.note(
            f"{self.loop.turns.value * 500} places; {(used.f_blocks - used.f_bfree) * 4096 / MIB:.0f} MiB of /dev/shm; "
            f"failures of the attacker: {self.loop.failed.value} {self.loop.text.value.decode()}"
        )


class BandwidthHog(Attack):
    row = "four processes read and write 1 MiB at depth 32 on the attacker's disk"

    def before(self, world):
        self.path = world.attacker_disk(LOCAL[0], size="512M")

    def begin(self, world):
        self.fio = world.storm(self.path, "--ioengine=libaio", "--rw=randrw", "--bs=1M", "--iodepth=32", "--numjobs=4", "--size=512M")
        time.sleep(1)

    def end(self, world):
        kill_group(self.fio)
        until(lambda: self.fio.poll() is not None, 20, "fio")


class CacheThrash(Attack):
    row = "random reads of an attacker's base that is larger than the memory cache"

    def before(self, world):
        self.good = world.serve(size=64 * GIB)
        world.daemon.cli("base", "add", "large", self.good.url())
        self.path = world.attacker_disk("large")

    def begin(self, world):
        self.readers = world.readers(self.path, seed=ATTACKER, threads=32, size=64 * GIB)
        time.sleep(1)

    def end(self, world):
        if not self.readers.end(20):
            world.problem("the reads do not end")
        if self.readers.errors() or self.readers.wrong():
            world.problem(f"{self.readers.errors()} {self.readers.text.value.decode()}")


class FuseBase(Attack):
    """A base on a filesystem that misbehaves."""

    mode, threads = "hang", 40
    own_errors = False

    def before(self, world):
        self.files = FileSystem(world.where / "below", 256 * MIB, ATTACKER)
        world.later(self.files.end)
        world.daemon.cli("base", "add", "below", self.files.path)
        self.path = world.attacker_disk("below")

    def begin(self, world):
        self.files.mode(self.mode)
        self.readers = world.readers(self.path, seed=None if self.mode == "lie" else ATTACKER, threads=self.threads, pace=0.002)
        time.sleep(0.5)

    def end(self, world):
        self.files.mode("ok")

    def healed(self, world):
        good = self.readers.good()
        until(lambda: self.readers.good() > good + self.threads, 15, "its own guest's reads resume")
        if not self.readers.end(20):
            world.problem("its own guest's reads do not end")
        if self.readers.wrong():
            world.problem(f"its own guest read wrong bytes: {self.readers.text.value.decode()}")
        if self.readers.errors() and not self.own_errors:
            world.problem(f"its own guest got {self.readers.errors()}")


class FuseHang(FuseBase):
    row = "40 reads of a base on a filesystem that hangs"
    quick = True


class FuseLie(FuseBase):
    row = "a base on a filesystem that returns wrong bytes"
    mode = "lie"


class FuseFail(FuseBase):
    row = "a base on a filesystem that fails with EIO"
    mode, own_errors = "fail", True


class FuseSlow(FuseBase):
    row = "a base on a filesystem that answers 20 reads a second"
    mode = "slow"


class FuseShort(FuseBase):
    row = "a base on a filesystem that returns half of each read"
    mode, own_errors = "short", True


class AttachHang(Attack):
    row = "bases and disks on a filesystem that hangs completely are added, attached and opened"

    def before(self, world):
        self.files = FileSystem(world.where / "below", 64 * MIB, ATTACKER)
        world.later(self.files.end)
        world.daemon.cli("base", "add", "below", self.files.path)
        for number in range(40):
            world.attacker_disk("below", f"h{number}")
        # After a restart the worker has not attached the disks.
        world.daemon.stop()
        world.daemon.start()

    def begin(self, world):
        self.files.mode("hang_everything")

        def opens(number):
            def one(turn):
                os.close(os.open(world.daemon.disk(f"h{number}"), os.O_RDWR))

            return one

        def adds(turn):
            world.daemon.ask("POST", "/v1/bases", {"name": f"below{turn}", "source": str(self.files.path)}, seconds=5)

        self.loops = [world.loop(opens(number), 0.05) for number in range(40)] + [world.loop(adds, 0.05) for _ in range(4)]
        time.sleep(0.5)

    def end(self, world):
        self.files.mode("ok")
        for loop in self.loops:
            loop.ending.set()
        if not all(loop.end(10) for loop in self.loops):
            world.problem("the opens do not end when the filesystem works again")


class NbdBase(Attack):
    row = "a base behind nbdkit and nbdfuse that delays reads by 2 s, then fails"

    def before(self, world):
        self.failing = world.where / "failing"
        self.server, path = world.nbd(
            "--filter=error", "--filter=delay", parameters=(f"error-file={self.failing}", "error-rate=50%", "rdelay=2"), name="slow"
        )
        world.daemon.cli("base", "add", "nbd", path)
        self.path = world.attacker_disk("nbd")

    def begin(self, world):
        self.readers = world.readers(self.path, threads=40)
        time.sleep(0.5)

    def during(self, world):
        self.failing.touch()

    def end(self, world):
        self.failing.unlink()
        if not self.readers.end(30):
            world.problem("the reads do not end")
        end_now(self.server)


class HostileImages(Attack):
    row = "hostile images (the fuzzers' seeds) are added, attached and read in a loop"
    quick = True

    def before(self, world):
        place = world.where / "images"
        place.mkdir()
        self.images = []
        for kind, suffix in (("image_qcow2", "qcow2"), ("image_vmdk", "vmdk")):
            for path in sorted((ROOT / "fuzz" / "corpus" / kind).iterdir()):
                self.images.append(place / f"{path.name}.{suffix}")
                # The seeds begin with two lengths for the fuzz target.
                data = path.read_bytes()
                self.images[-1].write_bytes(data[8:] if data[8:12] in (b"QFI\xfb", b"KDMV") else data)
        big = place / "claims.qcow2"
        call("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", big, "32T")
        data = bytearray(big.read_bytes())
        data[40:48] = (1 << 40).to_bytes(8, "big")
        (place / "far.qcow2").write_bytes(data)
        self.images += [big, place / "far.qcow2"]

    def begin(self, world):
        def work(turn):
            path = self.images[turn % len(self.images)]
            name = f"x{os.getpid()}-{turn}"
            if world.daemon.ask("POST", "/v1/bases", {"name": name, "source": str(path), "format": path.suffix[1:]})[0] != 200:
                return
            self_made = world.daemon.ask("POST", "/v1/disks", {"name": name, "base": name, "size": 1 << 30})[0] == 200
            if self_made:
                try:
                    fd = os.open(world.daemon.disk(name), os.O_RDWR)
                    for place in range(0, 1 << 30, 64 << 20):
                        try:
                            os.pread(fd, 65536, place)
                        except OSError:
                            pass
                    os.close(fd)
                except OSError:
                    pass
                world.daemon.ask("DELETE", f"/v1/disks/{name}?force=true")
            world.daemon.ask("DELETE", f"/v1/bases/{name}")

        self.loops = [world.loop(work) for _ in range(3)]
        time.sleep(0.5)

    def end(self, world):
        for loop in self.loops:
            if not loop.end(20):
                world.problem("a loop does not end")
        world.note(f"{sum(loop.turns.value for loop in self.loops)} images")


ATTACKS = [
    Nothing, Async300, Async10000, KilledReader, ManyOpens, ManyDisks, Create10000, CreateRemove, PunchStorm, TruncateStorm, FsyncStorm, HugeMap,
    BandwidthHog, CacheThrash, FuseHang, FuseLie, FuseFail, FuseSlow, FuseShort, AttachHang, NbdBase, HostileImages,
]  # fmt: skip
