"""With a real Glance, which the script installs beside Nova. There is no keystone: a token is the name of a project."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import world

import nova.conf
from nova import context as nova_context
from nova import exception

pytest.importorskip("glance", reason="Glance is not installed beside this Nova")

CONF = nova.conf.CONF
MIB = 1 << 20
GIB = 1 << 30

PASTE = """
[composite:glance-api]
paste.composite_factory = glance.api:root_app_factory
/: api
[pipeline:api]
pipeline = versionnegotiation context rootapp
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
[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
"""

# What keystone's middleware does with a token that is valid. The project `service` may see everything.
SERVE = """
import sys, waitress
from glance.wsgi.api import application

def authenticated(environ, start_response):
    project = environ.get("HTTP_X_AUTH_TOKEN", "")
    if project:
        environ["HTTP_X_IDENTITY_STATUS"] = "Confirmed"
        environ["HTTP_X_PROJECT_ID"] = project
        environ["HTTP_X_USER_ID"] = "user"
        environ["HTTP_X_ROLES"] = "admin,member,reader" if project == "service" else "member,reader"
    return application(environ, start_response)

waitress.serve(authenticated, host="127.0.0.1", port=int(sys.argv[1]))
"""


class Glance:
    def __init__(self, where):
        for name in ("images", "staging", "tasks", "cache", "lock"):
            (where / name).mkdir(parents=True)
        (where / "glance-api-paste.ini").write_text(PASTE)
        (where / "glance-api.conf").write_text(f"""
[DEFAULT]
enabled_backends = fast:file
log_file = {where}/api.log
[database]
connection = sqlite:///{where}/glance.sqlite
sqlite_synchronous = False
[glance_store]
default_backend = fast
[fast]
filesystem_store_datadir = {where}/images
[os_glance_staging_store]
filesystem_store_datadir = {where}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {where}/tasks
[paste_deploy]
config_file = {where}/glance-api-paste.ini
[oslo_concurrency]
lock_path = {where}/lock
""")
        programs = Path(sys.executable).parent
        with (where / "sync.log").open("w") as log:
            words = [programs / "glance-manage", "--config-file", where / "glance-api.conf", "db_sync"]
            subprocess.run(words, check=True, stdout=log, stderr=log)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        with (where / "serve.log").open("w") as log:
            environment = os.environ | {"OS_GLANCE_CONFIG_DIR": str(where)}
            self.process = subprocess.Popen([sys.executable, "-c", SERVE, str(self.port)], env=environment, stdout=log, stderr=log)
        world.wait_for(self.answers, f"Glance does not start: see {where}/serve.log", 60)

    def answers(self):
        try:
            self.call("GET", "/v2/images")
            return True
        except OSError:
            return False

    def call(self, method, path, data=None, kind="application/json"):
        headers = {"X-Auth-Token": "service", "Content-Type": kind}
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def image(self, file, project="project", **fields):
        """:returns: the ID of a new private image"""
        record = {"name": "image", "disk_format": "raw", "container_format": "bare", "visibility": "private", "owner": project, **fields}
        image_id = json.loads(self.call("POST", "/v2/images", json.dumps(record).encode()))["id"]
        self.call("PUT", f"/v2/images/{image_id}/file", file.read_bytes(), "application/octet-stream")
        return image_id

    def show(self, image_id):
        return json.loads(self.call("GET", f"/v2/images/{image_id}"))


@pytest.fixture(scope="module")
def glance(place):
    found = Glance(place / "glance")
    yield found
    found.process.terminate()
    found.process.wait(30)


@pytest.fixture
def host(hosts, glance):
    """A host whose plyfs has credentials of a service for Glance, and whose Nova asks Glance in the name of users."""
    host = hosts[0]
    headers = host.where / "headers"
    headers.write_text("X-Auth-Token: service\n")
    plain = host.plyfs.config.read_text()
    host.plyfs.stop()
    host.plyfs.config.write_text(
        f'{plain}[http]\nallow = ["127.0.0.1"]\n[[http.credentials]]\nurl = "{glance.url}/"\nheader_file = "{headers}"\n'
    )
    host.plyfs.start()
    CONF.set_override("image_source", f"glance+http://127.0.0.1:{glance.port}/{{image_id}}", group="plyfs")
    CONF.set_override("endpoint_override", glance.url, group="glance")
    CONF.set_override("num_retries", 0, group="glance")
    user = host.context
    host.context = nova_context.RequestContext("user", "project", roles=["member", "reader"], auth_token="project")
    yield host
    host.context = user
    host.clean()
    host.plyfs.stop()
    host.plyfs.config.write_text(plain)
    host.plyfs.start()


@pytest.fixture
def file(tmp_path):
    return world.make_image(tmp_path / "image.raw", 8 * MIB)


def test_a_boot_downloads_nothing(host, glance, file):
    instance = host.boot(glance.image(file))
    base = host.plyfs.bases()[f"g-{instance.image_ref}"]
    assert base["sha512"] == glance.show(instance.image_ref)["os_hash_value"]
    assert base["cached_bytes"] < MIB
    assert host.read(instance, 5 * MIB, 16) == b"block at 5242880"
    assert not (host.instances / "_base").exists() or not os.listdir(host.instances / "_base")


def test_a_snapshot_becomes_an_image(host, glance, file):
    instance = host.boot(glance.image(file))
    host.write(instance, 20 * MIB, b"written by the guest")
    record = {"name": "snapshot", "owner": "project"}
    image_id = json.loads(glance.call("POST", "/v2/images", json.dumps(record).encode()))["id"]
    CONF.set_override("snapshot_image_format", "qcow2", group="libvirt")
    host.driver.snapshot(host.context, instance, image_id, lambda **kwargs: None)
    assert glance.show(image_id)["status"] == "active"
    # And the next instance boots from it.
    other = host.boot(image_id)
    assert host.plyfs.bases()[f"g-{image_id}"]["format"] == "qcow2"
    assert host.read(other, 20 * MIB, 20) == b"written by the guest"


def test_an_image_of_another_format_is_downloaded_by_nova(host, glance, file, caplog):
    image_id = glance.image(file, disk_format="ami", container_format="ami")
    instance = host.boot(image_id)
    assert not host.path(instance).is_symlink()
    assert "plyfs cannot use image" in caplog.text
    host.destroy(instance)


def test_raw_that_is_qcow2_is_refused_by_both(host, glance, tmp_path):
    image_id = glance.image(world.make_image(tmp_path / "image.qcow2", 8 * MIB, format="qcow2"))
    instance = host.create(image_id)
    with pytest.raises(exception.ImageUnacceptable):
        host.spawn(instance)
    host.destroy(instance)
    assert host.plyfs.disks() == {} and host.plyfs.bases() == {}


def test_an_image_that_the_project_may_not_see(host, glance, file):
    """plyfs may see it. The API of Nova has asked Glance in the name of the user before a host hears of the instance; the
    download of an image that plyfs cannot use is in the name of the user too."""
    hidden = glance.image(file, project="other", disk_format="ami", container_format="ami")
    instance = host.create(hidden)
    with pytest.raises(exception.ImageNotFound):
        host.spawn(instance)
    host.destroy(instance)
    assert host.plyfs.disks() == {}


def test_an_image_that_is_gone(host, glance, file):
    image_id = glance.image(file)
    glance.call("DELETE", f"/v2/images/{image_id}")
    instance = host.create(image_id)
    with pytest.raises(exception.ImageNotFound):
        host.spawn(instance)
    host.destroy(instance)
    assert host.plyfs.disks() == {}


def test_precache(host, glance, file):
    image_id = glance.image(file)
    assert host.driver.cache_image(host.context, image_id) is True
    instance = host.create(image_id)
    # With all of it here, a boot needs no Glance.
    glance.call("POST", f"/v2/images/{image_id}/actions/deactivate")
    host.spawn(instance)
    assert host.read(instance, 5 * MIB, 16) == b"block at 5242880"
