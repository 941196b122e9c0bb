"""Attacks by local users, clients of the control socket and the host: full, hanging and failing disks, memory, signals, kills."""

import json
import os
import random
import signal
import socket
import time

from harness import MIB, children

from .content import content
from .run import Attack
from .world import ATTACKER, LOCAL, Cgroup, as_nobody, kill_group, remove_live_maps, until, worker_of


class SlowClients(Attack):
    row = "control socket: thousands of connections that send nothing, half a request, or single bytes"
    quick = True
    count = 3000

    def begin(self, world):
        path = str(world.daemon.store / "control.sock")

        def work(turn):
            import resource

            if turn == 0:
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                work.kept = []
            while len(work.kept) < self.count:
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(0.05)
                try:
                    client.connect(path)
                    client.send([b"", b"POST /v1/disks HT", b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"][len(work.kept) % 3])
                except OSError:
                    client.close()
                    return
                work.kept.append(client)
            for client in random.sample(work.kept, 100):
                try:
                    client.send(b" ")
                except OSError:
                    pass

        self.loop = world.loop(work, 0.1)
        time.sleep(2)

    def end(self, world):
        self.loop.end()


class Garbage(Attack):
    row = "control socket: invalid JSON, huge bodies, deep nesting, unknown methods, invalid names and sizes"

    def begin(self, world):
        path = str(world.daemon.store / "control.sock")
        bodies = [
            b"{", b"[" * 200_000, b'{"name":"' + b"x" * 5_000_000 + b'"}', b"\xff" * 1000, b'{"names":[' + b'"..",' * 100_000 + b'"."]}',
            json.dumps({"name": "g", "size": (1 << 64) - 1}).encode(), json.dumps({"name": "../../x", "base": LOCAL[0]}).encode(),
            json.dumps({"name": "g", "source": "/proc/self/mem"}).encode(), json.dumps({"name": "g", "source": "/dev/zero"}).encode(),
            json.dumps({"name": "g", "source": "http://[::1]:1/" + "a" * 100_000}).encode(),
        ]  # fmt: skip

        def work(turn):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(5)
            client.connect(path)
            body = bodies[turn % len(bodies)]
            method, target = random.choice(["POST", "PUT", "DELETE", "BREW"]), random.choice(["/v1/disks", "/v1/bases", "/v1/disks/%00", "/x" * 1000])
            head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            try:
                client.sendall(head.encode() + body)
                while client.recv(65536):
                    pass
            except OSError:
                pass
            client.close()

        self.loops = [world.loop(work, 0.01) for _ in range(3)]
        time.sleep(0.3)

    def end(self, world):
        for loop in self.loops:
            loop.end()
        world.note(f"{sum(loop.turns.value for loop in self.loops)} requests")
        if any(loop.failed.value for loop in self.loops):
            world.problem(self.loops[0].text.value.decode() or "the socket does not accept connections")


class Listeners(Attack):
    row = "control socket: hundreds of clients that follow events and do not read, and endless `disk ls` of 2,000 disks"

    def before(self, world):
        for first in range(0, 2000, 500):
            world.daemon.ask("POST", "/v1/disks", {"names": [f"l{first + number}" for number in range(500)], "base": LOCAL[0]}, seconds=120)

    def begin(self, world):
        path = str(world.daemon.store / "control.sock")

        def follow(turn):
            if turn == 0:
                follow.kept = []
            if len(follow.kept) < 300:
                client = socket.socket(socket.AF_UNIX)
                client.connect(path)
                client.sendall(b"GET /v1/events?follow=true&after=0 HTTP/1.1\r\nHost: x\r\n\r\n")
                follow.kept.append(client)

        self.loops = [world.loop(follow, 0.002), *[world.loop(lambda turn: world.daemon.ask("GET", "/v1/disks"), 0.01) for _ in range(3)]]
        time.sleep(0.5)

    def end(self, world):
        for loop in self.loops:
            loop.end()


class CacheDisk(Attack):
    """The persistent cache on its own filesystem, on a block device that fails or hangs on request."""

    def before(self, world):
        world.daemon.stop()
        self.nbdkit, self.failing = world.cache_disk()
        self.cache = world.daemon.store / "cache"
        world.later(lambda: self.heal(world))
        world.daemon.start()
        self.good = world.serve(size=1 << 30)
        world.daemon.cli("base", "add", "big", self.good.url())
        self.path = world.attacker_disk("big")

    def begin(self, world):
        self.readers = world.readers(self.path, seed=ATTACKER, threads=8, size=1 << 30, pace=0.002)
        self.harm(world)
        time.sleep(1)

    def end(self, world):
        self.heal(world)
        if not self.readers.end(20):
            world.problem("its own guest's reads do not end")
        if self.readers.errors() or self.readers.wrong():
            world.problem(f"its own guest got {self.readers.errors()} {self.readers.text.value.decode()}")
        degraded = world.daemon.cli("status", seconds=20)["cache"]["disk"].get("degraded")
        world.note(f"degraded: {degraded}")


class CacheFull(CacheDisk):
    row = "the cache's filesystem is full"
    quick = True

    def harm(self, world):
        self.filler = self.cache / "filler"
        with open(self.filler, "wb") as file:
            try:
                while True:
                    file.write(bytes(MIB))
                    file.flush()
            except OSError:
                pass

    def heal(self, world):
        self.filler.unlink(missing_ok=True)


class CacheFails(CacheDisk):
    row = "the cache's disk fails: EIO, and its filesystem becomes read-only"

    def harm(self, world):
        self.failing.touch()

    def heal(self, world):
        self.failing.unlink(missing_ok=True)


class CacheHangs(CacheDisk):
    row = "the cache's disk hangs"
    quick = True

    def harm(self, world):
        self.nbdkit.send_signal(signal.SIGSTOP)

    def heal(self, world):
        self.nbdkit.send_signal(signal.SIGCONT)


class Memory(Attack):
    row = "memory pressure: the daemon in a cgroup with 24 MiB free, where a process repeatedly takes 200 MiB"

    def before(self, world):
        self.group = Cgroup(f"plyfs-isolation-{os.path.basename(world.where)}")
        world.later(self.group.remove)
        if self.group.place is None:
            world.note("no memory cgroup can be created here: a process takes memory, without a limit")
        self.path = world.attacker_disk(LOCAL[0], size="256M")

    def begin(self, world):
        if self.group.place:
            for pid in [world.daemon.process.pid, *children(world.daemon.process.pid)]:
                self.group.add(pid)
            used = world.daemon.usage()["memory"]
            self.group.limit(max(self.group.used(), used) + 24 * MIB)

        def take(turn):
            if self.group.place and turn == 0:
                self.group.add(os.getpid())
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
            # In a child, since the kernel may kill it.
            if (pid := os.fork()) == 0:
                taken = bytearray(200 * MIB)
                os._exit(len(taken) & 1)
            os.waitpid(pid, 0)

        def write(turn):
            if self.group.place and turn == 0:
                self.group.add(os.getpid())
            with open(self.path, "r+b") as file:
                file.seek(turn % 200 * MIB)
                file.write(bytes(MIB))

        self.loops = [world.loop(take), world.loop(write)]
        time.sleep(1)

    def end(self, world):
        for loop in self.loops:
            loop.end()
        if self.group.place:
            self.group.limit(-1 if "limit_in_bytes" in self.group.limit_file.name else "max")
            root = self.group.place.parent
            for pid in [os.getpid(), *[pid for pid in map(int, (self.group.place / "cgroup.procs").read_text().split())]]:
                try:
                    (root / "cgroup.procs").write_text(str(pid))
                except OSError:
                    pass
        world.note(f"200 MiB taken {self.loops[0].turns.value} times")


class StoppedWorker(Attack):
    row = "SIGSTOP of the worker: `status` and `stop` answer in time and name the worker"
    worker_may_end = True
    # Guests wait while the worker is stopped; they must not see an error or a wrong byte.
    judged = ()

    def begin(self, world):
        self.pid = worker_of(world.daemon)
        os.kill(self.pid, signal.SIGSTOP)
        self.asked = False

    def during(self, world):
        if not self.asked:
            self.asked = True
            begin = time.monotonic()
            try:
                status = world.daemon.cli("status", seconds=8)
                world.note(f"status in {time.monotonic() - begin:.1f} s: {str(status)[:80]}")
            except RuntimeError as error:
                world.note(f"status in {time.monotonic() - begin:.1f} s: {str(error)[-160:]}")
            except Exception:
                world.problem("status does not answer within 8 s while the worker is stopped")

    def end(self, world):
        try:
            os.kill(self.pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


class KilledWorker(Attack):
    row = "the worker is killed twice a second, with 40 reads of a hanging server while disks are created and removed"
    quick = True
    worker_may_end = True
    # A takeover is a pause; `crash-campaign` measures it.
    judged = ()

    def before(self, world):
        self.bad = world.serve()
        world.daemon.cli("base", "add", "bad", self.bad.url())
        self.path = world.attacker_disk("bad")

    def begin(self, world):
        self.bad.mode("hang")
        self.readers = world.readers(self.path, seed=ATTACKER, threads=40, pace=0.002)

        def kill(turn):
            pid = world.daemon.worker()
            if pid:
                os.kill(pid, signal.SIGKILL)

        def names(turn):
            path = world.daemon.disk("again")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.ftruncate(fd, 65536)
            os.pwrite(fd, content(7, 0, 4096), 0)
            os.close(fd)
            os.rename(path, world.daemon.disk("renamed"))
            os.unlink(world.daemon.disk("renamed"))

        self.kills, self.names = world.loop(kill, 0.5), world.loop(names)

    def end(self, world):
        self.kills.end()
        self.names.end()
        self.bad.mode("ok")
        if self.names.failed.value:
            world.problem(f"names: {self.names.failed.value} of {self.names.turns.value} failed: {self.names.text.value.decode()}")
        world.note(f"{self.kills.turns.value} kills, {self.names.turns.value} files created, renamed and removed")

    def healed(self, world):
        until(lambda: self.readers.good() > 40, 20, "its own guest's reads resume")
        if not self.readers.end(20):
            world.problem("its own guest's reads do not end")
        if self.readers.errors() or self.readers.wrong():
            world.problem(f"its own guest got {self.readers.errors()} {self.readers.text.value.decode()}")


class ShmFull(Attack):
    row = "a local user fills /dev/shm"
    quick = True

    def before(self, world):
        # A guest that writes to new places needs space for its map.
        path = world.attacker_disk(LOCAL[0], "full", size="64G")

        def work(turn):
            fd = os.open(path, os.O_RDWR)
            os.pwrite(fd, b"f" * 4096, turn * 64 * MIB % (64 << 30))
            os.close(fd)

        # Started before /dev/shm is full, because Python's shared memory is there too.
        self.loop = world.loop(work, 0.01)

    def begin(self, world):
        as_nobody("sh", "-c", "cat /dev/zero > /dev/shm/full 2>/dev/null; true")
        used = os.statvfs("/dev/shm")
        world.note(f"{used.f_bavail * 4096 // 1024} KiB left of {used.f_blocks * 4096 // MIB} MiB")

    def end(self, world):
        os.unlink("/dev/shm/full")
        self.loop.end()
        if self.loop.failed.value:
            world.problem(f"another guest: {self.loop.failed.value} of {self.loop.turns.value} writes: {self.loop.text.value.decode()}")


class ShmRemoved(Attack):
    row = "the directory of live maps in /dev/shm is removed while the daemon runs, then the worker is killed"
    worker_may_end = True
    judged = ()

    def begin(self, world):
        world.note(f"removed: {remove_live_maps(world.daemon)}")
        # What is written now must survive the kill.
        time.sleep(0.5)
        os.kill(worker_of(world.daemon), signal.SIGKILL)


class UserMounts(Attack):
    row = "an ordinary user tries to access the mount, the socket and the store"

    def begin(self, world):
        store = world.daemon.store

        def work(turn):
            for command in (
                f"ls -lR {world.daemon.mount}", f"cat {world.daemon.disk('v-local')}", f"echo > {store}/control.sock", f"rm -rf {store}",
                f"mkdir {store}/cache/x", f"dd if=/dev/zero of={world.daemon.mount}/disks/x.raw count=1", f"ls {store}/cache",
            ):  # fmt: skip
                if as_nobody("sh", "-c", f"{command} >/dev/null 2>&1 && echo DONE").stdout.strip() and "ls -lR" not in command:
                    raise RuntimeError(f"an ordinary user is allowed: {command}")

        self.loop = world.loop(work)

    def end(self, world):
        self.loop.end()
        if self.loop.failed.value:
            world.problem(self.loop.text.value.decode())


class StoppedClient(Attack):
    row = "a guest is stopped (SIGSTOP) with 256 pending requests, and killed"

    def before(self, world):
        self.path = world.attacker_disk(LOCAL[0], size="512M")

    def begin(self, world):
        self.fio = world.storm(self.path, "--ioengine=libaio", "--rw=randrw", "--bs=64k", "--iodepth=256", "--size=512M")
        time.sleep(1)
        os.killpg(self.fio.pid, signal.SIGSTOP)

    def end(self, world):
        kill_group(self.fio)
        until(lambda: self.fio.poll() is not None, 20, "fio")


class PinnedCache(Attack):
    row = "an attacker's base is hydrated and pinned until the disk cache is full"
    arguments = ("--cache-disk", "96M")

    def before(self, world):
        self.good = world.serve(size=256 * MIB)
        world.daemon.cli("base", "add", "greedy", self.good.url(), "--pin")
        self.path = world.attacker_disk("greedy")

    def begin(self, world):
        world.daemon.ask("POST", "/v1/bases/greedy/hydrate", {})
        self.readers = world.readers(self.path, seed=ATTACKER, threads=16)
        time.sleep(1)

    def end(self, world):
        if not self.readers.end(20):
            world.problem("the reads do not end")

    def healed(self, world):
        world.daemon.cli("base", "evict", "greedy", seconds=30)


class Upgrades(Attack):
    row = "`upgrade` in a loop, to files that end at once or are not programs"

    def begin(self, world):
        programs = {"hangs": "#!/bin/sh\nexec sleep 1000\n", "ends": "#!/bin/sh\nexit 3\n", "noise": "\x7fELF" + "x" * 1000}
        for name, text in programs.items():
            (world.where / name).write_text(text)
            (world.where / name).chmod(0o755)
        names = list(programs)

        def work(turn):
            world.daemon.ask("POST", "/v1/upgrade", {"program": str(world.where / names[1 + turn % 2])})
            time.sleep(0.3)

        self.loop = world.loop(work)
        time.sleep(0.5)

    def end(self, world):
        self.loop.end()


ATTACKS = [
    SlowClients, Garbage, Listeners, CacheFull, CacheFails, CacheHangs, Memory, StoppedWorker, KilledWorker, ShmFull, ShmRemoved, UserMounts,
    StoppedClient, PinnedCache, Upgrades,
]  # fmt: skip

