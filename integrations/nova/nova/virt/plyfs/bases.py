"""Bases of images: `g-ID` is the image of Glance with that ID. `plyfs glance sync` uses the same names."""

import os
import time

from oslo_log import log as logging

from nova.virt.plyfs import client, conf

CONF = conf.CONF
LOG = logging.getLogger(__name__)

PREFIX = "g-"

# Why plyfs cannot use an image: another way has to be taken. All else is a failure.
REFUSALS = ("invalid", "unsupported", "not_found", "changed")

# States of a base that no wait ends.
BROKEN = ("refused", "failed", "given_up", "changed")


def name_of(image_id):
    return PREFIX + image_id


def image_of(name):
    """:returns: the ID of the image of a base; None for a base that is not of Nova"""
    return name.removeprefix(PREFIX) if name and name.startswith(PREFIX) else None


def ensure(image_id):
    """Registers the base of an image unless it is there. No data is copied.

    :returns: the base; None when plyfs cannot use the image
    """
    name = name_of(image_id)
    found = client.base(name)
    if found is None:
        if CONF.plyfs.image_source is None:
            LOG.info("plyfs has no base %s, and [plyfs] image_source is not set: Nova downloads the image.", name)
            return None
        try:
            found = client.add_base(name, CONF.plyfs.image_source.replace("{image_id}", image_id))
        except client.PlyfsError as error:
            if error.kind == "exists":
                found = client.base(name)
            elif error.kind in REFUSALS:
                LOG.warning("plyfs cannot use image %s: %s. Nova downloads the image.", image_id, error)
            else:
                raise
    if found is not None and found["state"] in BROKEN:
        LOG.warning("plyfs cannot use its base %s (%s): %s. Nova downloads the image.", name, found["state"], found["error"])
        return None
    return found


def hydrate(name):
    """Copies a base into the store, and waits for the end.

    :raises: PlyfsError when the job fails or is cancelled
    """
    work = client.hydrate_base(name)["work"]
    if work is not None:
        wait(work["job"])
    found = client.base(name)
    if found is None or not found["complete"]:
        raise client.PlyfsError(f"base {name} is not complete: see plyfs base show {name}")


def wait(identifier):
    """Waits for a job, which continues after a restart of the daemon. A job that is not known any more may have ended without
    success: look at its object.

    :raises: PlyfsError when it failed or was cancelled
    """
    while True:
        found = client.job(identifier)
        if found is None or found["state"] == "done":
            return
        if found["state"] in ("failed", "cancelled"):
            raise client.PlyfsError(f"job {identifier} has {found['state']}: {found['error']}")
        time.sleep(0.2)


def collect(seconds, cache_dir):
    """Removes bases of images that nothing has needed for so many seconds, as Nova does with its `_base` files.

    Bases that are not of Nova stay, and those to which a link in Nova's image cache leads.
    """
    linked = set()
    if os.path.isdir(cache_dir):
        linked = {os.path.basename(os.path.realpath(entry.path)) for entry in os.scandir(cache_dir) if entry.is_symlink()}
    for name in client.unused_bases(seconds):
        if image_of(name) is None or f"{name}.raw" in linked:
            continue
        try:
            client.remove_base(name)
            LOG.info("Removed the base %s, which nothing has needed for %d seconds.", name, seconds)
        except client.PlyfsError as error:
            LOG.info("The base %s stays: %s", name, error)
