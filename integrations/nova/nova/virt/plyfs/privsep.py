"""What needs root: only root and the daemon's own user may use the control socket, and own files in the mount.

nova-compute runs as the user nova, and calls these functions through its privileged helper, as its own ones of nova.privsep.
"""

import http.client
import os
import socket

from oslo_concurrency import processutils

import nova.privsep


class _Connection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("plyfs", timeout=timeout)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@nova.privsep.sys_admin_pctxt.entrypoint
def request(path, timeout, method, target, body, headers):
    """Sends one request to the control socket `path`.

    :returns: its status and body; status 0, and the reason in place of the body, when there was no answer
    """
    connection = _Connection(path, timeout)
    try:
        connection.request(method, target, body=body, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error) or type(error).__name__
    finally:
        connection.close()


@nova.privsep.sys_admin_pctxt.entrypoint
def give(path, uid, gid):
    """Gives a new disk to Nova's user, with the mode that qemu-img gives an image. libvirt gives it to QEMU's user later.

    :returns: None, or the number of the error
    """
    try:
        os.chown(path, uid, gid)
        os.chmod(path, 0o644)
    except OSError as error:
        return error.errno
    return None


@nova.privsep.sys_admin_pctxt.entrypoint
def command(*words):
    """Runs the program plyfs.

    :raises: ProcessExecutionError
    """
    processutils.execute(*words)


@nova.privsep.sys_admin_pctxt.entrypoint
def take(path, uid):
    """Gives a file that the program wrote to Nova's user, who copies it to another host."""
    os.chown(path, uid, -1)
