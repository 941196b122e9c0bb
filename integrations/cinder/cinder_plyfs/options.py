"""Options of a backend's section in cinder.conf."""

from oslo_config import cfg

OPTIONS = [
    cfg.StrOpt("plyfs_socket", default="/var/lib/plyfs/control.sock",
               help="Control socket of the plyfs daemon of this host: control.sock in the directory of its store."),
    cfg.StrOpt("plyfs_pool", default="default",
               help="Pool of plyfs in which the data of new volumes is kept. Clones stay in the pool of their origin."),
    cfg.StrOpt("plyfs_image_source",
               help="Where plyfs reads images: 'glance+cloud://NAME' for a cloud of plyfs.toml ([[http.clouds]]), "
                    "'glance://HOST[:PORT]' for a Glance by https, 'glance+http://HOST[:PORT]' by http, or 'none': every image is "
                    "downloaded. By default the first of glance_api_servers."),
    cfg.BoolOpt("plyfs_image_download", default=False,
                help="Whether plyfs fetches all of an image in the background when Glance's store has no ranges. By default Cinder "
                     "downloads such an image and copies it."),
    cfg.StrOpt("plyfs_base_prefix", default="cinder-", regex="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
               help="Beginning of the names of bases that the driver registers; the ID of the image follows. The limits of "
                    "image_volume_cache_max_size_gb and image_volume_cache_max_count count these."),
    cfg.ListOpt("plyfs_connect_hosts", default=[],
                help="Names of this host in Nova ([DEFAULT] host). Servers elsewhere cannot attach a volume of it. By default the "
                     "host name, and host of cinder.conf."),
    cfg.FloatOpt("plyfs_patience", default=60, min=0,
                 help="Seconds for which a request is sent again while the daemon restarts."),
    cfg.FloatOpt("plyfs_timeout", default=60, min=1,
                 help="Seconds that the daemon may take for one answer."),
]
