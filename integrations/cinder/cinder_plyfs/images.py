"""Bases for images of Glance: which image becomes one, who may have disks of it, and which go again.

What must hold:
- A disk on the base of an image is made only for a request that Glance shows this image now. That plyfs has its bytes tells
  nothing about who may see them.
- A base is used only while it has the digest that Glance has for the image.
- The limits of Cinder's image-volume cache hold for bases that nothing needs. plyfs itself refuses the removal of others.
"""

from cinder import exception
from cinder.image import cache as image_cache
from cinder.image import image_utils
from cinder.volume import volume_utils
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import units

from cinder_plyfs.client import Refused

LOG = logging.getLogger(__name__)

# What plyfs reads as it is; Cinder converts the rest.
FORMATS = ("raw", "iso", "qcow2", "vmdk")
# States in which plyfs does not, or may not, show the bytes of the image.
USELESS = ("refused", "failed", "given_up", "changed")
SIGNATURE = ("img_signature", "img_signature_hash_method", "img_signature_certificate_uuid", "img_signature_key_type")


class NoBase(Exception):
    """The image cannot be a base: Cinder downloads it."""


def source_of(image_id, configured, servers):
    """What plyfs is told to read. `servers`: glance_api_servers of cinder.conf."""
    place = configured or (servers[0] if servers else None)
    if place is None:
        raise NoBase("neither plyfs_image_source nor glance_api_servers is set in cinder.conf")
    if place == "none":
        raise NoBase("plyfs_image_source is 'none'")
    if place.startswith("https://"):
        place = "glance://" + place[len("https://"):]
    elif place.startswith("http://"):
        place = "glance+http://" + place[len("http://"):]
    elif "://" not in place:
        # As Cinder reads it.
        place = "glance+http://" + place
    return f"{place.rstrip('/')}/{image_id}"


def check_visible(context, volume, image):
    """Raises ImageUnacceptable unless the project of the volume may have the bytes of the image.

    `image` is Glance's answer for the requester's own token, so it is visible to the requester: public, community, their
    project's, or shared with it. What is left is a private image that an administrator sees, or that a Glance shows which does
    not know the requester (noauth).
    """
    owner = image.get("owner")
    if image.get("visibility") == "private" and owner and owner != volume.project_id and not context.is_admin:
        LOG.error("Volume %(volume)s: image %(image)s is a private image of project %(owner)s, and project %(project)s may not "
                  "see it.", {"volume": volume.id, "image": image["id"], "owner": owner, "project": volume.project_id})
        raise exception.ImageUnacceptable(image_id=image["id"], reason="it is a private image of another project.")


def check_usable(image, location):
    """Raises NoBase for an image that plyfs does not read, or whose bytes Cinder itself has to check."""
    if image.get("container_format") not in (None, "bare"):
        raise NoBase(f"its container format is {image['container_format']}")
    if image.get("disk_format") not in FORMATS:
        raise NoBase(f"its disk format is {image.get('disk_format')}")
    if location and location[0] and location[0].startswith("cinder://"):
        raise NoBase("its data is a volume of Cinder")
    properties = image.get("properties") or {}
    if cfg.CONF.verify_glance_signatures != "disabled" and any(properties.get(name) for name in SIGNATURE):
        raise NoBase("it is signed, and Cinder verifies the signature of a whole file (verify_glance_signatures)")


