"""Images of a Glance behind keystone, both the real ones. See scripts/test-sources."""

import hashlib
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from harness import MIB, Daemon, call, directory, end, free_port, say, start, wait_for

# A directory with the packages in bin/ saves their installation.
VENV = os.environ.get("OPENSTACK_VENV")
PASSWORD = "gEhEiM-of-the-reader"
# Seconds that a token lasts.
LIFE = 20
# Seconds in which a service has to start, and a command that prepares it to end, also on a machine that is busy.
START = 300
SIZE = 24 * MIB

KEYSTONE = """
[database]
connection = sqlite:///{where}/keystone.sqlite
[fernet_tokens]
key_repository = {where}/fernet
[credential]
key_repository = {where}/credential
[token]
expiration = {life}
"""

GLANCE = """
[DEFAULT]
log_file = {where}/glance.log
enabled_backends = fast:file
image_cache_dir = {where}/cache
[database]
connection = sqlite:///{where}/glance.sqlite
[glance_store]
default_backend = fast
[fast]
filesystem_store_datadir = {where}/images
[os_glance_staging_store]
filesystem_store_datadir = {where}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {where}/tasks
[paste_deploy]
config_file = {where}/paste.ini
flavor = keystone
[keystone_authtoken]
www_authenticate_uri = {keystone}/v3
auth_url = {keystone}/v3
auth_type = password
username = admin
password = {password}
project_name = admin
user_domain_id = default
project_domain_id = default
token_cache_time = -1
[oslo_concurrency]
lock_path = {where}/lock
"""

PASTE = """
[composite:glance-api-keystone]
paste.composite_factory = glance.api:root_app_factory
/: api
[composite:api]
paste.composite_factory = glance.api:pipeline_factory
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
"""

CLOUDS = """
clouds:
  test:
    auth:
      auth_url: {keystone}
      username: reader
      project_name: images
      user_domain_id: default
      project_domain_id: default
    region_name: R
"""
SECURE = "clouds: {{test: {{auth: {{password: {password}}}}}}}\n"


class Failures(list):
    def check(self, what, holds, detail=""):
        say(f"  {'ok' if holds else 'FAILED'}: {what}{f' ({detail})' if detail else ''}")
        if not holds:
            self.append(f"{what} {detail}")


