"""Volumes and snapshots."""

import uuid

import ddt
import servers
from cinder import exception
from cinder.tests.unit import fake_constants as fake
from cinder.volume import driver as cinder_driver
from cinder_plyfs import privileged
from os_brick.initiator import connector

from base import GIB, HOST, DriverCase, held_open, noise


class Volumes(DriverCase):
    def test_a_volume_is_a_disk_of_its_size(self):
        volume = self.created(size=3)
        self.assertEqual(3 * GIB, self.plyfs.disk(volume.name)["size"])
        self.assertEqual(b"\0" * 4096, self.read(volume, 4096))
        self.driver.delete_volume(volume)
        self.assertNotIn(volume.name, self.plyfs.disks())

    def test_a_creation_that_is_repeated_is_one(self):
        volume = self.created()
        self.write(volume, b"kept")
        self.driver.create_volume(volume)
        self.assertEqual(b"kept", self.read(volume, 4))

    def test_a_disk_of_another_content_is_not_taken_for_the_volume(self):
        volume = self.volume()
        self.plyfs.run("disk", "create", volume.name, "--size", "1G")
        error = self.assertRaises(exception.VolumeBackendAPIException, self.driver.create_volume, volume)
        self.assertIn("exists already", str(error))

    def test_a_volume_whose_disk_is_gone_is_deleted(self):
        volume = self.created()
        self.plyfs.run("disk", "rm", volume.name)
        self.driver.delete_volume(volume)

    def test_calls_on_a_disk_that_is_gone_name_it(self):
        volume = self.created()
        snapshot = self.snapshot(volume)
        self.plyfs.run("disk", "rm", "--snapshots", volume.name)
        for call in (
            lambda: self.driver.extend_volume(volume, 2),
            lambda: self.driver.create_snapshot(snapshot),
            lambda: self.driver.revert_to_snapshot(self.context, volume, snapshot),
            lambda: self.driver.create_volume_from_snapshot(self.volume(), snapshot),
            lambda: self.driver.create_cloned_volume(self.volume(), volume),
            lambda: self.driver.initialize_connection(volume, {"host": "thishost"}),
            lambda: self.driver.copy_volume_to_image(self.context, volume, self.image_service, {}),
            lambda: self.driver.copy_image_to_volume(self.context, volume, self.image_service, fake.IMAGE_ID),
            lambda: self.driver.local_path(volume),
        ):
            error = self.assertRaises(exception.VolumeBackendAPIException, call)
            self.assertIn(f"disk {volume.name}", str(error))
            self.assertIn("there is no", str(error))
        self.driver.delete_snapshot(snapshot)
        self.assertEqual(set(), {disk for disk in self.plyfs.disks() if disk.startswith("volume-")})

    def test_a_volume_that_a_process_has_open_stays_until_it_is_closed(self):
        volume = self.created()
        with held_open(self.path(volume)):
            self.assertRaises(exception.VolumeIsBusy, self.driver.delete_volume, volume)
            self.assertIn(volume.name, self.plyfs.disks())
        self.driver.delete_volume(volume)

    def test_after_the_death_of_a_worker_a_detached_volume_is_deleted_and_its_last_client_keeps_its_bytes(self):
        volume = self.created()
        self.write(volume, b"bytes")
        with held_open(self.path(volume)) as file:
            self.plyfs.kill_worker()
            servers.wait_until(lambda: self.plyfs.disk(volume.name)["open_handles"] is None, "the next worker cannot count handles")
            self.driver.delete_volume(volume)
            self.assertNotIn(volume.name, self.plyfs.disks())
            self.assertEqual(b"bytes", file.read(5))

    def test_extend(self):
        volume = self.created()
        self.write(volume, b"end", GIB - 3)
        self.driver.extend_volume(volume, 2)
        self.driver.extend_volume(volume, 2)
        self.assertEqual(2 * GIB, self.plyfs.disk(volume.name)["size"])
        self.assertEqual(b"end\0\0\0", self.read(volume, 6, GIB - 3))

    def test_an_encrypted_type_is_refused(self):
        volume = self.volume(encryption_key_id=fake.ENCRYPTION_KEY_ID)
        for call in (
            lambda: self.driver.create_volume(volume),
            lambda: self.driver.create_cloned_volume(volume, volume),
        ):
            error = self.assertRaises(exception.NotSupportedOperation, call)
            self.assertIn("plyfs encrypts disks itself", str(error))
        self.assertNotIn(volume.name, self.plyfs.disks())

    def test_retype_and_migration_are_left_to_cinder(self):
        volume = self.created()
        self.assertEqual((False, None), self.driver.retype(self.context, volume, {}, {}, {}))
        self.assertEqual((False, None), self.driver.migrate_volume(self.context, volume, {"host": "other"}))
        self.assertRaises(NotImplementedError, self.driver.update_migrated_volume, self.context, volume, volume, "available")

    def test_a_migrated_volume_has_the_disk_of_its_name_id(self):
        volume = self.volume(_name_id=str(uuid.uuid4()))
        self.driver.create_volume(volume)
        self.assertIn(f"volume-{volume.name_id}", self.plyfs.disks())
        self.driver.check_for_setup_error()
        self.assertEqual(HOST, self.driver._place_of(volume.name))


