"""Nova's libvirt driver with root disks in plyfs: `[DEFAULT] compute_driver = plyfs.PlyfsDriver`.

Nova imports the driver as `nova.virt.plyfs`, so this package is installed beside Nova's own modules.
"""

from nova.virt.plyfs.driver import PlyfsDriver

__all__ = ["PlyfsDriver"]
