"""What a trace of torch's profiler tells of a run's blocks: of all but the first and the last."""

from __future__ import annotations

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
        before: what the device did last, where it did something.
        after: what it does next.
    """

    start: float
    end: float
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]


def by_phase(events: Iterable[Mapping[str, Any]], blocks: int) -> dict[str, float]:
    """Seconds a block of what the device does, by what it was asked for; copies run beside that."""
    timed = [event for event in events if event.get("ph") == "X"]
    start, end = inner_span(timed)
    work = device_work(e for e in timed if start <= e["ts"] < end)
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
    found: list[Gap] = []
    last: Mapping[str, Any] | None = None
    reached = float("inf")
    for event in sorted(work, key=lambda e: e["ts"]):
        if event["ts"] > reached:
            found.append(Gap(reached, event["ts"], last, event))
        if last is None or event["ts"] + event["dur"] > reached:
            reached, last = event["ts"] + event["dur"], event
    return found


def idle_before(events: Iterable[Mapping[str, Any]], blocks: int) -> dict[str, float]:
    """Seconds a block in which a device does nothing, by the phase of what it does next."""
    timed = [event for event in events if event.get("ph") == "X"]
    start, end = inner_span(timed)
    asked = _asked_in(timed)
    found: dict[str, float] = defaultdict(float)
    for gap in gaps(device_work(e for e in timed if start <= e["ts"] < end)):
        found[_phase(gap.after, asked)] += (gap.end - gap.start) / (blocks - 2) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def longest_gaps(events: Iterable[Mapping[str, Any]], count: int) -> list[tuple[Gap, str]]:
    """The longest times in which a device does nothing, and the host's longest call in each."""
    timed = [event for event in events if event.get("ph") == "X"]
    start, end = inner_span(timed)
    found = gaps(device_work(e for e in timed if start <= e["ts"] < end))
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
