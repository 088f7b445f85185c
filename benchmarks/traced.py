"""What a trace of torch's profiler tells of a run's blocks: of all but the first and the last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
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


def by_phase(events: Iterable[Mapping[str, Any]], blocks: int) -> dict[str, float]:
    """Seconds a block of what the device does, by what it was asked for; copies run beside that."""
    timed = [event for event in events if event.get("ph") == "X"]
    start, end = inner_span(timed)
    work = device_work(e for e in timed if start <= e["ts"] < end)
    asked = _asked_in(timed)
    found = dict.fromkeys([READ, *PHASES.values(), WRITE, "other"], 0.0)
    for event in work:
        launch = event.get("args", {}).get("correlation", -1)
        phase = PHASES.get(asked.get(launch, ""), "other")
        if "HtoD" in event["name"]:
            phase = READ
        elif "DtoH" in event["name"]:
            phase = WRITE
        found[phase] += event["dur"]
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


def idle(work: Iterable[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Times in which the device does nothing, by what it does next."""
    ordered = sorted(work, key=lambda e: e["ts"])
    gaps, reached = [], ordered[0]["ts"] if ordered else 0.0
    for event in ordered:
        if event["ts"] > reached:
            gaps.append((str(event["name"])[:110], {"dur": event["ts"] - reached}))
        reached = max(reached, event["ts"] + event["dur"])
    return gaps
