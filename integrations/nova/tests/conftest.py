"""Fixtures: one libvirtd for all tests, and for each test a plyfs, a database, and a compute host."""

# isort: off
from nova import monkey_patch

# As nova-compute does, before all other imports. Older releases do it at the import.
if hasattr(monkey_patch, "patch"):
    monkey_patch.patch(backend="threading")
# isort: on

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
import world

import nova.conf
import nova.config
from nova import context as nova_context
from nova import objects
from nova.db import migration as db_migration
from nova.virt import driver as virt_driver
from nova.virt.plyfs import conf  # noqa: F401 (registers [plyfs])

CONF = nova.conf.CONF
MIB = 1 << 20
GIB = 1 << 30


def pytest_sessionfinish(session, exitstatus):
    session.config.exitstatus = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Nova's threads that wait for events of libvirt never end, and Python would wait for them."""
    if hasattr(config, "exitstatus"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.exitstatus)


@pytest.fixture(scope="session")
def place():
    """A directory that QEMU's user may enter. pytest's own are for their owner."""
    world.need_tools()
    where = Path(tempfile.mkdtemp(prefix="nova-plyfs.", dir=os.environ.get("TMPDIR", "/var/tmp")))
    where.chmod(0o755)
    yield where
    shutil.rmtree(where)


@pytest.fixture(scope="session")
def libvirtd(place):
    hidden = os.environ.get("HOST_MOUNTS") not in (None, os.readlink("/proc/self/ns/mnt"))
    assert hidden, "run integrations/nova/test: it makes a mount namespace, so that the libvirt of this machine is left alone"
    found = world.Libvirtd(place)
    yield found
    found.stop()


@pytest.fixture(scope="session")
def empty_database(place):
    """A database with Nova's tables."""
    import nova.privsep
    from nova.db.main import api as db_api

    nova.privsep.sys_admin_pctxt.set_client_mode(False)
    nova.config.parse_args(["nova-compute"], default_config_files=[], configure_db=False, init_rpc=False)
    nova.conf.neutron.register_dynamic_opts(CONF)
    objects.register_all()
    path = place / "nova.sqlite"
    CONF.set_override("connection", f"sqlite:///{path}", group="database")
    CONF.set_override("connection", f"sqlite:///{place}/api.sqlite", group="api_database")
    CONF.set_override("sqlite_synchronous", False, group="database")
    db_api.configure(CONF)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    db_migration.db_sync(database="main")
    return path


class VirtAPI:
    """What the compute manager does for a driver. No network, so no event to wait for."""

    @contextlib.contextmanager
    def wait_for_instance_event(self, *args, **kwargs):
        yield


