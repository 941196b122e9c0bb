"""Snapshots to Glance, shelved instances, precache, and the image cache."""

import os
import subprocess

import pytest

import nova.conf
from nova import exception
from nova.virt.plyfs import client

CONF = nova.conf.CONF
MIB = 1 << 20
GIB = 1 << 30


class Glance:
    """Keeps what Nova uploads. tests/test_glance.py has the real one."""

    def __init__(self, place):
        self.place, self.metadata, self.fails = place, None, None

    def get(self, context, image_id):
        return {"id": image_id, "name": "snapshot", "status": "queued", "properties": {}}

    def update(self, context, image_id, metadata, data=None, purge_props=True):
        if self.fails:
            raise self.fails
        self.metadata = metadata
        subprocess.run(["qemu-img", "convert", "-f", metadata["disk_format"], "-O", "raw", data.name, self.place / "raw"], check=True)


@pytest.fixture
def glance(host, monkeypatch, tmp_path):
    found = Glance(tmp_path)
    monkeypatch.setattr(host.driver, "_image_api", found)
    return found


def snapshot(host, instance):
    host.driver.snapshot(host.context, instance, "22222222-2222-2222-2222-222222222222", lambda **kwargs: None)


@pytest.fixture(params=["running", "off"])
def vm(request, host):
    instance = host.boot(host.image(size=8 * MIB))
    if request.param == "off":
        host.driver.power_off(instance)
    host.write(instance, 20 * MIB, b"written by the guest")
    return instance


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_snapshot_has_what_the_disk_had(host, glance, vm, image_format, tmp_path):
    CONF.set_override("snapshot_image_format", image_format, group="libvirt")
    snapshot(host, vm)
    assert glance.metadata["disk_format"] == image_format
    with open(tmp_path / "raw", "rb") as file:
        assert os.stat(file.fileno()).st_size == GIB
        file.seek(20 * MIB)
        assert file.read(20) == b"written by the guest"
        file.seek(5 * MIB)
        assert file.read(16) == b"block at 5242880"
    # The instance is as before, and nothing is left.
    assert host.plyfs.json("disk", "snapshots", f"{vm.uuid}_disk") == []
    assert os.listdir(host.instances / "snapshots") == []


def test_an_upload_that_fails_leaves_no_snapshot(host, glance):
    instance = host.boot()
    glance.fails = exception.ImageNotFound(image_id="x")
    with pytest.raises(exception.ImageNotFound):
        snapshot(host, instance)
    assert host.plyfs.json("disk", "snapshots", f"{instance.uuid}_disk") == []
    assert instance.name in host.libvirtd.running()


def test_a_snapshot_of_a_compute_that_was_killed_goes_at_its_start(host):
    instance = host.boot()
    client.take_snapshot(f"{instance.uuid}_disk", "nova-snapshot-0123")
    client.take_snapshot(f"{instance.uuid}_disk", "monday")
    host.driver._look_around()
    assert [found["name"] for found in host.plyfs.json("disk", "snapshots", f"{instance.uuid}_disk")] == ["monday"]
    # Nova deletes the instance with the snapshots of the operator.
    host.destroy(instance)
    assert host.plyfs.disks() == {}


def test_an_unshelved_instance_does_not_need_the_image_of_its_snapshot(host):
    """Nova deletes that image at the end of the unshelving."""
    instance = host.create(host.image())
    instance.vm_state = "shelved_offloaded"
    host.spawn(instance)
    assert host.plyfs.disks()[f"{instance.uuid}_disk"]["base"] is None
    host.plyfs.run("base", "rm", f"g-{instance.image_ref}")
    assert host.read(instance, MIB, 16) == b"block at 1048576"


def test_precache_fetches_the_whole_image(host):
    image = host.image()
    assert host.driver.cache_image(host.context, image) is True
    assert host.plyfs.bases()[f"g-{image}"]["complete"]
    assert host.driver.cache_image(host.context, image) is False


def test_precache_of_an_image_that_plyfs_refuses_is_novas(host, monkeypatch):
    from nova.virt import images

    monkeypatch.setattr(images, "fetch_to_raw", lambda context, image_id, path: open(path, "w").close())
    assert host.driver.cache_image(host.context, "33333333-3333-3333-3333-333333333333") is True
    assert len(os.listdir(host.instances / "_base")) == 1


@pytest.fixture
def age():
    """Sets for how long an image must have been unused."""
    yield lambda seconds: CONF.set_override("remove_unused_original_minimum_age_seconds", seconds, group="image_cache")
    CONF.clear_override("remove_unused_original_minimum_age_seconds", group="image_cache")
    CONF.clear_override("remove_unused_base_images", group="image_cache")


def test_the_cache_manager_removes_bases_that_nothing_needs(host, age):
    used, unused, linked = host.boot(), host.image(), host.image()
    for image in (unused, linked):
        host.driver.cache_image(host.context, image)
    host.plyfs.run("base", "add", "golden", host.images / f"{unused}.raw")
    # `plyfs glance sync` makes such links for a Nova without this driver. This one has a name that Nova's manager leaves alone.
    os.makedirs(host.instances / "_base", exist_ok=True)
    os.symlink(host.plyfs.bases()[f"g-{linked}"]["path"], host.instances / "_base" / "link")
    everything = {"golden", f"g-{linked}", f"g-{unused}", f"g-{used.image_ref}"}
    host.driver.manage_image_cache(host.context, [])
    assert host.plyfs.bases().keys() == everything, "they are younger than the option says"
    age(0)
    CONF.set_override("remove_unused_base_images", False, group="image_cache")
    host.driver.manage_image_cache(host.context, [])
    assert host.plyfs.bases().keys() == everything
    CONF.set_override("remove_unused_base_images", True, group="image_cache")
    host.driver.manage_image_cache(host.context, [])
    assert host.plyfs.bases().keys() == everything - {f"g-{unused}"}
