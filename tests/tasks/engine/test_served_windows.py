"""Windows that lie in a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from tasks.engine.errors import InputError
from tasks.engine.served_windows import MARGIN, WINDOWS, read_windows, served_windows, windows_text

TOKENS = torch.arange(3 * 20).reshape(3, 20)
NLL = torch.rand(3, 19, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("context", "length"), [(None, 20), (64, 20), (20 + MARGIN, 20), (20, 12)])
def test_they_are_as_long_as_a_server_takes(context, length):
    found = served_windows(TOKENS, NLL, 2, context)
    assert torch.equal(found.tokens, TOKENS[:2, :length])
    wanted = [sum(row[: length - 1].double().tolist()) / (length - 1) for row in NLL[:2]]
    assert found.nll == pytest.approx(wanted, abs=1e-12)
    assert found.mean == pytest.approx(sum(wanted) / 2, abs=1e-12)


@pytest.mark.parametrize(("count", "context"), [(0, None), (2, MARGIN + 1)])
def test_there_may_be_none(count, context):
    assert served_windows(TOKENS, NLL, count, context) is None


def test_more_than_there_are():
    assert len(served_windows(TOKENS, NLL, 99, None).tokens) == 3


def test_what_is_written_is_read(tmp_path):
    windows = served_windows(TOKENS, NLL, 3, None)
    (tmp_path / WINDOWS).write_text(windows_text(windows))
    found = read_windows(tmp_path)
    assert torch.equal(found.tokens, windows.tokens) and found.nll == windows.nll


def test_a_checkpoint_without_them(tmp_path):
    with pytest.raises(InputError, match=f"no {WINDOWS} in it.*--set serving.windows=16"):
        read_windows(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"tokens": [[1, 2]]}',
        json.dumps({"tokens": [[1, 2]], "nll": [1.0, 2.0]}),
        json.dumps({"tokens": [[1, 2], [1]], "nll": [1.0, 2.0]}),
        json.dumps({"tokens": [[1]], "nll": [1.0]}),
        json.dumps({"tokens": [], "nll": []}),
        json.dumps({"tokens": [[1, 2]], "nll": [1.0], "more": 1}),
    ],
)
def test_damaged_files(tmp_path, text):
    (tmp_path / WINDOWS).write_text(text)
    with pytest.raises(InputError, match="damaged; publish the checkpoint again"):
        read_windows(tmp_path)