class Snapshots(DriverCase):
    def test_volumes_of_snapshots_and_volumes_have_their_bytes_and_outlive_them(self):
        volume = self.created()
        self.write(volume, b"first")
        snapshot = self.snapshot(volume)
        self.write(volume, b"later")
        of_snapshot, clone = self.volume(2), self.volume(2)
        self.driver.create_volume_from_snapshot(of_snapshot, snapshot)
        self.driver.create_cloned_volume(clone, volume)
        self.driver.delete_snapshot(snapshot)
        self.driver.delete_volume(volume)
        self.assertEqual(b"first", self.read(of_snapshot, 5))
        self.assertEqual(b"later", self.read(clone, 5))
        self.assertEqual(2 * GIB, self.plyfs.disk(clone.name)["size"])

    def test_a_volume_in_use_is_cloned_as_of_a_moment(self):
        volume = self.created()
        with held_open(self.path(volume)):
            self.write(volume, b"flushed")
            clone = self.volume()
            self.driver.create_cloned_volume(clone, volume)
        self.assertEqual(b"flushed", self.read(clone, 7))

    def test_a_volume_with_snapshots_is_busy(self):
        volume = self.created()
        snapshot = self.snapshot(volume)
        self.assertRaises(exception.VolumeIsBusy, self.driver.delete_volume, volume)
        self.driver.delete_snapshot(snapshot)
        self.driver.delete_snapshot(snapshot)
        self.driver.delete_volume(volume)

    def test_each_revert_reverts(self):
        volume = self.created()
        self.write(volume, b"first")
        snapshot = self.snapshot(volume)
        for _ in range(2):
            self.write(volume, b"later")
            self.driver.revert_to_snapshot(self.context, volume, snapshot)
            self.assertEqual(b"first", self.read(volume, 5))

    def test_a_revert_keeps_the_size_of_the_volume(self):
        volume = self.created()
        snapshot = self.snapshot(volume)
        self.driver.extend_volume(volume, 2)
        volume.size = 2
        self.driver.revert_to_snapshot(self.context, volume, snapshot)
        self.assertEqual(2 * GIB, self.plyfs.disk(volume.name)["size"])

    def test_a_volume_that_is_open_is_not_reverted(self):
        volume = self.created()
        snapshot = self.snapshot(volume)
        with held_open(self.path(volume)):
            error = self.assertRaises(exception.VolumeBackendAPIException, self.driver.revert_to_snapshot, self.context, volume, snapshot)
        self.assertIn("open", str(error))


