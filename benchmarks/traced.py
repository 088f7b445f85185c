"""What a trace of torch's profiler tells of a run's blocks: of all but the first and the last."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
HOST_WORK = (*LAUNCHES, "cpu_op")
# what the host was at when it asked for something, and what that is called
PHASES = {
    "forward": "forward",
    "statistics": "statistics",
    "transform": "search",
    "learn": "learn",
    "clip": "clip",
    "quantize": "round",
    "pack": "pack",
    "advance": "forward",
}
# copies, beside the rest
READ, WRITE = "read: copies to the device", "write: copies to the host"
NOTHING = "orchestration: nothing to do"


class Gap(NamedTuple):
    """A time in which a device does nothing.

    Attributes:
        start: in microseconds of the trace.
        end: likewise.
        before: what the device did last.
        after: what it does next.
    """

    start: float
    end: float
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def by_phase(events: Iterable[Mapping[str, Any]], blocks: int) -> dict[str, float]:
    """Seconds a block of what the device does, by what it was asked for; copies run beside that."""
    timed = [event for event in events if event.get("ph") == "X"]
    start, end = inner_span(timed)
    work = inner_work(timed)
    asked = _asked_in(timed)
    found = dict.fromkeys([READ, *PHASES.values(), WRITE, "other"], 0.0)
    for event in work:
        found[_phase(event, asked)] += event["dur"]
    found[NOTHING] = end - start - covered((e["ts"], e["ts"] + e["dur"]) for e in work)
    return {name: taken / (blocks - 2) / 1e6 for name, taken in found.items() if taken}


def device_work(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a device does."""
    return [event for event in events if event.get("cat") in DEVICE_WORK]


def _asked_in(timed: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """By a launch's number, the innermost of PHASES that its thread was in."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in timed:
        named = event.get("cat") == "user_annotation" and event["name"] in PHASES
        if named or event.get("cat") in LAUNCHES:
            threads[event["tid"]].append(event)
    asked: dict[int, str] = {}
    for own in threads.values():
        inside: list[Mapping[str, Any]] = []
        for event in sorted(own, key=lambda e: e["ts"]):
            while inside and inside[-1]["ts"] + inside[-1]["dur"] <= event["ts"]:
                inside.pop()
            if event["cat"] == "user_annotation":
                inside.append(event)
            elif inside and "correlation" in event.get("args", {}):
                asked[event["args"]["correlation"]] = inside[-1]["name"]
    return asked


def inner_span(timed: list[Mapping[str, Any]]) -> tuple[float, float]:
    """When the first block was through and when the last but one was, in microseconds.

    A pass moves hidden states on after every block but the last.
    """
    named = [e for e in timed if e.get("cat") == "user_annotation"]
    ends = {
        name: sorted(e["ts"] + e["dur"] for e in named if e["name"] == name)
        for name in ("advance", "pack")
    }
    if ends["advance"]:
        return ends["advance"][0], ends["advance"][-1]
    return ends["pack"][0], ends["pack"][-2]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def gaps(work: Iterable[Mapping[str, Any]]) -> list[Gap]:
    """Times in which a device does nothing, between the first and the last that it does."""
    ordered = sorted(work, key=lambda e: e["ts"])
    found: list[Gap] = []
    for event, last in zip(ordered[1:], itertools.accumulate(ordered, _later), strict=False):
        reached = last["ts"] + last["dur"]
        if event["ts"] > reached:
            found.append(Gap(reached, event["ts"], last, event))
    return found


def _later(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one that ends later; the first of equals."""
    return max(one, other, key=lambda e: e["ts"] + e["dur"])


def inner_work(timed: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a device does between the end of the first block and that of the last but one."""
    start, end = inner_span(timed)
    return device_work(e for e in timed if start <= e["ts"] < end)


def idle_before(events: Iterable[Mapping[str, Any]], blocks: int) -> dict[str, float]:
    """Seconds a block in which a device does nothing, by the phase of what it does next."""
    timed = [event for event in events if event.get("ph") == "X"]
    asked = _asked_in(timed)
    found: dict[str, float] = defaultdict(float)
    for gap in gaps(inner_work(timed)):
        found[_phase(gap.after, asked)] += (gap.end - gap.start) / (blocks - 2) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def longest_gaps(events: Iterable[Mapping[str, Any]], count: int) -> list[tuple[Gap, str]]:
    """The longest times in which a device does nothing, and the host's longest call in each."""
    timed = [event for event in events if event.get("ph") == "X"]
    found = gaps(inner_work(timed))
    calls = [event for event in timed if event.get("cat") in HOST_WORK]
    return [
        (gap, _longest_call(calls, gap))
        for gap in sorted(found, key=lambda gap: gap.start - gap.end)[:count]
    ]


def _longest_call(calls: Iterable[Mapping[str, Any]], gap: Gap) -> str:
    """The innermost of the calls that take most of a gap."""

    def inside(call: Mapping[str, Any]) -> float:
        return float(min(gap.end, call["ts"] + call["dur"]) - max(gap.start, call["ts"]))

    known = [(inside(call), -call["dur"], str(call["name"])) for call in calls if inside(call) > 0]
    return max(known)[2] if known else ""


def _phase(event: Mapping[str, Any], asked: Mapping[int, str]) -> str:
    """What an event of a device belongs to."""
    if "HtoD" in event["name"]:
        return READ
    if "DtoH" in event["name"]:
        return WRITE
    return PHASES.get(asked.get(event.get("args", {}).get("correlation", -1), ""), "other")
