"""What the tests use: a real plyfs with a real mount, a real libvirtd with QEMU (TCG), and Nova's own classes on sqlite."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

PLYFS = os.environ.get("PLYFS_BIN", "plyfs")


def wait_for(condition, why, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why
        time.sleep(0.05)


class Plyfs:
    """A daemon with a store of its own."""

    def __init__(self, where):
        self.store, self.log, self.process = where / "store", where / "plyfs.log", None
        self.config = where / "plyfs.toml"
        self.config.write_text('[mount]\nbase_mode = "0444"\n')
        self.start()

    @property
    def socket(self):
        return self.store / "control.sock"

    @property
    def mount(self):
        return self.store / "mnt"

    def start(self):
        with self.log.open("a") as log:
            at = self.log.stat().st_size
            words = [PLYFS, "serve", "--store", self.store, "--config", self.config]
            self.process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)

        def ready():
            assert self.process.poll() is None, self.log.read_text()
            return "plyfs ready" in self.log.read_text()[at:]

        wait_for(ready, "plyfs is not ready")

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)

    def kill_worker(self):
        os.kill(self.json("status")["worker_pid"], signal.SIGKILL)

    def run(self, *words):
        command = [PLYFS, "--store", self.store, "--config", self.config, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *words):
        return json.loads(self.run("--json", *words))

    def clean(self):
        """Removes all disks and bases."""
        if self.process.poll() is not None:
            self.start()
        names = list(self.disks())
        if names:
            self.run("disk", "rm", "--now", "--snapshots", "--force", *names)
        for name in names:
            os.path.exists(self.mount / "disks" / f"{name}.raw")

        def without_bases():
            names = list(self.bases())
            with contextlib.suppress(AssertionError):
                if names:
                    self.run("base", "rm", "--force", *names)
            return not self.bases()

        wait_for(without_bases, "bases are still in use")

    def disks(self):
        return {disk["name"]: disk for disk in self.json("disk", "ls")}

    def bases(self):
        return {base["name"]: base for base in self.json("base", "ls")}


HIDDEN = ("/etc/libvirt", "/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")

# A libvirtd that has nothing of the machine's own: in a mount namespace. The arguments are a directory, a name of the host,
# and where libvirt keeps what it learns of QEMU, which takes it some seconds.
START = """set -e
for path in HIDDEN; do mkdir -p $path; mount -t tmpfs -o mode=755 nova-plyfs $path; done
[ -z "$3" ] || mount --bind "$3" /var/cache/libvirt
hostname "$2"
cp -r "$1/etc/." /etc/libvirt/
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
[ ! -e /dev/kvm ] || mount --bind "$1/kvm" /dev/kvm
exec libvirtd --pid-file "$1/libvirtd.pid"
""".replace("HIDDEN", " ".join(HIDDEN))


class Libvirtd:
    """A libvirtd with QEMU, of a host of some name."""

    def __init__(self, where, name="one"):
        self.where = where / f"libvirt-{name}"
        (self.where / "etc/qemu").mkdir(parents=True)
        self.where.chmod(0o755)
        (self.where / "etc/libvirtd.conf").write_text(
            f'auth_unix_ro = "none"\nauth_unix_rw = "none"\nunix_sock_dir = "{self.where}"\nhost_uuid = "{uuid.uuid4()}"\n'
            f'log_outputs = "2:file:{self.where}/libvirtd.log"\n'
        )
        # QEMU is another user than Nova, as on a real host: libvirt gives it the disks, and takes them back.
        (self.where / "etc/qemu.conf").write_text(
            'cgroup_controllers = [ ]\nnamespaces = [ ]\nstdio_handler = "file"\nsecurity_driver = "none"\n'
            'user = "libvirt-qemu"\ngroup = "libvirt-qemu"\ndynamic_ownership = 1\n'
        )
        # A package makes this user that is not needed otherwise.
        for file, line in (("passwd", "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin\n"), ("group", "libvirt-qemu:x:64055:\n")):
            (self.where / file).write_text(f"{Path('/etc', file).read_text()}{line}")
        # TCG everywhere. Where QEMU's user may not use KVM, libvirt asks QEMU for its capabilities again at each call.
        (self.where / "kvm").touch(0o600)
        self.uri = f"qemu+unix:///system?socket={self.where}/libvirt-sock"
        words = ["unshare", "--mount", "--uts", "--propagation", "slave", "sh", "-c", START, "sh", self.where, name]
        self.process = subprocess.Popen([*words, os.environ.get("LIBVIRT_CACHE", "")], stdout=subprocess.DEVNULL, stderr=(self.where / "stderr").open("w"))
        words = ["virsh", "--quiet", "--connect", self.uri, "list"]
        wait_for(lambda: subprocess.run(words, capture_output=True).returncode == 0, f"libvirtd does not start: see {self.where}/libvirtd.log")

    def virsh(self, *words):
        done = subprocess.run(["virsh", "--quiet", "--connect", self.uri, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def running(self):
        return self.virsh("list", "--name").split()

    def destroy_all(self):
        for name in self.running():
            self.virsh("destroy", name)
        for name in self.virsh("list", "--all", "--name").split():
            self.virsh("undefine", name)

    def stop(self):
        try:
            self.destroy_all()
        finally:
            self.process.terminate()
            self.process.wait(30)


def make_image(path, size, filesystem=False, format="raw"):
    """An image with bytes that tell where they are, or one ext4 filesystem."""
    raw = path if format == "raw" else path.with_suffix(".tmp")
    with open(raw, "wb") as file:
        file.truncate(size)
        if not filesystem:
            for at in range(0, size, 1 << 20):
                file.seek(at)
                file.write(f"block at {at} of {path.stem}".encode().ljust(512, b"."))
    if filesystem:
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", raw], check=True)
    if format != "raw":
        subprocess.run(["qemu-img", "convert", "-O", format, raw, path], check=True)
        raw.unlink()
    return path


def need_tools():
    missing = [tool for tool in ("libvirtd", "virsh", "qemu-img", "qemu-system-x86_64", "mke2fs", PLYFS) if shutil.which(tool) is None]
    assert not missing, f"missing programs: {', '.join(missing)}"
