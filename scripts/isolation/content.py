"""Contents of images and disks: every block of 4 KiB contains its seed and number, so wrong bytes are detected without a copy."""

import hashlib

BLOCK = 4096
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class WrongBytes(Exception):
    """A read returned bytes other than expected."""


def block(seed, number):
    return (b"%08x%08x" % (seed & 0xFFFFFFFF, number & 0xFFFFFFFF)) * (BLOCK // 16)


def content(seed, offset, length):
    """The bytes of a range of the image `seed`."""
    first, last = offset // BLOCK, (offset + length + BLOCK - 1) // BLOCK
    return b"".join(block(seed, number) for number in range(first, last))[offset - first * BLOCK :][:length]


def compare(found, expected, what):
    if found == expected:
        return
    if len(found) != len(expected):
        raise WrongBytes(f"{what}: {len(found)} bytes, expected {len(expected)}")
    at = next(i for i in range(len(found)) if found[i] != expected[i])
    raise WrongBytes(f"{what}: at {at:#x} {found[at : at + 16]!r}, expected {expected[at : at + 16]!r}")


def write_image(path, seed, size):
    with open(path, "wb") as file:
        for offset in range(0, size, MIB):
            file.write(content(seed, offset, min(MIB, size - offset)))


def sha256(seed, size):
    digest = hashlib.sha256()
    for offset in range(0, size, MIB):
        digest.update(content(seed, offset, min(MIB, size - offset)))
    return digest.hexdigest()
