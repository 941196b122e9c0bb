"""Cinder's own fixture for drivers, with a real plyfs and a real Glance."""

import contextlib
import os
import pathlib
import random
import uuid

import cinder.privsep
import os_brick.privileged
import pytest
import servers
from cinder import context
from cinder.image import glance as cinder_glance
from cinder.tests.unit import fake_constants as fake
from cinder.tests.unit import test
from cinder.tests.unit import utils as tests_utils
from cinder.volume import configuration
from cinder.volume import driver as cinder_driver
from cinder_plyfs import driver, options
from oslo_config import cfg

HOST = "thishost@plyfs"
GIB = 1 << 30
MIB = servers.MIB


def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


class DriverCase(test.TestCase):
    @pytest.fixture(autouse=True)
    def _servers(self, plyfs, glance, work):
        self.plyfs = plyfs
        self.glance = glance
        self.work = work

    def setUp(self):
        super().setUp()
        # The tests run as root: what Cinder leaves to its helpers runs here.
        for helper in (cinder.privsep.sys_admin_pctxt, os_brick.privileged.default):
            helper.set_client_mode(False)
            self.addCleanup(helper.set_client_mode, True)
        self.project = uuid.uuid4().hex
        self.context = context.RequestContext(fake.USER_ID, self.project, is_admin=False)
        self.override_config("glance_api_servers", [self.glance.url])
        self.override_config("volume_driver", "cinder_plyfs.driver.PlyfsDriver", group=configuration.SHARED_CONF_GROUP)
        self.image_service = cinder_glance.GlanceImageService()
        self.socket = self.plyfs.socket
        self.driver = self.make_driver()
        before = self.plyfs.disks()
        self.addCleanup(self.remove_disks, before)

    def _common_cleanup(self):
        # It deletes all attributes, and pytest removes the one of the test again afterwards.
        kept = self.__dict__.get(self._testMethodName)
        super()._common_cleanup()
        if kept is not None:
            setattr(self, self._testMethodName, kept)

    def remove_disks(self, before):
        for disk in self.plyfs.disks() - before:
            self.plyfs.run("disk", "rm", "--now", "--snapshots", disk)

    def make_driver(self, **values):
        conf = configuration.Configuration(options.OPTIONS + cinder_driver.volume_opts, config_group="plyfs")
        values = {"plyfs_socket": self.socket, "plyfs_patience": 20, "plyfs_base_prefix": f"i{uuid.uuid4().hex[:6]}-"} | values
        for name, value in values.items():
            cfg.CONF.set_override(name, value, group="plyfs")
            self.addCleanup(cfg.CONF.clear_override, name, group="plyfs")
        made = driver.PlyfsDriver(configuration=conf, host=HOST)
        made.do_setup(self.context)
        made.check_for_setup_error()
        return made

    # Objects of Cinder

    def volume(self, size=1, **more):
        return tests_utils.create_volume(self.context, host=f"{HOST}#plyfs", size=size, **({"volume_type_id": self.vt["id"]} | more))

    def created(self, size=1, **more):
        volume = self.volume(size, **more)
        self.driver.create_volume(volume)
        return volume

    def snapshot(self, volume):
        snapshot = tests_utils.create_snapshot(self.context, volume.id)
        self.driver.create_snapshot(snapshot)
        return snapshot

    # Bytes

    def path(self, volume):
        return self.plyfs.mount / "disks" / f"{volume.name}.raw"

    def write(self, volume, data, offset=0):
        with open(self.path(volume), "r+b") as file:
            file.seek(offset)
            file.write(data)
            os.fsync(file.fileno())

    def read(self, volume, length, offset=0):
        with open(self.path(volume), "rb") as file:
            file.seek(offset)
            return file.read(length)

    # Images

    def image_file(self, data, name=None):
        path = pathlib.Path(self.work) / (name or f"image-{uuid.uuid4().hex[:8]}")
        path.write_bytes(data)
        self.addCleanup(path.unlink)
        return path

    def image(self, data, disk_format="raw", **properties):
        self.glance.wait()
        return self.glance.image(self.image_file(data), disk_format, **properties)

    def clone(self, volume, image, driver=None, request=None):
        """As the manager does: the image as the requester sees it."""
        request = request or self.context
        meta = self.image_service.show(request, image["id"])
        location = self.image_service.get_location(request, image["id"])
        return (driver or self.driver).clone_image(request, volume, location, meta, self.image_service)

    def notifications(self):
        names = [note["event_type"] for note in self.notifier.notifications if note["event_type"].startswith("image_volume_cache")]
        return [name.partition(".")[2] for name in names]


@contextlib.contextmanager
def held_open(path):
    with open(path, "r+b") as file:
        yield file
