"""Artifacts of a registry: Debian's docker-registry, whose log has each request. See scripts/test-sources."""

import hashlib
import io
import json
import re
import tarfile
import urllib.request

from harness import MIB, Daemon, directory, end, free_port, say, start, wait_for

from sources.s3 import Bench

TAR = "application/vnd.oci.image.layer.v1.tar"


def call(method, url, body=None, **headers):
    request = urllib.request.Request(url, data=body, method=method, headers={"User-Agent": "test", **headers})
    with urllib.request.urlopen(request) as answer:
        return answer.headers


class Registry:
    def __init__(self, where):
        self.where, self.port, self.process = where, free_port(), None
        self.config = where / "config.yml"
        self.config.write_text(
            f"version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {where / 'data'}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}'}}\n"
        )
        self.start()

    def start(self):
        self.process = start(["docker-registry", "serve", self.config], self.where / "registry.log")
        wait_for("the registry", self.answers, self.process)

    def stop(self):
        end(self.process)

    def answers(self):
        try:
            return call("GET", f"http://127.0.0.1:{self.port}/v2/") is not None
        except OSError:
            return False

    def url(self, reference):
        return f"oci+http://127.0.0.1:{self.port}/team/golden{reference}"

    def push(self, tag, path, media):
        """Pushes a file as an artifact of one blob. Returns the digests of blob and manifest."""
        base = f"http://127.0.0.1:{self.port}/v2/team/golden"

        def blob(bytes):
            digest = "sha256:" + hashlib.sha256(bytes).hexdigest()
            place = call("POST", f"{base}/blobs/uploads/", b"")["Location"]
            call("PUT", f"{place}{'&' if '?' in place else '?'}digest={digest}", bytes, **{"Content-Type": "application/octet-stream"})
            return digest

        content = path.read_bytes()
        digest, config = blob(content), blob(b"{}")
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": 2},
            "layers": [{"mediaType": media, "digest": digest, "size": len(content)}],
        }
        text = json.dumps(manifest).encode()
        call("PUT", f"{base}/manifests/{tag}", text, **{"Content-Type": manifest["mediaType"]})
        return digest, "sha256:" + hashlib.sha256(text).hexdigest()

    def log(self):
        # 127.0.0.1 - - [30/Nov/2026:17:51:59 +0000] "GET /v2/... HTTP/1.1" 206 100 "" "plyfs/0.1.0"
        lines = re.findall(r'"GET (\S+) HTTP/1.1" (\d+) (\d+) "[^"]*" "plyfs/', (self.where / "registry.log").read_text())
        return [(path, int(status), int(size)) for path, status, size in lines]


class OciBench(Bench):
    """The bench of buckets, without keys."""

    def host(self):
        where = self.where / f"host{len(self.hosts)}"
        where.mkdir()
        host = Daemon(where, config="[http]\nstall_timeout = \"2s\"\nconnect_timeout = \"2s\"\n")
        host.start()
        self.hosts.append(host)
        return host


def run(bench):
    registry, check = bench.service, bench.failures.check
    blob, manifest = registry.push("12", bench.image, "application/octet-stream")
    host = bench.host()
    requests, size = bench.counted(lambda: host.cli("base", "add", "image", registry.url(":12")))
    check("base add", requests == 2 and 65536 <= size < 65536 + 1024, f"{requests} requests, {size} bytes")
    base = host.cli("base", "show", "image")
    check("the digest of the manifest is pinned", base["source"] == registry.url(f"@{manifest}"), base["source"])
    check("the digest of the blob is the base's", base["sha256"] == blob.split(":")[1], str(base["sha256"]))
    equal = []
    boot = bench.counted(lambda: equal.append(bench.replay(host, "image")))
    check("a boot's reads", equal == [True] and boot[1] > MIB, f"{boot[1] / MIB:.1f} MiB in {boot[0]} requests")
    host.cli("base", "add", "plain", f"http://127.0.0.1:{registry.port}/v2/team/golden/blobs/{blob}")
    plain = bench.counted(lambda: equal.append(bench.replay(host, "plain")))
    check("as many as by plain HTTP", all(equal) and abs(boot[1] - plain[1]) <= MIB, f"{plain[1] / MIB:.1f} MiB in {plain[0]} requests")
    again = bench.counted(lambda: equal.append(bench.replay(host, "image")))
    check("the second boot fetches nothing", again == (0, 0), str(again))
    other = bench.host()
    other.cli("base", "add", "image", registry.url(":12"))
    second = bench.counted(lambda: equal.append(bench.replay(other, "image")))
    check("another host", all(equal) and abs(second[1] - boot[1]) <= MIB, f"{second[1] / MIB:.1f} MiB in {second[0]} requests")

    # The tag leads to another image.
    replaced = bench.where / "replaced.raw"
    replaced.write_bytes(b"replaced" + bench.image.read_bytes()[8:])
    registry.push("12", replaced, "application/octet-stream")
    far = bench.image.stat().st_size - 9 * MIB
    thread, done = bench.reader(other, "image", far)
    thread.join(60)
    check("the tag is moved, the image is read on", done.get("equal") is True)
    registry.stop()
    bench.goes_on("the registry is down and back", other, "image", far + MIB, "onnect", registry.start)
    host.cli("base", "hydrate", "image", seconds=600)
    check("hydrate, compared with the digest", host.cli("base", "show", "image")["complete"] and bench.whole(host, "image"))

    # KubeVirt's form.
    layer, content = bench.where / "layer.tar", bench.image.read_bytes()
    with tarfile.open(layer, "w") as archive:
        directory_entry, member = tarfile.TarInfo("disk/"), tarfile.TarInfo("disk/disk.img")
        directory_entry.type, member.size = tarfile.DIRTYPE, len(content)
        archive.addfile(directory_entry)
        archive.addfile(member, io.BytesIO(content))
    registry.push("disk", layer, TAR)
    other.cli("base", "add", "container", registry.url(":disk"))
    check("a container disk", bench.replay(other, "container"))
    registry.push("packed", layer, TAR + "+gzip")
    bench.refused(host, "packed", registry.url(":packed"), "compressed as a whole", "--dest-decompress")
    bench.refused(host, "none", registry.url(":none"), "no such tag", "404")


def test_oci(quick):
    where = directory("/var/tmp", "plyfs-sources-")
    service_dir = where / "service"
    service_dir.mkdir()
    registry, bench = Registry(service_dir), None
    try:
        bench = OciBench(registry, where, quick)
        say(f"  docker-registry; an image of {bench.image.stat().st_size // MIB} MiB")
        run(bench)
    finally:
        for host in bench.hosts if bench else []:
            host.end()
        end(registry.process)
    return bench.failures
