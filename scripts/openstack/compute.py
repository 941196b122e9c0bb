"""Nova's classes, unmodified, on links that `plyfs glance sync` makes. See scripts/test-openstack."""

import json
import os
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import MIB, TARGET, Daemon, call, directory, end, say, start
from sources.openstack import Cloud, Failures, qcow2

# A virtual environment with Nova saves its installation.
VENV = os.environ.get("NOVA_VENV")
VERSION = "34.0.0"
SIZE = 24 * MIB
DAY = 86400

CONFIG = """
[[http.clouds]]
name = "test"
file = "{where}/clouds.yaml"
[mount]
base_mode = "0444"
"""


def venv():
    place = Path(VENV) if VENV else TARGET.parent / "python-nova"
    if not (place / "bin/nova-manage").exists():
        say(f"  installing: nova {VERSION} (pip)")
        call("python3", "-m", "venv", place)
        call(place / "bin/pip", "install", "-q", f"nova=={VERSION}", timeout=900)
    return place


class Refused(Exception):
    """An exception of Nova."""


class Host:
    """A process with Nova's classes, on its own directory of instances."""

    def __init__(self, where, cloud):
        self.cloud, self.instances, self.log = cloud, where / "instances", where / "nova.log"
        self.instances.mkdir()
        program = Path(__file__).parent / "nova_host.py"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = start([venv() / "bin/python", program], self.log, **pipes)
        nova_conf = str(where / "nova.conf")
        self.ask("start", instances=str(self.instances), glance=cloud.glance, nova_conf=nova_conf)

    def send(self, command, **arguments):
        self.process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"Nova's process has ended: {self.log.read_text()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    def ask(self, command, **arguments):
        self.send(command, **arguments)
        return self.answer()

    def begin(self, instance, image, size=SIZE):
        self.send("create", instance=instance, image=image, size=size, token=self.cloud.token())

    def create(self, instance, image, size=SIZE):
        self.begin(instance, image, size)
        return self.answer()

    def refusal(self, instance, image, size=SIZE):
        try:
            self.create(instance, image, size)
        except Refused as error:
            return str(error)
        return "it was created"

    def entry(self, image):
        name = call("sh", "-c", 'printf %s "$0" | sha1sum', image).split()[0]
        return self.instances / "_base" / name

    def contents(self, disk, length=SIZE):
        """The bytes of an overlay, as QEMU reads them."""
        raw = self.instances / "contents.raw"
        call("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, raw)
        data = raw.read_bytes()
        raw.unlink()
        return data[:length]


def test_nova(_quick=False):
    failures = Failures()
    where = directory(os.environ.get("TMPDIR", "/var/tmp"), "plyfs-nova-")
    cloud = Cloud(where, life=3600)
    daemon = Daemon(where, config=CONFIG.format(where=where))
    daemon.start()
    host = Host(where, cloud)
    try:
        run(failures, cloud, daemon, host)
    finally:
        end(host.process)
        daemon.end()
        for name in list(cloud.processes):
            cloud.stop(name)
    return failures


def downloads(cloud, image):
    """Answers with all of an image, which only Nova asks for."""
    return [line for line in cloud.data_requests(image) if " 200 " in line or "HTTP/1.1 200" in line]


def run(failures, cloud, daemon, host):
    check = failures.check
    data = {name: random.Random(name).randbytes(SIZE) for name in ("one", "two", "three")}
    ids = {name: cloud.image(name, data[name]) for name in data}
    ids["lies"] = cloud.image("lies", qcow2())
    seen = {image["id"] for image in cloud.ask("GET", f"{cloud.glance}/v2/images?status=active")["images"]}
    check("an administrator of another project sees them", seen == set(ids.values()))

    def sync(*more, refused=False):
        argv = ["glance", "sync", "--instances", host.instances, "--keep-unused", "0s", *more]
        done = subprocess.run([daemon.binary, "--store", daemon.store, "--json", *map(str, argv)], capture_output=True, text=True, timeout=120)
        check("the pass ends as it says", (done.returncode == 0) != refused, done.stderr.strip()[-300:])
        return json.loads(done.stdout)

    def is_linked(name):
        return host.entry(ids[name]).is_symlink() and os.readlink(host.entry(ids[name])) == str(daemon.base(f"g-{ids[name]}"))

    summary = sync(refused=True)
    check("active images are linked", summary["linked"] == 3 and all(map(is_linked, data)), f"{summary}")
    check("raw image with qcow2 bytes: no link", not host.entry(ids["lies"]).is_symlink())
    said = host.refusal("vm-lies", ids["lies"])
    check("Nova refuses that image too", "ImageUnacceptable" in said, said)

    os.utime(daemon.base(f"g-{ids['one']}"), (1e9, 1e9))
    made = host.create("vm1", ids["one"])
    check("Nova makes an overlay on the link", made["backing"] == str(host.entry(ids["one"])), made["backing"])
    check("Nova has set the time of the base", time.time() - host.entry(ids["one"]).stat().st_mtime < 600)
    usage = host.ask("cache_manager", used=[ids["one"]], instances=["vm1"], minimum_age=DAY)["usage"]
    check("Nova counts what the host has of the images", 0 < usage < SIZE, f"{usage} bytes")
    check("the overlay shows the image", host.contents(made["disk"]) == data["one"])
    check("Nova has downloaded nothing", not downloads(cloud, ids["one"]))
    larger = host.create("vm2", ids["one"], 2 * SIZE)
    check("a larger flavor: the image, then zeros", host.contents(larger["disk"], 2 * SIZE) == data["one"] + bytes(SIZE))
    said = host.refusal("vm3", ids["one"], SIZE // 2)
    check("a flavor that is smaller than the image is refused", "FlavorDiskSmallerThanImage" in said, said)

    host.ask("cache_manager", used=[ids["one"]], instances=["vm1"], minimum_age=DAY)
    check("the cache manager leaves young links", all(map(is_linked, data)))
    for name in data:
        os.utime(daemon.base(f"g-{ids[name]}"), (1e9, 1e9))
    host.ask("cache_manager", used=[ids["one"]], instances=["vm1"], minimum_age=DAY)
    check("the cache manager keeps the link of an image that is used", is_linked("one"))
    check("the cache manager removes links that were not used for a day", not host.entry(ids["two"]).is_symlink())
    check("and the bases stay", daemon.base(f"g-{ids['two']}").exists())
    check("the next pass makes the links again", sync(refused=True)["linked"] == 2 and all(map(is_linked, data)))
    host.ask("cache_manager", used=[], instances=[], minimum_age=DAY)
    check("and they count as used now", all(map(is_linked, data)))

    rounds, linked = 8, 0
    for number in range(rounds):
        # Nova and a pass work on one image at one time: in even rounds Nova begins, in odd ones the pass.
        host.entry(ids["two"]).unlink()
        if number % 2:
            with ThreadPoolExecutor(1) as pool:
                passing = pool.submit(sync, refused=True)
                time.sleep(0.05 * number)
                host.begin(f"race{number}", ids["two"])
                passing.result()
        else:
            host.begin(f"race{number}", ids["two"])
            sync(refused=True)
        raced = host.answer()
        right = host.contents(raced["disk"]) == data["two"]
        check(f"race {number}: the overlay shows the image", right and host.entry(ids["two"]).exists(), raced["backing"])
        if host.entry(ids["two"]).is_symlink():
            linked += 1
        else:
            check(f"race {number}: a pass leaves what Nova downloaded", sync(refused=True)["skipped"] >= 1)
    say(f"  of {rounds} races, a pass made the link first in {linked}")
    locks = sorted(path.name for path in (host.instances / "locks").iterdir())
    check("the locks are Nova's", all(name.startswith("nova-") for name in locks), f"{locks}")

    if not is_linked("three"):
        check("three is linked", False)
    daemon.stop()
    check("without the mount the link leads nowhere", host.entry(ids["three"]).is_symlink() and not host.entry(ids["three"]).exists())
    fallen = host.create("vm4", ids["three"])
    check("then Nova downloads over the link", host.entry(ids["three"]).is_file() and not host.entry(ids["three"]).is_symlink())
    check("and the overlay shows the image", host.contents(fallen["disk"]) == data["three"])
    check("in one download", len(downloads(cloud, ids["three"])) == 1, f"{cloud.data_requests(ids['three'])}")
    daemon.start()
    check("instances on links go on when it is back", host.contents(made["disk"]) == data["one"])
    sync(refused=True)
    check("a pass leaves what Nova downloaded", not host.entry(ids["three"]).is_symlink())

    cloud.act(ids["one"], "deactivate")
    summary = sync(refused=True)
    check("deactivated: kept, because instances stand on it", summary["kept"] >= 1 and is_linked("one"), f"{summary['images']}")
    cloud.act(ids["one"], "reactivate")
    check("reactivated: nothing changes", sync(refused=True)["present"] >= 1 and is_linked("one"))
    cloud.ask("DELETE", f"{cloud.glance}/v2/images/{ids['one']}")
    check("deleted: kept, because instances stand on it", sync(refused=True)["kept"] >= 1 and is_linked("one"))
    for name in ("vm1", "vm2"):
        (host.instances / name / "disk").unlink()
    check("deleted, and no instance: removed", sync(refused=True)["removed"] == 1)
    gone = not host.entry(ids["one"]).is_symlink() and not daemon.base(f"g-{ids['one']}").exists()
    check("and link and base are gone", gone)
