"""Create, resize, delete, and what can go wrong on the way."""

import inspect
import json
import os
import subprocess
import threading
import time

import pytest

import nova.conf
from nova import exception
from nova.virt.plyfs import client, disks

CONF = nova.conf.CONF
MIB = 1 << 20
GIB = 1 << 30


def test_spawn_boots_from_a_disk_on_the_base_of_the_image(host):
    instance = host.create(host.image())
    host.spawn(instance)
    link = host.path(instance)
    disk = host.plyfs.disks()[f"{instance.uuid}_disk"]
    assert os.readlink(link) == disk["path"]
    assert (disk["base"], disk["size"]) == (f"g-{instance.image_ref}", GIB)
    assert link.read_bytes()[:8] == b"block at"
    assert json.loads((link.parent / "disk.info").read_text()) == {str(link): "raw"}
    xml = host.libvirtd.virsh("dumpxml", instance.name)
    assert str(link) in xml and "type='raw'" in xml
    assert instance.name in host.libvirtd.running()
    # libvirt gave the disk to QEMU's user.
    assert os.stat(link).st_uid == 64055


def test_destroy_leaves_nothing(host):
    instance = host.boot()
    host.destroy(instance)
    assert host.plyfs.disks() == {}
    assert not host.path(instance).parent.exists()
    assert host.libvirtd.running() == []


def root(host, instance):
    """The root disk, as the driver has it."""
    mapping = {"bus": "virtio", "dev": "vda", "type": "disk"}
    return host.driver.image_backend.by_name(instance, "disk", disk_info_mapping=mapping)


def no_download(*args, **kwargs):
    pytest.fail("Nova downloads the image")


def make_root(host, instance, size=GIB):
    """Makes the root disk as the driver does, with Nova's own cache()."""
    host.path(instance).parent.mkdir(exist_ok=True)
    image = root(host, instance)
    host.driver._try_fetch_image_cache(image, no_download, host.context, "0" * 40, instance.image_ref, instance, size)
    return image


@pytest.fixture
def instance(host):
    """An instance in the database, with an image and no disk."""
    found = host.create(host.image())
    found.trusted_certs = None
    return found


def test_a_disk_takes_milliseconds_and_no_bytes(host, instance):
    host.plyfs.run("base", "add", f"g-{instance.image_ref}", host.images / f"{instance.image_ref}.raw")
    begun = time.monotonic()
    make_root(host, instance, 500 * GIB)
    assert time.monotonic() - begun < 1
    assert os.stat(host.path(instance)).st_size == 500 * GIB
    assert host.plyfs.disks()[f"{instance.uuid}_disk"]["delta_bytes"] == 0


def test_a_flavor_smaller_than_the_image_is_refused(host):
    instance = host.create(host.image(size=8 * MIB))
    with pytest.raises(exception.FlavorDiskSmallerThanImage):
        make_root(host, instance, 4 * MIB)
    assert host.plyfs.disks() == {}


def test_a_flavor_without_a_size_takes_that_of_the_image(host, instance):
    make_root(host, instance, None)
    assert os.stat(host.path(instance)).st_size == 8 * MIB


def test_a_second_call_grows_the_disk_and_never_shrinks_it(host, instance):
    make_root(host, instance)
    make_root(host, instance, 2 * GIB)
    make_root(host, instance, GIB)
    assert os.stat(host.path(instance)).st_size == 2 * GIB
    assert len(host.plyfs.disks()) == 1


def test_the_filesystem_of_an_image_without_partitions_grows(host):
    instance = host.create(host.image(size=16 * MIB, filesystem=True))
    make_root(host, instance, 64 * MIB)
    found = subprocess.run(["dumpe2fs", "-h", host.path(instance)], capture_output=True, text=True, check=True).stdout
    fields = dict(line.split(":", 1) for line in found.splitlines() if ":" in line)
    assert int(fields["Block count"]) * int(fields["Block size"]) == 64 * MIB


def test_what_a_guest_writes_is_never_probed(host, instance):
    make_root(host, instance)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", host.where / "evil", "1M"], check=True)
    with open(host.path(instance), "r+b") as disk:
        disk.write((host.where / "evil").read_bytes()[:65536])
    (host.path(instance).parent / "disk.info").unlink()
    assert root(host, instance).driver_format == "raw"


def test_swap_ephemeral_and_config_disks_are_files(host):
    instance = host.boot(swap=4, ephemeral_gb=1)
    assert host.plyfs.disks().keys() == {f"{instance.uuid}_disk"}
    for leaf, size in (("disk.swap", 4 * MIB), ("disk.local", GIB)):
        assert host.path(instance, leaf).is_file() and not host.path(instance, leaf).is_symlink()
        assert os.stat(host.path(instance, leaf)).st_size == size


