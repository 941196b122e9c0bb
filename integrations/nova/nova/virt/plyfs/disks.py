"""Disks of instances. A link in the instance's directory leads to the file of the disk in the mount, and owns the disk.

What no link of this compute names is never removed: it may belong to another compute that uses the same store. So that no
disk is left without a link, the link is there first: as `NAME.creating` while the disk is made, and in the directory until
the disk is removed. A compute that dies in between leaves the link, and the next attempt, or the deletion of the instance,
finds the disk.
"""

import errno
import os
import time

from oslo_log import log as logging

from nova import exception
from nova.virt.plyfs import client, privsep

LOG = logging.getLogger(__name__)

CREATING = ".creating"
REMOVING = ".removing"

# Seconds that a removed disk may stay open: QEMU closes it while it ends.
CLOSING = 10


def name_of(path):
    """:returns: the name of the disk that a link leads to, whether it is there or not; None for anything else"""
    try:
        directory, leaf = os.path.split(os.readlink(path))
    except OSError:
        return None
    if os.path.basename(directory) != "disks" or not leaf.endswith(".raw"):
        return None
    return leaf.removesuffix(".raw")


def links(directory):
    """:returns: paths of the links to disks in a directory, in order; none when there is no directory"""
    try:
        leaves = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    paths = [os.path.join(directory, leaf) for leaf in leaves]
    return [path for path in paths if name_of(path) is not None]


def _link(target, path):
    """Makes a link, or replaces one, in one step."""
    new = f"{path}.new"
    if os.path.lexists(new):
        os.unlink(new)
    os.symlink(target, new)
    os.rename(new, path)


def reachable(path):
    """Whether the disk of a link can be opened. Waits while the daemon restarts; a link into a former mount is made anew.

    :returns: False when the store has no such disk
    :raises: PlyfsUnavailable when the disk is there, and its file is not
    """
    if os.path.exists(path):
        return True
    name = name_of(path)
    retry = client.Retry()
    while True:
        found = client.disk(name)
        if found is None:
            return False
        if os.readlink(path) != found["path"]:
            LOG.warning("The mount of plyfs has moved: %s leads to %s now.", path, found["path"])
            _link(found["path"], path)
        if os.path.exists(path):
            return True
        retry.wait(f"disk {name} is in the store, but {found['path']} cannot be reached")


def require(path):
    """:raises: DiskNotFound for a link to a disk that was removed behind Nova"""
    if not reachable(path):
        name = name_of(path)
        LOG.error(
            "%s leads to the disk %s of plyfs, which does not exist: something other than Nova removed it. "
            "`plyfs trash ls` shows whether it can be restored; else rebuild or delete the instance.",
            path,
            name,
        )
        raise exception.DiskNotFound(location=f"{path} (disk {name} of plyfs)")


def _names(path):
    """Names for the disk of a path: UUID_disk, then UUID_disk.2 and so on."""
    directory, leaf = os.path.split(path)
    first = f"{os.path.basename(directory).removesuffix('_resize')}_{leaf}"
    yield first
    for number in range(2, 100):
        yield f"{first}.{number}"


def make(path, maker, fits=lambda found: False):
    """Makes a disk and the link to it.

    :param maker: makes the disk of a name
    :param fits: whether a disk that an attempt before this one made and did not link can be used
    :raises: PlyfsError
    """
    creating = path + CREATING
    mount = client.status()["mount"]
    begun = name_of(creating)
    if begun is not None:
        found = client.disk(begun)
        if found is not None and not fits(found):
            LOG.info("Removing the disk %s, the creation of which did not end.", begun)
            remove(begun)
    for name in _names(path):
        if begun not in (None, name):
            continue
        if begun is None and client.disk(name) is not None:
            LOG.warning("The store already has a disk %s, which no link in %s names. It is left alone.", name, os.path.dirname(path))
            continue
        _link(os.path.join(mount, "disks", f"{name}.raw"), creating)
        try:
            maker(name)
        except client.PlyfsError as error:
            # The link stays: of a request without an answer, it is not known whether there is a disk.
            if error.kind != "exists":
                raise
            if begun is None:
                continue
            LOG.info("The disk %s is there already, with the same base and size.", name)
        _give(creating)
        os.rename(creating, path)
        return name
    if os.path.lexists(creating):
        os.unlink(creating)
    raise client.PlyfsError(f"no name is free for the disk of {path}: see plyfs disk ls")


def create(path, base, size):
    """Creates a disk on a base, or a blank one, and the link to it. Size in bytes.

    :raises: PlyfsError, of kind `not_found` when there is no such base
    """

    def fits(found):
        return (found["base"], found["size"], found["delta_bytes"], found["snapshots"]) == (base, size, 0, 0)

    return make(path, lambda name: client.create_disk(name, base=base, size=size), fits)


def clone(origin, path):
    """Makes a disk with the contents of another one, and the link to it, without a copy."""
    return make(path, lambda name: client.create_disk(name, **{"from": origin}))


def _give(path):
    """Gives a disk to Nova's user. Waits while the mount is on its way back."""
    retry = client.Retry()
    while True:
        failure = privsep.give(path, os.getuid(), os.getgid())
        if failure is None:
            return
        if failure not in (errno.ENOENT, errno.ENOTCONN, errno.ECONNABORTED):
            raise client.PlyfsError(f"cannot give {path} to user {os.getuid()}: {os.strerror(failure)}")
        retry.wait(f"{path} cannot be reached: {os.strerror(failure)}")


def remove(name):
    """Removes a disk that Nova does not need any more, also when its last client is slow to close it."""
    end = time.monotonic() + CLOSING
    while True:
        try:
            client.remove_disk(name)
            return
        except client.PlyfsError as error:
            if error.kind not in ("in_use", "may_be_in_use"):
                raise
            if time.monotonic() > end:
                LOG.warning("Removing the disk %s although it is still open: %s", name, error)
                client.remove_disk(name, force=True)
                return
        time.sleep(0.2)


def remove_all(directory):
    """Removes the disks of an instance's directory, each before its link.

    :raises: PlyfsError; the links of the disks that are left stay
    """
    for path in links(directory):
        remove(name_of(path))
        # The kernel looks the name up again, and forgets the file. Before that, plyfs keeps the data of a disk that was open.
        os.path.exists(path)
        os.unlink(path)
