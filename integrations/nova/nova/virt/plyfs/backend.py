"""The image backend: how Nova makes and finds disks. Root disks are in plyfs; what has no image is a file as ever."""

import contextlib
import os

from oslo_concurrency import processutils
from oslo_log import log as logging

from nova import exception
from nova.virt.disk import api as disk_api
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from nova.virt.plyfs import bases, client, disks

LOG = logging.getLogger(__name__)

SNAPSHOT = "nova-snapshot-"


class Plyfs(imagebackend.Flat):
    """A disk in plyfs, or the file that Flat would make: of an image that plyfs cannot use, and for swap, ephemeral and
    config disks. Disks that Nova made before it used plyfs are files as well."""

    def _get_driver_format(self):
        # A disk of plyfs is raw, whatever its guest writes: nothing probes it.
        return "raw" if disks.name_of(self.path) else super()._get_driver_format()

    def exists(self):
        return super().exists() if disks.name_of(self.path) is None else disks.reachable(self.path)

    @staticmethod
    def is_file_in_instance_path():
        return False

    def create_image(self, prepare_template, base, size, *args, **kwargs):
        image_id = kwargs.get("image_id")
        if disks.name_of(self.path) is not None:
            disks.require(self.path)
            if size and size > os.stat(self.path).st_size:
                self.resize_image(size)
        elif image_id is None or self.exists() or not self._create_on_base(image_id, size):
            super().create_image(prepare_template, base, size, *args, **kwargs)
        self.correct_format()

    def _create_on_base(self, image_id, size):
        """:returns: whether plyfs can use the image"""
        for _attempt in range(3):
            base = bases.ensure(image_id)
            if base is None:
                return False
            self.verify_base_size(base["name"], size or None, base_size=base["size"])
            try:
                disks.create(self.path, base["name"], size or base["size"])
            except client.PlyfsError as error:
                if error.kind != "not_found":
                    raise
                # The base was removed since, as unused.
                continue
            if size and size > base["size"]:
                self._grow_filesystem()
            return True
        raise client.PlyfsError(f"base {bases.name_of(image_id)} is removed again and again")

    def resize_image(self, size):
        name = disks.name_of(self.path)
        if name is None:
            return super().resize_image(size)
        client.resize_disk(name, size)
        self._grow_filesystem()

    def _grow_filesystem(self):
        """As Nova does with its own raw files: of an image that is one ext filesystem, without partitions."""
        with open(self.path, "rb") as file:
            superblock = file.read(2048)[1024:]
        if superblock[56:58] != b"\x53\xef":
            return
        with contextlib.suppress(processutils.ProcessExecutionError):
            disk_api.resize2fs(self.path, check_exit_code=[0])

    def snapshot_extract(self, target, out_format):
        if disks.name_of(self.path) is None:
            return super().snapshot_extract(target, out_format)
        extract(self.path, take_snapshot(self.path, os.path.basename(target)), target, out_format)

    def flatten(self):
        """Nova calls this before it deletes the image of a shelved instance: the disk must not need that image any more."""
        name = disks.name_of(self.path)
        if name is None:
            return super().flatten()
        job = client.flatten_disk(name)["job"]
        if job is not None:
            bases.wait(job)
        base = client.disk(name)["base"]
        if base is not None:
            raise client.PlyfsError(f"disk {name} still needs its base {base}: see plyfs jobs")


class Backend(imagebackend.Backend):
    def __init__(self, use_cow):
        super().__init__(use_cow)
        self.BACKEND["default"] = Plyfs

    def by_libvirt_path(self, instance, path, image_type=None):
        # Nova takes the type from the domain, where a disk of plyfs is a raw file.
        if disks.name_of(path) is not None:
            return Plyfs(instance=instance, path=path)
        return super().by_libvirt_path(instance, path, image_type)


def take_snapshot(path, name):
    """Takes a snapshot of the disk of a link.

    :returns: its file
    """
    disk = disks.name_of(path)
    snapshot = SNAPSHOT + name
    client.take_snapshot(disk, snapshot)
    mount = os.path.dirname(os.path.dirname(client.disk(disk)["path"]))
    return os.path.join(mount, "snapshots", f"{disk}@{snapshot}.raw")


def extract(path, snapshot, target, out_format):
    """Makes the file that Nova uploads. A raw one is no copy, but a link to the file of the snapshot."""
    if not os.path.exists(snapshot):
        raise exception.DiskNotFound(location=snapshot)
    if out_format in ("raw", "iso"):
        os.symlink(snapshot, target)
    else:
        libvirt_utils.extract_snapshot(snapshot, "raw", target, out_format)


def remove_snapshots(path):
    """Removes the snapshots that Nova took of the disk of a link, those of attempts that ended early too."""
    disk = disks.name_of(path)
    for snapshot in client.snapshots(disk) if disk else []:
        if snapshot["name"].startswith(SNAPSHOT):
            client.remove_snapshot(disk, snapshot["name"])
