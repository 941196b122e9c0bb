"""Volumes of Cinder as disks of plyfs: see README.md."""

__version__ = "0.1.0"
