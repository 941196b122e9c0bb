"""What needs the rights of root: plyfs's control socket and its mount admit root and the daemon's user only.

cinder-volume runs as a user of its own. What must hold: these functions run in the privsep helper that Cinder starts for its own
drivers, so an operator configures neither sudo nor rootwrap for plyfs.
"""

import ctypes
import http.client
import os
import socket

import cinder.privsep

RENAME_NOREPLACE = 1
AT_FDCWD = -100


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path, timeout):
        super().__init__("plyfs", timeout=timeout)
        self._path = path

    def connect(self):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self.timeout)
        try:
            connection.connect(self._path)
        except BaseException:
            connection.close()
            raise
        self.sock = connection


def exchange(path, method, target, headers, body, timeout):
    """Sends one request to the control socket `path`. Returns the status and the text of the answer.

    Raises OSError: nobody serves the socket, the connection broke, or no answer came within `timeout` seconds. Whether the
    request was carried out is then not known.
    """
    connection = UnixConnection(path, timeout)
    try:
        connection.request(method, target, body=body, headers=headers | {"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except http.client.HTTPException as error:
        # One kind of error crosses the border of the helper.
        raise ConnectionError(f"the answer is incomplete: {error!r}") from error
    finally:
        connection.close()


def move(source, target):
    """Renames a file, and never over another one. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), source, None, target)


@cinder.privsep.sys_admin_pctxt.entrypoint
def exchange_as_root(path, method, target, headers, body, timeout):
    return exchange(path, method, target, headers, body, timeout)


@cinder.privsep.sys_admin_pctxt.entrypoint
def move_as_root(source, target):
    return move(source, target)


def is_needed(path):
    """Whether only the helper may connect to the control socket `path`."""
    if os.geteuid() == 0:
        return False
    try:
        return os.stat(path).st_uid != os.geteuid()
    except FileNotFoundError:
        # The daemon is not running, or its directory is out of reach; root can tell.
        return True
    except PermissionError:
        return True
