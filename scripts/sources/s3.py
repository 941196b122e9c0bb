"""Buckets of S3: two services, and the same tests of both. See scripts/test-sources."""

import hashlib
import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

from harness import MIB, ROOT, Daemon, call, directory, end, family, free_port, log_of, say, start, wait_for

READS = ROOT / "tests" / "data" / "debian-boot-reads.txt"
# The size of the disk whose reads they are.
READS_SIZE = 2 << 30
REGION = "eu-test-1"
# The keys of the test itself, whose requests do not count.
ADMIN = ("admin", "admin")
# Secrets that no log, status or command line may show.
SECRETS = ["sEcReT/one+first", "sEcReT/two+second", "ToKeN-of-the-session"]


class Failures(list):
    def check(self, what, holds, detail=""):
        say(f"  {'ok' if holds else 'FAILED'}: {what}{f' ({detail})' if detail else ''}")
        if not holds:
            self.append(f"{what} {detail}")


def python():
    """A Python with boto3 and moto."""
    found = call("bash", "-c", 'source "$0" && need_s3_python >&2 && echo "$S3_PYTHON"', ROOT / "scripts" / "lib.sh")
    return found.strip().splitlines()[-1]


class Moto:
    """moto behind scripts/sources/s3_server.py."""

    name = "moto, signatures verified by botocore"
    expires = versions = regions = clock = True

    def __init__(self, where):
        self.where, self.port, self.python, self.process = where, free_port(), python(), None
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.keys = {"admin": {"secret": "admin"}, "AKone": {"secret": SECRETS[0]}}
        self.write_keys()
        self.start()

    def write_keys(self):
        new = self.where / "keys.new"
        new.write_text(json.dumps(self.keys))
        new.rename(self.where / "keys.json")

    def start(self):
        program = ROOT / "scripts" / "sources" / "s3_server.py"
        self.process = start([self.python, program, self.where, self.port], self.where / "server.log")
        wait_for("the S3 service", lambda: "ready" in log_of(self.process), self.process)

    def pause(self, paused):
        """The server takes connections and answers nothing, as one that hangs; then it goes on."""
        self.process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def log(self):
        """Method, path, status and bytes of each request of a reader."""
        lines = map(json.loads, (self.where / "access.log").read_text().splitlines())
        return [(line["path"], line["status"], line["bytes"]) for line in lines if line["keys"] != "admin"]

    def set_keys(self, name, **key):
        self.keys[name] = key
        self.write_keys()

    def set_clock(self, ahead):
        (self.where / "clock").write_text(str(ahead))


class Radosgw:
    """Ceph 16 on this host."""

    name = "radosgw of Ceph 16"
    expires = regions = clock = False
    versions = True

    def __init__(self, where):
        self.where, self.port, self.python = where, free_port(), python()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        call("bash", "-c", 'source "$0" && need_packages "${CEPH_PACKAGES[@]}"', ROOT / "scripts" / "lib.sh")
        say("  starting Ceph (about 20 s)")
        call(ROOT / "scripts" / "sources" / "ceph-up", where, self.port, timeout=300)
        self.user("admin", *ADMIN)
        self.user("reader", "AKone", SECRETS[0])

    def tool(self, *argv):
        return call("radosgw-admin", "-c", self.where / "ceph.conf", *argv, timeout=60)

    def user(self, uid, name, secret):
        self.tool("user", "create", f"--uid={uid}", f"--display-name={uid}", f"--access-key={name}", f"--secret-key={secret}")

    def pid(self):
        return int((self.where / "client.rgw.a.pid").read_text())

    def pause(self, paused):
        os.kill(self.pid(), signal.SIGSTOP if paused else signal.SIGCONT)

    def log(self):
        # beast: 0x7f...: 127.0.0.1 - reader [...] "GET /images/key HTTP/1.1" 206 65536 - "plyfs/0.1.0" bytes=0-65535
        text = (self.where / "client.rgw.a.log").read_text(errors="replace")
        found = re.findall(r'beast: \S+ \S+ - (\S+) \[[^]]*\] "GET (\S+) [^"]*" (\d+) (\d+) ', text)
        return [(path.split("?")[0], int(status), int(size)) for user, path, status, size in found if user != "admin"]

    def set_keys(self, name, secret):
        self.tool("key", "create", "--uid=reader", "--key-type=s3", f"--access-key={name}", f"--secret-key={secret}")

    def drop_keys(self, name):
        self.tool("key", "rm", "--uid=reader", "--key-type=s3", f"--access-key={name}")

    def end(self):
        for file in self.where.glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                pass


