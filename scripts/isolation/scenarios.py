"""Attacks on the start, the stop and the store of a daemon, without the measured victim."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from harness import GIB, MIB, Daemon, call

from .content import compare, content, sha256, write_image
from .fusefs import FileSystem
from .run import Scenario
from .world import ATTACKER, CONFIG, LOCAL, URL, as_nobody, live_maps, remove_live_maps, until, worker_of


def read(path, seed, offset, length, what):
    with open(path, "rb", buffering=0) as file:
        compare(os.pread(file.fileno(), length, offset), content(seed, offset, length), what)


def stop_and_check(world, what="stop"):
    status = world.daemon.stop(60)
    if status != 0:
        world.problem(f"{what}: the command succeeded, the daemon ended with status {status}")
    found = world.daemon.check()
    if found:
        world.problem(f"{what}: check: {found[:200]}")


class BorrowedDigest(Scenario):
    row = "a base with the --sha256 of another base and different bytes is read first"
    quick = True

    def run(self, world):
        world.daemon.start()
        world.later(world.daemon.end)
        evil = world.serve(size=16 * MIB, seed=ATTACKER)
        good = world.serve(size=16 * MIB, seed=5)
        digest = sha256(5, 16 * MIB)
        world.daemon.cli("base", "add", "evil", evil.url(), "--sha256", digest)
        world.daemon.cli("base", "add", "good", good.url(), "--sha256", digest)
        for base in ("evil", "good"):
            world.daemon.cli("disk", "create", base, "--base", base)
        with open(world.daemon.disk("evil"), "rb") as file:
            file.read(4 * MIB)
        try:
            read(world.daemon.disk("good"), 5, 0, 16 * MIB, "good")
        except Exception as error:
            world.problem(str(error))
        try:
            world.daemon.cli("base", "hydrate", "good", seconds=30)
        except Exception as error:
            world.problem(f"hydrate good: {error}"[-300:])
        # The bytes of the digest are cached and verified by now: evil may get them or be refused.
        try:
            world.daemon.cli("base", "hydrate", "evil", seconds=30)
            world.note("evil has got the bytes of its digest")
        except RuntimeError as error:
            world.note(f"evil: {str(error)[-100:]}")
        try:
            read(world.daemon.disk("good"), 5, 0, 16 * MIB, "good, after evil was refused")
        except Exception as error:
            world.problem(str(error))
        stop_and_check(world)


class BorrowedDigestFile(Scenario):
    row = "the same with local files"

    def run(self, world):
        write_image(world.where / "evil.img", ATTACKER, 16 * MIB)
        write_image(world.where / "good.img", 5, 16 * MIB)
        digest = sha256(5, 16 * MIB)
        world.daemon.start()
        world.later(world.daemon.end)
        for name in ("evil", "good"):
            world.daemon.cli("base", "add", name, world.where / f"{name}.img", "--sha256", digest)
            world.daemon.cli("disk", "create", name, "--base", name)
        try:
            world.daemon.cli("base", "hydrate", "evil", seconds=30)
            world.problem("hydrate evil succeeded although its bytes do not have the digest")
        except RuntimeError:
            pass
        try:
            read(world.daemon.disk("good"), 5, 0, 16 * MIB, "good")
            world.daemon.cli("base", "hydrate", "good", seconds=30)
            read(world.daemon.disk("good"), 5, 0, 16 * MIB, "good, hydrated")
        except Exception as error:
            world.problem(str(error)[-300:])
        stop_and_check(world)


class ReplacedImage(Scenario):
    row = "a source without a validator: an image is replaced under its URL and added again, with and without the old base"

    def run(self, world):
        world.daemon.start()
        world.later(world.daemon.end)
        server = world.serve(size=16 * MIB, seed=5, etag="")
        for name in ("kept", "removed"):
            world.daemon.cli("base", "add", name, server.url(name), "--identity", "size")
            world.daemon.cli("disk", "create", name, "--base", name)
            read(world.daemon.disk(name), 5, 0, 4 * MIB, name)
        world.daemon.cli("disk", "rm", "removed")
        world.daemon.cli("base", "rm", "removed")
        server.end()
        # At the same URL, another object of the same size.
        newer = world.serve(size=16 * MIB, seed=6, port=server.port, etag="")
        for name in ("kept", "removed"):
            world.daemon.cli("base", "add", f"new-{name}", newer.url(name), "--identity", "size")
            world.daemon.cli("disk", "create", f"new-{name}", "--base", f"new-{name}")
            try:
                read(world.daemon.disk(f"new-{name}"), 6, 0, 4 * MIB, f"new base, old one {name}")
            except Exception as error:
                world.problem(str(error))
        stop_and_check(world)


class FewDescriptorsAtStart(Scenario):
    row = "a start with few descriptors, of a store with hydrated bases whose originals have been removed"
    quick = True

    def run(self, world):
        count = 40
        world.daemon.start()
        world.later(world.daemon.end)
        for number in range(count):
            path = world.where / f"b{number}.img"
            write_image(path, number, MIB)
            world.daemon.cli("base", "add", f"b{number}", path)
            world.daemon.cli("disk", "create", f"b{number}", "--base", f"b{number}")
            world.daemon.cli("base", "hydrate", f"b{number}", seconds=30)
            path.unlink()
        stop_and_check(world)
        few = Daemon(world.where / "attacked", *world.daemon.arguments, binary=world.binary, prefix=("prlimit", "--nofile=48:48"))
        try:
            few.start(30)
            world.note("it starts with 48 descriptors")
            time.sleep(0.5)
        except RuntimeError as error:
            world.note(f"with 48 descriptors: {str(error)[:100]}")
        finally:
            few.end()
        world.daemon.start()
        bad = []
        for number in range(count):
            try:
                read(world.daemon.disk(f"b{number}"), number, 0, MIB, f"b{number}")
            except Exception as error:
                bad.append(f"b{number}: {error}"[:160])
        if bad:
            world.problem(f"{len(bad)} of {count} hydrated bases are lost: {bad[0]}")
        stop_and_check(world)


class Ulimit256(Scenario):
    row = "300 disks are written with ulimit -n 256: no acknowledged write is lost, and check finds nothing"
    quick = True

    def run(self, world):
        few = world.daemon
        few.prefix = ("prlimit", "--nofile=256:256")
        few.start()
        world.later(few.end)
        few.cli("base", "add", LOCAL[0], world.where / "local.img")
        names = [f"u{number}" for number in range(300)]
        few.cli("disk", "create", *names, "--base", LOCAL[0])
        failed, kept = [], []
        for name in names:
            try:
                fd = os.open(few.disk(name), os.O_RDWR)
                kept.append(fd)
                os.pwrite(fd, content(7, 0, 4096), 0)
                os.fsync(fd)
                # Forty disks stay open.
                if len(kept) > 40:
                    os.close(kept.pop(0))
            except OSError as error:
                failed.append(f"{name}: {error}")
        for fd in kept:
            os.close(fd)
        if failed:
            world.problem(f"{len(failed)} of 300 disks cannot be written, 40 open at a time: {failed[0]}")
        try:
            status = few.stop(20)
            if status != 0:
                world.problem(f"stop succeeded, the daemon ended with status {status}")
        except RuntimeError as error:
            world.note(f"stop: {error}"[:200])
            few.end()
        except subprocess.TimeoutExpired:
            world.problem("stop has not ended within 20 s")
            few.end()
        few.prefix = ()
        few.start()
        written = len(names) - len(failed)
        good = 0
        for name in names:
            with open(few.disk(name), "rb", buffering=0) as file:
                good += file.read(4096) == content(7, 0, 4096)
        if good < written:
            world.problem(f"{written - good} of {written} acknowledged and flushed writes are lost")
        stop_and_check(world)


class Squat(Scenario):
    row = "an ordinary user creates the daemon's directories in /dev/shm before it starts"
    quick = True

    def run(self, world):
        world.daemon.start()
        place = live_maps(world.daemon)
        world.daemon.stop()
        if place is None or place.parent != Path("/dev/shm"):
            world.note(f"the live maps are in {place}")
            places = [Path("/dev/shm") / name for name in ("plyfs", place.name if place else "x", f"plyfs-{place.name if place else 0}")]
        else:
            call("rm", "-rf", place)
            places = [place]
        for squatted in places:
            as_nobody("mkdir", squatted)
        try:
            world.daemon.start(30)
            world.daemon.stop()
        except Exception as error:
            world.problem(f"the daemon does not start: {str(error)[-200:]}")
        finally:
            world.daemon.end()
            for squatted in places:
                subprocess.run(["rm", "-rf", squatted])
        world.later(world.daemon.end)


class ShmLost(Scenario):
    row = "live maps are removed from /dev/shm, writes continue, with and without a flush, and the worker is killed: no write is lost"
    quick = True

    def run(self, world):
        world.daemon.start()
        world.later(world.daemon.end)
        world.daemon.cli("base", "add", LOCAL[0], world.where / "local.img")
        for flush in (False, True):
            for before in (False, True):
                name = f"s-{flush}-{before}".lower()
                world.daemon.cli("disk", "create", name, "--base", LOCAL[0], "--size", "128M")
                with open(world.daemon.disk(name), "r+b", buffering=0) as file:
                    fd = file.fileno()
                    if before:
                        os.pwrite(fd, content(1, 0, MIB), 0)
                    remove_live_maps(world.daemon)
                    for offset in range(0, 16 * MIB, MIB):
                        os.pwrite(fd, content(2, offset, MIB), offset)
                    if flush:
                        os.fsync(fd)
                        os.pwrite(fd, content(3, 0, MIB), 0)
                    os.kill(worker_of(world.daemon), signal.SIGKILL)
                    try:
                        compare(os.pread(fd, MIB, 0), content(3 if flush else 2, 0, MIB), f"{name}, last write")
                        for offset in range(MIB, 16 * MIB, MIB):
                            compare(os.pread(fd, MIB, offset), content(2, offset, MIB), name)
                    except Exception as error:
                        world.problem(f"an acknowledged write is lost: {error}"[:300])
        stop_and_check(world)


class StopWhileStopped(Scenario):
    row = "`stop` while the worker is stopped by SIGSTOP ends within a minute"

    def run(self, world):
        world.daemon.start()
        world.later(world.daemon.end)
        pid = worker_of(world.daemon)
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        try:
            world.daemon.cli("stop", "--force", "--timeout", "40s", seconds=60)
            world.note(f"stopped in {time.monotonic() - begin:.0f} s")
        except RuntimeError as error:
            world.note(f"stop after {time.monotonic() - begin:.0f} s: {str(error)[-200:]}")
        except subprocess.TimeoutExpired:
            world.problem("stop --timeout 40s has not ended within 60 s")
        finally:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass


class StopWhileHanging(Scenario):
    row = "`stop` with 250 reads that wait for a hanging server"
    kind = "bad"

    def run(self, world):
        world.daemon.start()
        world.later(world.daemon.end)
        bad = world.serve()
        files = FileSystem(world.where / "below", 256 * MIB, ATTACKER)
        world.later(files.end)
        world.daemon.cli("base", "add", "bad", bad.url())
        world.daemon.cli("base", "add", "below", files.path)
        readers = world.readers(world.attacker_disk(self.kind), threads=250)
        time.sleep(0.3)
        bad.mode("hang")
        files.mode("hang")
        time.sleep(1)
        begin = time.monotonic()
        try:
            status = world.daemon.stop(40)
            world.note(f"{time.monotonic() - begin:.1f} s")
            if status != 0:
                world.problem(f"stop succeeded, the daemon ended with status {status}")
        except Exception as error:
            world.problem(f"stop: {error}"[-200:])
            return
        if not readers.end(20):
            world.problem("reads do not end with the daemon")
        found = world.daemon.check()
        if found:
            world.problem(f"check: {found[:200]}")


class StopWhileFilesHang(StopWhileHanging):
    row = "`stop` with 250 reads that wait for a hanging filesystem"
    kind, quick = "below", True


class CacheHangsAtTheEnd(Scenario):
    row = "the cache's disk hangs while workers are killed, the daemon is stopped, started again, and killed with all its processes"

    def run(self, world):
        world.daemon.start()
        world.later(world.daemon.end)
        world.daemon.stop()
        server, _ = world.cache_disk()
        world.daemon.start()
        world.bases(world.daemon)
        for number in range(4):
            world.daemon.cli("disk", "create", f"c{number}", "--base", (LOCAL, URL)[number % 2][0])
        with open(world.daemon.disk("c1"), "rb", buffering=0) as file:
            compare(file.read(MIB), content(URL[1], 0, MIB), "before")
        server.send_signal(signal.SIGSTOP)
        for turn in range(3):
            os.kill(worker_of(world.daemon), signal.SIGKILL)
            self.works(world, turn)
        begin = time.monotonic()
        try:
            status = world.daemon.stop(100)
            world.note(f"stopped in {time.monotonic() - begin:.1f} s, with status {status}")
        except Exception as error:
            world.problem(f"stop: {error}"[-200:])
        # Threads of the killed workers still wait for that disk.
        self.starts(world, 3)
        world.daemon.end()
        self.starts(world, 4)
        server.send_signal(signal.SIGCONT)
        self.works(world, 5)
        stop_and_check(world)

    def starts(self, world, turn):
        begin = time.monotonic()
        try:
            world.daemon.start()
            world.note(f"started in {time.monotonic() - begin:.1f} s")
            self.works(world, turn)
        except Exception as error:
            world.problem(f"start: {error}"[-200:])

    def works(self, world, turn):
        begin = time.monotonic()
        with open(world.daemon.disk("c0"), "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), content(turn, 0, 4096), 0)
            compare(os.pread(file.fileno(), 4096, 0), content(turn, 0, 4096), "a disk on a local base")
        local = time.monotonic() - begin
        with open(world.daemon.disk("c1"), "rb", buffering=0) as file:
            place = (8 + turn) * MIB
            compare(os.pread(file.fileno(), 65536, place), content(URL[1], place, 65536), "a disk on a server's base")
        world.note(f"after {local:.2f} s, with a server after {time.monotonic() - begin:.2f} s")
        if time.monotonic() - begin > 5:
            world.problem("reads and writes took longer than 5 s")
        for command in (["base", "ls"], ["base", "show", URL[0]], ["status"]):
            try:
                world.daemon.cli(*command, seconds=10)
            except subprocess.TimeoutExpired:
                world.problem(f"{' '.join(command)} has no answer after 10 s")


class LargeCache(Scenario):
    row = "2 GiB of cached blocks: the pause after a worker is killed, compared with that of an empty cache"

    def run(self, world):
        world.daemon.arguments = (*world.daemon.arguments, "--cache-disk", "8G")
        world.daemon.start()
        world.later(world.daemon.end)
        world.bases(world.daemon)
        world.daemon.cli("disk", "create", "p", "--base", LOCAL[0])
        empty = self.pauses(world)
        server = world.serve(size=2 * GIB, nice=False)
        world.daemon.cli("base", "add", "big", server.url())
        try:
            world.daemon.cli("base", "hydrate", "big", seconds=180)
        except subprocess.TimeoutExpired:
            world.note("hydrated only in part")
        full = self.pauses(world)
        world.note(f"median of 5: {sorted(empty)[2]:.0f} ms empty, {sorted(full)[2]:.0f} ms with 2 GiB; worst {max(full):.0f} ms")
        if sorted(full)[2] > 2 * sorted(empty)[2] + 10:
            world.problem(f"the pause grows with the cache: {sorted(empty)[2]:.0f} to {sorted(full)[2]:.0f} ms for 2 GiB")
        stop_and_check(world)

    def pauses(self, world):
        pauses = []
        with open(world.daemon.disk("p"), "r+b", buffering=0) as file:
            for turn in range(5):
                time.sleep(0.7)
                os.kill(worker_of(world.daemon), signal.SIGKILL)
                begin = time.monotonic()
                os.pwrite(file.fileno(), content(turn, 0, 4096), 0)
                os.pread(file.fileno(), 4096, 0)
                pauses.append((time.monotonic() - begin) * 1000)
        return pauses


class LargestDisk(Scenario):
    row = "a disk of 64 TiB, all of it mapped: the pause of a killed worker, beside that of an empty disk; its flush, and writers meanwhile"

    TIB = 1 << 40

    def run(self, world):
        (world.where / "attacked" / "plyfs.toml").write_text(CONFIG + '[runtime]\nmap_memory = "12G"\nmap_memory_per_disk = "10G"\n')
        world.daemon.start()
        world.later(world.daemon.end)
        world.daemon.cli("disk", "create", "p", "--size", "64M")
        call("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", world.where / "large.qcow2", "64T")
        world.daemon.cli("base", "add", "large", world.where / "large.qcow2", "--format", "qcow2")
        world.daemon.cli("disk", "create", "huge", "--base", "large")
        empty = self.pauses(world)
        with open(world.daemon.disk("huge"), "r+b", buffering=0) as huge:
            # Zeros that hide the base have words of their own in the map.
            for at in range(0, 64 * self.TIB, self.TIB):
                call("fallocate", "--zero-range", "--keep-size", "--offset", at, "--length", self.TIB, world.daemon.disk("huge"))
            os.pwrite(huge.fileno(), b"x" * 4096, 0)
            flushed, longest = self.flush(huge.fileno())
            # Upkeep merges its pages meanwhile; until that is done the pause is longer.
            time.sleep(20)
            full = self.pauses(world)
            after, longest_after = self.flush(huge.fileno())
        world.note(
            f"pause, median of 5: {sorted(empty)[2]:.0f} ms empty, {sorted(full)[2]:.0f} ms mapped, worst {max(full):.0f} ms; "
            f"flush of all of it {flushed:.1f} s, longest write of a 4 KiB writer meanwhile {longest * 1000:.1f} ms; "
            f"after a kill {after:.1f} s, {longest_after * 1000:.1f} ms; memory {world.daemon.usage()['memory'] / MIB:.0f} MiB"
        )
        if sorted(full)[2] > 2 * sorted(empty)[2] + 50:
            world.problem(f"the pause grows with the map: {sorted(empty)[2]:.0f} to {sorted(full)[2]:.0f} ms")
        if max(longest, longest_after) > max(flushed, after) / 4 + 0.1:
            world.problem(f"a writer waits {max(longest, longest_after) * 1000:.0f} ms for a flush")
        stop_and_check(world)

    pauses = LargeCache.pauses

    def flush(self, huge):
        """Seconds of an fsync, and of the longest write to the same disk meanwhile."""
        took = []

        def sync():
            begin = time.monotonic()
            os.fsync(huge)
            took.append(time.monotonic() - begin)

        thread = threading.Thread(target=sync)
        longest, at = 0, 0
        thread.start()
        while thread.is_alive():
            begin = time.monotonic()
            at += 1
            os.pwrite(huge, b"y" * 4096, at * 4096)
            longest = max(longest, time.monotonic() - begin)
            time.sleep(0.001)
        thread.join()
        return took[0], longest


class TokenRunsOut(Scenario):
    row = "the token expires while the command that prints it fails; then the command works again"

    def run(self, world):
        token = world.where / "token"
        (world.where / "print").write_text(f"#!/bin/sh\nexec cat {token}\n")
        (world.where / "print").chmod(0o755)
        server = world.serve()
        scope = server.url("")
        (world.where / "attacked" / "plyfs.toml").write_text(
            CONFIG + f'[[http.credentials]]\nurl = "{scope}"\ncommand = ["{world.where / "print"}"]\n'
        )
        token.write_text("one\n")
        world.daemon.start()
        world.later(world.daemon.end)
        world.daemon.cli("base", "add", "private", server.url())
        readers = world.readers(world.attacker_disk("private"), seed=ATTACKER, threads=8, pace=0.01)
        until(lambda: readers.good() > 20, 20, "reads")
        token.unlink()
        server.mode("unauthorized")
        time.sleep(3)
        shown = world.state("private")["state"]
        token.write_text("two\n")
        server.mode("ok")
        good = readers.good()
        try:
            until(lambda: readers.good() > good + 20, 20, "reads resume when the token is available again")
        except RuntimeError as error:
            world.problem(str(error))
        readers.end(20)
        if readers.errors():
            world.problem(f"the guest got {readers.errors()}")
        if shown == "ok":
            world.problem("base show reports ok while the server refuses")
        stop_and_check(world)


class Many(Scenario):
    row = "10,000 disks in a store: start, list, open one; memory and descriptors"

    def run(self, world):
        world.daemon.start()
        world.later(world.daemon.end)
        world.daemon.cli("base", "add", LOCAL[0], world.where / "local.img")
        for first in range(0, 10_000, 1000):
            status, answer = world.daemon.ask(
                "POST", "/v1/disks", {"names": [f"n{first + number}" for number in range(1000)], "base": LOCAL[0]}, seconds=180
            )
            if status != 200:
                world.problem(f"create: {answer}"[:200])
                return
        world.daemon.stop(120)
        begin = time.monotonic()
        world.daemon.start(60)
        started = time.monotonic() - begin
        begin = time.monotonic()
        count = len(os.listdir(world.daemon.mount / "disks"))
        listed = time.monotonic() - begin
        begin = time.monotonic()
        subprocess.run(["ls", "-l", world.daemon.mount / "disks"], stdout=subprocess.DEVNULL, timeout=120, check=True)
        long = time.monotonic() - begin
        read(world.daemon.disk("n777"), LOCAL[1], 0, MIB, "n777")
        usage = world.daemon.usage()
        world.note(
            f"start {started:.1f} s, readdir of {count} {listed:.1f} s, ls -l {long:.1f} s; {usage['memory'] / MIB:.0f} MiB, {usage['files']} descriptors"
        )
        if usage["files"] > 1000:
            world.problem(f"{usage['files']} descriptors")
        stop_and_check(world)


SCENARIOS = [
    BorrowedDigest, BorrowedDigestFile, ReplacedImage, FewDescriptorsAtStart, Ulimit256, Squat, ShmLost, StopWhileStopped, StopWhileHanging,
    StopWhileFilesHang, CacheHangsAtTheEnd, LargeCache, LargestDisk, TokenRunsOut, Many,
]  # fmt: skip
