"""Web servers whose mode makes them correct, slow, wrong, failing or endless. They serve `content` of their seed."""

import multiprocessing
import os
import random
import signal
import socket
import struct
import threading
import time

from .content import KIB, content

FORK = multiprocessing.get_context("fork")
# Interval at which a waiting server checks whether the mode has changed.
TICK = 0.05


class Request:
    def __init__(self, method, path, headers):
        self.method, self.path, self.headers = method, path, headers

    def range(self, size):
        """The first and the last byte requested."""
        text = self.headers.get("range", "")
        if not text.startswith("bytes="):
            return 0, size - 1
        first, _, last = text[6:].partition("-")
        return int(first), min(int(last or size - 1), size - 1)


class Server:
    """A process that serves `/...` on `host`. `mode` names a method of this class below."""

    def __init__(self, size, seed, mode="ok", host="127.0.0.1", target=None, nice=True, backlog=1024, etag="one", port=0):
        self.size, self.seed, self.target, self.nice, self.etag = size, seed, target, nice, etag
        self.number, self.requests = FORK.Value("i", MODES.index(mode)), FORK.Value("q", 0)
        self.listener = socket.create_server((host, port), backlog=backlog)
        self.host, self.port = self.listener.getsockname()
        self.process = FORK.Process(target=self.run, daemon=True)
        self.process.start()
        self.listener.close()

    def url(self, path="image"):
        return f"http://{self.host}:{self.port}/{path}"

    def mode(self, name):
        self.number.value = MODES.index(name)

    def end(self):
        self.process.kill()
        self.process.join(5)

    def run(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.nice:
            os.nice(10)
        threading.stack_size(256 * KIB)
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.connection, args=(connection,), daemon=True).start()

    def connection(self, connection):
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if MODES[self.number.value] == "tls_garbage":
                connection.sendall(b"\x16\x03\x03\xff\xff" + os.urandom(4096))
                return
            with connection.makefile("rb") as lines:
                while True:
                    first = lines.readline(65536).split()
                    if len(first) < 3:
                        return
                    headers = {}
                    while (line := lines.readline(65536)) not in (b"\r\n", b"\n", b""):
                        name, _, value = line.decode("latin-1").partition(":")
                        headers[name.strip().lower()] = value.strip()
                    self.requests.value += 1
                    request = Request(first[0].decode(), first[1].decode(), headers)
                    if not getattr(self, MODES[self.number.value])(connection, request):
                        return
        except (OSError, ValueError):
            pass
        finally:
            connection.close()

    def waiting(self):
        """Waits one tick; returns whether the mode is unchanged."""
        now = self.number.value
        time.sleep(TICK)
        return self.number.value == now

    def head(self, first, last, status="206 Partial Content", total=None, length=None, etag=None, more=""):
        total = self.size if total is None else total
        length = last - first + 1 if length is None else length
        return (
            f"HTTP/1.1 {status}\r\nContent-Type: application/octet-stream\r\nAccept-Ranges: bytes\r\nContent-Length: {length}\r\n"
            f"Content-Range: bytes {first}-{last}/{total}\r\n"
            + (f'ETag: "{etag or self.etag}"\r\n' if etag or self.etag else "")
            + f"{more}\r\n"
        ).encode()

    def send(self, connection, request, **answer):
        first, last = request.range(self.size)
        seed = answer.pop("seed", self.seed)
        connection.sendall(self.head(first, last, **answer) + (b"" if request.method == "HEAD" else content(seed, first, last - first + 1)))
        return True

    def status(self, connection, text, more="", body=b"no\n"):
        connection.sendall(f"HTTP/1.1 {text}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)
        return True

    # The modes. They return True if the connection stays open.

    def ok(self, connection, request):
        return self.send(connection, request)

    def slow(self, connection, request):
        time.sleep(0.3)
        return self.send(connection, request)

    def hang(self, connection, request):
        while self.waiting():
            pass
        return False

    def hang_in_body(self, connection, request):
        first, last = request.range(self.size)
        connection.sendall(self.head(first, last) + content(self.seed, first, 100))
        return self.hang(connection, request)

    def byte_a_second(self, connection, request):
        first, last = request.range(self.size)
        connection.sendall(self.head(first, last))
        for byte in content(self.seed, first, last - first + 1):
            connection.sendall(bytes([byte]))
            for _ in range(20):
                if not self.waiting():
                    return False
        return True

    def header_a_second(self, connection, request):
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\n")
        for number in range(1 << 30):
            connection.sendall(b"X-%d: y\r\n" % number)
            for _ in range(20):
                if not self.waiting():
                    return False
        return False

    def endless_headers(self, connection, request):
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\n")
        lines = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 1000) for number in range(64))
        while self.mode_is("endless_headers"):
            connection.sendall(lines)
        return False

    def endless_body(self, connection, request):
        first, last = request.range(self.size)
        connection.sendall(self.head(first, last, length=1 << 62))
        while self.mode_is("endless_body"):
            connection.sendall(content(self.seed, first, 64 * KIB))
        return False

    def endless_chunks(self, connection, request):
        first, last = request.range(self.size)
        head = self.head(first, last).replace(b"Content-Length: %d" % (last - first + 1), b"Transfer-Encoding: chunked")
        connection.sendall(head)
        while self.mode_is("endless_chunks"):
            connection.sendall(b"10000\r\n" + content(self.seed, first, 64 * KIB) + b"\r\n")
        return False

    def mode_is(self, name):
        return MODES[self.number.value] == name

    def gzip_bomb(self, connection, request):
        import gzip

        first, last = request.range(self.size)
        body = gzip.compress(bytes(64 << 20))
        connection.sendall(self.head(first, last, length=len(body), more="Content-Encoding: gzip\r\n") + body)
        return True

    def other_range(self, connection, request):
        """A range other than requested, with its bytes."""
        first, last = request.range(self.size)
        first, last = (first + 64 * KIB) % self.size, (first + 64 * KIB) % self.size + last - first
        connection.sendall(self.head(first, last) + content(self.seed, first, last - first + 1))
        return True

    def whole_other(self, connection, request):
        """200 and another object's bytes from its beginning."""
        connection.sendall(
            f'HTTP/1.1 200 OK\r\nContent-Length: {self.size}\r\nETag: "{self.etag}"\r\n\r\n'.encode() + content(self.seed + 7, 0, 256 * KIB)
        )
        return False

    def error_page(self, connection, request):
        return self.status(connection, "200 OK", "Content-Type: text/html\r\n", b"<html>down for maintenance</html>" * 100)

    def short(self, connection, request):
        first, last = request.range(self.size)
        connection.sendall(self.head(first, last) + content(self.seed, first, (last - first + 1) // 2))
        return False

    def dying(self, connection, request):
        """Resets the connection in the middle of half of the answers."""
        if random.random() < 0.5:
            return self.send(connection, request)
        first, last = request.range(self.size)
        connection.sendall(self.head(first, last) + content(self.seed, first, 1000))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def reset(self, connection, request):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def huge_total(self, connection, request):
        first, last = request.range(self.size)
        connection.sendall(self.head(first, last, total=(1 << 63) - 1, length=1 << 62))
        return False

    def negative(self, connection, request):
        connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: -5\r\nContent-Range: bytes 9-3/1\r\n\r\n")
        return False

    def other_etag(self, connection, request):
        return self.send(connection, request, etag="other", seed=self.seed + 1)

    def etag_flap(self, connection, request):
        """Half of the answers are of another object."""
        return self.other_etag(connection, request) if random.random() < 0.5 else self.send(connection, request)

    def size_flap(self, connection, request):
        return self.send(connection, request, total=self.size + random.randrange(2) * 4096)

    def refused_flap(self, connection, request):
        return self.status(connection, random.choice(["401 Unauthorized", "403 Forbidden", "404 Not Found"]))

    def unauthorized(self, connection, request):
        return self.status(connection, "401 Unauthorized", 'WWW-Authenticate: Bearer realm="r"\r\n')

    def forbidden(self, connection, request):
        return self.status(connection, "403 Forbidden")

    def not_found(self, connection, request):
        return self.status(connection, "404 Not Found")

    def empty(self, connection, request):
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        return True

    def not_satisfiable(self, connection, request):
        return self.status(connection, "416 Range Not Satisfiable", f"Content-Range: bytes */{self.size}\r\n")

    def come_again(self, connection, request):
        """Retry-After in thirty thousand years."""
        return self.status(connection, "429 Too Many Requests", "Retry-After: 999999999999\r\n")

    def broken(self, connection, request):
        return self.status(connection, "500 Internal Server Error")

    def redirect_self(self, connection, request):
        return self.status(connection, "302 Found", f"Location: {self.url('x%d' % random.getrandbits(60))}\r\n")

    def redirect_dead(self, connection, request):
        """To a different host each time, which does not answer."""
        host = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        return self.status(connection, "302 Found", f"Location: http://{host}:{self.target}/x\r\n")

    def redirect_to(self, connection, request):
        return self.status(connection, "302 Found", f"Location: {self.target}\r\n")

    def redirect_long(self, connection, request):
        return self.status(connection, "302 Found", f"Location: {self.url('y' * 60000)}\r\n")

    def tls_garbage(self, connection, request):
        return False


MODES = [
    "ok", "slow", "hang", "hang_in_body", "byte_a_second", "header_a_second", "endless_headers", "endless_body", "endless_chunks",
    "gzip_bomb", "other_range", "whole_other", "error_page", "short", "dying", "reset", "huge_total", "negative", "other_etag",
    "etag_flap", "size_flap", "refused_flap", "unauthorized", "forbidden", "not_found", "empty", "not_satisfiable", "come_again",
    "broken", "redirect_self", "redirect_dead", "redirect_to", "redirect_long", "tls_garbage",
]  # fmt: skip


def black_hole():
    """A socket on every address of this host whose queue is full, so that connections to it hang; and its port."""
    listener = socket.socket()
    listener.bind(("0.0.0.0", 0))
    listener.listen(0)
    port, kept = listener.getsockname()[1], [listener]
    for _ in range(4):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        kept.append(client)
    return kept, port
