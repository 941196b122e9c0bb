"""What a run found, as a file of JSON, and how the files of several runs become one."""

import json

from harness import say

VERSION = 1


class Results:
    def __init__(self, meta=None):
        # Of each run that is part of this: command, date, machine, versions, rounds, seconds.
        self.parts = [meta] if meta else []
        # Name, label, group and whether it is a peer.
        self.contenders = {}
        # By "MEDIUM ROW".
        self.rows = {}
        # Lists of figures, by the key of the fact.
        self.facts = {}
        # The highest load at the start of a group of facts, by its row.
        self.fact_loads = {}
        self.refused, self.failures = [], []

    def row(self, medium, row):
        return self.rows.setdefault(f"{medium} {row.key}", {"load": [], "values": {}, "empty": {}})

    def note(self, contenders):
        for one in contenders:
            self.contenders[one.name] = {"label": one.label, "group": one.group, "is_peer": one.is_peer}

    def add_facts(self, found):
        for key, value in found.items():
            self.facts.setdefault(key, []).append(value)

    def refuse(self, key, what):
        """Notes a round of a row, or a group of facts, that was left out."""
        self.refused.append([key, what])
        say("   REFUSED", what)

    def still_refused(self):
        """What was left out, and not measured by another part either."""
        asked = max(part["rounds"] for part in self.parts)

        def is_missing(key):
            if " " not in key:
                return key not in self.fact_loads
            values = self.rows[key]["values"].values()
            return min(map(len, values), default=0) < asked

        return [what for key, what in self.refused if is_missing(key)]

    def fail(self, what):
        self.failures.append(what.replace("\n", " "))
        say("   FAILED", self.failures[-1])

    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": VERSION, **self.__dict__}, indent=1) + "\n")
        say(f"wrote {path}")

    @classmethod
    def load(cls, path):
        found = json.loads(path.read_text())
        if found.pop("version", None) != VERSION:
            raise ValueError(f"{path}: not of this version of scripts/bench; measure again")
        results = cls()
        results.__dict__.update(found)
        return results

    def merge(self, other):
        """Adds what another run found. Rounds of one row add up."""
        self.parts += other.parts
        for name, contender in other.contenders.items():
            self.contenders.setdefault(name, contender)
        for key, row in other.rows.items():
            mine = self.rows.setdefault(key, {"load": [], "values": {}, "empty": {}})
            mine["load"] += row["load"]
            mine["empty"].update(row["empty"])
            for name, values in row["values"].items():
                mine["values"].setdefault(name, []).extend(values)
        for key, values in other.facts.items():
            self.facts.setdefault(key, []).extend(values)
        for row, load in other.fact_loads.items():
            self.fact_loads[row] = max(load, self.fact_loads.get(row, 0))
        self.refused += other.refused
        self.failures += other.failures

    def differences(self):
        """What is not the same in all parts, though it has to be."""
        keys = ("machine", "versions", "seconds")
        return [key for key in keys if len({json.dumps(part[key], sort_keys=True) for part in self.parts}) > 1]