class Host:
    """A compute host: a plyfs, a directory of instances, and Nova's driver, which reads Nova's configuration at each call."""

    def __init__(self, where, libvirtd, driver, name):
        self.where, self.libvirtd, self.driver, self.name = where, libvirtd, driver, name
        where.mkdir()
        where.chmod(0o755)
        self.images = where.parent / "images"
        self.images.mkdir(exist_ok=True)
        self.instances = where / "instances"
        self.instances.mkdir()
        self.plyfs = world.Plyfs(where)
        self.context = nova_context.RequestContext("user", "project", is_admin=True, auth_token="token")
        self.use()

    def use(self):
        """Nova's configuration is that of this host from now on."""
        for group, option, value in (
            (None, "host", self.name),
            (None, "my_ip", "127.0.0.1"),
            (None, "instances_path", str(self.instances)),
            (None, "force_config_drive", False),
            (None, "flat_injected", False),
            (None, "default_ephemeral_format", "ext4"),
            ("libvirt", "virt_type", "qemu"),
            ("libvirt", "cpu_mode", "none"),
            ("libvirt", "connection_uri", self.libvirtd.uri),
            ("libvirt", "images_type", "default"),
            ("libvirt", "snapshots_directory", str(self.instances / "snapshots")),
            ("libvirt", "snapshot_image_format", None),
            ("vnc", "enabled", False),
            ("oslo_concurrency", "lock_path", str(self.where / "locks")),
            ("plyfs", "socket", str(self.plyfs.socket)),
            ("plyfs", "command", world.PLYFS),
            ("plyfs", "image_source", f"{self.images}/{{image_id}}.raw"),
            ("plyfs", "retry_seconds", 20),
        ):
            CONF.set_override(option, value, group=group)

    def image(self, size=8 * MIB, **kwargs):
        """:returns: the ID of a new image that plyfs can read"""
        image_id = str(uuid.uuid4())
        world.make_image(self.images / f"{image_id}.raw", size, **kwargs)
        return image_id

    def path(self, instance, leaf="disk"):
        return self.instances / instance.uuid / leaf

    def create(self, image_id, root_gb=1, swap=0, ephemeral_gb=0):
        """A row in the database, as the API makes it."""
        flavor = objects.Flavor(
            id=1, name="small", flavorid="small", memory_mb=64, vcpus=1, root_gb=root_gb, ephemeral_gb=ephemeral_gb, swap=swap, rxtx_factor=1.0,
            vcpu_weight=0, disabled=False, is_public=True, extra_specs={}, description=None,
        )  # fmt: skip
        instance = objects.Instance(
            self.context, uuid=str(uuid.uuid4()), host=self.name, image_ref=image_id, flavor=flavor, old_flavor=None,
            new_flavor=None, project_id="project", user_id="user", kernel_id="", ramdisk_id="", root_device_name="/dev/vda",
            display_name="vm", memory_mb=64, vcpus=1, root_gb=root_gb, ephemeral_gb=ephemeral_gb,
            system_metadata={"image_base_image_ref": image_id, "image_disk_format": "raw", "image_container_format": "bare"},
            metadata={}, config_drive="", key_data=None, vm_state="building", launch_index=0, numa_topology=None, pci_requests=None,
        )  # fmt: skip
        instance.create()
        # As the claim of the compute manager does.
        instance.node = self.name
        if "compute_id" in instance.fields:
            instance.compute_id = 1
        return instance

    def bdi(self, instance):
        """Block devices of an instance without volumes."""
        swap = {"device_name": "/dev/vdc", "swap_size": instance.flavor.swap} if instance.flavor.swap else None
        return {"root_device_name": "/dev/vda", "swap": swap, "ephemerals": [], "image": [], "block_device_mapping": []}

    def spawn(self, instance, **kwargs):
        meta = objects.ImageMeta.from_dict({"id": instance.image_ref, "disk_format": "raw", "min_disk": 0, "properties": {}})
        self.driver.spawn(self.context, instance, meta, [], None, {}, network_info=self.network(), block_device_info=self.bdi(instance), **kwargs)
        instance.vm_state, instance.task_state = "active", None
        instance.save()
        return instance

    @staticmethod
    def network():
        from nova.network import model

        return model.NetworkInfo([])

    def boot(self, image_id=None, **kwargs):
        return self.spawn(self.create(image_id or self.image(), **kwargs))

    def write(self, instance, at, data):
        """As the guest would, while it is off."""
        with open(self.path(instance), "r+b") as disk:
            disk.seek(at)
            disk.write(data)
            os.fsync(disk.fileno())

    def read(self, instance, at, length):
        with open(self.path(instance), "rb") as disk:
            disk.seek(at)
            return disk.read(length)

    def destroy(self, instance):
        self.driver.destroy(self.context, instance, self.network(), self.bdi(instance))

    def clean(self):
        self.libvirtd.destroy_all()
        self.plyfs.clean()
        for entry in self.instances.iterdir():
            shutil.rmtree(entry)


@pytest.fixture(scope="session")
def driver(libvirtd, empty_database):
    """The driver as Nova loads it. It is told of its host by the first test."""
    CONF.set_override("connection_uri", libvirtd.uri, group="libvirt")
    CONF.set_override("virt_type", "qemu", group="libvirt")
    CONF.set_override("compute_driver", "plyfs.PlyfsDriver")
    return virt_driver.load_compute_driver(VirtAPI())


@pytest.fixture(scope="session")
def _hosts(place, libvirtd, driver):
    made = [Host(place / name, libvirtd, driver, name) for name in ("compute-2", "compute-1")]
    driver.init_host("compute-1")
    yield made[::-1]
    for host in made:
        host.plyfs.stop()


@pytest.fixture
def hosts(_hosts):
    """Two compute hosts. What the driver does, it does on the host that a test has named last with use()."""
    for host in reversed(_hosts):
        host.use()
    yield _hosts
    for host in _hosts:
        host.clean()


@pytest.fixture
def host(hosts):
    return hosts[0]
