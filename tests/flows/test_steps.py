from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.loading import load_recipe
from flows.steps import calibration
from tasks.engine.errors import InputError
from tasks.engine.job import Job
from tasks.engine.memo import Memo
from tasks.engine.source import open_source
from tasks.engine.store import Store
from tasks.engine.team import Team
from tests.models import make_checkpoint


@pytest.mark.parametrize(("windows", "devices", "fits"), [(2, 3, False), (3, 3, True)])
def test_a_text_gives_each_device_a_window(
    windows: int, devices: int, fits: bool, tmp_path: Path
) -> None:
    loaded = load_recipe("awq_w4a16", ["serving.check_kernels=false"])
    source = open_source(make_checkpoint(tmp_path / "model", "llama"))
    job = Job(loaded, source, Store(tmp_path / "store"), Memo(), "cpu", 1 << 30)
    job = replace(job, team=Team(0, devices))
    entry = SimpleNamespace(key="it", value={"windows": windows, "window": 32})
    course: Any = SimpleNamespace(run=lambda *_: SimpleNamespace(entry=entry))
    if fits:
        assert calibration(job, course, job.steps[0], {}) == "it"
        return
    with pytest.raises(InputError, match="gives 2 windows for 3 devices; use fewer devices"):
        calibration(job, course, job.steps[0], {})
