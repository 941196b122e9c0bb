"""Exports of NBD servers: nbdkit, whose log filter names each request. See scripts/test-sources."""

import re
import subprocess

from harness import MIB, Daemon, directory, end, free_port, say, start, wait_for

from sources.s3 import Bench


class Nbdkit:
    """nbdkit serves the image over TCP."""

    def __init__(self, where):
        self.where, self.port, self.process, self.logs = where, free_port(), None, 0
        self.url = f"nbd://127.0.0.1:{self.port}/golden"

    def start(self, image, *filters, plugin="file"):
        """Serves an image until `stop`; a list of parameters of filters follows the plugin."""
        self.logs += 1
        self.requests = self.where / f"requests{self.logs}.log"
        before = [word for word in filters if word.startswith("--")]
        after = [word for word in filters if not word.startswith("--")]
        self.process = start(
            ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", self.port, *before, "--filter=log", plugin, image, *after, f"logfile={self.requests}"],
            self.where / f"nbdkit{self.logs}.log",
        )  # fmt: skip
        info = ["nbdinfo", "--size", self.url]
        wait_for("nbdkit", lambda: subprocess.run(info, capture_output=True).returncode == 0, self.process)

    def stop(self):
        end(self.process)

    def log(self):
        # 2026-11-30 17:00:00.000000 connection=1 Read id=1 offset=0x0 count=0x1000 ...
        text = self.requests.read_text(errors="replace") if self.requests.exists() else ""
        return [("golden", 0, int(count, 16)) for count in re.findall(r" Read id=\d+ offset=0x[0-9a-f]+ count=0x([0-9a-f]+) \.\.\.", text)]


class NbdBench(Bench):
    """The bench of buckets, without keys."""

    def host(self):
        where = self.where / f"host{len(self.hosts)}"
        where.mkdir()
        host = Daemon(where, config="[http]\nstall_timeout = \"2s\"\nconnect_timeout = \"2s\"\n")
        host.start()
        self.hosts.append(host)
        return host


def run(bench):
    server, check = bench.service, bench.failures.check
    server.start(bench.image)
    host = bench.host()
    requests, size = bench.counted(lambda: host.cli("base", "add", "image", server.url))
    check("base add", (requests, size) == (1, 65536), f"{requests} requests, {size} bytes")
    equal = []
    boot = bench.counted(lambda: equal.append(bench.replay(host, "image")))
    check("a boot's reads", equal == [True], f"{boot[1] / MIB:.1f} MiB in {boot[0]} requests")
    again = bench.counted(lambda: equal.append(bench.replay(host, "image")))
    check("the second boot fetches nothing", again == (0, 0), str(again))
    other = bench.host()
    other.cli("base", "add", "image", server.url)
    second = bench.counted(lambda: equal.append(bench.replay(other, "image")))
    check("another host", all(equal) and abs(second[1] - boot[1]) <= MIB, f"{second[1] / MIB:.1f} MiB in {second[0]} requests")

    far = bench.image.stat().st_size - 9 * MIB
    server.stop()
    bench.goes_on("the server is down and back", other, "image", far, "no connection", lambda: server.start(bench.image))
    larger = bench.where / "larger.raw"
    larger.write_bytes(bench.image.read_bytes() + bytes(4096))
    server.stop()
    server.start(larger)

    def restore():
        server.stop()
        server.start(bench.image)

    bench.goes_on("an export of another size is not read", other, "image", far + MIB, "bytes, not", restore)
    server.stop()
    server.start(bench.image, "--filter=error", "error-pread=EIO", "error-pread-rate=20%")
    errors = bench.host()
    errors.cli("base", "add", "image", server.url)
    check("a boot's reads through errors of the server", bench.replay(errors, "image"))
    server.stop()
    server.start(bench.image, "--filter=delay", "rdelay=20ms")
    slow = bench.host()
    slow.cli("base", "add", "image", server.url)
    check("a boot's reads from a slow server", bench.replay(slow, "image"))
    host.cli("base", "hydrate", "image", seconds=600)
    server.stop()
    check("hydrated, it needs no server", host.cli("base", "show", "image")["complete"] and bench.whole(host, "image"))
    bench.refused(host, "none", server.url, "no connection", "check the server")


def test_nbd(quick):
    where = directory("/var/tmp", "plyfs-sources-")
    service_dir = where / "service"
    service_dir.mkdir()
    bench = None
    try:
        bench = NbdBench(Nbdkit(service_dir), where, quick)
        say(f"  nbdkit; an image of {bench.image.stat().st_size // MIB} MiB")
        run(bench)
    finally:
        for host in bench.hosts if bench else []:
            host.end()
        if bench and bench.service.process:
            end(bench.service.process)
    return bench.failures