class Connections(DriverCase):
    def test_os_brick_finds_the_file(self):
        volume = self.created()
        self.write(volume, b"bytes")
        found = self.driver.initialize_connection(volume, {"host": "thishost"})
        self.assertEqual("gpfs", found["driver_volume_type"])
        brick = connector.InitiatorConnector.factory("gpfs", None)
        path = brick.connect_volume(found["data"])["path"]
        with open(path, "rb") as file:
            self.assertEqual(b"bytes", file.read(5))

    def test_a_server_on_another_host_is_refused_by_name(self):
        volume = self.created()
        error = self.assertRaises(exception.VolumeBackendAPIException, self.driver.initialize_connection, volume, {"host": "elsewhere"})
        self.assertIn("host elsewhere cannot attach it", str(error))
        configured = self.make_driver(plyfs_connect_hosts=["elsewhere"])
        configured.initialize_connection(volume, {"host": "elsewhere"})
        self.assertRaises(exception.VolumeBackendAPIException, configured.initialize_connection, volume, {"host": "thishost"})


class Existing(DriverCase):
    def test_a_disk_becomes_a_volume_and_stays_as_a_disk(self):
        self.plyfs.run("disk", "create", "older", "--size", str(GIB + 4096))
        volume = self.volume()
        self.assertEqual(2, self.driver.manage_existing_get_size(volume, {"source-name": "older"}))
        self.driver.manage_existing(volume, {"source-name": "older"})
        self.assertNotIn("older", self.plyfs.disks())
        self.assertEqual(2 * GIB, self.plyfs.disk(volume.name)["size"])
        self.driver.unmanage(volume)
        self.assertIn(volume.name, self.plyfs.disks())

    def test_what_is_no_free_disk_is_refused(self):
        volume, other = self.created(), self.created()
        for reference, why in (
            ({}, "source-name"),
            ({"source-name": "nothing"}, "there is no disk"),
            ({"source-name": other.name}, "a volume already"),
        ):
            error = self.assertRaises(exception.ManageExistingInvalidReference, self.driver.manage_existing, volume, reference)
            self.assertIn(why, str(error))
        self.plyfs.run("disk", "create", "busy", "--size", "1G")
        with held_open(self.plyfs.mount / "disks" / "busy.raw"):
            error = self.assertRaises(exception.ManageExistingInvalidReference, self.driver.manage_existing, volume, {"source-name": "busy"})
        self.assertIn("has it open", str(error))

    def test_a_disk_is_never_renamed_over_another(self):
        for name in ("one", "two"):
            self.plyfs.run("disk", "create", name, "--size", "1M")
        disks = self.plyfs.mount / "disks"
        self.assertRaises(FileExistsError, privileged.move, disks / "one.raw", disks / "two.raw")

    def test_the_list_of_disks_says_which_are_free(self):
        volume = self.created()
        self.plyfs.run("disk", "create", "free", "--size", "1G")
        found = self.driver.get_manageable_volumes([volume], None, 100, 0, ["size"], ["asc"])
        by_name = {entry["reference"]["source-name"]: entry for entry in found}
        self.assertEqual((False, volume.id), (by_name[volume.name]["safe_to_manage"], by_name[volume.name]["cinder_id"]))
        self.assertEqual((True, None), (by_name["free"]["safe_to_manage"], by_name["free"]["cinder_id"]))


