"""Attacks by servers that are slow, wrong, failing or endless, below a base of the attacker."""

import time

from .content import MIB
from .run import Attack
from .servers import black_hole
from .world import ATTACKER, PUBLIC, until

# A temporary failure of a server causes no errors: reads wait, and continue within this many seconds afterwards.
HEALS = 15


class ServerAttack(Attack):
    """A base on a good server, which turns bad while `threads` read the base, and then good again."""

    mode = "ok"
    threads = 40
    options = ()
    server = {}
    expect_state = True  # whether `base show` must report the failure
    honest = True  # whether wrong bytes can be detected

    def before(self, world):
        self.bad = world.serve(**self.server)
        world.daemon.cli("base", "add", "bad", self.bad.url(), *self.options)
        self.path = world.attacker_disk("bad")

    def begin(self, world):
        self.states = set()
        self.bad.mode(self.mode)
        self.readers = world.readers(self.path, seed=ATTACKER if self.honest else None, threads=self.threads, pace=0.02)
        time.sleep(0.5)
        self.adding = world.loop(lambda turn: self.add(world, turn), 0.2)

    def add(self, world, turn):
        """Adds a base on the bad server, which may succeed or fail, but within the time limit."""
        try:
            world.daemon.cli("base", "add", f"bad{turn}", self.bad.url("2"), *self.options, seconds=60)
        except RuntimeError:
            pass

    def during(self, world):
        self.states.add(world.state("bad")["state"])

    def end(self, world):
        self.bad.mode("ok")

    def healed(self, world):
        good = self.readers.good()
        try:
            until(lambda: self.readers.good() > good + self.threads, HEALS, "")
        except RuntimeError:
            world.problem(f"its own guest's reads have not resumed {HEALS} s after the server recovered")
        if not self.readers.end(20):
            world.problem("its own guest's reads do not end")
        if self.readers.errors():
            world.problem(f"its own guest got {self.readers.errors()} for a temporary failure")
        if self.readers.wrong():
            world.problem(f"its own guest read wrong bytes, {self.readers.wrong()} times: {self.readers.text.value.decode()}")
        if self.expect_state and self.states == {"ok"}:
            world.problem("base show reported ok all the time")
        world.note(f"state {'/'.join(sorted(self.states))}; {self.bad.requests.value} requests")
        if not self.adding.end(20):
            world.problem("base add has not ended")
        if self.adding.failed.value:
            world.problem(f"base add: {self.adding.text.value.decode()}")


def bad(name, mode, row, quick=False, **more):
    return type(name, (ServerAttack,), {"mode": mode, "row": row, "quick": quick, **more})


SERVER_MODES = [
    bad("hang", "hang", "a server hangs; 40 reads wait for it", quick=True),
    bad("hang-in-body", "hang_in_body", "a server hangs in the middle of each answer"),
    bad("slow", "slow", "a server needs 300 ms for each answer", expect_state=False),
    bad("byte-a-second", "byte_a_second", "one byte a second"),
    bad("header-a-second", "header_a_second", "one header line a second"),
    bad("endless-headers", "endless_headers", "headers without end"),
    bad("endless-body", "endless_body", "a body of 2^62 bytes that keeps coming", expect_state=False),
    bad("endless-chunks", "endless_chunks", "chunks without end", expect_state=False),
    bad("gzip-bomb", "gzip_bomb", "64 MiB of zeros, gzipped, for each range"),
    bad("other-range", "other_range", "206 with another range and its bytes"),
    bad("whole-other", "whole_other", "200 with another object's bytes from its beginning", expect_state=False, honest=False),
    bad("error-page", "error_page", "200 with an error page"),
    bad("short", "short", "half of each answer, then the end of the connection", expect_state=False),
    bad("dying", "dying", "every other answer is reset in its middle", expect_state=False),
    bad("reset", "reset", "every connection is reset"),
    bad("huge-total", "huge_total", "an object of 2^63 - 1 bytes"),
    bad("negative", "negative", "negative lengths and ranges"),
    bad("etag-other", "other_etag", "another ETag for a while (a deploy)", quick=True),
    bad("etag-flap", "etag_flap", "every other answer is of another object (a cache node)"),
    bad("size-flap", "size_flap", "the size of the object changes from answer to answer"),
    bad("unauthorized", "unauthorized", "401 for a while (an expired token)"),
    bad("forbidden", "forbidden", "403 for a while (an expired presigned URL, a deactivated image)", quick=True),
    bad("not-found", "not_found", "404 for four seconds"),
    bad("empty-204", "empty", "an empty 204"),
    bad("refused-flap", "refused_flap", "401, 403, 404 in turn"),
    bad("not-satisfiable", "not_satisfiable", "416 for existing ranges"),
    bad("come-again", "come_again", "429, Retry-After in thirty thousand years"),
    bad("broken-500", "broken", "500"),
    bad("redirect-loop", "redirect_self", "redirects to a new path of itself each time"),
    bad("redirect-long", "redirect_long", "redirects to URLs of 60 KB"),
    bad("tls-garbage", "tls_garbage", "TLS records of noise instead of HTTP"),
]  # fmt: skip


class DeadHosts(ServerAttack):
    row = "redirects to a different dead host each time"
    mode, quick = "redirect_dead", True

    def before(self, world):
        self.kept, port = black_hole()
        self.server = {"target": port}
        super().before(world)

    def healed(self, world):
        for kept in self.kept:
            kept.close()
        super().healed(world)


