"""Runs one attack and records its effects on the victim."""

import json
import subprocess
import time
import traceback

from harness import GIB, MIB

from .content import compare, content
from .victim import KINDS, LIMITS, Quiet, Victim, by_window
from .world import LOCAL, URL, URL_SIZE, World

# Allowed growth after an attack: the memory cache (64 MiB) and buffers are kept.
GROWTH_MEMORY, GROWTH_FILES = 300 * MIB, 200
LONGEST_END = 45


class Attack:
    """An attack by a tenant, a server, an image, a filesystem or a local user."""

    row = ""  # its description in the table
    quick = False  # whether --quick runs it
    arguments, prefix = (), ()
    newer = {}  # configuration that only binaries with the key in them know
    worker_may_end = False  # whether the attack kills workers itself
    seconds = 240  # limit of the total duration
    settle = 1.0  # seconds between its end and the windows after it
    least = 0.0  # its shortest useful duration, seconds
    judged = KINDS  # the probes whose latency it must not affect

    def before(self, world):
        """Prepares the attack; called before the first windows."""

    def begin(self, world):
        """Starts the attack, and returns when it is effective."""

    def during(self, world):
        """Called between the windows of the attack."""

    def end(self, world):
        """Ends the attack and its processes."""

    def healed(self, world):
        """Checks the recovery, a while after the end; reports to `world.problem`."""


class Scenario(Attack):
    """An attack without the measured victim: it starts and stops daemons itself, in `run`."""

    def run(self, world):
        raise NotImplementedError


def pause(seconds):
    begin = time.monotonic_ns()
    time.sleep(seconds)
    return begin, time.monotonic_ns()


def guarded(problems, what, work):
    try:
        return work()
    except subprocess.TimeoutExpired as error:
        problems.append(f"{what}: no end in {error.timeout:.0f} s")
    except Exception as error:
        problems.append(f"{what}: {str(error) or type(error).__name__}"[:500])
        if not isinstance(error, (RuntimeError, OSError, ValueError)):
            problems[-1] += " " + traceback.format_exc(limit=-2)
    return None


def status_problems(world, found):
    status = guarded(found, "status", lambda: world.daemon.cli("status", seconds=10))
    if status is None:
        return
    if status["worker_starts"] > 1 and not world.attack.worker_may_end:
        found.append(f"the worker ended {status['worker_starts'] - 1} times: {[end['why'] for end in status['worker_ends']][:3]}")
    for key in ("damaged", "disks_refusing_writes"):
        if status.get(key):
            found.append(f"status: {key}: {status[key][:3]}")
    if status["caught_panics"]:
        found.append(f"{status['caught_panics']} panics")


def new_disk(world):
    """Checks that a new disk works on each base of the victim."""
    for base, seed in (LOCAL, URL):
        world.daemon.cli("disk", "create", f"after-{base}", "--base", base, seconds=20)
        with open(world.daemon.disk(f"after-{base}"), "r+b", buffering=0) as file:
            compare(file.read(MIB), content(seed, 0, MIB), f"after-{base}")
            file.write(b"x" * 4096)
        world.daemon.cli("disk", "rm", f"after-{base}", seconds=20)


def carry_out(attack, where, binary, quick, phase, save):
    """Runs an attack and returns the result, which is also saved in between."""
    result = {
        "name": attack.name, "row": attack.row, "errors": [], "wrong": [], "recovers": [], "notes": [], "stuck": [], "check": None,
        "finished": False,
    }  # fmt: skip
    begun = time.monotonic()
    world = World(where, binary, attack, quick)
    try:
        if isinstance(attack, Scenario):
            guarded(world.problems, "scenario", lambda: attack.run(world))
            result["recovers"] = world.problems
        else:
            measured(attack, world, quick, phase, result, save)
        result["finished"] = True
    except Exception:
        result["recovers"].append("campaign: " + traceback.format_exc(limit=-3))
    finally:
        result["notes"] += world.notes
        result["seconds"] = round(time.monotonic() - begun, 1)
        save(result)
        world.clean()
        world.server.end()
    return result