class Reports(DriverCase):
    def test_the_capacity_is_that_of_the_pool(self):
        self.created(size=5)
        stats = self.driver.get_volume_stats(refresh=True)
        self.assertEqual("up", stats["backend_state"])
        self.assertGreater(stats["total_capacity_gb"], stats["free_capacity_gb"])
        self.assertGreater(stats["free_capacity_gb"], 0)
        self.assertGreaterEqual(stats["provisioned_capacity_gb"], 5)
        self.assertIs(False, stats["online_extend_support"])

    def test_volumes_lie_in_the_pool_of_the_backend(self):
        if "fast" not in {pool["name"] for pool in self.plyfs.json("pool", "ls")}:
            (self.work / "fast").mkdir()
            self.plyfs.run("pool", "add", "fast", self.work / "fast")
        servers.wait_until(lambda: "fast" in {pool["name"] for pool in self.plyfs.json("pool", "ls")}, "the pool is used")
        driver = self.make_driver(plyfs_pool="fast")
        volume, clone = self.volume(), self.volume()
        driver.create_volume(volume)
        driver.create_cloned_volume(clone, volume)
        self.assertEqual({"fast"}, {self.plyfs.disk(each.name)["pool"] for each in (volume, clone)})
        self.assertEqual("up", driver.get_volume_stats(refresh=True)["backend_state"])

    def test_an_unknown_pool_ends_the_start(self):
        error = self.assertRaises(exception.VolumeBackendAPIException, self.make_driver, plyfs_pool="none")
        self.assertIn("pool none", str(error))

    def test_disks_that_look_like_volumes_are_named_at_the_start(self):
        orphan, elsewhere, mine = f"volume-{uuid.uuid4()}", self.created(), self.created()
        self.plyfs.run("disk", "create", orphan, "--size", "1G")
        self.plyfs.run("disk", "create", "somebody-elses", "--size", "1G")
        self.plyfs.run("disk", "create", f"{mine.name}-upload", "--size", "1G")
        elsewhere.host = "other@plyfs#plyfs"
        elsewhere.save()
        with self.assertLogs("cinder_plyfs.driver", "WARNING") as log:
            self.driver.check_for_setup_error()
        text = "\n".join(log.output)
        self.assertIn(f"{orphan} has the name of a volume, and Cinder has no such volume", text)
        self.assertIn(f"{elsewhere.name} has the name of a volume, and that volume is on other@plyfs", text)
        self.assertNotIn(mine.name, text)
        self.assertNotIn("somebody-elses", text)
        self.assertNotIn(f"{mine.name}-upload", self.plyfs.disks())