class DeadHostsRefusing(ServerAttack):
    row = "redirects to a different host each time, which refuses connections"
    mode = "redirect_dead"
    server = {"target": 1}

    def during(self, world):
        super().during(world)
        self.most = max(getattr(self, "most", 0), self.bad.requests.value)

    def end(self, world):
        seen = self.bad.requests.value
        world.note(f"{seen} requests during the attack")
        super().end(world)


class ByteASecondDeadline(ServerAttack):
    row = "one byte a second, --deadline 3s: EIO in time, and the mirror takes over"
    least = 3.5
    mode, threads = "byte_a_second", 8

    def before(self, world):
        self.good = world.serve()
        self.bad = world.serve()
        world.daemon.cli("base", "add", "bad", self.bad.url(), "--deadline", "3s")
        world.daemon.cli("base", "add", "mirrored", self.bad.url("m"), "--mirror", self.good.url(), "--deadline", "30s")
        self.path, self.mirrored = world.attacker_disk("bad"), world.attacker_disk("mirrored")

    def begin(self, world):
        super().begin(world)
        self.second = world.readers(self.mirrored, seed=ATTACKER, threads=8, pace=0.002)

    def healed(self, world):
        if not self.readers.errors().get("EIO") and not self.readers.errors().get("ETIMEDOUT"):
            world.problem("no read failed at its deadline of 3 s")
        if self.second.good() < 20:
            world.problem(f"the mirror was not used: {self.second.good()} reads")
        for readers in (self.readers, self.second):
            if not readers.end(20):
                world.problem("its own guest's reads do not end")
            if readers.wrong():
                world.problem(f"wrong bytes: {readers.text.value.decode()}")
        world.note(f"state {'/'.join(sorted(self.states))}; {self.second.good()} reads from the mirror")

    settle = 3.0


class RedirectLoopback(Attack):
    row = "a server redirects `base add` to a loopback service"
    quick = True

    def begin(self, world):
        self.secret = world.serve(seed=77)
        self.far = world.serve("redirect_to", host=PUBLIC, target=self.secret.url())
        self.loop = world.loop(lambda turn: self.add(world, turn), 0.05)
        until(lambda: self.loop.turns.value > 0, 30, "base add")

    def add(self, world, turn):
        world.daemon.cli("base", "add", f"far{turn}", self.far.url(), seconds=20)

    def end(self, world):
        self.loop.end()

    def healed(self, world):
        names = [base["name"] for base in world.daemon.cli("base", "ls") if base["name"].startswith("far")]
        if names:
            world.problem(f"{len(names)} bases were created from answers of a loopback service")
        if self.secret.requests.value:
            world.problem(f"the loopback service got {self.secret.requests.value} requests")


class FiveHundredBases(Attack):
    row = "500 bases on one hanging server, one reader each"

    def before(self, world):
        self.bad = world.serve(size=4 * MIB)
        for number in range(500):
            status, answer = world.daemon.ask("POST", "/v1/bases", {"name": f"b{number}", "source": self.bad.url(str(number))})
            assert status == 200, answer
        for number in range(500):
            world.daemon.ask("POST", "/v1/disks", {"name": f"b{number}", "base": f"b{number}"})

    def begin(self, world):
        self.bad.mode("hang")
        self.readers = [
            world.readers(world.daemon.disk(f"b{number}"), seed=ATTACKER, threads=1, size=4 * MIB, pace=0.1) for number in range(0, 500, 4)
        ]
        time.sleep(1)

    def end(self, world):
        self.bad.mode("ok")

    def healed(self, world):
        ended = [readers.end(0.1) or readers.end(10) for readers in self.readers[:20]]
        if not all(ended):
            world.problem("its own guests' reads do not end")
        errors = [readers.errors() for readers in self.readers if readers.errors()]
        if errors:
            world.problem(f"{len(errors)} of its own guests got errors: {errors[0]}")


class HydrateDead(Attack):
    row = "hydrate, evict, pin and verify in a loop, of a base on a dead server, while a reader waits"
    quick = True

    def before(self, world):
        self.bad = world.serve()
        world.daemon.cli("base", "add", "bad", self.bad.url())
        self.path = world.attacker_disk("bad")

    def begin(self, world):
        self.bad.mode("hang")
        self.readers = world.readers(self.path, seed=ATTACKER, threads=4)

        def work(turn):
            path, body = [
                ("hydrate", {}), ("evict", None), ("pin", {"pinned": True}), ("verify", None), ("pin", {"pinned": False}),
            ][turn % 5]  # fmt: skip
            begin = time.monotonic()
            try:
                world.daemon.ask("POST", f"/v1/bases/bad/{path}", body, seconds=10)
            except OSError as error:
                raise RuntimeError(f"{path}: no answer in {time.monotonic() - begin:.0f} s: {error}") from error

        self.loops = [world.loop(work, 0.02) for _ in range(4)]
        time.sleep(1)

    def end(self, world):
        self.bad.mode("ok")
        for loop in self.loops:
            if not loop.end(15):
                world.problem("a request of the loop does not end")

    def healed(self, world):
        failed = [loop.text.value.decode() for loop in self.loops if loop.failed.value]
        if failed:
            world.problem(f"{failed[0]}")
        if not self.readers.end(20):
            world.problem("its own guest's reads do not end")
        if self.readers.errors():
            world.problem(f"its own guest got {self.readers.errors()}")
        answer = world.daemon.cli("base", "evict", "bad", seconds=20)
        world.note(f"{sum(loop.turns.value for loop in self.loops)} requests; evict afterwards: {answer}"[:200])


ATTACKS = [
    *SERVER_MODES, DeadHosts, DeadHostsRefusing, ByteASecondDeadline, RedirectLoopback, FiveHundredBases, HydrateDead,
]  # fmt: skip
