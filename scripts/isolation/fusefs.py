"""A FUSE filesystem with one read-only file that works, hangs, returns wrong bytes, fails or is slow, as its mode says.

It implements the protocol of linux/fuse.h, version 7.31, in one thread. A request that hangs is kept without an answer, which
does not delay others.
"""

import ctypes
import os
import select
import signal
import stat
import struct
import time

from .content import KIB, MIB, content
from .servers import FORK

MODES = ["ok", "hang", "hang_everything", "lie", "fail", "slow", "short"]
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH = 1, 2, 3, 14, 15, 17, 18, 25
INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 26, 27, 28, 29, 36, 42
ROOT, FILE = 1, 2
DIRECT_IO = 1
NAME = b"image"
libc = ctypes.CDLL(None, use_errno=True)


class FileSystem:
    """Mounted on `mount` for as long as its process lives; the file is `mount`/image."""

    def __init__(self, mount, size, seed):
        self.mount, self.size, self.seed = mount, size, seed
        self.number, self.reads = FORK.Value("i", 0), FORK.Value("q", 0)
        mount.mkdir()
        self.fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={128 * KIB}"
        if libc.mount(b"isolation", os.fsencode(mount), b"fuse", 6, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"mount {mount}")
        self.process = FORK.Process(target=self.run, daemon=True)
        self.process.start()
        os.close(self.fd)
        self.path = mount / NAME.decode()

    def mode(self, name):
        self.number.value = MODES.index(name)

    def end(self):
        # Closing the last descriptor ends the connection: waiting requests fail.
        self.process.kill()
        self.process.join(5)
        libc.umount2(os.fsencode(self.mount), 2)

    def attributes(self, node):
        mode, size = (stat.S_IFDIR | 0o755, 0) if node == ROOT else (stat.S_IFREG | 0o444, self.size)
        return struct.pack("<6Q10I", node, size, size // 512, 1, 1, 1, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def run(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.nice(10)
        held = []
        while True:
            mode = MODES[self.number.value]
            if held and mode not in ("hang", "hang_everything"):
                # Requests that hung are answered now.
                for late in held:
                    self.one(late, mode)
                held = []
            try:
                if not select.select([self.fd], [], [], 0.05)[0]:
                    continue
                request = os.read(self.fd, MIB + 4096)
            except OSError as error:
                if error.errno == 19:
                    return
                continue
            opcode = struct.unpack_from("<I", request, 4)[0]
            if opcode == READ:
                self.reads.value += 1
            if (mode == "hang" and opcode == READ) or (mode == "hang_everything" and opcode not in (INIT, FORGET, BATCH_FORGET, INTERRUPT)):
                held.append(request)
                continue
            self.one(request, mode)

    def answer(self, unique, body=b"", error=0):
        try:
            os.write(self.fd, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)
        except OSError:
            pass

    def one(self, request, mode):
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode == INIT:
            self.answer(unique, struct.pack("<4I2H2I2H8I", 7, 31, 128 * KIB, 1, 16, 12, 128 * KIB, 1, 32, 0, *[0] * 7, 0))
        elif opcode == LOOKUP:
            if request[40:].rstrip(b"\0") != NAME:
                return self.answer(unique, error=2)
            self.answer(unique, struct.pack("<4Q2I", FILE, 0, 1, 1, 0, 0) + self.attributes(FILE))
        elif opcode == GETATTR:
            self.answer(unique, struct.pack("<Q2I", 1, 0, 0) + self.attributes(node))
        elif opcode in (OPEN, OPENDIR):
            self.answer(unique, struct.pack("<Q2I", 1, DIRECT_IO if opcode == OPEN else 0, 0))
        elif opcode == READ:
            _, offset, length = struct.unpack_from("<QQI", request, 40)
            if mode == "fail":
                return self.answer(unique, error=5)
            if mode == "slow":
                time.sleep(0.05)
            data = content(self.seed + (mode == "lie"), offset, max(0, min(length, self.size - offset)))
            self.answer(unique, data[: len(data) // 2] if mode == "short" else data)
        elif opcode == READDIR:
            self.answer(unique)
        elif opcode == STATFS:
            self.answer(unique, struct.pack("<5Q4I24x", 1 << 20, 0, 0, 2, 0, 4096, 255, 4096, 0))
        elif opcode in (RELEASE, RELEASEDIR, FLUSH):
            self.answer(unique)
        elif opcode not in (FORGET, BATCH_FORGET, INTERRUPT):
            self.answer(unique, error=38)
