"""The section [plyfs] of nova.conf."""

from oslo_config import cfg

import nova.conf

CONF = nova.conf.CONF

OPTIONS = [
    cfg.StrOpt(
        "socket",
        default="/var/lib/plyfs/control.sock",
        help="Control socket of the plyfs daemon of this host. It lies in the directory of the store.",
    ),
    cfg.StrOpt(
        "image_source",
        default=None,
        help="""
Where plyfs reads an image: a source of `plyfs base add` with {image_id} in place of the ID of the image, for example
glance+cloud://mycloud/{image_id}. The cloud is one of [[http.clouds]] in plyfs.toml: plyfs reads images with its own
credentials, and never gets a token of a user. Without this option the driver uses the bases g-ID that are there, and all
other images are downloaded as without plyfs.
""",
    ),
    cfg.StrOpt("command", default="plyfs", help="The program plyfs, which exports and imports disks in cold migrations."),
    cfg.IntOpt(
        "retry_seconds",
        default=60,
        min=1,
        help="For how many seconds a request is sent again while the daemon restarts, before the operation of Nova fails.",
    ),
]

CONF.register_opts(OPTIONS, group="plyfs")


def list_opts():
    """For oslo-config-generator."""
    return [("plyfs", OPTIONS)]
