"""Shared by benchmarks and campaigns: child processes that end with the program, a daemon, and the generated documents."""

import atexit
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
PLYFS = os.environ.get("PLYFS_BIN") or str(TARGET / "plyfs")
# The environment may name another build of qemu-storage-daemon, such as one newer than the distribution's.
QSD = os.environ.get("QEMU_STORAGE_DAEMON", "qemu-storage-daemon")
GIB = 1 << 30
MIB = 1 << 20


def say(*words):
    print(*words, flush=True)


def call(*argv, **kwargs):
    """Runs to completion and returns the output; RuntimeError with the error output if it fails."""
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv[:6]))}: status {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def mounted(path):
    return any(line.split()[1] == str(path) for line in Path("/proc/self/mounts").read_text().splitlines())


def wait_for(what, condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"{what}: ended with status {process.returncode}: {log_of(process)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not ready after {seconds} s: {log_of(process)}")
        time.sleep(0.01)


# The processes that this program started and that are still to be ended; their logs by process id.
STARTED = []
LOGS = {}


def log_of(process):
    path = LOGS.get(process.pid)
    return path.read_text(errors="replace")[-800:] if path and path.exists() else ""


def start(argv, log, **kwargs):
    # Append, because a restart uses the same file. The child has its own descriptor once it runs.
    with open(log, "ab") as out:
        files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        process = subprocess.Popen([str(a) for a in argv], **{**files, **kwargs})
    LOGS[process.pid] = log
    STARTED.append(process)
    return process


def end(process, mount=None):
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process in STARTED:
        STARTED.remove(process)
    if mount is not None and mounted(mount):
        subprocess.run(["fusermount3", "-uz", str(mount)], stderr=subprocess.DEVNULL)


def children(pid):
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def family(pid):
    """The process and all its descendants."""
    return [pid] + [below for child in children(pid) for below in family(child)]


class Control(http.client.HTTPConnection):
    """A connection to a daemon's control socket."""

    def __init__(self, path, seconds):
        super().__init__("plyfs", timeout=seconds)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Daemon:
    """plyfs on its own store. Every call ends within `seconds`, whatever the daemon does."""

    def __init__(self, where, *arguments, binary=PLYFS, config=None, prefix=()):
        self.where, self.arguments, self.binary, self.prefix = where, arguments, binary, prefix
        self.store, self.log, self.process = where / "store", where / "plyfs.log", None
        self.mount = self.store / "mnt"
        if config is not None:
            (where / "plyfs.toml").write_text(config)
            self.arguments = (*arguments, "--config", where / "plyfs.toml")

    def start(self, seconds=60, **kwargs):
        offset = self.log.stat().st_size if self.log.exists() else 0
        self.process = start([*self.prefix, self.binary, "--store", self.store, "serve", *self.arguments], self.log, **kwargs)
        wait_for("plyfs serve", lambda: b"\nplyfs ready " in b"\n" + self.log.read_bytes()[offset:], self.process, seconds)

    def disk(self, name):
        return self.mount / "disks" / f"{name}.raw"

    def base(self, name):
        return self.mount / "bases" / f"{name}.raw"

    def cli(self, *argv, seconds=60):
        """The value that the command prints; RuntimeError with its error output if it fails, subprocess.TimeoutExpired if it hangs."""
        text = call(self.binary, "--store", self.store, "--json", *argv, timeout=seconds)
        try:
            return json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            # Work that takes longer prints a line for each update; the last line is the result.
            return json.loads(text.splitlines()[-1])

    def ask(self, method, path, body=None, seconds=30):
        """Status and value of the answer to one request to the control socket."""
        connection = Control(self.store / "control.sock", seconds)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def worker(self):
        """The active worker: the supervisor's oldest child."""
        return next(iter(children(self.process.pid)), None)

    def usage(self):
        """Bytes of memory, descriptors and seconds of processor time of all its processes."""
        memory = files = ticks = 0
        for pid in family(self.process.pid):
            try:
                # Pss: memory shared by several processes counts once.
                memory += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1]) << 10
                files += len(os.listdir(f"/proc/{pid}/fd"))
                ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
            except OSError:
                pass
        return {"memory": memory, "files": files, "seconds": ticks / os.sysconf("SC_CLK_TCK")}

    def stop(self, seconds=60):
        """Runs `plyfs stop`, under files that are open too, and returns the daemon's exit status."""
        self.cli("stop", "--force", seconds=seconds)
        status = self.process.wait(seconds)
        STARTED.remove(self.process)
        self.process = None
        return status

    def check(self, seconds=120):
        """The findings of `plyfs check`, or None."""
        done = subprocess.run(
            [self.binary, "--store", self.store, "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        return None if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"status {done.returncode}"

    def end(self):
        """Kills the daemon, whatever state it is in, and removes its mount."""
        if self.process is None:
            return
        below = family(self.process.pid)[1:]
        self.process.kill()
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        STARTED.remove(self.process)
        self.process = None
        subprocess.run(["umount", "-l", self.mount], stderr=subprocess.DEVNULL)


def version(*argv):
    try:
        lines = [line for line in call(*argv).splitlines() if line.strip()]
        return lines[0] if lines else "unknown"
    except (RuntimeError, OSError):
        return "unknown"


def machine(disk_directory):
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        "unknown CPU",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    kind = call("findmnt", "-no", "FSTYPE,SOURCE", "-T", disk_directory).split()
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB; {system}, Linux {platform.release()}; "
        f"disk: {' on '.join(kind)}"
    )


# Temporary directories; they and the mounts in them are removed at exit.
DIRECTORIES = []


def directory(where, prefix):
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
    DIRECTORIES.append(made)
    return made


def clean():
    for process in list(STARTED):
        end(process)
    for made in DIRECTORIES:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.split()[1].startswith(f"{made}/"):
                subprocess.run(["fusermount3", "-uz", line.split()[1]], stderr=subprocess.DEVNULL)
        shutil.rmtree(made, ignore_errors=True)


def clean_at_exit():
    atexit.register(clean)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def need(packages):
    call("bash", "-c", 'source "$0" && need_packages "$@" && need_fuse', ROOT / "scripts" / "lib.sh", *packages)


def write_section(path, name, text):
    """Replaces one program's section of a document that several programs write."""
    old = path.read_text() if path.exists() else ""
    parts = dict(re.findall(r"<!-- begin ([a-z-]+) -->\n(.*?)<!-- end \1 -->\n", old, re.DOTALL))
    parts[name] = text.rstrip() + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Sorted by name, so that `bench`, whose section has the title, comes first.
    path.write_text("\n".join(f"<!-- begin {n} -->\n{parts[n]}<!-- end {n} -->\n" for n in sorted(parts)))
