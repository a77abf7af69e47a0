"""What chips send each other in a compiled step, read from its HLO text."""

import math
import re
from collections import Counter, defaultdict

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2}
WIDTHS |= {"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OP = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][a-z0-9-]*)\(")
_SHAPE = re.compile(r"\b(" + "|".join(WIDTHS) + r"|f8\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?(%?[\w.-]+)")


def traffic(hlo: str, loops: int = 1) -> tuple[dict[str, float], dict[str, int]]:
    """Bytes that a chip sends by kind of collective, and how many of each it runs, in one step.

    Counted is what an algorithm on a ring sends: of s bytes among n chips, gathered or scattered,
    s (n - 1) / n, and twice as much to reduce to all. A loop's body counts as often as it runs.

    Args:
        hlo: `compiled.as_text()`.
        loops: how often those run of which data decide it.
    """
    computations = _computations(hlo)
    sent: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    seen = set()  # on TPU each stage of an overlapped collective names it, under one channel
    for name, times in _times(computations, loops).items():
        for line in computations[name]:
            found = _OP.match(line)
            kind = found and re.sub(r"-start$", "", found[2])
            channel = re.search(r"channel_id=(\d+)", line)
            if kind in KINDS and (channel is None or channel[1] not in seen):
                seen |= {channel[1]} if channel else set()
                sent[kind] += times * _bytes(kind, found[1], line)
                counts[kind] += times
    return dict(sent), dict(counts)


def _computations(hlo: str) -> dict[str, list[str]]:
    """{name of each computation: its lines}."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            lines = computations[("ENTRY " if line.startswith("ENTRY") else "") + head[1]] = []
        else:
            lines.append(line)
    return computations


def _times(computations: dict[str, list[str]], loops: int) -> Counter[str]:
    """How often each computation runs; a computation stands after those that it calls."""
    times: Counter[str] = Counter()
    for name in reversed(computations):
        times[name] += name.startswith("ENTRY ")
        for line in computations[name]:
            trips = _trips(line, computations, loops) if " while(" in line else 1
            for called in _CALLED.findall(line):
                times[called.lstrip("%")] += times[name] * trips
    return Counter({name: times[name] for name in computations if times[name]})


def _trips(line: str, computations: dict[str, list[str]], loops: int) -> int:
    """How often a while runs: XLA says so on CPU and GPU; else its condition holds the number."""
    if known := re.search(r'"known_trip_count":\s*\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)[1]
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition]))
    return int(limits[0]) if len(limits) == 1 else loops


def _bytes(kind: str, result: str, line: str) -> float:
    """What one chip sends in one collective. result: its shape, a tuple if it is asynchronous."""
    sizes = [
        WIDTHS.get(dtype, 1) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(result)
    ]
    size = max(sizes) if "-start(" in line else sum(sizes)
    if kind == "collective-permute":
        return size
    group = _group(line)
    if kind == "reduce-scatter" and "-start(" not in line:
        size *= group  # the result is one chip's share
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _group(line: str) -> int:
    """How many chips take part: replica groups are written in three ways."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"[\w.]+", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    return 1