class Cloud:
    """keystone and Glance, each behind uwsgi on a port of the loopback interface."""

    def __init__(self, where, life=LIFE):
        self.where, self.venv = where, Path(VENV) if VENV else where / "venv"
        if not VENV:
            call("python3", "-m", "venv", self.venv)
            call(self.venv / "bin/pip", "install", "-q", "keystone", "glance", "uwsgi", timeout=900)
        self.ports = {"keystone": free_port(), "glance": free_port()}
        self.keystone, self.glance = (f"http://127.0.0.1:{self.ports[name]}" for name in ("keystone", "glance"))
        for name in ("fernet", "credential", "images", "staging", "tasks", "cache", "lock"):
            (where / name).mkdir(mode=0o700)
        values = {"where": where, "life": life, "keystone": self.keystone, "password": PASSWORD}
        (where / "keystone.conf").write_text(KEYSTONE.format(**values))
        (where / "glance-api.conf").write_text(GLANCE.format(**values))
        (where / "paste.ini").write_text(PASTE)
        (where / "clouds.yaml").write_text(CLOUDS.format(**values))
        (where / "secure.yaml").write_text(SECURE.format(**values))
        manage = [self.venv / "bin/keystone-manage", "--config-file", where / "keystone.conf"]
        user = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
        call(*manage, "db_sync", timeout=START)
        call(*manage, "fernet_setup", *user, timeout=START)
        call(*manage, "credential_setup", *user, timeout=START)
        urls = [f"--bootstrap-{kind}-url={self.keystone}/v3" for kind in ("admin", "public", "internal")]
        call(*manage, "bootstrap", "--bootstrap-password", PASSWORD, "--bootstrap-region-id", "R", *urls, timeout=START)
        call(self.venv / "bin/glance-manage", "--config-file", where / "glance-api.conf", "db_sync", timeout=START)
        self.processes = {}
        self.start("keystone")
        self.start("glance")
        self.furnish()

    def start(self, name):
        # A socket of uwsgi closes the connection after each answer of HTTP/1.1 and does not say so. A client that sends its next
        # request there gets a reset. keystone is behind uwsgi's router, which keeps connections; Glance says that it closes them.
        ways = {
            "keystone": ["--http", "--http-keepalive", "--post-buffering=65536"],
            "glance": ["--http-socket", "--add-header=Connection: close"],
        }
        modules = {"keystone": "keystone.wsgi.api:application", "glance": "glance.wsgi.api:application"}
        way, *more = ways[name]
        environment = {
            **os.environ,
            "OS_KEYSTONE_CONFIG_DIR": str(self.where),
            "OS_KEYSTONE_CONFIG_FILES": str(self.where / "keystone.conf"),
            "OS_GLANCE_CONFIG_DIR": str(self.where),
        }
        self.processes[name] = start(
            [self.venv / "bin/uwsgi", way, f"127.0.0.1:{self.ports[name]}", *more, "--module", modules[name], "--virtualenv", self.venv]
            + ["--master", "--processes=2", "--enable-threads", "--lazy-apps", "--die-on-term", "--buffer-size=65535"]
            + ["--http-chunked-input", "--socket-timeout=60"],
            self.where / f"{name}.uwsgi.log",
            env=environment,
        )
        url = f"http://127.0.0.1:{self.ports[name]}/"
        wait_for(name, lambda: self.answers(url), self.processes[name], seconds=START)

    @staticmethod
    def answers(url):
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def stop(self, name):
        end(self.processes.pop(name))

    def token(self):
        """A new token of the administrator."""
        user = {"name": "admin", "domain": {"id": "default"}, "password": PASSWORD}
        identity = {"methods": ["password"], "password": {"user": user}}
        scope = {"project": {"name": "admin", "domain": {"id": "default"}}}
        asked = json.dumps({"auth": {"identity": identity, "scope": scope}}).encode()
        request = urllib.request.Request(f"{self.keystone}/v3/auth/tokens", asked, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=30).headers["X-Subject-Token"]

    def ask(self, method, url, body=None, media="application/json"):
        """One request of the administrator, with a token of its own."""
        token = self.token()
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"X-Auth-Token": token, "Content-Type": media}, method=method)
        text = urllib.request.urlopen(request, timeout=60).read()
        return json.loads(text) if text else None

    def furnish(self):
        """A service in the catalog, and a project with a reader."""
        ask, v3 = self.ask, f"{self.keystone}/v3"
        service = ask("POST", f"{v3}/services", {"service": {"type": "image", "name": "glance"}})["service"]["id"]
        endpoint = {"service_id": service, "interface": "public", "region": "R", "url": self.glance}
        ask("POST", f"{v3}/endpoints", {"endpoint": endpoint})
        project = ask("POST", f"{v3}/projects", {"project": {"name": "images", "domain_id": "default"}})["project"]["id"]
        user = {"name": "reader", "password": PASSWORD, "domain_id": "default"}
        reader = ask("POST", f"{v3}/users", {"user": user})["user"]["id"]
        roles = {role["name"]: role["id"] for role in ask("GET", f"{v3}/roles")["roles"]}
        # The role reader lists images and does not download them.
        ask("PUT", f"{v3}/projects/{project}/users/{reader}/roles/{roles['member']}")
        self.project = project

    def image(self, name, data, **properties):
        """A new image of the reader's project; without data it stays queued."""
        record = {"name": name, "disk_format": "raw", "container_format": "bare", "owner": self.project, **properties}
        made = self.ask("POST", f"{self.glance}/v2/images", record)["id"]
        if data is not None:
            self.ask("PUT", f"{self.glance}/v2/images/{made}/file", data, "application/octet-stream")
        return made

    def act(self, image, action):
        self.ask("POST", f"{self.glance}/v2/images/{image}/actions/{action}")

    def data_requests(self, image):
        """Status and bytes of each answer with data, as Glance logged them."""
        lines = (self.where / "glance.uwsgi.log").read_text(errors="replace").splitlines()
        return [line for line in lines if f"GET /v2/images/{image}/file" in line]


def read(path, at, length):
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, at)


def refusal(daemon, *argv):
    try:
        daemon.cli("base", "add", *argv)
    except RuntimeError as error:
        return str(error)
    return "it was added"


class Reader(threading.Thread):
    """A read that may wait."""

    def __init__(self, path, at, length):
        super().__init__(daemon=True)
        self.parameters, self.bytes = (path, at, length), None
        self.start()

    def run(self):
        self.bytes = read(*self.parameters)


def waits_for(daemon, base, words, seconds=60):
    """Whether the base says that its reads wait for something with these words."""
    end_of_patience = time.monotonic() + seconds
    shown = {}
    while time.monotonic() < end_of_patience:
        shown = daemon.cli("base", "show", base)
        if words in (shown.get("waiting_for") or ""):
            return True, ""
        time.sleep(0.1)
    return False, f"it says {shown.get('state')}: {shown.get('waiting_for')}"


def test_glance(_quick):
    failures = Failures()
    where = directory(os.environ.get("TMPDIR", "/var/tmp"), "plyfs-glance-")
    cloud = Cloud(where)
    data = random.Random(1).randbytes(SIZE)
    image = cloud.image("debian-12", data)
    daemon = Daemon(where, config=f'[[http.clouds]]\nname = "test"\nfile = "{where}/clouds.yaml"\n')
    daemon.start()
    try:
        run(failures, cloud, daemon, data, image)
    finally:
        daemon.end()
        for name in list(cloud.processes):
            cloud.stop(name)
    texts = daemon.log.read_text(errors="replace")
    failures.check("no log has the password", PASSWORD not in texts)
    return failures


