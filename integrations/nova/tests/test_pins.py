"""What this package takes from Nova and Nova does not promise: private methods, and what they call.

When a test here fails, Nova has changed: read the new method, adapt the override, then the pin.
"""

import inspect

import pytest

from nova.virt import libvirt
from nova.virt.libvirt import driver, imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from nova.virt.plyfs import backend
from nova.virt.plyfs import driver as plyfs_driver

assert libvirt

# Parameters that Nova's own method has, in order.
DRIVER = {
    "__init__": "self virtapi read_only",
    "init_host": "self host",
    "_get_local_gb_info": "",
    "delete_instance_files": "self instance",
    "unrescue": "self context instance",
    "_get_instance_disk_info_from_config": "self guest_config block_device_info",
    "_create_images_and_backing": "self context instance instance_dir disk_info fallback_from_host",
    "rollback_live_migration_at_destination": "self context instance network_info block_device_info destroy_disks migrate_data",
    "migrate_disk_and_power_off": "self context instance dest flavor network_info block_device_info timeout retry_interval",
    "_disk_raw_to_qcow2": "path",
    "_cleanup_resize": "self context instance network_info",
    "_cleanup_failed_instance_base": "self inst_base",
    "_cleanup_remote_migration": "self dest inst_base inst_base_resize shared_storage",
    "snapshot": "self context instance image_id update_task_state",
    "_live_snapshot": "self context instance guest disk_path out_path source_format image_format image_meta",
    "cache_image": "self context image_id",
    "manage_image_cache": "self context all_instances",
}

FLAT = {
    "_get_driver_format": "self",
    "exists": "self",
    "is_file_in_instance_path": "",
    "resize_image": "self size",
    "snapshot_extract": "self target out_format",
    "flatten": "self",
}

# Calls on which the overrides rely: Nova's method has to contain them.
CALLS = [
    (driver.LibvirtDriver._cleanup, "self.delete_instance_files(instance)"),
    (driver.LibvirtDriver._create_and_inject_local_root, "self._try_fetch_image_cache("),
    (driver.LibvirtDriver._try_fetch_image_cache, "image.flatten()"),
    (driver.LibvirtDriver._try_fetch_image_cache, "image_id=image_id"),
    (driver.LibvirtDriver.migrate_disk_and_power_off, "libvirt_utils.copy_image("),
    (driver.LibvirtDriver.migrate_disk_and_power_off, "self._cleanup_remote_migration("),
    (driver.LibvirtDriver.finish_migration, "self._disk_raw_to_qcow2("),
    (driver.LibvirtDriver.finish_revert_migration, "self._cleanup_failed_instance_base(inst_base)"),
    (driver.LibvirtDriver.confirm_migration, "self._cleanup_resize("),
    (driver.LibvirtDriver.pre_live_migration, "self._create_images_and_backing("),
    (driver.LibvirtDriver.snapshot, "self.image_backend.by_libvirt_path("),
    (driver.LibvirtDriver.snapshot, "self._live_snapshot("),
    (driver.LibvirtDriver.snapshot, "root_disk.snapshot_extract(out_path, image_format)"),
    (driver.LibvirtDriver.unrescue, '"*.rescue"'),
    (imagebackend.Image.cache, "self.create_image("),
    (imagebackend.Flat.correct_format, "self.resolve_driver_format()"),
]


def parameters(method):
    return list(inspect.signature(method).parameters)


@pytest.mark.parametrize("name", DRIVER)
def test_the_driver_overrides_a_method_with_these_parameters(name):
    assert parameters(getattr(driver.LibvirtDriver, name)) == DRIVER[name].split()


def test_finish_migration_begins_as_ever():
    assert parameters(driver.LibvirtDriver.finish_migration)[:4] == ["self", "context", "migration", "instance"]


@pytest.mark.parametrize("name", FLAT)
def test_the_backend_overrides_a_method_with_these_parameters(name):
    assert parameters(getattr(imagebackend.Flat, name)) == FLAT[name].split()


def test_create_image_begins_as_ever():
    names = [name for name in parameters(imagebackend.Flat.create_image) if name != "safe"]
    assert names == ["self", "prepare_template", "base", "size", "args", "kwargs"]


@pytest.mark.parametrize("ours, theirs", [(plyfs_driver.PlyfsDriver, driver.LibvirtDriver), (backend.Plyfs, imagebackend.Flat)])
def test_nothing_is_overridden_that_is_not_pinned(ours, theirs):
    pinned = {*DRIVER, *FLAT, "finish_migration", "create_image"}
    overridden = {name for name, value in vars(ours).items() if hasattr(theirs, name) and inspect.isroutine(getattr(ours, name))}
    assert overridden <= pinned


def test_copy_image_has_these_parameters():
    original = inspect.unwrap(libvirt_utils.copy_image)
    from nova.virt.plyfs import migration

    assert original is migration.copy_image
    assert parameters(migration._nova_copy_image) == "src dest host receive on_execute on_completion compression".split()


@pytest.mark.parametrize("method, call", CALLS, ids=lambda value: getattr(value, "__qualname__", None))
def test_nova_makes_the_calls_that_the_overrides_are_for(method, call):
    assert call in inspect.getsource(method)