# What boto3 does for the test: its program is run by the Python that has it.
BOTO = """
import json, sys, boto3
from botocore.config import Config
endpoint, name, secret, region, action, *rest = json.load(sys.stdin)
# One attempt: a test that waits for a failure is not to wait for retries.
config = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 0})
s3 = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=name, aws_secret_access_key=secret, region_name=region, config=config)
def bucket(name, versions):
    # Amazon's first region is none; every other one has to be named.
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    s3.create_bucket(Bucket=name, **place)
    if versions:
        s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
def put(bucket, key, path, multipart):
    from boto3.s3.transfer import TransferConfig
    s3.upload_file(path, bucket, key, Config=TransferConfig(multipart_threshold=8 << 20 if multipart else 1 << 40))
    head = s3.head_object(Bucket=bucket, Key=key)
    return {"etag": head["ETag"], "version": head.get("VersionId")}
def delete(bucket, key, version):
    s3.delete_object(Bucket=bucket, Key=key, **({"VersionId": version} if version else {}))
def presign(bucket, key, seconds):
    return s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=seconds)
def share(bucket, user):
    # Without ListBucket, an object that is not there is forbidden.
    allow = [(f"arn:aws:s3:::{bucket}/*", ["s3:GetObject", "s3:GetObjectVersion"]), (f"arn:aws:s3:::{bucket}", ["s3:ListBucket"])]
    allow = [{"Effect": "Allow", "Principal": {"AWS": [user]}, "Action": does, "Resource": [what]} for what, does in allow]
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": allow}))
print(json.dumps(globals()[action](*rest)))
"""


