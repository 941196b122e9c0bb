"""Live migration: the driver prepares the disk, QEMU mirrors it, and each side removes what it does not need any more."""

import json
import os

import pytest
import world

import nova.conf
from nova import exception, objects

CONF = nova.conf.CONF
MIB = 1 << 20
GIB = 1 << 30


def migrate_data(instance):
    return objects.LibvirtLiveMigrateData(
        is_shared_block_storage=False, is_shared_instance_path=False, block_migration=True, image_type="default", bdms=[],
        instance_relative_path=instance.uuid, graphics_listen_addr_vnc="127.0.0.1", graphics_listen_addr_spice="127.0.0.1",
        serial_listen_addr=None,
    )  # fmt: skip


def prepare(two, instance, disk_info):
    two.use()
    data = migrate_data(instance)
    two.driver.pre_live_migration(two.context, instance, two.bdi(instance), two.network(), disk_info, data)
    return data


@pytest.fixture
def running(hosts):
    one = hosts[0]
    instance = one.boot(one.image(size=16 * MIB))
    one.write(instance, 40 * MIB, b"written by the guest")
    disk_info = one.driver.get_instance_disk_info(instance, one.bdi(instance))
    return instance, disk_info


def test_the_driver_asks_for_block_migration(hosts, running):
    one, _ = hosts
    one.use()
    instance, disk_info = running
    (info,) = json.loads(disk_info)
    assert (info["type"], info["virt_disk_size"], info["backing_file"]) == ("raw", GIB, "")
    data = migrate_data(instance)
    data.is_volume_backed = False
    data.is_shared_instance_path = True
    # Also when the directories of instances are shared: the store is not.
    assert one.driver._is_shared_block_storage(instance, data) is False


def test_qemu_mirrors_the_disk_to_the_other_host(hosts, running, place):
    one, two = hosts
    instance, disk_info = running
    prepare(two, instance, disk_info)
    assert two.plyfs.disks()[f"{instance.uuid}_disk"]["size"] == GIB
    assert json.loads(two.path(instance, "disk.info").read_text()) == {str(two.path(instance)): "raw"}
    other = world.Libvirtd(place, "two")
    try:
        xml = one.libvirtd.virsh("dumpxml", "--migratable", instance.name).replace(str(one.instances), str(two.instances))
        (place / "migrate.xml").write_text(xml)
        two.path(instance, "console.log").touch()
        one.libvirtd.virsh(
            "migrate", "--live", "--copy-storage-all", "--migrate-disks", "vda", "--xml", place / "migrate.xml", instance.name, other.uri,
            "tcp://127.0.0.1",
        )  # fmt: skip
        assert other.running() == [instance.name] and one.libvirtd.running() == []
        assert two.read(instance, 40 * MIB, 20) == b"written by the guest"
        assert two.read(instance, 5 * MIB, 16) == b"block at 5242880"
        # The source cleans up.
        one.use()
        one.driver.cleanup(one.context, instance, one.network(), one.bdi(instance), destroy_disks=True, migrate_data=migrate_data(instance))
        assert one.plyfs.disks() == {} and not one.path(instance).parent.exists()
        assert two.plyfs.disks().keys() == {f"{instance.uuid}_disk"}
    finally:
        other.stop()


def test_a_rollback_leaves_nothing_at_the_destination(hosts, running):
    one, two = hosts
    instance, disk_info = running
    data = prepare(two, instance, disk_info)
    two.driver.rollback_live_migration_at_destination(two.context, instance, two.network(), two.bdi(instance), True, data)
    assert two.plyfs.disks() == {} and not two.path(instance).parent.exists()
    assert one.plyfs.disks().keys() == {f"{instance.uuid}_disk"}
    assert one.read(instance, 40 * MIB, 20) == b"written by the guest"


def test_a_rollback_while_plyfs_is_away_names_the_disk(hosts, running, caplog):
    _, two = hosts
    instance, disk_info = running
    data = prepare(two, instance, disk_info)
    CONF.set_override("retry_seconds", 1, group="plyfs")
    two.plyfs.stop()
    two.driver.rollback_live_migration_at_destination(two.context, instance, two.network(), two.bdi(instance), True, data)
    assert f"plyfs disk rm {instance.uuid}_disk" in caplog.text
    two.plyfs.start()


def test_two_computes_with_one_store_do_not_share_a_disk(hosts, running):
    one, two = hosts
    instance, disk_info = running
    two.use()
    CONF.set_override("socket", str(one.plyfs.socket), group="plyfs")
    data = migrate_data(instance)
    two.driver.pre_live_migration(two.context, instance, two.bdi(instance), two.network(), disk_info, data)
    assert os.path.basename(os.readlink(two.path(instance))) == f"{instance.uuid}_disk.2.raw"
    two.driver.delete_instance_files(instance)
    assert one.plyfs.disks().keys() == {f"{instance.uuid}_disk"}
    assert one.read(instance, 40 * MIB, 20) == b"written by the guest"


def test_a_directory_that_is_left_at_the_destination_is_refused_as_ever(hosts, running):
    _, two = hosts
    instance, disk_info = running
    two.path(instance).parent.mkdir()
    with pytest.raises(exception.DestinationDiskExists):
        prepare(two, instance, disk_info)