def measured(attack, world, quick, phase, result, save):
    count = 3 if quick else 5
    length = max(phase, attack.least) / count
    world.start()
    attack.before(world)
    victim, quiet = Victim(world.where, world.daemon, LOCAL, URL, URL_SIZE, quick), Quiet(world.quiet, LOCAL)
    victim.begin()
    quiet.begin()
    time.sleep(1.0)
    windows = {"before": [], "during": [], "after": []}
    for _ in range(count):
        windows["before"].append(pause(length))
    usage = world.daemon.usage()
    guarded(world.problems, "attack", lambda: attack.begin(world))
    begin, used = time.monotonic(), world.daemon.usage()
    for _ in range(count):
        windows["during"].append(pause(length))
        guarded(world.problems, "attack", lambda: attack.during(world))
    middle = world.daemon.usage()
    result["processor"] = (middle["seconds"] - used["seconds"]) / (time.monotonic() - begin)
    result["peak"] = {key: middle[key] - usage[key] for key in ("memory", "files")}
    guarded(world.problems, "attack's end", lambda: attack.end(world))
    time.sleep(attack.settle / (2 if quick else 1))
    for _ in range(count):
        windows["after"].append(pause(length))
    result["p99"] = {probe.kind: by_window(probe, windows) for probe in victim.probes}
    result["quiet"] = {probe.kind: by_window(probe, windows) for probe in quiet.probes}
    save(result)
    status_problems(world, world.problems)
    guarded(world.problems, "a new disk", lambda: new_disk(world))
    guarded(world.problems, "afterwards", lambda: attack.healed(world))
    last = world.daemon.usage()
    result["growth"] = {key: last[key] - usage[key] for key in ("memory", "files")}
    if last["memory"] - usage["memory"] > GROWTH_MEMORY or last["files"] - usage["files"] > GROWTH_FILES:
        world.problems.append(f"grown by {result['growth']['memory'] / MIB:.0f} MiB, {result['growth']['files']} descriptors")
    result["stuck"] = victim.end(10 if quick else LONGEST_END)
    quiet.end(5)
    for kind, text in victim.take():
        result["wrong" if kind == "wrong" else "errors"].append(text)
    result["passes"] = victim.fio.passes.value
    save(result)
    status = guarded(world.problems, "stop", lambda: world.daemon.stop(60))
    if status not in (0, None):
        world.problems.append(f"the daemon ended with status {status}")
    if world.daemon.process is not None:
        world.daemon.end()
    if "panicked" in world.daemon.log.read_text(errors="replace"):
        world.problems.append("a panic in the log")
    result["check"] = guarded(world.problems, "check", world.daemon.check)
    result["recovers"] = world.problems


def ratio(values):
    before, during = values["before"]["p99"], values["during"]["p99"]
    return during / before if before and during else None


def judge(result, attack, generous):
    """The list of failures in a result: wrong bytes, errors, stuck operations, p99, recovery, check."""
    verdict = []
    if result["wrong"]:
        verdict.append(f"wrong bytes: {result['wrong'][0]}")
    if result["errors"]:
        verdict.append(f"{len(result['errors'])} errors: {result['errors'][0]}")
    if result["stuck"]:
        verdict.append(f"did not end: {', '.join(result['stuck'])}")
    if "p99" in result:
        for kind, values in result["p99"].items():
            found = ratio(values)
            limit = LIMITS[kind] * (10 if generous else 1)
            if kind not in attack.judged or found is None:
                continue
            # Effects of the host, as seen on the second daemon or before the attack, do not count.
            host = max(1.0, ratio(result["quiet"][kind if kind in result["quiet"] else "local"]) or 1.0)
            peace = values["before"]["most"]
            if found / host > limit and values["during"]["p99"] > peace and not (generous and values["during"]["p99"] < 200):
                verdict.append(f"p99 of {kind} {values['before']['p99']:.1f} to {values['during']['p99']:.1f} ms")
    verdict += result["recovers"]
    if result["check"]:
        verdict.append(f"check: {' / '.join(result['check'].splitlines()[:2])}"[:300])
    if not result["finished"]:
        verdict.append("the attack did not finish in time")
    return verdict


def save_to(path):
    def save(result):
        path.write_text(json.dumps(result))

    return save


__all__ = ["GIB", "Attack", "Scenario", "carry_out", "judge", "ratio", "save_to"]
