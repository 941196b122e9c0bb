"""The control API of plyfs (docs/api.md).

What must hold: a request that was not answered, because the daemon restarted, is sent again until it is answered or the time is
over. So each request has the same result when it is carried out twice: creations have an idempotency key, and a removal of what
is gone counts as done.
"""

import json
import time
import urllib.parse

from oslo_log import log as logging

from cinder_plyfs import privileged

LOG = logging.getLogger(__name__)

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0


class Refused(Exception):
    """plyfs does not carry a request out. `kind` is that of docs/api.md."""

    def __init__(self, status, kind, message):
        super().__init__(message)
        self.status = status
        self.kind = kind


class Unanswered(Exception):
    """No answer came in time: whether the request was carried out is not known."""


def quote(name):
    return urllib.parse.quote(name, safe="")


def refusal(status, text):
    try:
        error = json.loads(text)["error"]
        return Refused(status, error["kind"], error["message"])
    except (ValueError, KeyError, TypeError):
        return Refused(status, "unknown", f"plyfs answers with status {status}: {text[:200]}")


class Client:
    """`patience`: for how many seconds a request is sent again while no daemon answers. `timeout`: seconds for one answer."""

    def __init__(self, socket, patience, timeout):
        self.socket = socket
        self.patience = patience
        self.timeout = timeout

    def request(self, method, target, body=None, key=None, patience=None):
        """Returns the decoded answer. Raises Refused and Unanswered."""
        patience = self.patience if patience is None else patience
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if key is not None:
            headers["Idempotency-Key"] = key
        text = json.dumps(body) if body is not None else None
        begun, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                status, answer = self._exchange(method, target, headers, text)
                # Unavailable or busy: nothing was done.
                if status not in (429, 503):
                    break
                trouble = str(refusal(status, answer))
            except OSError as error:
                trouble = str(error)
            left = begun + patience - time.monotonic()
            if left <= 0:
                raise Unanswered(
                    f"plyfs does not answer on {self.socket}: {trouble}. See that the daemon runs (plyfs status), then try again; "
                    "plyfs_patience in cinder.conf says how long the driver waits for it"
                )
            if pause == FIRST_PAUSE:
                LOG.warning("plyfs does not answer %(method)s %(target)s, trying again: %(trouble)s",
                            {"method": method, "target": target, "trouble": trouble})
            time.sleep(min(pause, left))
            pause = min(pause * 2, LONGEST_PAUSE)
        if status >= 400:
            raise refusal(status, answer)
        return answer

    def _exchange(self, *request):
        send = privileged.exchange_as_root if privileged.is_needed(self.socket) else privileged.exchange
        return send(self.socket, *request, self.timeout)

    def call(self, method, target, body=None, key=None, patience=None):
        return json.loads(self.request(method, target, body, key, patience))

    def status(self, patience=None):
        return self.call("GET", "/v1/status", patience=patience)

    def pool(self, name, patience=None):
        return self.call("GET", f"/v1/pools/{quote(name)}", patience=patience)

    def disks(self, patience=None):
        return self.call("GET", "/v1/disks", patience=patience)

    def disk(self, name):
        return self.call("GET", f"/v1/disks/{quote(name)}")

    def create_disk(self, key, **content):
        """Creates a disk once, whatever the number of calls with this key and content."""
        return self.call("POST", "/v1/disks", content, key=key)[0]

    def remove_disk(self, name, force=False):
        """Whether there was such a disk."""
        return self._remove(f"/v1/disks/{quote(name)}" + ("?force=true" if force else ""))

    def resize_disk(self, name, size):
        return self.call("POST", f"/v1/disks/{quote(name)}/resize", {"size": size})

    def move_disk(self, disk, name):
        """Gives a disk another name."""
        source = disk["path"]
        target = source[: -len(f"{disk['name']}.raw")] + f"{name}.raw"
        move = privileged.move_as_root if privileged.is_needed(self.socket) else privileged.move
        move(source, target)

    def take_snapshot(self, disk, name, key):
        return self.call("POST", f"/v1/disks/{quote(disk)}/snapshots", {"name": name}, key=key)

    def snapshots(self, disk):
        return self.call("GET", f"/v1/disks/{quote(disk)}/snapshots")

    def remove_snapshot(self, disk, name):
        """Whether there was such a snapshot."""
        return self._remove(f"/v1/disks/{quote(disk)}/snapshots/{quote(name)}")

    def roll_back(self, disk, name, key):
        return self.call("POST", f"/v1/disks/{quote(disk)}/rollback", {"snapshot": name}, key=key)

    def base(self, name):
        """The base, or None."""
        try:
            return self.call("GET", f"/v1/bases/{quote(name)}")
        except Refused as error:
            if error.kind != "not_found":
                raise
            return None

    def add_base(self, key, **content):
        return self.call("POST", "/v1/bases", content, key=key)

    def remove_base(self, name):
        return self._remove(f"/v1/bases/{quote(name)}")

    def unused_bases(self, patience=None):
        """The bases that nothing needs, the least recently used first."""
        return self.call("POST", "/v1/prune", {"dry_run": True}, patience=patience)["bases"]

    def events(self, after=None, worker=None, patience=None):
        query = "" if after is None else f"?after={after}&worker={worker}"
        lines = self.request("GET", f"/v1/events{query}", patience=patience).splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    def _remove(self, target):
        try:
            self.call("DELETE", target)
        except Refused as error:
            if error.kind != "not_found":
                raise
            return False
        return True
