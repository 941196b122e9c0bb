#!/usr/bin/env python3
"""Runs a real Cinder on a real plyfs, with a real Glance and RabbitMQ, and checks what its users see.

    tests/service.py        as `integrations/cinder/test --service` calls it: as root, in the virtual environment that it makes

cinder-api, cinder-scheduler and cinder-volume run with sqlite and auth_strategy=noauth. Every state comes from Cinder's API, and
the bytes from the mount.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
import uuid

import servers

MIB = 1 << 20
GIB = 1 << 30
PROJECT = uuid.uuid4().hex
VENV = pathlib.Path(sys.prefix)
IMAGE = 48 * MIB

CINDER_CONF = """
[DEFAULT]
debug = False
auth_strategy = noauth
state_path = {dir}/state
api_paste_config = {venv}/etc/cinder/api-paste.ini
resource_query_filters_file = {venv}/etc/cinder/resource_filters.json
rootwrap_config = {dir}/rootwrap.conf
transport_url = rabbit://guest:guest@127.0.0.1:{rabbit}/
host = {host}
enabled_backends = {backend}
glance_api_servers = {glance}
default_volume_type = __DEFAULT__
scheduler_default_filters = CapacityFilter,CapabilitiesFilter
rpc_response_timeout = 120
periodic_interval = 10
backend_stats_polling_interval = 10
image_conversion_dir = {dir}/conversion
[database]
connection = sqlite:///{dir}/cinder.sqlite?timeout=60
[oslo_concurrency]
lock_path = {dir}/lock
[oslo_messaging_notifications]
driver = log
[oslo_messaging_rabbit]
heartbeat_timeout_threshold = 0
[coordination]
backend_url = file://{dir}/lock
[cinder_sys_admin]
helper_command = {venv}/bin/privsep-helper --config-file {dir}/cinder.conf
[privsep_osbrick]
helper_command = {venv}/bin/privsep-helper --config-file {dir}/cinder.conf
[plyfs]
volume_driver = cinder_plyfs.driver.PlyfsDriver
volume_backend_name = plyfs
plyfs_socket = {socket}
plyfs_patience = 30
image_volume_cache_max_count = 1
[second]
volume_driver = cinder_plyfs.driver.PlyfsDriver
volume_backend_name = second
plyfs_socket = {socket}
plyfs_base_prefix = second-
"""

API = """
import sys
import waitress
from cinder.wsgi import wsgi
port = int(sys.argv.pop())
waitress.serve(wsgi.initialize_application(), host="127.0.0.1", port=port, threads=8)
"""


def say(text):
    print(f"{time.monotonic() - BEGUN:6.1f} s  {text}", flush=True)


class Rabbit:
    """A broker of its own, beside one that the host may have."""

    def __init__(self, directory):
        self.directory = directory
        self.port = servers.free_port()
        self._process = None

    def start(self):
        self.directory.mkdir()
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        shutil.chown(self.directory, "rabbitmq", "rabbitmq")
        self._environment = os.environ | {
            "RABBITMQ_NODENAME": f"plyfs{os.getpid()}@localhost",
            "RABBITMQ_DIST_PORT": str(servers.free_port()),
            "RABBITMQ_MNESIA_BASE": f"{self.directory}/mnesia",
            "RABBITMQ_LOG_BASE": f"{self.directory}/log",
            "RABBITMQ_CONFIG_FILE": f"{self.directory}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{self.directory}/enabled_plugins",
            "RABBITMQ_PID_FILE": f"{self.directory}/pid",
            # A port mapper of its own.
            "ERL_EPMD_PORT": str(servers.free_port()),
            "HOME": str(self.directory),
        }
        # The script of the package changes to the user rabbitmq; as that user from the start the processes are one group.
        command = ["setpriv", "--reuid=rabbitmq", "--regid=rabbitmq", "--clear-groups", "/usr/lib/rabbitmq/bin/rabbitmq-server"]
        with open(self.directory / "out.log", "ab") as out:
            self._process = subprocess.Popen(command, env=self._environment, stdout=out, stderr=out, start_new_session=True, cwd=self.directory)

    def wait(self):
        def listens():
            assert self._process.poll() is None, (self.directory / "out.log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        servers.wait_until(listens, "RabbitMQ listens", 120)

    def stop(self):
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            # The port mapper is a daemon of its own.
            subprocess.run(["epmd", "-kill"], env=self._environment, check=False, capture_output=True)


class Cinder:
    """cinder-api, cinder-scheduler and cinder-volume."""

    def __init__(self, directory, values):
        self.directory = directory
        self.conf, self.second = directory / "cinder.conf", directory / "second.conf"
        self.port = servers.free_port()
        self.processes = {}
        for name in ("state", "lock", "conversion"):
            (directory / name).mkdir(parents=True)
        for conf, backend in ((self.conf, "plyfs"), (self.second, "second")):
            conf.write_text(CINDER_CONF.format(dir=directory, venv=VENV, backend=backend, **values))
        (directory / "rootwrap.conf").write_text(f"[DEFAULT]\nfilters_path={VENV}/etc/cinder/rootwrap.d\nexec_dirs={VENV}/bin,/usr/bin,/bin\n")

    def log(self, name):
        return self.directory / f"{name}.log"

    def run(self, name, *command):
        with open(self.log(name), "ab") as out:
            self.processes[name] = subprocess.Popen([*map(str, command)], stdout=out, stderr=out, start_new_session=True)

    def sync(self):
        with open(self.log("manage"), "ab") as out:
            subprocess.run([VENV / "bin" / "cinder-manage", "--config-file", self.conf, "db", "sync"], check=True, stdout=out, stderr=out)
        # Else a reader of one service makes a writer of another fail.
        with contextlib.closing(sqlite3.connect(self.directory / "cinder.sqlite")) as database:
            database.execute("pragma journal_mode=wal")

    def start(self):
        """One after the other: of two that start at once, sqlite lets one fail."""
        self.run("api", sys.executable, "-c", API, "--config-file", self.conf, self.port)
        servers.wait_until(self.answers, "cinder-api answers", 120)
        self.run("scheduler", VENV / "bin" / "cinder-scheduler", "--config-file", self.conf)
        servers.wait_until(lambda: "cleanup completed" in self.log("scheduler").read_text(), "cinder-scheduler is up", 240)
        self.start_volume()

    def answers(self):
        try:
            self.request("GET", "/limits")
        except OSError:
            return False
        except Refused:
            # An error is an answer: it has no services yet.
            return True
        return True

    def wait_for_services(self, count):
        servers.wait_until(lambda: len(self.services()) >= count, f"{count} services are up", 240)

    def wait_for_pools(self, count):
        servers.wait_until(lambda: len(self.request("GET", "/scheduler-stats/get_pools")["pools"]) >= count, f"{count} pools are known", 240)

    def start_volume(self, name="volume"):
        begun = len(self.log(name).read_text()) if self.log(name).exists() else 0
        self.run(name, VENV / "bin" / "cinder-volume", "--config-file", self.second if name == "second" else self.conf)
        servers.wait_until(lambda: "post RPC initialization completed" in self.log(name).read_text()[begun:], "cinder-volume is up", 240)

    def kill_volume(self):
        process = self.processes.pop("volume")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def request(self, method, target, body=None):
        headers = {"Content-Type": "application/json", "X-Auth-Token": f"admin:{PROJECT}", "OpenStack-API-Version": "volume 3.60"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v3/{PROJECT}{target}", json.dumps(body).encode() if body else None,
                                         headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=150) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(f"{method} {target}: {error.code} {error.read().decode()}") from error
        return json.loads(text) if text else None

    def services(self):
        with contextlib.suppress(OSError, Refused):
            return [s for s in self.request("GET", "/os-services")["services"] if s["state"] == "up"]
        return []

    # Volumes

    def volume(self, size=1, wait="available", **more):
        made = self.request("POST", "/volumes", {"volume": {"size": size, **more}})["volume"]
        return self.wait_for("volumes", made["id"], wait)

    def snapshot(self, volume):
        made = self.request("POST", "/snapshots", {"snapshot": {"volume_id": volume["id"], "force": True}})["snapshot"]
        return self.wait_for("snapshots", made["id"], "available")

    def show(self, kind, name):
        return self.request("GET", f"/{kind}/{name}")[kind[:-1]]

    def wait_for(self, kind, name, *wanted):
        """The object when it has one of these states."""
        deadline = time.monotonic() + 180
        while True:
            found = self.show(kind, name)
            if found["status"] in wanted:
                return found
            if (found["status"].startswith("error") and not any(w.startswith("error") for w in wanted)) or time.monotonic() > deadline:
                raise AssertionError(f"{kind} {name} is {found['status']}, not {wanted}")
            time.sleep(0.2)

    def action(self, volume, name, **content):
        return self.request("POST", f"/volumes/{volume['id']}/action", {name: content})

    def delete(self, kind, found):
        self.request("DELETE", f"/{kind}/{found['id']}")
        self.wait_until_gone(kind, found)

    def wait_until_gone(self, kind, found):
        def is_gone():
            try:
                state = self.show(kind, found["id"])["status"]
            except Refused:
                return True
            assert not state.startswith("error"), f"{kind} {found['id']} is {state}"
            return False

        servers.wait_until(is_gone, f"{kind} {found['id']} is deleted", 180)


class Refused(Exception):
    pass


def disk_of(volume):
    return f"volume-{volume['id']}"


class Service:
    """The steps, in their order; each leaves the services running."""

    def __init__(self, work, plyfs, glance, cinder):
        self.work, self.plyfs, self.glance, self.cinder = work, plyfs, glance, cinder
        self.data = random.Random(1).randbytes(IMAGE)
        path = work / "image.raw"
        path.write_bytes(self.data)
        self.image = glance.image(path, name="debian-12")

    def path(self, volume):
        return self.plyfs.mount / "disks" / f"{disk_of(volume)}.raw"

    def read(self, volume, length, offset=0):
        with open(self.path(volume), "rb") as file:
            file.seek(offset)
            return file.read(length)

    def write(self, volume, data, offset=0):
        with open(self.path(volume), "r+b") as file:
            file.seek(offset)
            file.write(data)
            os.fsync(file.fileno())

    def volume_log(self):
        return self.cinder.log("volume").read_text()

    def check_disks(self, *volumes):
        """Every disk is a volume that Cinder has."""
        assert self.plyfs.disks() == {disk_of(volume) for volume in volumes}, (self.plyfs.disks(), volumes)

    def step_volumes_snapshots_clones(self):
        volume = self.cinder.volume()
        self.write(volume, b"first")
        snapshot = self.cinder.snapshot(volume)
        self.write(volume, b"later")
        of_snapshot = self.cinder.volume(2, snapshot_id=snapshot["id"])
        clone = self.cinder.volume(1, source_volid=volume["id"])
        assert self.read(of_snapshot, 5) == b"first" and self.read(clone, 5) == b"later"
        self.cinder.action(clone, "os-extend", new_size=3)
        self.cinder.wait_for("volumes", clone["id"], "available")
        assert self.plyfs.disk(disk_of(clone))["size"] == 3 * GIB
        self.cinder.action(volume, "revert", snapshot_id=snapshot["id"])
        self.cinder.wait_for("volumes", volume["id"], "available")
        assert self.read(volume, 5) == b"first"
        self.check_disks(volume, clone, of_snapshot)
        self.cinder.delete("snapshots", snapshot)
        for each in (volume, clone, of_snapshot):
            self.cinder.delete("volumes", each)
        self.check_disks()

    def step_images(self):
        begun = time.monotonic()
        first = self.cinder.volume(imageRef=self.image["id"])
        took = time.monotonic() - begun
        kept = self.plyfs.json("base", "show", f"cinder-{self.image['id']}")["cached_bytes"]
        assert kept < IMAGE // 4, kept
        second = self.cinder.volume(2, imageRef=self.image["id"])
        assert first["bootable"] == "true" and first["volume_image_metadata"]["image_id"] == self.image["id"]
        assert self.read(second, IMAGE + MIB) == self.data + b"\0" * MIB
        say(f"a volume of an image is available after {took:.2f} s; {kept} of {IMAGE} bytes were read for it")
        log = self.volume_log()
        for action in ("miss", "hit"):
            assert f"image_volume_cache.{action}" in log, action
        # To Glance, and from there.
        answer = self.cinder.action(first, "os-volume_upload_image", image_name="up", disk_format="raw", container_format="bare")
        uploaded = answer["os-volume_upload_image"]["image_id"]
        self.cinder.wait_for("volumes", first["id"], "available")
        servers.wait_until(lambda: self.glance.request("GET", f"/v2/images/{uploaded}")["status"] == "active", "the image is active")
        third = self.cinder.volume(imageRef=uploaded)
        assert self.read(third, IMAGE) == self.data
        self.check_disks(first, second, third)
        for each in (first, second, third):
            self.cinder.delete("volumes", each)
        # Two bases without disks, and one may stay.
        bases = {base for base in self.plyfs.bases() if base.startswith("cinder-")}
        assert len(bases) == 1, bases
        assert "image_volume_cache.evict" in self.volume_log()

    def step_image_sizes(self):
        """An image that is larger than the volume, and one that plyfs does not read."""
        large = self.work / "large.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", large, "2G"], check=True)
        image = self.glance.image(large, "qcow2")
        try:
            # Glance knows the virtual size, and cinder-api refuses it.
            self.cinder.volume(1, imageRef=image["id"])
        except Refused as error:
            assert "doesn't fit in a volume of size 1GB" in str(error), error
        else:
            raise AssertionError("a volume is smaller than its image")
        self.check_disks()
        fits = self.cinder.volume(2, imageRef=image["id"])
        vdi = self.work / "image.vdi"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vdi", self.work / "image.raw", vdi], check=True)
        downloaded = self.cinder.volume(1, imageRef=self.glance.image(vdi, "vdi")["id"])
        assert self.read(downloaded, IMAGE) == self.data
        assert self.plyfs.disk(disk_of(downloaded))["size"] == GIB
        assert "is downloaded and copied, not cloned: its disk format is vdi" in self.volume_log()
        self.check_disks(fits, downloaded)
        for each in (fits, downloaded):
            self.cinder.delete("volumes", each)
        self.check_disks()

    def step_attachments(self):
        volume = self.cinder.volume()
        self.write(volume, b"bytes")
        connector = {"host": HOST, "ip": "127.0.0.1", "multipath": False, "platform": "x86_64", "os_type": "linux"}
        answer = self.cinder.action(volume, "os-initialize_connection", connector=connector)["connection_info"]
        assert answer["driver_volume_type"] == "gpfs", answer
        with open(answer["data"]["device_path"], "rb") as file:
            assert file.read(5) == b"bytes"
        try:
            self.cinder.action(volume, "os-initialize_connection", connector=connector | {"host": "elsewhere"})
        except Refused:
            assert "host elsewhere cannot attach it" in self.volume_log()
        else:
            raise AssertionError("another host attached the volume")
        with open(self.path(volume), "r+b"):
            self.cinder.request("DELETE", f"/volumes/{volume['id']}")
            servers.wait_until(lambda: "a client has it open" in self.volume_log(), "the deletion is refused")
            self.cinder.wait_for("volumes", volume["id"], "available")
        self.cinder.delete("volumes", volume)
        self.check_disks()

    def step_disk_gone(self):
        volume = self.cinder.volume()
        self.plyfs.run("disk", "rm", disk_of(volume))
        self.cinder.action(volume, "os-extend", new_size=2)
        self.cinder.wait_for("volumes", volume["id"], "error_extending")
        assert f"disk {disk_of(volume)}: there is no disk of that name" in self.volume_log()
        self.cinder.delete("volumes", volume)

    def step_manage(self):
        self.plyfs.run("disk", "create", "older", "--size", "1G")
        body = {"volume": {"host": f"{HOST}@plyfs#plyfs", "ref": {"source-name": "older"}}}
        volume = self.cinder.request("POST", "/os-volume-manage", body)["volume"]
        self.cinder.wait_for("volumes", volume["id"], "available")
        self.check_disks(volume)
        self.cinder.action(volume, "os-unmanage")
        servers.wait_until(lambda: not self.cinder.request("GET", "/volumes")["volumes"], "the volume is unmanaged")
        self.plyfs.run("disk", "rm", disk_of(volume))

    def step_migration(self):
        """Host-assisted, by Cinder: it copies to a disk of the other backend."""
        volume = self.cinder.volume()
        self.write(volume, b"moved", GIB - 5)
        target = "second"
        self.cinder.start_volume(target)
        self.cinder.wait_for_services(3)
        self.cinder.wait_for_pools(2)
        self.cinder.action(volume, "os-migrate_volume", host=f"{HOST}@{target}#{target}", force_host_copy=True)

        def is_there():
            found = self.cinder.show("volumes", volume["id"])
            assert found["migration_status"] != "error", self.volume_log()[-3000:]
            return found["migration_status"] == "success" and f"@{target}" in found["os-vol-host-attr:host"]

        servers.wait_until(is_there, "the volume is migrated", 240)
        disks = self.plyfs.disks()
        assert len(disks) == 1, disks
        with open(self.plyfs.mount / "disks" / f"{disks.pop()}.raw", "rb") as file:
            file.seek(GIB - 5)
            assert file.read() == b"moved"
        # With the name of its new disk it has snapshots and clones.
        self.cinder.delete("snapshots", self.cinder.snapshot(volume))
        self.cinder.delete("volumes", volume)
        self.check_disks()

    def restarted(self, call):
        """The daemon is away when the request comes, and is back two seconds later."""
        self.plyfs.stop()
        try:
            result = call()
            time.sleep(2)
        finally:
            self.plyfs.start()
        return result

    def step_command_line(self):
        """The commands of the README."""
        def cinder(*command):
            server = ["--os-auth-type", "noauth", "--os-endpoint", f"http://127.0.0.1:{self.cinder.port}/v3/{PROJECT}", "--os-user-id", "admin",
                      "--os-project-id", PROJECT]
            done = subprocess.run([VENV / "bin" / "cinder", *server, *command], check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "total_capacity_gb" in cinder("get-pools", "--detail")
        cinder("create", "--image", self.image["name"], "--name", "first", "2")
        made = self.cinder.request("GET", "/volumes")["volumes"]
        assert [each["name"] for each in made] == ["first"], made
        self.cinder.wait_for("volumes", made[0]["id"], "available")
        # On one of the two backends.
        assert self.plyfs.disk(disk_of(made[0]))["base"] in (f"cinder-{self.image['id']}", f"second-{self.image['id']}")
        self.cinder.delete("volumes", made[0])
        self.plyfs.run("disk", "create", "older", "--size", "1G")
        cinder("manage", f"{HOST}@plyfs#plyfs", "older")
        made = self.cinder.request("GET", "/volumes")["volumes"]
        self.cinder.wait_for("volumes", made[0]["id"], "available")
        self.cinder.delete("volumes", made[0])
        self.check_disks()

    def step_restarts_of_plyfs(self):
        def post(kind, name, **body):
            return self.cinder.request("POST", f"/{kind}", {name: body})[name]

        volume = self.restarted(lambda: post("volumes", "volume", size=1))
        self.cinder.wait_for("volumes", volume["id"], "available")
        self.write(volume, b"first")
        snapshot = self.restarted(lambda: post("snapshots", "snapshot", volume_id=volume["id"]))
        self.cinder.wait_for("snapshots", snapshot["id"], "available")
        made = [volume]
        for more in ({"source_volid": volume["id"]}, {"snapshot_id": snapshot["id"]}, {"imageRef": self.image["id"]}):
            made.append(self.restarted(lambda more=more: post("volumes", "volume", size=1, **more)))
            self.cinder.wait_for("volumes", made[-1]["id"], "available")
        assert [self.read(each, 5) for each in made] == [b"first"] * 3 + [self.data[:5]]
        self.write(volume, b"later")
        self.restarted(lambda: self.cinder.action(volume, "revert", snapshot_id=snapshot["id"]))
        self.cinder.wait_for("volumes", volume["id"], "available")
        assert self.read(volume, 5) == b"first"
        self.restarted(lambda: self.cinder.action(made[1], "os-extend", new_size=2))
        self.cinder.wait_for("volumes", made[1]["id"], "available")
        assert self.plyfs.disk(disk_of(made[1]))["size"] == 2 * GIB
        self.check_disks(*made)
        for kind, found in [("snapshots", snapshot)] + [("volumes", each) for each in made]:
            self.restarted(lambda kind=kind, found=found: self.cinder.request("DELETE", f"/{kind}/{found['id']}"))
            self.cinder.wait_until_gone(kind, found)
        self.check_disks()

    def step_death_of_a_worker(self):
        volume = self.cinder.volume()
        self.plyfs.kill_worker()
        second = self.cinder.volume(source_volid=volume["id"])
        for each in (volume, second):
            self.cinder.delete("volumes", each)
        self.check_disks()

    def step_death_of_cinder_volume(self):
        """It dies in an upload: the clone that it uploaded goes when it starts again, and the volume can be deleted."""
        volume = self.cinder.volume()
        self.plyfs.run("disk", "create", f"{disk_of(volume)}-upload", "--size", "1G")
        orphan = f"volume-{uuid.uuid4()}"
        self.plyfs.run("disk", "create", orphan, "--size", "1G")
        self.cinder.kill_volume()
        self.cinder.start_volume()
        servers.wait_until(lambda: f"Disk {orphan} has the name of a volume, and Cinder has no such volume" in self.volume_log(),
                           "the orphan is named", 120)
        servers.wait_until(lambda: f"{disk_of(volume)}-upload" not in self.plyfs.disks(), "the upload is removed")
        self.plyfs.run("disk", "rm", orphan)
        self.cinder.wait_for_services(2)
        self.cinder.delete("volumes", volume)
        self.check_disks()

    def step_privileged_helper(self):
        """As an unprivileged cinder-volume: by the privsep helper, which Cinder's own configuration starts."""
        code = """
import sys
from oslo_config import cfg
import cinder.common.config
from cinder import objects
objects.register_all()
cfg.CONF(sys.argv[1:3], project="cinder")
from cinder_plyfs import client, privileged
privileged.is_needed = lambda path: True
made = client.Client(sys.argv[3], 5, 30)
print(made.status()["version"])
made.create_disk("k", name="by-helper", size=1 << 20)
made.move_disk(made.disk("by-helper"), "moved-by-helper")
made.create_disk("k2", name="by-helper", size=1 << 20)
try:
    made.move_disk(made.disk("by-helper"), "moved-by-helper")
except FileExistsError:
    print("not over another")
assert made.remove_disk("by-helper") and made.remove_disk("moved-by-helper")
away = client.Client(sys.argv[3] + ".none", 0, 5)
try:
    away.status()
except client.Unanswered as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code, "--config-file", str(self.cinder.conf), self.plyfs.socket], check=False,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "not over another" in done.stdout and "plyfs does not answer" in done.stdout, done.stdout


HOST = "thishost"
BEGUN = time.monotonic()


def main():
    work = servers.work_directory()
    with contextlib.ExitStack() as ends:
        if not os.environ.get("PLYFS_KEEP"):
            ends.callback(servers.remove, work)
        rabbit = Rabbit(work / "rabbit")
        os.chmod(work, 0o755)
        rabbit.start()
        ends.callback(rabbit.stop)
        glance = servers.Glance(work / "glance")
        glance.begin()
        ends.callback(glance.stop)
        plyfs = servers.Plyfs(work, os.environ["PLYFS_BIN"])
        plyfs.start()
        ends.callback(plyfs.stop)
        cinder = Cinder(work / "cinder", {"rabbit": rabbit.port, "host": HOST, "glance": glance.url, "socket": plyfs.socket})
        cinder.sync()
        rabbit.wait()
        glance.wait()
        say("plyfs, RabbitMQ and Glance are up")
        ends.callback(cinder.stop)
        cinder.start()
        cinder.wait_for_pools(1)
        say("Cinder is up")
        service = Service(work, plyfs, glance, cinder)
        wanted = sys.argv[1:]
        failed = []
        for name in [name for name in vars(Service) if name.startswith("step_")]:
            title = name.removeprefix("step_").replace("_", " ")
            if wanted and not any(word in name for word in wanted):
                continue
            before = {each: len(cinder.log(each).read_text()) for each in cinder.processes}
            try:
                getattr(service, name)()
            except Exception:
                failed.append(title)
                say(f"FAILED: {title}")
                traceback.print_exc()
                for each in cinder.processes:
                    print(f"--- {each}\n{cinder.log(each).read_text()[before.get(each, 0):][-4000:]}", file=sys.stderr)
            else:
                say(f"passed: {title}")
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")
    say("all steps passed")


if __name__ == "__main__":
    main()
