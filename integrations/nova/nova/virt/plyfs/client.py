"""A client of the control API of plyfs (docs/api.md) that outlives restarts of the daemon.

A request that got no answer is sent again until `[plyfs] retry_seconds` are over. Creations carry an Idempotency-Key, so
that the second request returns what the first one made. All other changes here have the same result when they are made
twice; a removal that finds nothing is done.
"""

import json
import os
import time
import urllib.parse
import uuid

from oslo_log import log as logging

from nova import exception
from nova.virt.plyfs import conf, privsep

CONF = conf.CONF
LOG = logging.getLogger(__name__)


class PlyfsError(exception.NovaException):
    """plyfs refused or failed a request."""

    msg_fmt = "plyfs: %(reason)s"

    def __init__(self, reason, kind=""):
        super().__init__(reason=reason)
        self.kind = kind


class PlyfsUnavailable(PlyfsError):
    """The daemon did not answer for `[plyfs] retry_seconds`."""


class Retry:
    """Pauses between attempts, up to `[plyfs] retry_seconds` in all."""

    def __init__(self):
        self._end = time.monotonic() + CONF.plyfs.retry_seconds
        self._pause = 0.05

    def wait(self, reason):
        """:raises: PlyfsUnavailable with the reason when the time is over"""
        if time.monotonic() + self._pause > self._end:
            raise PlyfsUnavailable(
                f"{reason}, for {CONF.plyfs.retry_seconds} seconds ([plyfs] retry_seconds); is the daemon running "
                "(systemctl status plyfs), and does [plyfs] socket name its socket?"
            )
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.5, 1)


def _request(method, target, body=None, create=False):
    headers = {"Content-Type": "application/json"}
    if create:
        headers["Idempotency-Key"] = str(uuid.uuid4())
    text = None if body is None else json.dumps(body)
    retry = Retry()
    while True:
        status, answer = privsep.request(CONF.plyfs.socket, CONF.plyfs.retry_seconds, method, target, text, headers)
        if status in (200, 202):
            return json.loads(answer)
        if status == 0:
            reason, kind = f"no answer from {CONF.plyfs.socket}: {answer}", ""
        else:
            reason, kind = _error(status, answer)
        if status not in (0, 429, 503):
            raise PlyfsError(reason, kind)
        LOG.debug("plyfs: %s %s: %s; trying again", method, target, reason)
        retry.wait(reason)


def _error(status, answer):
    try:
        error = json.loads(answer)["error"]
        return error["message"], error["kind"]
    except (ValueError, KeyError, TypeError):
        return f"status {status}: {answer[:200]}", ""


def _found(method, target, body=None):
    """As _request; None when there is no such object."""
    try:
        return _request(method, target, body)
    except PlyfsError as error:
        if error.kind == "not_found":
            return None
        raise


def _quoted(name):
    return urllib.parse.quote(name, safe="")


def store():
    """Directory of the store."""
    return os.path.dirname(CONF.plyfs.socket)


def status():
    return _request("GET", "/v1/status")


def disks():
    return _request("GET", "/v1/disks")


def disk(name):
    """:returns: the disk, or None when there is none of that name"""
    return _found("GET", f"/v1/disks/{_quoted(name)}")


def create_disk(name, **what):
    """:raises: PlyfsError of kind `exists`, or `not_found` when there is no such base or origin"""
    return _request("POST", "/v1/disks", {"name": name, **what}, create=True)[0]


def remove_disk(name, force=False):
    """Removes a disk and its snapshots; nothing to remove is no error."""
    query = "?snapshots=true&force=true" if force else "?snapshots=true"
    _found("DELETE", f"/v1/disks/{_quoted(name)}{query}")


def resize_disk(name, size):
    return _request("POST", f"/v1/disks/{_quoted(name)}/resize", {"size": size})


def flatten_disk(name):
    return _request("POST", f"/v1/disks/{_quoted(name)}/flatten", {})


def snapshots(name):
    return _found("GET", f"/v1/disks/{_quoted(name)}/snapshots") or []


def take_snapshot(name, snapshot):
    return _request("POST", f"/v1/disks/{_quoted(name)}/snapshots", {"name": snapshot}, create=True)


def remove_snapshot(name, snapshot):
    _found("DELETE", f"/v1/disks/{_quoted(name)}/snapshots/{_quoted(snapshot)}")


def base(name):
    """:returns: the base, or None when there is none of that name"""
    return _found("GET", f"/v1/bases/{_quoted(name)}")


def add_base(name, source):
    return _request("POST", "/v1/bases", {"name": name, "source": source}, create=True)


def hydrate_base(name):
    return _request("POST", f"/v1/bases/{_quoted(name)}/hydrate", {})


def remove_base(name):
    _found("DELETE", f"/v1/bases/{_quoted(name)}")


def unused_bases(seconds):
    """Names of the bases that nothing has needed for so long."""
    return [found["name"] for found in _request("POST", "/v1/prune", {"dry_run": True, "older_than_seconds": seconds})["bases"]]


def job(identifier):
    """:returns: the job, or None when this daemon knows none"""
    return _found("GET", f"/v1/jobs/{_quoted(identifier)}")
