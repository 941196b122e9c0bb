"""Databases in a guest's filesystem: ext4 in a loop device on the file that a contender serves."""

import os
import pwd
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

from harness import GIB, call, directory, end, start, wait_for

SIZE = 2 * GIB
# Of pgbench: about 300 MB, many times what the server keeps in memory.
SCALE = 20
ACCOUNTS = 100_000
USER = "postgres"


def postgres(name):
    """The newest installed program of PostgreSQL, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return found[-1] if found else None


def missing(key):
    """Why a row cannot be measured here, or None."""
    if os.geteuid() != 0:
        return "only root may use loop devices"
    if key == "pgbench":
        if not postgres("pgbench"):
            return "PostgreSQL is not installed (Debian: postgresql)"
        try:
            pwd.getpwnam(USER)
        except KeyError:
            return f"there is no user {USER}"
    return None


def version(key):
    if key == "sqlite":
        return f"sqlite {sqlite3.sqlite_version}"
    program = postgres("postgres")
    return call(program, "--version").strip() if program else "no PostgreSQL"


class Filesystem:
    """The mounted filesystem of an image; unmounted at the end, also when work in it fails."""

    def __init__(self, path, direct):
        self.path, self.direct = path, direct
        self.loop = self.where = None

    def __enter__(self):
        self.where = directory("/var/tmp", "plyfs-bench-db.")
        # The database runs as a user of its own.
        self.where.chmod(0o755)
        self.mount, self.socket = self.where / "mnt", self.where / "socket"
        self.mount.mkdir()
        self.socket.mkdir()
        try:
            self.loop = call("losetup", "--find", "--show", f"--direct-io={'on' if self.direct else 'off'}", self.path).strip()
            call("mount", self.loop, self.mount)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if os.path.ismount(self.mount) and subprocess.run(["umount", str(self.mount)], stderr=subprocess.DEVNULL).returncode != 0:
            call("umount", "-l", self.mount)
        if self.loop:
            call("losetup", "--detach", self.loop)
            self.loop = None
        shutil.rmtree(self.where, ignore_errors=True)


class Server:
    """A server of PostgreSQL on the data in a filesystem."""

    def __init__(self, filesystem):
        self.filesystem = filesystem

    def __enter__(self):
        shutil.chown(self.filesystem.socket, USER)
        self.process = start(
            ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", postgres("postgres"), "-D", self.filesystem.mount / "pg",
             "-k", self.filesystem.socket, "-c", "listen_addresses=", "-c", "shared_buffers=64MB"],
            self.filesystem.where / "postgres.log",
        )  # fmt: skip
        ready = [postgres("pg_isready"), "-q", "-h", self.filesystem.socket]
        try:
            wait_for("PostgreSQL", lambda: subprocess.run(ready, check=False).returncode == 0, self.process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            # A fast shutdown, which waits for no client.
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                pass
        end(self.process)

    def pgbench(self, *arguments, seconds=60):
        return call(postgres("pgbench"), "-h", self.filesystem.socket, "-U", USER, *arguments, "postgres", timeout=seconds + 300)


def as_user(*argv):
    return call("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", *argv, cwd="/")


def prepare(path, keys):
    """Makes the image with the databases of these rows, as contents of a base."""
    with open(path, "wb") as image:
        image.truncate(SIZE)
    # Nothing is left to be initialised later, beside the measurement.
    call("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
    with Filesystem(path, direct=False) as filesystem:
        if "sqlite" in keys:
            make_sqlite(filesystem.mount / "sqlite.db")
        if "pgbench" in keys:
            data = filesystem.mount / "pg"
            data.mkdir(mode=0o700)
            shutil.chown(data, USER)
            as_user(postgres("initdb"), "-D", data, "--no-sync", "--auth=trust", f"--username={USER}")
            with Server(filesystem) as server:
                server.pgbench("-i", "-q", "-s", SCALE)
    call("sync", path)


def make_sqlite(path):
    database = sqlite3.connect(path)
    database.execute("create table accounts (id integer primary key, balance integer, filler text)")
    database.execute("create table history (account integer, delta integer)")
    database.executemany("insert into accounts values (?, 0, ?)", ((n, "x" * 80) for n in range(ACCOUNTS)))
    database.commit()
    database.close()


def run_sqlite(path, seconds):
    """Transactions of one update and one insertion, each durable before the next."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("pragma synchronous = full")
    pick = random.Random(7)
    took, begin = [], time.monotonic()
    while (at := time.monotonic()) - begin < seconds:
        account = pick.randrange(ACCOUNTS)
        database.execute("begin immediate")
        database.execute("update accounts set balance = balance + 1 where id = ?", (account,))
        database.execute("insert into history values (?, 1)", (account,))
        database.execute("commit")
        took.append(time.monotonic() - at)
    passed = time.monotonic() - begin
    database.close()
    took.sort()
    percentiles = {name: took[int((len(took) - 1) * part)] * 1e6 for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))}
    return {"bytes": 0, "requests": len(took), "seconds": passed, **percentiles}


def run_pgbench(filesystem, seconds):
    with Server(filesystem) as server:
        text = server.pgbench("-n", "-c", 4, "-j", 2, "-T", seconds, seconds=seconds)
    done = int(re.search(r"transactions actually processed: (\d+)", text)[1])
    return {"bytes": 0, "requests": done, "seconds": done / float(re.search(r"tps = ([0-9.]+)", text)[1])}


def run(key, path, direct, seconds):
    """One run in the filesystem on `path`. The time of mounting and unmounting does not count."""
    with Filesystem(path, direct) as filesystem:
        if key == "sqlite":
            return run_sqlite(filesystem.mount / "sqlite.db", seconds)
        return run_pgbench(filesystem, seconds)