def run(failures, cloud, daemon, data, image):
    check = failures.check
    base = daemon.cli("base", "add", "debian", "--cloud", "test", "debian-12", seconds=START)
    check("add by name gives the image by its ID", base["source"] == f"glance+cloud://test/{image}", base["source"])
    check("the digest is the record's", base["sha512"] == hashlib.sha512(data).hexdigest())
    path = daemon.base("debian")
    places = [(random.Random(n).randrange(SIZE - 100_000), 100_000) for n in range(20)]
    check("reads are the image's bytes", all(read(path, at, n) == data[at : at + n] for at, n in places))
    lines = cloud.data_requests(image)
    # 401: a token ended before a busy machine had answered with it.
    others = [line for line in lines if "HTTP/1.1 206" not in line and "HTTP/1.1 401" not in line]
    check("each answer of Glance with data was a range", lines and not others, f"{len(lines)} answers; {others}")

    for name, words in (("queued", "Glance says that the image is queued"), ("ova", "container_format is ova"), ("two", "2 images two")):
        properties = {"container_format": "ova"} if name == "ova" else {}
        cloud.image(name, None if name == "queued" else b"x" * 65536, **properties)
        if name == "two":
            cloud.image(name, b"y" * 65536)
        said = refusal(daemon, f"r-{name}", "--cloud", "test", name)
        check(f"refused: {words}", words in said, said)
    said = refusal(daemon, "r-qcow2", "--cloud", "test", cloud.image("lies", qcow2()))
    check("refused: a raw image that begins as a qcow2 image does", "qcow2" in said, said)
    private = cloud.ask("POST", f"{cloud.glance}/v2/images", {"name": "other", "disk_format": "raw", "container_format": "bare"})
    said = refusal(daemon, "r-other", "--cloud", "test", private["id"])
    check("refused: another project's image", "this project may see (404)" in said, said)
    said = refusal(daemon, "r-cloud", "--cloud", "nowhere", "debian-12")
    check("refused: a cloud that the configuration lacks", "no cloud nowhere" in said, said)

    fresh = iter(range(1_000_000, SIZE, 1_000_000))

    def waits_and_goes_on(what, words, undo):
        # Bytes that no earlier read has brought.
        at = next(fresh)
        daemon.cli("base", "evict", "debian")
        reader = Reader(path, at, 5000)
        waits, detail = waits_for(daemon, "debian", words)
        check(f"{what}: a read waits and says why", waits, detail)
        undo()
        reader.join(90)
        check(f"{what}: the read goes on with the right bytes", reader.bytes == data[at : at + 5000])

    cloud.act(image, "deactivate")
    waits_and_goes_on("deactivated", "Glance says that the image is deactivated", lambda: cloud.act(image, "reactivate"))
    cloud.stop("glance")
    waits_and_goes_on("Glance down", "", lambda: cloud.start("glance"))
    time_of_token = LIFE + 5
    say(f"  waiting {time_of_token} s, until tokens have ended")
    threading.Event().wait(time_of_token)
    at = next(fresh)
    daemon.cli("base", "evict", "debian")
    check("a token that ended is renewed", read(path, at, 5000) == data[at : at + 5000])
    cloud.stop("keystone")
    threading.Event().wait(time_of_token)
    waits_and_goes_on("keystone down", "a token of cloud test", lambda: cloud.start("keystone"))

    daemon.cli("base", "hydrate", "debian", seconds=300)
    shown = daemon.cli("base", "show", "debian")
    check("hydrated and compared with the record's digest", shown["complete"] and shown["digest_verified"])
    cloud.ask("DELETE", f"{cloud.glance}/v2/images/{image}")
    check("deleted in Glance: the copy is read", all(read(path, at, n) == data[at : at + n] for at, n in places))

    whole = cloud.image("whole", data)
    daemon.cli("base", "add", "whole", "--cloud", "test", "--download", "whole")
    reader = Reader(daemon.base("whole"), SIZE - 70_000, 70_000)
    reader.join(120)
    check("download: a read of the end waits for it", reader.bytes == data[SIZE - 70_000 :])
    daemon.cli("base", "hydrate", "whole", seconds=300)
    shown = daemon.cli("base", "show", "whole")
    check("download: all of it is here and compared", shown["complete"] and shown["digest_verified"])
    check("download: two requests, the probe's and the one for all", len(cloud.data_requests(whole)) == 2)

    workers = [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes_of(daemon)]
    check("no command line has the password", not any(PASSWORD in text for text in workers))


def qcow2():
    """The header of a qcow2 image, version 3, and nothing behind it."""
    return b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(65528)


def processes_of(daemon):
    found = [daemon.process.pid]
    for pid in found:
        found += [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found