def test_an_image_that_plyfs_refuses_is_downloaded(host, caplog):
    """Nova's own download is replaced by the file that it would write."""
    instance = host.create("11111111-1111-1111-1111-111111111111")
    host.path(instance).parent.mkdir()
    os.makedirs(host.instances / "_base")

    def download(context, target, **kwargs):
        with open(target, "wb") as file:
            file.truncate(8 * MIB)

    root(host, instance).cache(download, "1" * 40, GIB, context=host.context, image_id=instance.image_ref)
    assert not host.path(instance).is_symlink() and os.stat(host.path(instance)).st_size == GIB
    assert "plyfs cannot use image 11111111" in caplog.text
    assert host.plyfs.disks() == {}
    # It is an ordinary disk of Nova from then on, and goes as one.
    host.destroy(instance)
    assert not host.path(instance).parent.exists()


def test_without_a_source_of_images_only_known_bases_are_used(host, instance):
    CONF.set_override("image_source", None, group="plyfs")
    with pytest.raises(pytest.fail.Exception):
        make_root(host, instance)
    host.plyfs.run("base", "add", f"g-{instance.image_ref}", host.images / f"{instance.image_ref}.raw")
    make_root(host, instance)
    assert host.path(instance).is_symlink()


def test_a_spawn_that_fails_leaves_nothing(host, monkeypatch):
    instance = host.create(host.image())
    monkeypatch.setattr(host.driver, "_create_guest_with_network", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.spawn(instance)
    # The compute manager does this.
    host.destroy(instance)
    assert host.plyfs.disks() == {} and not host.path(instance).parent.exists()
    monkeypatch.undo()
    host.spawn(instance)


@pytest.mark.parametrize("made", [False, True])
def test_a_compute_killed_between_link_and_disk(host, instance, made):
    """The link is there first, so the next attempt and the deletion find the disk, whether it was made or not."""
    directory = host.path(instance).parent
    directory.mkdir()
    disks._link(f"{host.plyfs.mount}/disks/{instance.uuid}_disk.raw", f"{directory}/disk.creating")
    if made:
        host.plyfs.run("base", "add", f"g-{instance.image_ref}", host.images / f"{instance.image_ref}.raw")
        host.plyfs.run("disk", "create", f"{instance.uuid}_disk", "--base", f"g-{instance.image_ref}", "--size", "1G")
        created = host.plyfs.disks()[f"{instance.uuid}_disk"]["id"]
    make_root(host, instance)
    assert sorted(os.listdir(directory)) == ["disk", "disk.info"]
    if made:
        # The same base and size: it is the disk.
        assert host.plyfs.disks()[f"{instance.uuid}_disk"]["id"] == created
    host.destroy(instance)
    assert host.plyfs.disks() == {}


def test_a_compute_killed_before_it_linked_a_disk_leaves_nothing_after_a_deletion(host, instance):
    directory = host.path(instance).parent
    directory.mkdir()
    disks._link(f"{host.plyfs.mount}/disks/{instance.uuid}_disk.raw", f"{directory}/disk.creating")
    host.plyfs.run("disk", "create", f"{instance.uuid}_disk", "--size", "1G")
    host.destroy(instance)
    assert host.plyfs.disks() == {} and not directory.exists()


def test_a_half_made_disk_of_another_size_is_made_anew(host, instance):
    directory = host.path(instance).parent
    directory.mkdir()
    disks._link(f"{host.plyfs.mount}/disks/{instance.uuid}_disk.raw", f"{directory}/disk.creating")
    host.plyfs.run("disk", "create", f"{instance.uuid}_disk", "--size", "7G")
    make_root(host, instance)
    disk = host.plyfs.disks()[f"{instance.uuid}_disk"]
    assert (disk["base"], disk["size"]) == (f"g-{instance.image_ref}", GIB)


def test_a_disk_of_another_compute_in_the_same_store_is_left_alone(host, instance, caplog):
    """No link in the instance's directory names it: another nova-compute with this store may have it."""
    host.plyfs.run("disk", "create", f"{instance.uuid}_disk", "--size", "1G")
    make_root(host, instance)
    assert host.plyfs.disks().keys() == {f"{instance.uuid}_disk", f"{instance.uuid}_disk.2"}
    assert "It is left alone" in caplog.text
    host.destroy(instance)
    assert host.plyfs.disks().keys() == {f"{instance.uuid}_disk"}
    caplog.clear()
    host.driver._look_around()
    assert f"plyfs disk rm {instance.uuid}_disk" in caplog.text


def test_a_disk_deleted_behind_nova_is_told_and_not_replaced(host, caplog):
    instance = host.boot()
    host.libvirtd.virsh("destroy", instance.name)
    host.plyfs.run("disk", "rm", "--now", f"{instance.uuid}_disk")
    instance.trusted_certs = None
    with pytest.raises(exception.DiskNotFound):
        make_root(host, instance)
    assert "something other than Nova removed it" in caplog.text
    with pytest.raises(exception.DiskNotFound):
        host.driver.reboot(host.context, instance, host.network(), "HARD", host.bdi(instance))
    assert host.plyfs.disks() == {}
    # A rebuild deletes the instance's files and spawns it again.
    host.destroy(instance)
    host.spawn(instance)
    assert instance.name in host.libvirtd.running()


def test_a_link_into_a_former_mount_is_made_anew(host, instance):
    make_root(host, instance)
    link = host.path(instance)
    target = os.readlink(link)
    link.unlink()
    link.symlink_to(f"/former/mnt/disks/{instance.uuid}_disk.raw")
    assert root(host, instance).exists()
    assert os.readlink(link) == target


def test_an_open_disk_is_removed_in_the_end(host, instance, monkeypatch, caplog):
    monkeypatch.setattr(disks, "CLOSING", 1)
    make_root(host, instance)
    with open(host.path(instance), "rb"):
        host.destroy(instance)
    assert host.plyfs.disks() == {}
    assert "although it is still open" in caplog.text


def away(host, action, seconds=1.5):
    """Does something while plyfs is away, as during `systemctl restart plyfs`."""
    host.plyfs.stop()
    back = threading.Timer(seconds, host.plyfs.start)
    back.start()
    try:
        return action()
    finally:
        back.join()


@pytest.mark.parametrize("call", ["create", "exists", "resize", "destroy", "space", "cache"])
def test_a_restart_of_plyfs_in_the_middle_of_a_call(host, instance, call):
    if call not in ("create", "cache"):
        make_root(host, instance)
    if call == "create":
        away(host, lambda: make_root(host, instance))
        assert host.plyfs.disks().keys() == {f"{instance.uuid}_disk"}
    elif call == "exists":
        assert away(host, lambda: root(host, instance).exists())
    elif call == "resize":
        away(host, lambda: root(host, instance).resize_image(2 * GIB))
        assert os.stat(host.path(instance)).st_size == 2 * GIB
    elif call == "destroy":
        away(host, lambda: host.destroy(instance))
        assert host.plyfs.disks() == {}
    elif call == "space":
        assert away(host, host.driver._get_local_gb_info)["total"] > 0
    elif call == "cache":
        assert away(host, lambda: host.driver.cache_image(host.context, instance.image_ref))


def test_a_worker_that_dies_in_the_middle_of_calls(host):
    instances = [host.create(host.image()) for _ in range(4)]
    for instance in instances:
        instance.trusted_certs = None
        killer = threading.Timer(0.02, host.plyfs.kill_worker)
        killer.start()
        make_root(host, instance)
        killer.join()
    assert host.plyfs.disks().keys() == {f"{instance.uuid}_disk" for instance in instances}
    for instance in instances:
        host.destroy(instance)
    assert host.plyfs.disks() == {}


def test_plyfs_that_stays_away_fails_the_call_with_a_reason(host, instance, caplog):
    CONF.set_override("retry_seconds", 1, group="plyfs")
    make_root(host, instance)
    other = host.create(host.image())
    other.trusted_certs = None
    host.plyfs.stop()
    with pytest.raises(client.PlyfsUnavailable, match="is the daemon running"):
        make_root(host, other)
    # Nova tries deletions again, as long as the instance is not marked as cleaned.
    host.destroy(instance)
    assert not instance.cleaned and "Nova tries again" in caplog.text
    assert host.path(instance).is_symlink()
    host.plyfs.start()
    assert host.driver.delete_instance_files(instance)
    assert host.plyfs.disks() == {}


def test_space_is_that_of_the_store(host):
    found = host.driver._get_local_gb_info()
    space = os.statvfs(host.plyfs.store)
    assert abs(found["total"] - space.f_blocks * space.f_frsize / GIB) < 0.1
    assert found["free"] <= space.f_bavail * space.f_frsize / GIB + 0.1


def test_rescue_and_unrescue(host):
    instance = host.boot()
    rescue = host.image()
    from nova import objects

    meta = objects.ImageMeta.from_dict({"id": rescue, "disk_format": "raw", "min_disk": 0, "properties": {}})
    more = {"share_info": None} if "share_info" in inspect.signature(host.driver.rescue).parameters else {}
    host.driver.rescue(host.context, instance, host.network(), meta, "password", host.bdi(instance), **more)
    assert host.plyfs.disks()[f"{instance.uuid}_disk.rescue"]["base"] == f"g-{rescue}"
    host.driver.unrescue(host.context, instance)
    assert host.plyfs.disks().keys() == {f"{instance.uuid}_disk"}
    assert not [leaf for leaf in os.listdir(host.path(instance).parent) if "rescue" in leaf]


def test_another_type_of_images_is_refused_at_start(host):
    CONF.set_override("images_type", "qcow2", group="libvirt")
    with pytest.raises(exception.InvalidConfiguration, match="has to be default"):
        host.driver.init_host(host.name)
