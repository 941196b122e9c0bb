"""The driver: what LibvirtDriver does, where a disk is more than a file in the instance's directory.

Methods of Nova that are overridden here are pinned by tests/test_pins.py: some are private.
"""

import glob
import os
import re

from oslo_log import log as logging
from oslo_utils import units

from nova import exception
from nova.virt.libvirt import driver
from nova.virt.libvirt import utils as libvirt_utils
from nova.virt.plyfs import backend, bases, client, conf, disks, migration

CONF = conf.CONF
LOG = logging.getLogger(__name__)

# Disks that Nova may have made.
OURS = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}_disk")


class PlyfsDriver(driver.LibvirtDriver):
    """LibvirtDriver with root disks in plyfs."""

    def __init__(self, virtapi, read_only=False):
        super().__init__(virtapi, read_only)
        self.image_backend = backend.Backend(CONF.use_cow_images)

    def init_host(self, host):
        if CONF.libvirt.images_type != "default":
            raise exception.InvalidConfiguration(
                f"[libvirt] images_type is {CONF.libvirt.images_type}: with compute_driver = plyfs.PlyfsDriver it has to be default"
            )
        mount = client.status()["mount"]
        LOG.info("Root disks are in plyfs: socket %s, mount %s.", CONF.plyfs.socket, mount)
        super().init_host(host)
        self._look_around()

    def _look_around(self):
        """Tells of disks that no link names, and ends snapshots that a former nova-compute began."""
        linked = set()
        for directory in glob.glob(os.path.join(glob.escape(CONF.instances_path), "*-*-*-*-*")):
            for path in disks.links(directory):
                linked.add(disks.name_of(path))
                try:
                    backend.remove_snapshots(path)
                except client.PlyfsError as error:
                    LOG.warning("A snapshot of %s stays: %s", path, error)
        for disk in client.disks():
            if OURS.match(disk["name"]) and disk["name"] not in linked:
                LOG.warning(
                    "No instance in %s has the disk %s of plyfs. Unless another nova-compute uses this store, remove it: plyfs disk rm %s",
                    CONF.instances_path,
                    disk["name"],
                    disk["name"],
                )

    # Space

    @staticmethod
    def _get_local_gb_info():
        # Without an answer the resource tracker keeps what it knows; the filesystem of the instances may be another one.
        space = client.status().get("space")
        if space is None:
            raise client.PlyfsUnavailable("the worker does not answer: see plyfs status")
        if space["total_bytes"] is None:
            return driver.LibvirtDriver._get_local_gb_info()
        total, free = space["total_bytes"], space["available_bytes"]
        return {"total": total / units.Gi, "free": free / units.Gi, "used": (total - free) / units.Gi}

    # Deletion

    def delete_instance_files(self, instance):
        base = libvirt_utils.get_instance_path(instance)
        try:
            for directory in (base, base + "_resize", base + "_del"):
                disks.remove_all(directory)
        except client.PlyfsError as error:
            LOG.error("The disks stay for now: %s. Nova tries again.", error, instance=instance)
            return False
        return super().delete_instance_files(instance)

    def unrescue(self, context, instance):
        directory = libvirt_utils.get_instance_path(instance)
        # Nova removes *.rescue once the instance runs without them. The disks keep links until they are removed.
        for path in disks.links(directory):
            if path.endswith(".rescue"):
                os.rename(path, path + disks.REMOVING)
                os.symlink(os.readlink(path + disks.REMOVING), path)
        super().unrescue(context, instance)
        for path in disks.links(directory):
            if path.endswith(disks.REMOVING):
                disks.remove(disks.name_of(path))
                os.unlink(path)

    # Hard reboot, and the destination of a live migration

    def _get_instance_disk_info_from_config(self, guest_config, block_device_info):
        for device in guest_config.devices:
            path = getattr(device, "source_path", None)
            if path and disks.name_of(path) is not None:
                disks.require(path)
        return super()._get_instance_disk_info_from_config(guest_config, block_device_info)

    def _create_images_and_backing(self, context, instance, instance_dir, disk_info, fallback_from_host=None):
        for info in disk_info or []:
            path = os.path.join(instance_dir, os.path.basename(info["path"]))
            if disks.name_of(path) is not None:
                # Nova would make an empty disk.
                disks.require(path)
            elif os.path.basename(path) == "disk" and info["type"] == "raw" and not info["backing_file"] and not os.path.exists(path):
                # QEMU writes all of it.
                disks.create(path, None, int(info["virt_disk_size"]))
        super()._create_images_and_backing(context, instance, instance_dir, disk_info, fallback_from_host)

    def rollback_live_migration_at_destination(
        self, context, instance, network_info, block_device_info, destroy_disks=True, migrate_data=None
    ):
        # At its end Nova removes the directory in any case.
        directory = libvirt_utils.get_instance_path_at_destination(instance, migrate_data)
        names = [disks.name_of(path) for path in disks.links(directory)]
        try:
            super().rollback_live_migration_at_destination(
                context, instance, network_info, block_device_info, destroy_disks=destroy_disks, migrate_data=migrate_data
            )
        finally:
            if not os.path.exists(directory):
                for name in names:
                    self._remove_or_tell(name, instance)

    @staticmethod
    def _remove_or_tell(name, instance):
        try:
            disks.remove(name)
        except client.PlyfsError as error:
            LOG.error("The disk %s is left, and nothing needs it: plyfs disk rm %s (%s)", name, name, error, instance=instance)

    # Cold migration and resize

    def migrate_disk_and_power_off(self, context, instance, dest, flavor, network_info, *args, **kwargs):
        def has_image(image_id):
            try:
                return self._image_api.get(context, image_id)["status"] == "active"
            except (exception.ImageNotFound, exception.ImageNotAuthorized):
                return False

        with migration.sending(has_image):
            return super().migrate_disk_and_power_off(context, instance, dest, flavor, network_info, *args, **kwargs)

    def finish_migration(self, context, migration_, instance, *args, **kwargs):
        migration.receive(libvirt_utils.get_instance_path(instance))
        return super().finish_migration(context, migration_, instance, *args, **kwargs)

    @staticmethod
    def _disk_raw_to_qcow2(path):
        """Nova converts raw disks that arrive at a host with use_cow_images. Here they stay raw."""

    def _cleanup_resize(self, context, instance, network_info):
        disks.remove_all(libvirt_utils.get_instance_path(instance) + "_resize")
        super()._cleanup_resize(context, instance, network_info)

    def _cleanup_failed_instance_base(self, inst_base):
        disks.remove_all(inst_base)
        super()._cleanup_failed_instance_base(inst_base)

    def _cleanup_remote_migration(self, dest, inst_base, inst_base_resize, shared_storage=False):
        if os.path.exists(inst_base_resize):
            try:
                disks.remove_all(inst_base)
            except client.PlyfsError as error:
                LOG.error("Disks of a failed migration are left: %s; see plyfs disk ls", error)
        super()._cleanup_remote_migration(dest, inst_base, inst_base_resize, shared_storage)

    # Snapshots

    def snapshot(self, context, instance, image_id, update_task_state):
        try:
            super().snapshot(context, instance, image_id, update_task_state)
        finally:
            for path in disks.links(libvirt_utils.get_instance_path(instance)):
                try:
                    backend.remove_snapshots(path)
                except client.PlyfsError as error:
                    LOG.warning("A snapshot of %s stays until the next one: %s", path, error, instance=instance)

    def _live_snapshot(self, context, instance, guest, disk_path, out_path, source_format, image_format, image_meta):
        if disks.name_of(disk_path) is None:
            super()._live_snapshot(context, instance, guest, disk_path, out_path, source_format, image_format, image_meta)
            return
        quiesced = self._quiesce_if_possible(context, instance, image_meta)
        try:
            snapshot = backend.take_snapshot(disk_path, os.path.basename(out_path))
        finally:
            if quiesced:
                self.unquiesce(context, instance, image_meta)
        backend.extract(disk_path, snapshot, out_path, image_format)

    def _quiesce_if_possible(self, context, instance, image_meta):
        try:
            self.quiesce(context, instance, image_meta)
        except exception.NovaException as error:
            if image_meta.properties.get("os_require_quiesce", False):
                raise
            LOG.info("The snapshot is as after a power cut: %s", error, instance=instance)
            return False
        return True

    # The image cache

    def cache_image(self, context, image_id):
        name = bases.name_of(image_id)
        before = client.base(name)
        found = bases.ensure(image_id)
        if found is None:
            return super().cache_image(context, image_id)
        if not found["complete"]:
            bases.hydrate(name)
        return before is None or not before["complete"]

    def manage_image_cache(self, context, all_instances):
        super().manage_image_cache(context, all_instances)
        if CONF.image_cache.remove_unused_base_images:
            bases.collect(CONF.image_cache.remove_unused_original_minimum_age_seconds, self.image_cache_manager.cache_dir)
