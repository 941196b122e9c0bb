"""Volumes of Cinder as disks of plyfs.

A volume is the disk of its name, a snapshot of it a snapshot of that disk. A volume of an image is a disk on the base of the
image: no data moves. Nova gets the path of the disk, as of a volume of GPFS, and QEMU opens it as a raw file.

What must hold:
- Each call has the same result when plyfs restarts in its middle: the client sends the request again.
- A disk that Cinder does not know is named in the log, with what to do. So is a volume whose disk is gone.
- The data of a volume is deleted only for a request to delete it.
"""

import contextlib
import math
import socket
import time
import uuid

from cinder import context as cinder_context
from cinder import exception, interface, objects
from cinder.common import constants
from cinder.image import image_utils
from cinder.volume import configuration, driver, volume_utils
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import units

import cinder_plyfs
from cinder_plyfs import images, options
from cinder_plyfs.client import Client, Refused, Unanswered

LOG = logging.getLogger(__name__)

cfg.CONF.register_opts(options.OPTIONS, group=configuration.SHARED_CONF_GROUP)

# Of the clone that is uploaded to Glance.
UPLOAD = "-upload"
# Of the periodic report: Cinder asks again in a minute.
SHORT_PATIENCE = 3


def whole_gib(size):
    return math.ceil(size / units.Gi)


