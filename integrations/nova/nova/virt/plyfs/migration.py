"""Cold migration: what a disk has written travels as a file, by the way that Nova's own copies of disks take.

Nova copies the files of an instance's directory to the other host, and finishes the migration there. A link to a disk is
not copied: in its place go `NAME.plyfs`, which says what the disk is, and `NAME.plyfs-data`, an increment: what the disk
has written since its base. The driver of the other host makes the disk of them. When the image is not in Glance any more,
the other host may not be able to read the base, and the data is a whole image.

The disk of the source stays, as the directory `UUID_resize` does, until the migration is confirmed or reverted.
"""

import contextlib
import json
import os
import threading

from oslo_concurrency import processutils
from oslo_log import log as logging

from nova import exception
from nova.virt.libvirt import utils as libvirt_utils
from nova.virt.plyfs import bases, client, conf, disks, privsep

CONF = conf.CONF
LOG = logging.getLogger(__name__)

FORMAT = 1
HEAD = ".plyfs"
DATA = ".plyfs-data"
SNAPSHOT = "nova-snapshot-migration"

_nova_copy_image = libvirt_utils.copy_image
_sender = threading.local()


@contextlib.contextmanager
def sending(has_image):
    """While it lasts, copies of disks by this thread ask `has_image` whether Glance still has the image of an ID."""
    _sender.has_image = has_image
    try:
        yield
    finally:
        del _sender.has_image


def copy_image(src, dest, host=None, receive=False, **kwargs):
    """In place of Nova's function of this name: a link to a disk is not copied as a link."""
    disk = disks.name_of(src)
    if disk is None or receive:
        return _nova_copy_image(src, dest, host=host, receive=receive, **kwargs)
    disks.require(src)
    if host is None:
        # A resize on this host.
        disks.clone(disk, dest)
    else:
        _send(disk, src, dest, host, kwargs)
    return None


libvirt_utils.copy_image = copy_image


def _plyfs(*words):
    try:
        privsep.command(CONF.plyfs.command, "--store", client.store(), *words)
    except processutils.ProcessExecutionError as error:
        raise client.PlyfsError(f"`plyfs {' '.join(words)}` failed: {error.stderr.strip()}") from error
    except OSError as error:
        raise client.PlyfsError(f"cannot run {CONF.plyfs.command} ([plyfs] command): {error}") from error


def _send(disk, src, dest, host, kwargs):
    found = client.disk(disk)
    image = bases.image_of(found["base"])
    whole = found["base"] is not None and not (image and getattr(_sender, "has_image", lambda _image: False)(image))
    head = {"format": FORMAT, "base": None if whole else found["base"], "size": found["size"], "data": "qcow2" if whole else "increment"}
    if whole:
        LOG.warning("Glance does not have the image of base %s: all of disk %s is copied to %s.", found["base"], disk, host)
    client.remove_snapshot(disk, SNAPSHOT)
    client.take_snapshot(disk, SNAPSHOT)
    try:
        _plyfs("disk", "export", f"{disk}@{SNAPSHOT}", src + DATA, "--format", head["data"], "--force")
        privsep.take(src + DATA, os.getuid())
        with open(src + HEAD, "w") as file:
            json.dump(head, file)
        LOG.info("Copying %d bytes of disk %s to %s.", os.stat(src + DATA).st_size, disk, host)
        # Data of qcow2 is not compressed, and what an increment has may compress well.
        _nova_copy_image(src + DATA, dest + DATA, host=host, **kwargs)
        _nova_copy_image(src + HEAD, dest + HEAD, host=host, **kwargs)
    finally:
        client.remove_snapshot(disk, SNAPSHOT)
        for path in (src + DATA, src + HEAD):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def receive(directory):
    """Makes the disks that another host has sent into the directory of an instance."""
    for leaf in sorted(os.listdir(directory)):
        path = os.path.join(directory, leaf.removesuffix(HEAD))
        if not leaf.endswith(HEAD):
            continue
        if disks.name_of(path) is None:
            _receive(path)
        for part in (path + DATA, path + HEAD):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)


def _receive(path):
    with open(path + HEAD) as file:
        head = json.load(file)
    if head["format"] != FORMAT:
        raise exception.InvalidDiskInfo(
            reason=f"{path + HEAD} has format {head['format']}, and this driver knows {FORMAT}: install the same nova-plyfs on both hosts"
        )
    base = head["base"]
    words = ["--increment"] if head["data"] == "increment" else ["--format", head["data"]]
    if base is not None:
        image = bases.image_of(base)
        if image is None or bases.ensure(image) is None:
            raise client.PlyfsError(f"the disk of {path} needs the base {base}, which plyfs does not have here; revert the migration")
        words += ["--base", base]
    name = disks.make(path, lambda name: _import(name, path + DATA, words))
    # An increment ends at a snapshot, which the copy has as well.
    client.remove_snapshot(name, SNAPSHOT)
    LOG.info("The disk of %s is here, on base %s.", path, base)


def _import(name, data, words):
    if client.disk(name) is not None:
        raise client.PlyfsError(f"a disk {name} exists", "exists")
    _plyfs("disk", "import", name, data, *words)
