"""What the benchmarks share: processes that end with the program, and the file that the tables go to."""

import atexit
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
PLYFS = os.environ.get("PLYFS_BIN") or str(TARGET / "plyfs")
# Another build of the peer, to be fair to a newer one than the distribution's.
QSD = os.environ.get("QEMU_STORAGE_DAEMON", "qemu-storage-daemon")
GIB = 1 << 30
MIB = 1 << 20


def say(*words):
    print(*words, flush=True)


def call(*argv, **kwargs):
    """Runs to completion; on failure says what the program said."""
    done = subprocess.run([str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv[:6]))}: status {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


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


# Every process and mount that this program started: exactly those are ended, whatever happens.
STARTED = []
LOGS = {}


def log_of(process):
    path = LOGS.get(process.pid)
    return path.read_text(errors="replace")[-800:] if path and path.exists() else ""


def start(argv, log, **kwargs):
    # Append: one file serves restarts too. The descriptor is the child's once it runs.
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


# Directories that are removed at the end, whatever was mounted in them.
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
    """Replaces one program's part of a file that several write, and leaves the others' alone."""
    old = path.read_text() if path.exists() else ""
    parts = dict(re.findall(r"<!-- begin ([a-z-]+) -->\n(.*?)<!-- end \1 -->\n", old, re.DOTALL))
    parts[name] = text.rstrip() + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the order of the names: `bench`, whose part has the title, is the first.
    path.write_text("\n".join(f"<!-- begin {n} -->\n{parts[n]}<!-- end {n} -->\n" for n in sorted(parts)))
