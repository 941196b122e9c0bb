"""Cold migration between two hosts, and resize on one. Nova copies files with ssh and scp: here programs of these names copy
them to the directory of the other host."""

import json
import os
from types import SimpleNamespace

import pytest

import nova.conf
from nova import exception, objects
from nova.virt.plyfs import disks

CONF = nova.conf.CONF
MIB = 1 << 20
GIB = 1 << 30
OTHER = "192.0.2.2"


@pytest.fixture
def network_copies(hosts, tmp_path, monkeypatch):
    """ssh and scp that reach the second host, and a list of what they copied."""
    rename = f"sed s,{hosts[0].instances},{hosts[1].instances},g"
    programs = {
        # ssh -o BatchMode=yes HOST COMMAND...
        "ssh": f'[ ! -e {tmp_path}/down ] || exit 255\nshift 3\nset -- $(echo "$@" | {rename})\nexec "$@"\n',
        # scp [-C] -r FILE HOST:FILE
        "scp": f'[ ! -e {tmp_path}/down ] || exit 1\nwhile [ "${{1#-}}" != "$1" ]; do shift; done\n'
        f'stat -c "%s %n" "$1" >>{tmp_path}/copies\nexec cp "$1" "$(echo "${{2#*:}}" | {rename})"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(hosts[0].driver, "_image_api", SimpleNamespace(get=lambda context, image_id: {"id": image_id, "status": "active"}))
    return tmp_path


def flavor(instance, root_gb):
    found = instance.flavor.obj_clone()
    found.root_gb = root_gb
    return found


def send(host, instance, dest, root_gb=1):
    host.use()
    instance.old_flavor = instance.flavor
    instance.new_flavor = flavor(instance, root_gb)
    return host.driver.migrate_disk_and_power_off(host.context, instance, dest, instance.new_flavor, host.network(), host.bdi(instance))


def finish(host, instance, disk_info):
    host.use()
    instance.flavor = instance.new_flavor
    instance.host, instance.task_state = host.name, "resize_finish"
    instance.trusted_certs = None
    meta = objects.ImageMeta.from_dict({"id": instance.image_ref, "disk_format": "raw", "properties": {}})
    host.driver.finish_migration(
        host.context, SimpleNamespace(source_compute="compute-1"), instance, disk_info, host.network(), meta, True, {},
        block_device_info=host.bdi(instance),
    )  # fmt: skip


def confirm(host, instance):
    host.use()
    host.driver.confirm_migration(host.context, None, instance, host.network())


def revert(host, instance):
    host.use()
    instance.flavor, instance.host = instance.old_flavor, host.name
    host.driver.finish_revert_migration(host.context, instance, host.network(), None, block_device_info=host.bdi(instance))


@pytest.fixture
def written(hosts):
    """An instance on the first host whose guest has written something, on an image of 64 MiB."""
    host = hosts[0]
    instance = host.boot(host.image(size=64 * MIB))
    host.libvirtd.virsh("destroy", instance.name)
    host.write(instance, 40 * MIB, b"written by the guest")
    return instance


def check(host, instance):
    assert host.read(instance, 40 * MIB, 20) == b"written by the guest"
    assert host.read(instance, 41 * MIB, 14) == b"block at 42991"
    assert instance.name in host.libvirtd.running()


def test_a_migration_copies_what_the_guest_wrote(hosts, written, network_copies):
    one, two = hosts
    disk_info = send(one, written, OTHER, root_gb=2)
    copied = sum(int(line.split()[0]) for line in (network_copies / "copies").read_text().splitlines())
    assert copied < MIB
    finish(two, written, disk_info)
    disk = two.plyfs.disks()[f"{written.uuid}_disk"]
    assert (disk["base"], disk["size"]) == (f"g-{written.image_ref}", 2 * GIB)
    assert disk["delta_bytes"] < MIB
    check(two, written)
    assert sorted(os.listdir(two.path(written).parent)) == ["console.log", "disk", "disk.info"]
    # The source has its disk until the migration is confirmed.
    assert one.plyfs.disks().keys() == {f"{written.uuid}_disk"}
    confirm(one, written)
    assert one.plyfs.disks() == {} and not list(one.instances.glob(f"{written.uuid}*"))
    assert two.plyfs.disks().keys() == {f"{written.uuid}_disk"}


def test_a_migration_is_reverted(hosts, written, network_copies):
    one, two = hosts
    finish(two, written, send(one, written, OTHER))
    two.destroy(written)
    assert two.plyfs.disks() == {}
    revert(one, written)
    check(one, written)


def test_a_whole_disk_goes_when_glance_has_the_image_no_more(hosts, written, network_copies, monkeypatch, caplog):
    one, two = hosts

    def gone(context, image_id):
        raise exception.ImageNotFound(image_id=image_id)

    monkeypatch.setattr(one.driver._image_api, "get", gone)
    disk_info = send(one, written, OTHER)
    (one.images / f"{written.image_ref}.raw").rename(one.images / "gone")
    CONF.set_override("image_source", None, group="plyfs")
    finish(two, written, disk_info)
    assert "all of disk" in caplog.text
    assert two.plyfs.disks()[f"{written.uuid}_disk"]["base"] is None
    check(two, written)
    (one.images / "gone").rename(one.images / f"{written.image_ref}.raw")


def test_a_copy_that_fails_leaves_both_hosts_as_they_were(hosts, written, network_copies, monkeypatch):
    one, two = hosts
    original = one.driver._cleanup_failed_instance_base

    def network_ends(directory):
        original(directory)
        (network_copies / "down").touch()

    monkeypatch.setattr(one.driver, "_cleanup_failed_instance_base", network_ends)
    with pytest.raises(Exception, match="scp"):
        send(one, written, OTHER)
    assert sorted(os.listdir(one.path(written).parent)) == ["console.log", "disk", "disk.info"]
    assert one.read(written, 40 * MIB, 20) == b"written by the guest"
    assert two.plyfs.disks() == {}
    # Nova's next attempt.
    monkeypatch.undo()
    (network_copies / "down").unlink()


def test_an_import_that_was_killed_is_done_again(hosts, written, network_copies):
    one, two = hosts
    disk_info = send(one, written, OTHER)
    two.use()
    two.plyfs.run("disk", "create", f"{written.uuid}_disk", "--size", "1G")
    disks._link(f"{two.plyfs.mount}/disks/{written.uuid}_disk.raw", f"{two.path(written)}.creating")
    finish(two, written, disk_info)
    assert two.plyfs.disks().keys() == {f"{written.uuid}_disk"}
    check(two, written)


def test_a_package_of_another_version_is_refused(hosts, written, network_copies):
    one, two = hosts
    disk_info = send(one, written, OTHER)
    head = two.path(written, "disk.plyfs")
    head.write_text(json.dumps(json.loads(head.read_text()) | {"format": 2}))
    with pytest.raises(exception.InvalidDiskInfo, match="same nova-plyfs on both hosts"):
        finish(two, written, disk_info)
    two.destroy(written)
    revert(one, written)
    check(one, written)


def test_a_resize_on_one_host_clones_the_disk(hosts, written, monkeypatch):
    host = hosts[0]
    disk_info = send(host, written, CONF.my_ip, root_gb=3)
    assert host.plyfs.disks().keys() == {f"{written.uuid}_disk", f"{written.uuid}_disk.2"}
    finish(host, written, disk_info)
    assert os.stat(host.path(written)).st_size == 3 * GIB
    check(host, written)
    confirm(host, written)
    assert host.plyfs.disks().keys() == {f"{written.uuid}_disk.2"}
    host.destroy(written)
    assert host.plyfs.disks() == {}


def test_a_resize_on_one_host_is_reverted(hosts, written):
    host = hosts[0]
    finish(host, written, send(host, written, CONF.my_ip, root_gb=3))
    host.driver.power_off(written)
    revert(host, written)
    assert host.plyfs.disks().keys() == {f"{written.uuid}_disk"}
    assert os.stat(host.path(written)).st_size == GIB
    check(host, written)
