import os
import pathlib
import shutil

import pytest
import servers

# Before all of Cinder that the tests import: its modules import each other in a circle.
from cinder.tests.unit import test  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[3]


def missing(why):
    """A prerequisite is missing: a failure in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def plyfs_binary():
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    binary = os.environ.get("PLYFS_BIN") or shutil.which(f"{target}/release/plyfs") or shutil.which("plyfs")
    if binary is None:
        missing("there is no plyfs: build it (cargo build --release), or set PLYFS_BIN")
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        missing("the tests mount plyfs as root: run them as root, with /dev/fuse")
    if shutil.which("qemu-img") is None:
        missing("qemu-img is missing: apt-get install qemu-utils")
    return binary


@pytest.fixture(scope="session")
def work():
    directory = servers.work_directory()
    yield directory
    servers.remove(directory)


@pytest.fixture(scope="session")
def plyfs(work):
    daemon = servers.Plyfs(work, plyfs_binary())
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture(scope="session")
def glance(work):
    """It starts while the first tests run; who needs it waits for it."""
    server = servers.Glance(work / "glance")
    server.begin()
    yield server
    server.stop()
