"""The servers that the tests use: a plyfs daemon and a Glance, both real."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid

MIB = 1 << 20

GLANCE_CONF = """
[DEFAULT]
log_file = {dir}/api.log
enabled_backends = fast:file
image_cache_dir = {dir}/cache
show_multiple_locations = False
[database]
connection = sqlite:///{dir}/glance.sqlite
[glance_store]
default_backend = fast
[fast]
filesystem_store_datadir = {dir}/images
[os_glance_staging_store]
filesystem_store_datadir = {dir}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {dir}/tasks
[paste_deploy]
config_file = {dir}/glance-api-paste.ini
flavor = {flavor}
[keystone_authtoken]
{keystone}
[oslo_policy]
enforce_new_defaults = False
enforce_scope = False
{policy}
[oslo_concurrency]
lock_path = {dir}/lock
[image_format]
# As an older Glance, which takes any bytes.
require_image_format_match = False
"""

GLANCE_PASTE = """
[composite:glance-api]
paste.composite_factory = glance.api:root_app_factory
/: api
[composite:glance-api-keystone]
paste.composite_factory = glance.api:root_app_factory
/: api
[composite:api]
paste.composite_factory = glance.api:pipeline_factory
default = versionnegotiation unauthenticated-context rootapp
keystone = versionnegotiation authtoken context rootapp
[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: apiversions
/v2: apiv2app
[app:apiversions]
paste.app_factory = glance.api.versions:create_resource
[app:apiv2app]
paste.app_factory = glance.api.v2.router:API.factory
[filter:versionnegotiation]
paste.filter_factory = glance.api.middleware.version_negotiation:VersionNegotiationFilter.factory
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
[filter:unauthenticated-context]
paste.filter_factory = glance.api.middleware.context:UnauthenticatedContextMiddleware.factory
"""

# Of a Glance without keystone: every request may do everything.
OPEN_POLICY = {
    name: "@" for name in ("context_is_admin", "add_image", "get_image", "get_images", "modify_image", "delete_image", "publicize_image",
                           "upload_image", "download_image", "deactivate", "reactivate", "add_member", "get_members")
}

# Any WSGI server does; this one is written in Python.
# The tables are made from the models: twenty migrations take half a minute.
SERVE_GLANCE = """
import sys
import waitress
from glance.wsgi.api import application
from glance.db.sqlalchemy import api, models
models.register_models(api.get_engine())
waitress.serve(application, host="127.0.0.1", port=int(sys.argv[1]), threads=8, max_request_body_size=1 << 36)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def work_directory():
    return pathlib.Path(tempfile.mkdtemp(prefix="plyfs-cinder.", dir=os.environ.get("PLYFS_TEST_DIR", "/var/tmp")))


class Plyfs:
    """A daemon with a store of its own."""

    def __init__(self, directory, binary, options=()):
        self.directory = directory
        self.binary = binary
        self.options = options
        self.store = directory / "store"
        self.socket = str(self.store / "control.sock")
        self.mount = self.store / "mnt"
        self._process = None

    def start(self):
        log = self.directory / "plyfs.log"
        before = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as out:
            # Not in the group of the tests: a signal of the terminal would end it before its clients.
            self._process = subprocess.Popen([self.binary, "--store", str(self.store), "serve", *self.options], stdout=out,
                                             stderr=subprocess.STDOUT, start_new_session=True)

        def is_ready():
            assert self._process.poll() is None, log.read_text()[before:]
            return "plyfs ready" in log.read_text()[before:]

        wait_until(is_ready, "plyfs serve is ready")

    def stop(self):
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            subprocess.run(["umount", "-l", str(self.mount)], check=False)
        self._process = None

    def restart(self):
        self.stop()
        self.start()

    def kill_worker(self):
        os.kill(self.json("status")["worker_pid"], signal.SIGKILL)

    def run(self, *arguments, check=True):
        return subprocess.run([self.binary, "--store", str(self.store), *map(str, arguments)], check=check, capture_output=True, text=True)

    def json(self, *arguments):
        return json.loads(self.run("--json", *arguments).stdout)

    def disks(self):
        return {disk["name"] for disk in self.json("disk", "ls")}

    def bases(self):
        return {base["name"] for base in self.json("base", "ls")}

    def disk(self, name):
        return self.json("disk", "show", name)


class Interrupter:
    """A socket before that of the daemon, which restarts the daemon in the middle of requests."""

    def __init__(self, plyfs):
        self.plyfs = plyfs
        self.path = str(plyfs.directory / f"proxy-{uuid.uuid4().hex[:8]}.sock")
        self.pending = []
        self.restarts = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def interrupt(self, *moments):
        """The next requests that change something meet a restart, one each: `before` or `after` the daemon has carried it out."""
        self.pending = list(moments)

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        os.unlink(self.path)

    def _serve(self):
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                self._carry(client)

    def _carry(self, client):
        request = receive(client)
        changes = not request.startswith(b"GET ") and not request.startswith(b"POST /v1/prune ")
        moment = self.pending.pop(0) if self.pending and changes else None
        if moment == "before":
            self._restart()
            return
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(self.plyfs.socket)
            daemon.sendall(request)
            answer = receive(daemon)
        if moment == "after":
            self._restart()
            return
        client.sendall(answer)

    def _restart(self):
        self.restarts += 1
        self.plyfs.restart()


def receive(connection):
    """One message of HTTP with a Content-Length, or up to the end of the connection."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
        head, found, body = data.partition(b"\r\n\r\n")
        if not found:
            continue
        lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if lengths and len(body) >= lengths[0]:
            break
        if not lengths and head.startswith((b"GET ", b"DELETE ", b"POST ")):
            break
    return data


class Glance:
    """glance-api with a file store; `keystone`: lines of [keystone_authtoken], or none and every request is the administrator's."""

    def __init__(self, directory, python=None, keystone=None):
        self.directory = directory
        self.python = python or os.environ.get("GLANCE_PYTHON", sys.executable)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._keystone = keystone
        self._process = None

    def start(self):
        self.begin()
        self.wait()

    def begin(self):
        """Starts it; it takes its time."""
        for name in ("images", "staging", "tasks", "cache", "lock"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        conf = self.directory / "glance-api.conf"
        policy = self.directory / "policy.json"
        policy.write_text(json.dumps(OPEN_POLICY))
        conf.write_text(GLANCE_CONF.format(dir=self.directory, flavor="keystone" if self._keystone else "", keystone=self._keystone or "",
                                           policy="" if self._keystone else f"policy_file = {policy}"))
        (self.directory / "glance-api-paste.ini").write_text(GLANCE_PASTE)
        with open(self.directory / "out.log", "ab") as out:
            self._process = subprocess.Popen([self.python, "-c", SERVE_GLANCE, str(self.port)], stdout=out, stderr=out,
                                             env=os.environ | {"OS_GLANCE_CONFIG_DIR": str(self.directory)}, start_new_session=True)

    def wait(self):
        def is_up():
            assert self._process.poll() is None, (self.directory / "out.log").read_text()
            try:
                urllib.request.urlopen(f"{self.url}/").close()
            except urllib.error.HTTPError:
                # 300 Multiple Choices.
                return True
            except OSError:
                return False
            return True

        wait_until(is_up, "Glance answers", 120)

    def stop(self):
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def request(self, method, target, body=None, kind="application/json", token=None):
        headers = {"Content-Type": kind} | ({"X-Auth-Token": token} if token else {})
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        request = urllib.request.Request(f"{self.url}{target}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {target}: {error.code} {error.read().decode()}") from error
        return json.loads(text) if text else None

    def image(self, path, disk_format="raw", token=None, **properties):
        """Uploads a file. Returns the image."""
        record = {"name": "test", "disk_format": disk_format, "container_format": "bare", "visibility": "public"} | properties
        image = self.request("POST", "/v2/images", record, token=token)
        self.request("PUT", f"/v2/images/{image['id']}/file", pathlib.Path(path).read_bytes(), "application/octet-stream", token=token)
        return self.request("GET", f"/v2/images/{image['id']}", token=token)


def remove(directory):
    shutil.rmtree(directory, ignore_errors=True)