@ddt.ddt
class Restarts(DriverCase):
    """The daemon restarts in the middle of every call: before it carries the request out, and after it, before the answer."""

    def setUp(self):
        super().setUp()
        self.interrupter = servers.Interrupter(self.plyfs)
        self.addCleanup(self.interrupter.close)
        self.socket = self.interrupter.path
        self.driver = self.make_driver()

    def interrupted(self, moment, call):
        restarts = self.interrupter.restarts
        self.interrupter.interrupt(moment)
        call()
        self.assertEqual(restarts + 1, self.interrupter.restarts)

    @ddt.data("before", "after")
    def test_volumes_and_snapshots(self, moment):
        volume, clone, of_snapshot = self.volume(), self.volume(), self.volume()
        self.interrupted(moment, lambda: self.driver.create_volume(volume))
        self.write(volume, b"first")
        snapshot = self.snapshot(volume)
        self.driver.delete_snapshot(snapshot)
        self.interrupted(moment, lambda: self.driver.create_snapshot(snapshot))
        self.write(volume, b"later")
        self.interrupted(moment, lambda: self.driver.create_cloned_volume(clone, volume))
        self.interrupted(moment, lambda: self.driver.create_volume_from_snapshot(of_snapshot, snapshot))
        self.assertEqual(b"later", self.read(clone, 5))
        self.assertEqual(b"first", self.read(of_snapshot, 5))
        self.interrupted(moment, lambda: self.driver.revert_to_snapshot(self.context, volume, snapshot))
        self.assertEqual(b"first", self.read(volume, 5))
        self.interrupted(moment, lambda: self.driver.extend_volume(volume, 2))
        self.assertEqual(2 * GIB, self.plyfs.disk(volume.name)["size"])
        self.interrupted(moment, lambda: self.driver.delete_snapshot(snapshot))
        for each in (volume, clone, of_snapshot):
            self.interrupted(moment, lambda each=each: self.driver.delete_volume(each))
            self.assertNotIn(each.name, self.plyfs.disks())

    @ddt.data("before", "after")
    def test_images(self, moment):
        image = self.image(noise(servers.MIB))
        # The first request registers the base, the second one creates the disk.
        volume = self.volume()
        self.interrupter.interrupt(moment, moment)
        self.assertEqual(({}, True), self.clone(volume, image))
        self.assertEqual(2, self.interrupter.restarts)
        self.assertEqual(noise(servers.MIB), self.read(volume, servers.MIB))
        target = self.glance.request("POST", "/v2/images", {"name": "up", "disk_format": "raw", "container_format": "bare"})
        # The removal of an earlier upload, the clone, and its removal.
        self.interrupter.interrupt(moment, moment, moment)
        meta = {"id": target["id"], "disk_format": "raw", "container_format": "bare"}
        self.driver.copy_volume_to_image(self.context, volume, self.image_service, meta)
        self.assertEqual(5, self.interrupter.restarts)
        self.assertEqual(GIB, self.glance.request("GET", f"/v2/images/{target['id']}")["size"])
        self.assertEqual({volume.name}, {disk for disk in self.plyfs.disks() if disk.startswith("volume-")})

    def test_a_daemon_that_stays_away_is_named_and_leaves_nothing(self):
        driver = self.make_driver(plyfs_patience=0.5)
        volume, kept = self.volume(), self.volume()
        self.driver.create_volume(kept)
        self.assertEqual("up", driver.get_volume_stats(refresh=True)["backend_state"])
        self.assertEqual("up", self.driver.get_volume_stats(refresh=True)["backend_state"])
        self.interrupter.interrupt("after")
        restart, self.interrupter._restart = self.interrupter._restart, self.plyfs.stop
        error = self.assertRaises(exception.VolumeBackendAPIException, driver.create_volume, volume)
        self.interrupter._restart = restart
        self.assertIn("plyfs does not answer on", str(error))
        down = driver.get_volume_stats(refresh=True)
        self.assertEqual(("down", 0), (down["backend_state"], down["free_capacity_gb"]))
        # Within its patience a driver takes it for a restart.
        restarting = self.driver.get_volume_stats(refresh=True)
        self.assertEqual("up", restarting["backend_state"])
        self.assertGreater(restarting["free_capacity_gb"], 0)
        for call in (
            lambda: driver.delete_volume(kept),
            lambda: driver.extend_volume(kept, 2),
            lambda: driver.initialize_connection(kept, {"host": "thishost"}),
            lambda: driver.check_for_setup_error(),
        ):
            self.assertRaises(exception.VolumeBackendAPIException, call)
        # Cinder creates the volume elsewhere meanwhile.
        self.plyfs.start()
        self.assertIn(volume.name, self.plyfs.disks())
        volume.host = "other@plyfs#plyfs"
        volume.save()
        self.assertEqual("up", driver.get_volume_stats(refresh=True)["backend_state"])
        self.assertNotIn(volume.name, self.plyfs.disks())
        # Cinder's own retry.
        driver.delete_volume(kept)
        self.assertNotIn(kept.name, self.plyfs.disks())

    def test_a_disk_without_an_answer_stays_while_its_volume_is_here(self):
        driver = self.make_driver(plyfs_patience=0)
        volume = self.volume()
        self.interrupter.interrupt("after")
        self.assertRaises(exception.VolumeBackendAPIException, driver.create_volume, volume)
        driver.get_volume_stats(refresh=True)
        self.assertIn(volume.name, self.plyfs.disks())
        driver.delete_volume(volume)
        self.assertNotIn(volume.name, self.plyfs.disks())


class Interface(DriverCase):
    def test_the_driver_has_what_cinder_asks_of_drivers(self):
        self.assertIsInstance(self.driver, cinder_driver.VolumeDriver)
        self.assertTrue(self.driver.supported)
        self.driver.init_capabilities()
