"""Volumes of images, images of volumes, and the limits of cached images."""

import inspect
import subprocess
import threading

import servers
from cinder import context, exception
from cinder.image import image_utils
from cinder.tests.unit import fake_constants as fake
from cinder.tests.unit import utils as tests_utils
from cinder_plyfs import images
from oslo_config import cfg

from base import GIB, MIB, DriverCase, noise

SIZE = 24 * MIB


class Clones(DriverCase):
    def qcow2(self, data, *options):
        raw = self.image_file(data)
        target = self.image_file(b"")
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, target], check=True)
        return target

    def test_a_raw_image_is_cloned_without_its_bytes_and_reads_its_bytes(self):
        image = self.image(noise(SIZE))
        volume, second = self.volume(), self.volume(2)
        self.assertEqual(({}, True), self.clone(volume, image))
        base = self.driver._bases.name_of(image["id"])
        shown = self.plyfs.json("base", "show", base)
        self.assertLess(shown["cached_bytes"], SIZE // 4)
        self.assertEqual(image["os_hash_value"], shown["sha512"])
        self.assertEqual(base, self.plyfs.disk(volume.name)["base"])
        self.assertEqual(noise(SIZE) + b"\0" * 4096, self.read(volume, SIZE + 4096))
        self.assertEqual(GIB, self.plyfs.disk(volume.name)["size"])
        self.write(volume, b"mine")
        self.assertEqual(({}, True), self.clone(second, image))
        self.assertEqual(noise(4), self.read(second, 4))
        self.assertEqual(2 * GIB, self.plyfs.disk(second.name)["size"])
        self.assertEqual(["miss", "hit"], self.notifications())
        # Another base of the image, as of Nova, has what was read.
        self.plyfs.run("base", "add", "novas", shown["source"])
        self.addCleanup(self.plyfs.run, "base", "rm", "novas")
        self.assertEqual(SIZE, self.plyfs.json("base", "show", "novas")["cached_bytes"])

    def test_a_notification_has_what_cinders_have(self):
        image = self.image(noise(MIB))
        self.clone(self.volume(), image)
        note = next(note for note in self.notifier.notifications if note["event_type"] == "image_volume_cache.miss")
        self.assertEqual({"image_id": image["id"], "host": self.driver.host}, note["payload"])

    def test_a_qcow2_image_is_cloned(self):
        image = self.glance.image(self.qcow2(noise(SIZE), "-c"), "qcow2") if self.glance.wait() is None else None
        volume = self.volume()
        self.assertEqual(({}, True), self.clone(volume, image))
        self.assertEqual(noise(SIZE), self.read(volume, SIZE))

    def test_an_image_that_is_larger_than_the_volume_is_refused_and_leaves_no_disk(self):
        image = self.image(b"")
        self.glance.request("DELETE", f"/v2/images/{image['id']}")
        large = self.image_file(b"")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", large, "2G"], check=True)
        image = self.glance.image(large, "qcow2")
        volume = self.volume(1)
        error = self.assertRaises(exception.ImageUnacceptable, self.clone, volume, image)
        self.assertIn("2", str(error))
        self.assertNotIn(volume.name, self.plyfs.disks())
        # A volume of the size is one.
        self.assertEqual(({}, True), self.clone(self.volume(2), image))

    def test_what_plyfs_does_not_read_is_downloaded(self):
        self.glance.wait()
        for path, disk_format, why in (
            (self.qcow2(noise(MIB)), "raw", "qcow2"),
            (self.image_file(noise(MIB)), "vhd", "disk format is vhd"),
        ):
            image = self.glance.image(path, disk_format)
            volume = self.volume()
            with self.assertLogs("cinder_plyfs.driver", "WARNING") as log:
                self.assertEqual((None, False), self.clone(volume, image))
            self.assertIn("downloaded and copied, not cloned", log.output[0])
            self.assertIn(why, log.output[0])
            self.assertNotIn(volume.name, self.plyfs.disks())

    def test_a_signed_image_is_downloaded_where_cinder_verifies(self):
        image = self.image(noise(MIB), img_signature="x")
        volume = self.volume()
        self.assertEqual((None, False), self.clone(volume, image))
        cfg.CONF.set_override("verify_glance_signatures", "disabled")
        self.addCleanup(cfg.CONF.clear_override, "verify_glance_signatures")
        self.assertEqual(({}, True), self.clone(volume, image))

    def test_no_image_is_cloned_for_an_encrypted_volume(self):
        volume = self.volume(encryption_key_id=fake.ENCRYPTION_KEY_ID)
        self.assertEqual((None, False), self.clone(volume, self.image(noise(MIB))))

    def test_an_image_that_changed_behind_the_base_is_not_cloned(self):
        image = self.image(noise(MIB))
        base = self.driver._bases.name_of(image["id"])
        path = self.image_file(noise(MIB, 2))
        self.plyfs.run("base", "add", base, path, "--format", "raw", "--sha512", "0" * 128)
        volume = self.volume()
        with self.assertLogs("cinder_plyfs.driver", "WARNING") as log:
            self.assertEqual((None, False), self.clone(volume, image))
        self.assertIn(f"plyfs base rm {base}", log.output[0])

    def test_an_image_of_a_store_without_ranges_is_fetched_in_the_background(self):
        driver = self.make_driver(plyfs_image_download=True)
        image = self.image(noise(SIZE))
        volume = self.volume()
        self.assertEqual(({}, True), self.clone(volume, image, driver))
        base = driver._bases.name_of(image["id"])
        servers.wait_until(lambda: self.plyfs.json("base", "show", base)["complete"], "all of the image is here")
        self.assertEqual(noise(SIZE), self.read(volume, SIZE))

    def test_ten_requests_at_once_register_one_base(self):
        image = self.image(noise(MIB))
        volumes = [self.volume() for _ in range(10)]
        meta = self.image_service.show(self.context, image["id"])
        results = []

        def clone(volume):
            results.append(self.driver._create_on_base(self.context, volume, meta)["name"])

        threads = [threading.Thread(target=clone, args=(volume,)) for volume in volumes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual({volume.name for volume in volumes}, set(results))

    def test_where_images_are_read(self):
        for configured, known, source in (
            (None, ["http://glance:9292"], "glance+http://glance:9292/ID"),
            (None, ["https://glance/image/"], "glance://glance/image/ID"),
            (None, ["glance:9292"], "glance+http://glance:9292/ID"),
            ("glance+cloud://mycloud", ["http://other"], "glance+cloud://mycloud/ID"),
        ):
            self.assertEqual(source, images.source_of("ID", configured, known))
        self.assertRaises(images.NoBase, images.source_of, "ID", None, None)
        self.assertRaises(images.NoBase, images.source_of, "ID", "none", ["http://glance"])


class Visibility(DriverCase):
    def of_project(self, project):
        return context.RequestContext(fake.USER_ID, project, is_admin=False, auth_token="token")

    def volume_of(self, project):
        return tests_utils.create_volume(self.of_project(project), host=f"{self.driver.host}#plyfs", size=1)

    def test_the_base_of_a_private_image_is_not_cloned_for_another_project(self):
        image = self.image(noise(MIB), visibility="private", owner="a")
        meta = self.image_service.show(self.of_project("a"), image["id"])
        self.assertEqual("a", meta["owner"])
        volume = self.volume_of("a")
        self.assertEqual(({}, True), self.driver.clone_image(self.of_project("a"), volume, None, meta, self.image_service))
        # The base is there now. A request with the metadata of an earlier one gets nothing of it.
        volume = self.volume_of("b")
        error = self.assertRaises(exception.ImageUnacceptable, self.driver.clone_image, self.of_project("b"), volume, None, meta,
                                  self.image_service)
        self.assertIn("private image of another project", str(error))
        self.assertNotIn(volume.name, self.plyfs.disks())
        # Public, or an administrator's request: they may.
        administrator = context.get_admin_context()
        self.assertEqual(({}, True), self.driver.clone_image(administrator, volume, None, meta, self.image_service))
        patch = [{"op": "replace", "path": "/visibility", "value": "public"}]
        self.glance.request("PATCH", f"/v2/images/{image['id']}", patch, "application/openstack-images-v2.1-json-patch")
        volume = self.volume_of("b")
        self.assertEqual(({}, True), self.driver.clone_image(self.of_project("b"), volume, None, meta, self.image_service))

    def test_an_image_that_glance_does_not_show_is_not_cloned(self):
        image = self.image(noise(MIB))
        meta = self.image_service.show(self.context, image["id"])
        self.clone(self.volume(), image)
        self.glance.request("DELETE", f"/v2/images/{image['id']}")
        volume = self.volume()
        for request in (self.context, context.get_admin_context()):
            self.assertRaises(exception.ImageNotFound, self.driver.clone_image, request, volume, None, meta, self.image_service)
        self.assertNotIn(volume.name, self.plyfs.disks())


class Limits(DriverCase):
    def bases(self, driver):
        prefix = driver.configuration.plyfs_base_prefix
        return {base[len(prefix):] for base in self.plyfs.bases() if base.startswith(prefix)}

    def test_the_least_recently_used_of_too_many_unused_bases_goes(self):
        driver = self.make_driver(image_volume_cache_max_count=1)
        made = [self.image(noise(MIB, seed)) for seed in range(3)]
        volumes = [self.volume() for _ in made]
        for volume, image in zip(volumes, made):
            self.clone(volume, image, driver)
        self.assertEqual({image["id"] for image in made}, self.bases(driver))
        self.plyfs.run("base", "add", "not-cinders", self.image_file(noise(MIB)))
        self.addCleanup(self.plyfs.run, "base", "rm", "not-cinders")
        for volume in volumes:
            driver.delete_volume(volume)
        # The third one was used last.
        self.assertEqual({made[2]["id"]}, self.bases(driver))
        self.assertIn("not-cinders", self.plyfs.bases())
        self.assertEqual(["miss"] * 3 + ["evict"] * 2, self.notifications())
        evicted = [note["payload"]["image_id"] for note in self.notifier.notifications if note["event_type"].endswith("evict")]
        self.assertEqual([image["id"] for image in made[:2]], evicted)

    def test_unused_bases_take_no_more_than_they_may(self):
        driver = self.make_driver(image_volume_cache_max_size_gb=1)
        image = self.image(noise(4 * MIB))
        volume = self.volume()
        self.clone(volume, image, driver)
        driver.delete_volume(volume)
        self.assertEqual({image["id"]}, self.bases(driver))
        # In place of a gigabyte of images.
        driver._bases._most_bytes = 1
        driver.get_volume_stats(refresh=True)
        self.assertEqual(set(), self.bases(driver))

    def test_what_plyfs_evicts_by_itself_is_notified_of(self):
        image = self.image(noise(MIB))
        volume = self.volume()
        self.driver.get_volume_stats(refresh=True)
        self.clone(volume, image)
        self.driver.delete_volume(volume)
        self.plyfs.run("base", "prune")
        self.assertEqual(set(), self.bases(self.driver))
        self.driver.get_volume_stats(refresh=True)
        self.driver.get_volume_stats(refresh=True)
        self.assertEqual(["miss", "evict"], self.notifications())

    def test_a_base_that_is_evicted_under_a_request_is_registered_again(self):
        image = self.image(noise(MIB))
        meta = self.image_service.show(self.context, image["id"])
        found = self.driver._bases.base_for

        def evicted(*arguments):
            base = found(*arguments)
            self.driver._bases.base_for = found
            self.plyfs.run("base", "rm", base["name"])
            return base

        self.driver._bases.base_for = evicted
        volume = self.volume()
        self.driver._create_on_base(self.context, volume, meta)
        self.assertEqual(noise(MIB), self.read(volume, MIB))


class Copies(DriverCase):
    def upload(self, volume, disk_format):
        self.glance.wait()
        record = {"name": "up", "disk_format": disk_format, "container_format": "bare", "visibility": "public"}
        image = self.glance.request("POST", "/v2/images", record)
        meta = {"id": image["id"], "disk_format": disk_format, "container_format": "bare"}
        self.driver.copy_volume_to_image(self.context, volume, self.image_service, meta)
        self.assertEqual([], [disk for disk in self.plyfs.disks() if disk.endswith("-upload")])
        target = self.image_file(b"")
        with open(target, "wb") as file:
            self.image_service.download(self.context, image["id"], file)
        return target

    def test_an_upload_has_the_bytes_of_the_volume_also_while_it_is_open(self):
        volume = self.created()
        # As of a guest that writes the header of another format.
        qcow2 = self.image_file(b"")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "7M"], check=True)
        self.write(volume, qcow2.read_bytes())
        self.write(volume, noise(MIB), GIB - MIB)
        with open(self.path(volume), "r+b"):
            raw = self.upload(volume, "raw")
        self.assertEqual(0, subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", raw, self.path(volume)]).returncode)

    def test_an_upload_is_converted_and_never_probed(self):
        volume = self.created()
        self.write(volume, noise(MIB), MIB)
        target = self.upload(volume, "qcow2")
        compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", target, self.path(volume)]
        self.assertEqual(0, subprocess.run(compare).returncode)
        # The header of an image that shows a file of the host.
        evil = self.image_file(b"")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", evil, "1M"], check=True)
        self.write(volume, evil.read_bytes())
        self.assertRaises(exception.Invalid, self.upload, volume, "qcow2")
        self.assertEqual([], [disk for disk in self.plyfs.disks() if disk.endswith("-upload")])

    def test_a_download_fills_the_volume_and_keeps_its_size(self):
        self.glance.wait()
        image = self.glance.image(self.image_file(noise(3 * MIB)))
        volume = self.created(2)
        self.write(volume, b"x" * (4 * MIB))
        self.driver.copy_image_to_volume(self.context, volume, self.image_service, image["id"])
        self.assertEqual(2 * GIB, self.plyfs.disk(volume.name)["size"])
        self.assertEqual(noise(3 * MIB) + b"\0" * MIB, self.read(volume, 4 * MIB))
        # Later releases ask for it when they rewrite a volume.
        if "disable_sparse" in inspect.signature(image_utils.fetch_to_raw).parameters:
            self.driver.copy_image_to_volume(self.context, volume, self.image_service, image["id"], disable_sparse=True)
            self.assertEqual(noise(3 * MIB), self.read(volume, 3 * MIB))

    def test_a_download_of_a_lie_is_refused(self):
        self.glance.wait()
        lie = self.image_file(b"")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", lie, "1M"], check=True)
        image = self.glance.image(lie, "raw")
        volume = self.created()
        self.assertRaises(exception.ImageUnacceptable, self.driver.copy_image_to_volume, self.context, volume, self.image_service, image["id"])

    def test_conversion_that_is_disabled_is_refused(self):
        cfg.CONF.set_override("image_conversion_disable", True)
        self.addCleanup(cfg.CONF.clear_override, "image_conversion_disable")
        self.assertRaises(exception.ImageConversionNotAllowed, self.upload, self.created(), "qcow2")