@interface.volumedriver
class PlyfsDriver(driver.VolumeDriver):
    """Volumes as disks of the plyfs daemon of this host."""

    VERSION = cinder_plyfs.__version__
    CI_WIKI_NAME = "plyfs_CI"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(options.OPTIONS)
        self._client = None
        self._bases = None
        # Disks of creations without an answer: they may exist, while Cinder creates the volume on another host.
        self._unsettled = set()
        # When plyfs answered last, and the capacities of then.
        self._answered, self._capacity = -math.inf, {}

    @staticmethod
    def get_driver_options():
        return options.OPTIONS

    # Start

    def do_setup(self, context):
        conf = self.configuration
        self._client = Client(conf.plyfs_socket, conf.plyfs_patience, conf.plyfs_timeout)
        self._bases = images.Bases(self._client, conf, self.host)

    def check_for_setup_error(self):
        with self._answers("the driver cannot start"):
            status = self._client.status()
            pool = self._client.pool(self.configuration.plyfs_pool)
        LOG.info("plyfs %(version)s serves %(mount)s", {"version": status["version"], "mount": status["mount"]})
        if pool["error"]:
            LOG.warning("Pool %(pool)s is %(state)s: %(error)s", pool | {"pool": pool["name"]})
        self._bases.check_source()
        with self._answers("the driver cannot start"):
            self._report_orphans()

    def _report_orphans(self):
        """Names disks that look like volumes of this backend and are none. An upload that a crash interrupted is removed."""
        for disk in self._client.disks():
            name = disk["name"]
            if name.endswith(UPLOAD) and volume_utils.extract_id_from_volume_name(name[: -len(UPLOAD)]):
                self._remove_upload(name)
                continue
            place = self._place_of(name)
            if place is not None and place != self.host:
                LOG.warning("Disk %(disk)s has the name of a volume, and %(place)s. After a look at it, remove it with "
                            "`plyfs disk rm %(disk)s`, or keep it with `cinder manage`.",
                            {"disk": name, "place": f"that volume is on {place}" if place else "Cinder has no such volume"})

    def _place_of(self, name):
        """The backend of the volume that has the disk of this name, "" when there is none, None for another kind of name."""
        volume_id = volume_utils.extract_id_from_volume_name(name)
        with contextlib.suppress(ValueError, TypeError):
            uuid.UUID(volume_id)
            try:
                volume = objects.Volume.get_by_id(cinder_context.get_admin_context(), volume_id)
            except exception.VolumeNotFound:
                return self._place_of_migrated(volume_id)
            return volume_utils.extract_host(volume.host) if volume.host else ""
        return None

    def _place_of_migrated(self, name_id):
        """As `_place_of`, of a volume that has kept the name of its disk through a migration."""
        mine = objects.VolumeList.get_all_by_host(cinder_context.get_admin_context(), self.host)
        return self.host if any(volume.name_id == name_id for volume in mine) else ""

    # Errors

    @contextlib.contextmanager
    def _answers(self, what, disk=None):
        """Makes errors of plyfs those that Cinder's manager knows. `disk`: the name of a disk that is being created."""
        try:
            yield
        except Unanswered as error:
            if disk is not None:
                self._unsettled.add(disk)
            raise exception.VolumeBackendAPIException(data=f"{what}: {error}") from error
        except Refused as error:
            raise exception.VolumeBackendAPIException(data=f"{what}: {error}") from error
        if disk is not None:
            self._unsettled.discard(disk)

    def _settle(self):
        """Removes disks of creations without an answer, unless they are volumes of this backend now."""
        for name in sorted(self._unsettled):
            # Of a volume that is here: Cinder retried, or the user deletes what has failed.
            if self._place_of(name) != self.host and self._client.remove_disk(name):
                LOG.info("Disk %s is removed: its creation had no answer, and the volume is not on this backend.", name)
            self._unsettled.discard(name)

    # Volumes

    def _refuse_encryption(self, volume):
        if volume.encryption_key_id is not None:
            raise exception.NotSupportedOperation(
                operation="volumes of an encrypted type: plyfs encrypts disks itself, see `plyfs disk create --help`"
            )

    def _create(self, volume, key, **content):
        """Creates the disk of a volume."""
        self._refuse_encryption(volume)
        if content.get("from") is None:
            content["pool"] = self.configuration.plyfs_pool
        content = {"name": volume.name, "size": volume.size * units.Gi} | content
        with self._answers(f"volume {volume.id} is not created", disk=volume.name):
            self._client.create_disk(f"cinder-{key}-{volume.id}", **content)

    def create_volume(self, volume):
        self._create(volume, "blank")

    def create_volume_from_snapshot(self, volume, snapshot):
        self._create(volume, "snapshot", **{"from": f"{snapshot.volume_name}@{snapshot.name}"})

    def create_cloned_volume(self, volume, src_vref):
        self._create(volume, "clone", **{"from": src_vref.name})

    def delete_volume(self, volume):
        name = volume.name
        try:
            with self._unless_busy(f"volume {volume.id} is not deleted", exception.VolumeIsBusy(volume_name=name)):
                try:
                    existed = self._client.remove_disk(name)
                except Refused as error:
                    if error.kind != "may_be_in_use":
                        raise
                    # A worker of plyfs died, and the next one cannot tell who has the disk open. Cinder knows of no server that
                    # has it; a process that has it all the same keeps its bytes until it closes the disk.
                    LOG.warning("%s. Cinder has it detached: it is removed.", error)
                    existed = self._client.remove_disk(name, force=True)
        finally:
            self._evict_surplus()
        if not existed:
            LOG.warning("Volume %(volume)s: disk %(disk)s is gone already; the volume is deleted.",
                        {"volume": volume.id, "disk": name})

    @contextlib.contextmanager
    def _unless_busy(self, what, busy):
        """As `_answers`, and raises `busy` when plyfs refuses because of a client or a snapshot: Cinder makes the object available
        again."""
        with self._answers(what):
            try:
                yield
            except Refused as error:
                if error.kind not in ("in_use", "may_be_in_use"):
                    raise
                LOG.error("%(what)s: %(error)s", {"what": what, "error": error})
                raise busy from error

    def extend_volume(self, volume, new_size):
        with self._answers(f"volume {volume.id} is not extended"):
            self._client.resize_disk(volume.name, new_size * units.Gi)

    def create_snapshot(self, snapshot):
        with self._answers(f"snapshot {snapshot.id} is not taken"):
            self._client.take_snapshot(snapshot.volume_name, snapshot.name, f"cinder-snapshot-{snapshot.id}")

    def delete_snapshot(self, snapshot):
        with self._unless_busy(f"snapshot {snapshot.id} is not deleted", exception.SnapshotIsBusy(snapshot_name=snapshot.name)):
            existed = self._client.remove_snapshot(snapshot.volume_name, snapshot.name)
        if not existed:
            LOG.warning("Snapshot %(snapshot)s: %(name)s is gone already; the snapshot is deleted.",
                        {"snapshot": snapshot.id, "name": f"{snapshot.volume_name}@{snapshot.name}"})

    def revert_to_snapshot(self, context, volume, snapshot):
        with self._answers(f"volume {volume.id} is not reverted"):
            # A key for this call alone: a later one reverts again.
            disk = self._client.roll_back(volume.name, snapshot.name, f"cinder-revert-{uuid.uuid4()}")
            if disk["size"] < volume.size * units.Gi:
                self._client.resize_disk(volume.name, volume.size * units.Gi)

    def snapshot_revert_use_temp_snapshot(self):
        # plyfs reverts a disk wholly or not at all.
        return False

    # Images

    def clone_image(self, context, volume, image_location, image_meta, image_service):
        """Makes the volume a disk on the base of the image. Otherwise Cinder downloads the image."""
        image_id = image_meta["id"]
        # Now, and with the requester's token: what Cinder read for this request may be of an earlier attempt.
        image = image_service.show(context, image_id)
        images.check_visible(context, volume, image)
        if volume.encryption_key_id is not None:
            return None, False
        try:
            images.check_usable(image, image_location)
            self._create_on_base(context, volume, image)
        except images.NoBase as error:
            LOG.warning("Volume %(volume)s: image %(image)s is downloaded and copied, not cloned: %(error)s",
                        {"volume": volume.id, "image": image_id, "error": error})
            return None, False
        finally:
            self._evict_surplus()
        return {}, True

    def _create_on_base(self, context, volume, image):
        for _ in range(5):
            with self._answers(f"the base of image {image['id']} for volume {volume.id}"):
                base = self._bases.base_for(context, image)
            image_utils.check_virtual_size(base["size"], volume.size, image["id"])
            try:
                content = {"name": volume.name, "size": volume.size * units.Gi, "base": base["name"], "pool": self.configuration.plyfs_pool}
                with self._answers(f"volume {volume.id} is not created", disk=volume.name):
                    return self._client.create_disk(f"cinder-image-{volume.id}", **content)
            except exception.VolumeBackendAPIException as error:
                cause = error.__cause__
                if not isinstance(cause, Refused) or cause.kind != "not_found":
                    raise
                # The base was unused until now, and has just been evicted.
        raise images.NoBase(f"base {base['name']} is evicted again and again")

    def copy_image_to_volume(self, context, volume, image_service, image_id, disable_sparse=False):
        with self._answers(f"image {image_id} is not copied"):
            path = self._client.disk(volume.name)["path"]
        more = {"disable_sparse": True} if disable_sparse else {}
        image_utils.fetch_to_raw(context, image_service, image_id, path, self.configuration.volume_dd_blocksize, size=volume.size, **more)
        with self._answers(f"volume {volume.id} has the size of the image"):
            if self._client.disk(volume.name)["size"] < volume.size * units.Gi:
                self._client.resize_disk(volume.name, volume.size * units.Gi)

    def copy_volume_to_image(self, context, volume, image_service, image_meta):
        """Uploads a clone: one moment of the volume, also while a server writes to it."""
        name = f"{volume.name}{UPLOAD}"
        with self._answers(f"volume {volume.id} is not uploaded"):
            # Of an upload that was interrupted.
            self._client.remove_disk(name)
            disk = self._client.create_disk(f"cinder-upload-{uuid.uuid4()}", name=name, **{"from": volume.name})
        try:
            images.upload(context, image_service, image_meta, disk["path"], volume)
        finally:
            self._remove_upload(name)

    def _remove_upload(self, name):
        try:
            self._client.remove_disk(name)
        except (Refused, Unanswered) as error:
            LOG.warning("Disk %(disk)s, of an upload to Glance, stays until cinder-volume starts again: %(error)s",
                        {"disk": name, "error": error})

    def _evict_surplus(self):
        """The limits of unused bases. They hold again later when plyfs does not answer now."""
        try:
            self._bases.evict_surplus(cinder_context.get_admin_context(), SHORT_PATIENCE)
        except (Refused, Unanswered) as error:
            LOG.warning("Unused bases are not counted: %s", error)

    # Connections

    def _check_connector(self, volume, connector):
        """A disk is a file of this host."""
        names = self.configuration.plyfs_connect_hosts or [socket.gethostname(), volume_utils.extract_host(self.host, "host")]
        if connector.get("host") not in names:
            raise exception.VolumeBackendAPIException(
                data=f"volume {volume.id} is a file of host {names[0]}, and host {connector.get('host')} cannot attach it. Start the server "
                     f"on {names[0]}; plyfs_connect_hosts in cinder.conf has the names of this host"
            )

    def initialize_connection(self, volume, connector, **kwargs):
        self._check_connector(volume, connector)
        with self._answers(f"volume {volume.id} is not connected"):
            disk = self._client.disk(volume.name)
        if disk["error"]:
            raise exception.VolumeBackendAPIException(data=f"volume {volume.id} is not connected: disk {volume.name}: {disk['error']}")
        return {"driver_volume_type": "gpfs", "data": {"name": volume.name, "device_path": disk["path"]}}

    def terminate_connection(self, volume, connector, **kwargs):
        pass

    def ensure_export(self, context, volume):
        pass

    def create_export(self, context, volume, connector):
        pass

    def remove_export(self, context, volume):
        pass

    def local_path(self, volume):
        with self._answers(f"volume {volume.id} has no path"):
            return self._client.disk(volume.name)["path"]

    # Existing disks

    def _existing(self, existing_ref):
        name = existing_ref.get("source-name")
        if not name:
            raise exception.ManageExistingInvalidReference(existing_ref=existing_ref, reason="give the disk's name as source-name")
        try:
            disk = self._client.disk(name)
        except Refused as error:
            raise exception.ManageExistingInvalidReference(existing_ref=existing_ref, reason=str(error)) from error
        except Unanswered as error:
            raise exception.VolumeBackendAPIException(data=str(error)) from error
        why = self._why_not(disk)
        if why is not None:
            raise exception.ManageExistingInvalidReference(existing_ref=existing_ref, reason=why)
        return disk

    def _why_not(self, disk):
        """Why a disk cannot become a volume."""
        if self._place_of(disk["name"]) == self.host:
            return "it is a volume already"
        if disk["open_handles"] != 0:
            return "a client has it open"
        return disk["error"]

    def manage_existing_get_size(self, volume, existing_ref):
        return whole_gib(self._existing(existing_ref)["size"])

    def manage_existing(self, volume, existing_ref):
        disk = self._existing(existing_ref)
        with self._answers(f"disk {disk['name']} does not become volume {volume.id}"):
            size = whole_gib(disk["size"]) * units.Gi
            if disk["size"] < size:
                self._client.resize_disk(disk["name"], size)
            if disk["name"] == volume.name:
                return
            try:
                self._client.move_disk(disk, volume.name)
            except OSError as error:
                raise exception.VolumeBackendAPIException(data=f"disk {disk['name']} is not renamed: {error}") from error

    def get_manageable_volumes(self, cinder_volumes, marker, limit, offset, sort_keys, sort_dirs):
        managed = {volume.name: volume.id for volume in cinder_volumes}
        with self._answers("disks cannot be listed"):
            disks = self._client.disks()
        entries = []
        for disk in disks:
            known = managed.get(disk["name"])
            why = "it is a volume already" if known else self._why_not(disk)
            entries.append({
                "reference": {"source-name": disk["name"]},
                "size": whole_gib(disk["size"]),
                "safe_to_manage": why is None,
                "reason_not_safe": why,
                "cinder_id": known,
                "extra_info": f"base {disk['base']}" if disk["base"] else None,
            })
        return volume_utils.paginate_entries_list(entries, marker, limit, offset, sort_keys, sort_dirs)

    def unmanage(self, volume):
        # The disk stays, under the name of the volume.
        pass

    # Reports

    def _update_volume_stats(self):
        conf = self.configuration
        stats = {
            "volume_backend_name": conf.safe_get("volume_backend_name") or "plyfs",
            "vendor_name": "plyfs",
            "driver_version": self.VERSION,
            "storage_protocol": constants.FILE,
            "total_capacity_gb": 0,
            "free_capacity_gb": 0,
            "reserved_percentage": conf.safe_get("reserved_percentage"),
            "max_over_subscription_ratio": conf.safe_get("max_over_subscription_ratio"),
            "thin_provisioning_support": True,
            "thick_provisioning_support": False,
            "QoS_support": False,
            "multiattach": False,
            # Nova has no way to tell a guest that its file has grown.
            "online_extend_support": False,
            # A new disk reads zeros.
            "sparse_copy_volume": True,
            "filter_function": self.get_filter_function(),
            "goodness_function": self.get_goodness_function(),
            "backend_state": "down",
        }
        try:
            self._capacity = self._measure()
            self._answered = time.monotonic()
        except (Refused, Unanswered) as error:
            # A restart is no reason to place volumes elsewhere: requests wait for its end.
            if time.monotonic() - self._answered > self._client.patience:
                self._capacity = {"backend_state": "down"}
                LOG.error("plyfs is down, no volume is placed here: %s", error)
            else:
                LOG.warning("The capacity is that of a moment ago: %s", error)
        self._stats = stats | self._capacity

    def _measure(self):
        """What changes of the report; and what is due from time to time."""
        pool = self._client.pool(self.configuration.plyfs_pool, patience=SHORT_PATIENCE)
        provisioned = sum(disk["size"] for disk in self._client.disks(patience=SHORT_PATIENCE))
        self._settle()
        self._evict_surplus()
        self._bases.follow(cinder_context.get_admin_context(), patience=SHORT_PATIENCE)
        return {
            "total_capacity_gb": round((pool["total_bytes"] or 0) / units.Gi, 2),
            "free_capacity_gb": round((pool["available_bytes"] or 0) / units.Gi, 2),
            "provisioned_capacity_gb": round(provisioned / units.Gi, 2),
            "backend_state": "down" if pool["state"] == "unavailable" else "up",
        }
