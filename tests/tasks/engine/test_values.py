"""Values that are not at hand yet become numbers once they are written."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tasks.engine.values import Later, begun, resolved


def test_tensors_become_numbers_and_lists_of_their_kind() -> None:
    shared = torch.tensor(0.1, dtype=torch.float32)
    value = {
        "as it is": {"text": "a", "none": None, "number": 3, "list": [1, 2]},
        "float": torch.tensor(1 / 3, dtype=torch.float64),
        "again": [shared, {"deep": shared}],
        "counts": torch.tensor([1, 2, 3], dtype=torch.int64),
        "empty": torch.tensor([]),
        "nan": torch.tensor(math.inf),
    }
    found = resolved(value)
    assert found["as it is"] == value["as it is"]
    assert found["float"] == 1 / 3
    assert found["again"] == [float(shared), {"deep": float(shared)}]
    assert found["counts"] == [1, 2, 3] and all(type(n) is int for n in found["counts"])
    assert found["empty"] == [] and found["nan"] == math.inf


def test_work_for_later_is_done_then() -> None:
    done: list[str] = []

    def work() -> str:
        done.append("work")
        return "digest"

    value = {"linears": {"q": {"digest": Later(work)}}}
    assert done == []
    assert resolved(value) == {"linears": {"q": {"digest": "digest"}}}
    assert done == ["work"]


def test_work_that_was_begun_is_waited_for() -> None:
    value = {"all": [Later(lambda: threading.current_thread().name), torch.tensor(2)], "other": "x"}
    with ThreadPoolExecutor(1, thread_name_prefix="other") as other:
        started = begun(value, other.submit)
        assert resolved(started) == {"all": ["other_0", 2], "other": "x"}


def test_what_went_wrong_in_work_is_told() -> None:
    def fails() -> None:
        raise OSError("disk")

    with ThreadPoolExecutor(1) as other:
        started = begun({"digest": Later(fails)}, other.submit)
        with pytest.raises(OSError, match="disk"):
            resolved(started)


def test_a_matrix_is_no_small_value() -> None:
    with pytest.raises(TypeError, match="no small value"):
        resolved({"gram": torch.zeros(2, 2)})