class Bench:
    """One service, and plyfs hosts that read from it."""

    def __init__(self, service, where, quick):
        self.service, self.where, self.failures = service, where, Failures()
        size = (64 if quick else 2048) * MIB
        self.image = where / "image.raw"
        self.make_image(size)
        scale = READS_SIZE // size
        lines = (line.split() for line in READS.read_text().splitlines() if line and not line.startswith("#"))
        self.reads = [(int(offset) // scale // 512 * 512, int(length)) for offset, length in lines]
        self.reads = [(offset, min(length, size - offset)) for offset, length in self.reads if offset < size]
        self.keys = where / "secrets" / "keys"
        self.keys.parent.mkdir()
        self.signs = ("AKone", SECRETS[0])
        self.write_keys(*self.signs)
        self.hosts = []

    def make_image(self, size):
        """Bytes that differ everywhere, made fast."""
        block = random.Random(7).randbytes(MIB)
        with self.image.open("wb") as file:
            for number in range(size // MIB):
                file.write(number.to_bytes(8, "little") + block[8:])

    def write_keys(self, name, secret):
        new = self.keys.with_name("new")
        new.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = {secret}\n")
        new.chmod(0o600)
        new.rename(self.keys)

    def boto(self, action, *rest, keys=ADMIN):
        request = json.dumps([self.service.endpoint, *keys, REGION, action, *rest])
        return json.loads(call(self.service.python, "-c", BOTO, input=request, timeout=600))

    def host(self, extra="", region=REGION):
        where = self.where / f"host{len(self.hosts)}"
        where.mkdir()
        config = (
            "[http]\nstall_timeout = \"2s\"\nconnect_timeout = \"2s\"\n"
            f"[[http.s3]]\nbucket = \"*\"\nendpoint = \"{self.service.endpoint}\"\nregion = \"{region}\"\n"
            f"keys_file = \"{self.keys}\"\n{extra}"
        )
        host = Daemon(where, config=config)
        host.start()
        self.hosts.append(host)
        return host

    def counted(self, work):
        """The requests and bytes that the server logged meanwhile."""
        before = len(self.service.log())
        work()
        lines = self.service.log()[before:]
        return len(lines), sum(size for _, _, size in lines)

    def replay(self, host, base):
        """Reads as a boot did, and compares each; returns whether all were equal."""
        with host.base(base).open("rb", buffering=0) as file, self.image.open("rb", buffering=0) as image:
            pairs = ((os.pread(file.fileno(), n, at), os.pread(image.fileno(), n, at)) for at, n in self.reads)
            return all(found == right for found, right in pairs)

    def whole(self, host, base):
        return hashlib.sha256(host.base(base).read_bytes()).digest() == hashlib.sha256(self.image.read_bytes()).digest()

    def reader(self, host, base, offset, length=65536, image=None):
        """Starts a read, whose result is compared when it ends."""
        done = {}

        def read():
            try:
                with host.base(base).open("rb", buffering=0) as file:
                    found = os.pread(file.fileno(), length, offset)
            except OSError as error:
                # One that waits when the host ends.
                done["error"] = str(error)
                return
            with (image or self.image).open("rb") as right:
                done["equal"] = found == os.pread(right.fileno(), length, offset)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread, done

    def until(self, condition, seconds=60):
        end_at = time.monotonic() + seconds
        while time.monotonic() < end_at:
            if condition():
                return True
            time.sleep(0.05)
        return False

    def waits(self, host, base, word):
        return self.until(lambda: word in str(host.cli("base", "show", base).get("waiting_for")))

    def refused(self, host, name, source, *words):
        try:
            host.cli("base", "add", name, source)
        except RuntimeError as error:
            text = str(error)
            self.failures.check(f"base add is refused: {words[0]}", all(word in text for word in words), text.split("plyfs: ")[-1])
        else:
            self.failures.check(f"base add is refused: {words[0]}", False, "it was accepted")

    def goes_on(self, what, host, base, offset, word, mend, image=None):
        """A read waits, the reason is shown, and after `mend` the read ends with the right bytes."""
        thread, done = self.reader(host, base, offset, image=image)
        shown = self.waits(host, base, word)
        mend()
        thread.join(90)
        self.failures.check(what, shown and done.get("equal") is True, f"waiting for {word!r} shown: {shown}, read: {done}")


def run(bench):
    service, check = bench.service, bench.failures.check
    for bucket, versions in [("images", True), ("plain", False)]:
        bench.boto("bucket", bucket, versions)
        if isinstance(service, Radosgw):
            bench.boto("share", bucket, "arn:aws:iam:::user/reader")
    put = bench.boto("put", "images", "debian 12/disk.raw", str(bench.image), True)
    bench.boto("put", "plain", "disk.raw", str(bench.image), False)
    host = bench.host()

    source = "s3://images/debian 12/disk.raw"
    requests, size = bench.counted(lambda: host.cli("base", "add", "image", source))
    base = host.cli("base", "show", "image")
    # The second one asks for a proof beside the object, and its answer is an error.
    check("base add", requests == 2 and 65536 <= size < 65536 + 1024, f"{requests} requests, {size} bytes")
    check("the ETag of a multipart upload is the validator", base["etag"] == put["etag"] and "-" in put["etag"], put["etag"])
    check("the version is pinned", base["version_id"] == put["version"] and put["version"], put["version"])
    equal = []
    signed = bench.counted(lambda: equal.append(bench.replay(host, "image")))
    url = bench.boto("presign", "images", "debian 12/disk.raw", 3600, keys=bench.signs)
    host.cli("base", "add", "presigned", url)
    plain = bench.counted(lambda: equal.append(bench.replay(host, "presigned")))
    check("a boot's reads", all(equal) and len(equal) == 2, f"{signed[1] / MIB:.1f} MiB in {signed[0]} requests")
    check("as many as by plain HTTP", abs(signed[1] - plain[1]) <= MIB, f"{plain[1] / MIB:.1f} MiB in {plain[0]} requests")
    again = bench.counted(lambda: equal.append(bench.replay(host, "image")))
    check("the second boot fetches nothing", again == (0, 0), str(again))

    host.cli("base", "hydrate", "image", seconds=600)
    check("hydrate", host.cli("base", "show", "image")["complete"] and bench.whole(host, "image"))
    other = bench.host()
    other.cli("base", "add", "image", source)
    second = bench.counted(lambda: equal.append(bench.replay(other, "image")))
    check("another host", all(equal) and abs(second[1] - signed[1]) <= MIB, f"{second[1] / MIB:.1f} MiB in {second[0]} requests")

    far = bench.image.stat().st_size - 9 * MIB
    host.cli("base", "add", "plain", "s3://plain/disk.raw")
    service.pause(True)
    bench.goes_on("the server hangs and is back", host, "plain", far, "it", lambda: service.pause(False))

    # Keys are replaced: the old ones are gone, the file has the new ones a while later.
    if service.expires:
        service.set_keys("AKone", secret=SECRETS[0], ends=time.time() - 1)
        word = "the keys ran out"
    else:
        service.drop_keys("AKone")
        word = "does not know the keys"

    def renew():
        bench.signs = ("AKtwo", SECRETS[1])
        service.set_keys("AKtwo", secret=SECRETS[1])
        bench.write_keys(*bench.signs)

    bench.goes_on("keys run out and are renewed", host, "plain", far + MIB, word, renew)
    if service.clock:
        service.set_clock(3600)
        bench.refused(host, "skewed", "s3://plain/disk.raw", "RequestTimeTooSkewed", "clock of this host")
        bench.goes_on("the clock is wrong and is set", host, "plain", far + 2 * MIB, "the clock", lambda: service.set_clock(0))
    bench.refused(host, "none", "s3://plain/none.raw", "NoSuchKey", "bucket plain has no object none.raw")
    bench.refused(host, "none", "s3://none-such/none.raw", "NoSuchBucket", "there is no bucket")
    bench.write_keys("AKtwo", "wrong")
    stranger = bench.host()
    bench.refused(stranger, "wrong", "s3://plain/disk.raw", "SignatureDoesNotMatch", "the secret key does not fit")
    bench.write_keys("AKtwo", SECRETS[1])
    if service.regions:
        abroad = bench.host(region="us-east-1")
        abroad.cli("base", "add", "abroad", "s3://plain/disk.raw")
        thread, done = bench.reader(abroad, "abroad", far)
        thread.join(60)
        check("the region that the service names is used", done.get("equal") is True)

    # An object is replaced: a base with a version does not notice, and one without says so and waits.
    replaced = bench.where / "replaced.raw"
    replaced.write_bytes(b"replaced" + bench.image.read_bytes()[8:])
    bench.boto("put", "images", "debian 12/disk.raw", str(replaced), True)
    thread, done = bench.reader(other, "image", far)
    thread.join(60)
    check("the object is replaced, the version is read on", done.get("equal") is True)
    bench.boto("put", "plain", "disk.raw", str(replaced), False)
    original = bench.image

    def restore():
        # A read meanwhile spoils the object of moto, whose ETag is then that of neither.
        right = host.cli("base", "show", "plain")["etag"]
        bench.until(lambda: bench.boto("put", "plain", "disk.raw", str(original), False)["etag"] == right)

    bench.goes_on("the object of a bucket without versions is replaced and restored", host, "plain", far + 3 * MIB, "", restore)
    bench.boto("delete", "images", "debian 12/disk.raw", put["version"])
    thread, _ = bench.reader(other, "image", far + MIB)
    check("a version that was deleted is waited for, in words", bench.waits(other, "image", "NoSuch"))

    short = bench.boto("presign", "plain", "disk.raw", 3, keys=bench.signs)
    signed = time.time()
    host.cli("base", "add", "short", short)
    # Its time is in whole seconds.
    time.sleep(max(0, signed + 5 - time.time()))
    long = bench.boto("presign", "plain", "disk.raw", 3600, keys=bench.signs)
    bench.goes_on(
        "a presigned URL runs out and is replaced", host, "short", far, "its presigned URL ran out",
        lambda: host.cli("base", "set", "short", "--source", long),
    )  # fmt: skip

    shown = [host.log.read_text(), json.dumps(host.cli("base", "ls")), json.dumps(host.cli("status")), call(host.binary, "--store", host.store, "events")]
    shown += [Path(f"/proc/{pid}/cmdline").read_text() for pid in family(host.process.pid)]
    check("no secret is shown", not any(secret in text for secret in [*SECRETS, "X-Amz-Signature"] for text in shown))


def test(make, quick):
    where = directory("/var/tmp", "plyfs-sources-")
    service_dir = where / "service"
    service_dir.mkdir()
    service = make(service_dir)
    bench = None
    try:
        bench = Bench(service, where, quick)
        say(f"  {service.name}; an image of {bench.image.stat().st_size // MIB} MiB")
        run(bench)
    finally:
        for host in bench.hosts if bench else []:
            host.end()
        if isinstance(service, Radosgw):
            service.end()
        else:
            end(service.process)
    return bench.failures


def test_moto(quick):
    return test(Moto, quick)


def test_radosgw(quick):
    return test(Radosgw, quick)
