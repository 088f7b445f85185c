"""What a device did of each phase of a block, read from a trace of torch's profiler."""

from __future__ import annotations

import importlib.util
from itertools import count
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

BLOCKS = 4
MAIN, WRITER, DEVICE = 1, 2, 7


@pytest.fixture(scope="module")
def traced() -> ModuleType:
    spec = importlib.util.spec_from_file_location("traced", ROOT / "benchmarks" / "traced.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def span(name: str, category: str, thread: int, start: float, end: float, **args: Any) -> Any:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "tid": thread,
        "ts": start,
        "dur": end - start,
        "args": args,
    }


def block_of(start: float, numbers: count[int]) -> list[dict[str, Any]]:
    """One block of 1000 microseconds, in which the device works in 700."""
    events = [
        span(name, "user_annotation", MAIN, start + begin, start + end)
        for name, begin, end in (
            ("transform", 0, 300),
            ("forward", 10, 100),
            ("statistics", 50, 60),
            ("quantize", 300, 400),
            ("advance", 400, 500),
            ("forward", 410, 490),
            ("something else", 415, 420),
        )
    ]
    # when the host asks, what the device does from when to when
    for asked, name, begin, end in (
        (20, "gemm", 100, 200),
        (55, "gram", 200, 250),
        (70, "gemm", 250, 300),
        (120, "search", 300, 400),
        (310, "round", 500, 600),
        (418, "gemm", 600, 800),
    ):
        number = next(numbers)
        asking = "cuda_driver" if name == "round" else "cuda_runtime"
        launch = span("launch", asking, MAIN, start + asked, start + asked + 1, correlation=number)
        events += [
            launch,
            span(name, "kernel", DEVICE, start + begin, start + end, correlation=number),
        ]
    for thread, name, begin, end in (
        (WRITER, "Memcpy DtoH (Device -> Pinned)", 590, 650),
        (MAIN, "Memcpy HtoD (Pinned -> Device)", 0, 50),
    ):
        number = next(numbers)
        events += [
            span("copy", "cuda_runtime", thread, start + begin, start + begin, correlation=number),
            span(name, "gpu_memcpy", DEVICE, start + begin, start + end, correlation=number),
        ]
    events.append(span("left alone", "kernel", DEVICE, start + 900, start + 950))
    return events


def test_each_phase_has_what_it_asked_for(traced: ModuleType) -> None:
    numbers = count()
    events = [e for n in range(BLOCKS) for e in block_of(1000.0 * n, numbers)]
    events.append({"ph": "i", "name": "an instant", "ts": 3.0})
    # from the end of the first block's pass on
    assert traced.inner_span([e for e in events if e["ph"] == "X"]) == (500.0, 3500.0)
    found = {name: round(1e6 * s) for name, s in traced.by_phase(events, 5).items()}
    # of five blocks three count, and three are there
    assert found == {
        traced.READ: 50,
        "forward": 350,
        "statistics": 50,
        "search": 100,
        "round": 100,
        traced.WRITE: 60,
        "other": 50,
        traced.NOTHING: 300,
    }


def test_what_it_waited_for(traced: ModuleType) -> None:
    numbers = count()
    events = [e for n in range(BLOCKS) for e in block_of(1000.0 * n, numbers)]
    found = {name: round(1e6 * s) for name, s in traced.idle_before(events, 5).items()}
    # the first that counts begins with the round at 500, after what was idle before
    assert found == {"other": 100, "forward": 50, traced.READ: 50, "round": 67}
    events.append(span("waits", "cuda_runtime", MAIN, 1390, 1495))
    events.append(span("asks", "cpu_op", MAIN, 1380, 1520))
    (first, call), (_, other) = traced.longest_gaps(events, 2)
    assert (first.start, first.end, first.after["name"]) == (800.0, 900.0, "left alone")
    assert first.before["name"] == "gemm" and call == ""
    assert other == "asks"


def test_the_innermost_call_is_told(traced: ModuleType) -> None:
    gap = traced.Gap(100.0, 200.0, {"name": "last"}, {"name": "kernel"})
    calls = [
        span("outer", "cpu_op", MAIN, 50, 300),
        span("inner", "cuda_runtime", MAIN, 90, 210),
        span("short", "cuda_runtime", MAIN, 120, 150),
    ]
    assert traced._longest_call(calls, gap) == "inner"