class Bases:
    """The bases of one backend."""

    def __init__(self, client, configuration, host):
        self._client = client
        self._host = host
        self._prefix = configuration.plyfs_base_prefix
        self._source = configuration.plyfs_image_source
        self._download = configuration.plyfs_image_download
        self._most_bytes = int(configuration.safe_get("image_volume_cache_max_size_gb") or 0) * units.Gi
        self._most = int(configuration.safe_get("image_volume_cache_max_count") or 0)
        # For its notifications; entries of its own are volumes, and there are none.
        self._cache = image_cache.ImageVolumeCache(None, None)
        self._seen = None

    def name_of(self, image_id):
        return f"{self._prefix}{image_id}"

    def check_source(self):
        """Says once at the start that no image will be cloned."""
        try:
            source_of("", self._source, cfg.CONF.glance_api_servers)
        except NoBase as error:
            LOG.warning("Every image is downloaded, none is cloned: %s.", error)

    def base_for(self, context, image):
        """The base of an image, registered when it is missing. Raises NoBase and Refused."""
        name = self.name_of(image["id"])
        base = self._client.base(name)
        action = "hit"
        if base is None:
            action = "miss"
            source = source_of(image["id"], self._source, cfg.CONF.glance_api_servers)
            content = {"name": name, "source": source}
            if self._download:
                content["download"] = True
            try:
                base = self._client.add_base(f"cinder-base-{image['id']}", **content)
            except Refused as error:
                if error.kind != "exists":
                    raise NoBase(str(error)) from error
                # Another request was faster.
                base = self._client.base(name)
                if base is None:
                    raise
        self._notify(context, image["id"], action)
        if base["state"] in USELESS:
            raise NoBase(f"base {name} is {base['state']}: {base['error']}; see `plyfs base show {name}`")
        digest = image.get("os_hash_value")
        for algorithm in ("sha256", "sha512"):
            if image.get("os_hash_algo") == algorithm and base[algorithm] not in (None, digest):
                raise NoBase(f"base {name} has another {algorithm} than the image; remove it: `plyfs base rm {name}`")
        return base

    def evict_surplus(self, context, patience=None):
        """Removes unused bases, the least recently used first, until the limits hold."""
        if not self._most and not self._most_bytes:
            return
        unused = [base for base in self._client.unused_bases(patience) if base["name"].startswith(self._prefix)]
        count, total = len(unused), sum(base["bytes"] for base in unused)
        for base in unused:
            too_many = self._most and count > self._most
            too_large = self._most_bytes and total > self._most_bytes and base["bytes"] > 0
            if not too_many and not too_large:
                continue
            try:
                removed = self._client.remove_base(base["name"])
            except Refused as error:
                # A request was faster and needs it.
                LOG.info("Base %(base)s stays: %(error)s", {"base": base["name"], "error": error})
                continue
            count, total = count - 1, total - base["bytes"]
            if removed:
                LOG.info("Base %(base)s is removed: the limits of image_volume_cache_max_count and image_volume_cache_max_size_gb",
                         {"base": base["name"]})
                self._notify(context, base["name"][len(self._prefix):], "evict")

    def follow(self, context, patience=None):
        """Notifies of evictions that plyfs did by itself ([bases] unused_age and unused_limit). To be called again and again."""
        after, worker = self._seen or (None, None)
        events = self._client.events(after, worker, patience)
        numbered = [event for event in events if event.get("number") is not None]
        if numbered:
            self._seen = (numbered[-1]["number"], numbered[-1]["worker"])
        elif self._seen is None:
            self._seen = (0, 0)
        if after is None:
            # They happened before this driver began.
            return
        for event in numbered:
            base = event.get("base") or ""
            if event["event"] == "base.removed" and base.startswith(self._prefix):
                self._notify(context, base[len(self._prefix):], "evict")

    def _notify(self, context, image_id, action):
        # Names and content are Cinder's.
        self._cache._notify_cache_action(context, image_id, self._host, action)


def upload(context, image_service, image_meta, path, volume):
    """Uploads a raw file. It is taken for raw also when a guest has written the header of another format. Only for a compressed
    container Cinder's own conversion looks at the format, and refuses what names other files."""
    if image_meta.get("container_format") == "compressed" or image_meta["disk_format"] == "raw":
        volume_utils.upload_volume(context, image_service, image_meta, path, volume)
        return
    image_utils.check_image_conversion_disable(image_meta["disk_format"], "raw", image_meta["id"], upload=True)
    with image_utils.temporary_file(prefix="vol_upload_") as converted:
        out_format = image_utils.fixup_disk_format(image_meta["disk_format"])
        image_utils.convert_image(path, converted, out_format, src_format="raw", run_as_root=True, compress=True,
                                  image_id=image_meta["id"])
        volume_utils.upload_volume(context, image_service, image_meta, converted, volume,
                                   volume_format=image_meta["disk_format"])
