"""Publications that were begun and not ended, and what makes two runs the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tasks.engine.errors import RunError
from tasks.engine.publication import (
    alone,
    begin,
    begun,
    end,
    note_work,
    publication_key,
    published_by,
    under_way,
    work_identity,
)
from tasks.engine.store import Store
from tests.models import make_checkpoint, make_text
from tests.tasks.conftest import JobOf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publication") / "model"
    return make_checkpoint(folder, blocks=1, hidden=64, intermediate=96, vocabulary=64)


def test_a_publication_is_begun_until_it_is_ended(tmp_path: Path) -> None:
    store, one, other = tmp_path / "store", tmp_path / "out", tmp_path / "other"
    assert begun(store, one) is None
    begin(store, one, "work")
    assert (begun(store, one), begun(store, other)) == ("work", None)
    begin(store, other, "other work")
    begin(store, one, "later work")
    assert (begun(store, one), begun(store, other)) == ("later work", "other work")
    end(store, one, "later work")
    assert (begun(store, one), begun(store, other)) == (None, "other work")
    end(store, one, "later work")
    assert begun(tmp_path / "another store", other) is None


def test_a_work_is_under_way_until_it_is_ended(tmp_path: Path) -> None:
    for _ in range(2):
        note_work(tmp_path, "work")
    assert under_way(tmp_path, "work") and not under_way(tmp_path, "other work")
    end(tmp_path, None, "other work")
    assert under_way(tmp_path, "work")
    end(tmp_path, None, "work")
    assert not under_way(tmp_path, "work")


def test_nothing_is_created_by_looking(tmp_path: Path) -> None:
    assert begun(tmp_path / "store", tmp_path / "out") is None
    assert not under_way(tmp_path / "store", "work")
    end(tmp_path / "store", tmp_path / "out", "work")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    begin(tmp_path, tmp_path / "out", "work")
    (record,) = (tmp_path / "publishing").iterdir()
    record.write_bytes(b"\xff\xfe")
    assert begun(tmp_path, tmp_path / "out") is None
    record.unlink()
    record.mkdir()
    assert begun(tmp_path, tmp_path / "out") is None


def test_one_run_at_a_time_works_for_an_output(tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    with alone(Store(store), out):
        with (
            pytest.raises(RunError, match=f"{out}: another run works for it right now"),
            alone(Store(store), out),
        ):
            raise AssertionError("two at a time")
        with alone(Store(store), tmp_path / "other"):
            pass
    with pytest.raises(ValueError, match="stop"), alone(Store(store), out):
        raise ValueError("stop")
    with alone(Store(store), out):
        pass


def test_outputs_have_keys_of_their_own(tmp_path: Path) -> None:
    keys = {publication_key(tmp_path / name) for name in ("a", "b", "a/b")}
    assert len(keys) == 3
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in keys)


def test_what_was_published_of_another_source_is_not_of_this_work(
    tmp_path: Path, job_of: JobOf
) -> None:
    model, out = make_checkpoint(tmp_path / "model", blocks=1), tmp_path / "out"
    job = job_of(model, "rtn_w4a16")
    assert not published_by(job, out)
    digest = job.source.digest(job.source.tensors)
    begin(job.store.root, out, work_identity(job, out), digest)
    assert published_by(job, out) and not published_by(job, tmp_path / "elsewhere")
    file = model / "model.safetensors"
    written = load_file(file)
    save_file(written, file, metadata={"format": "pt"})
    assert published_by(job_of(model, "rtn_w4a16"), out)
    written["model.norm.weight"] += 1
    save_file(written, file, metadata={"format": "pt"})
    assert not published_by(job_of(model, "rtn_w4a16"), out)
    # its name is the same: a run of MLflow is told by the digest
    assert begun(job.store.root, out) == work_identity(job_of(model, "rtn_w4a16"), out)


def test_another_text_is_other_work(tmp_path: Path, job_of: JobOf, model: Path) -> None:
    text = make_text(tmp_path / "words.txt")
    given = f"eval={{name: text, path: {text}, windows: 2, seq_len: 48}}"
    before = job_of(model, "rtn_w4a16", "quant.weight.group_size=32", given)
    identity = work_identity(before, None)
    text.write_text(text.read_text() + " more")
    after = job_of(model, "rtn_w4a16", "quant.weight.group_size=32", given)
    assert work_identity(after, None) != identity
    # a run keeps the name that it began with
    assert work_identity(before, None) == identity


def test_the_same_work_has_the_same_identity(
    model: Path, job_of: JobOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    base = ("quant.weight.group_size=32",)
    identity = work_identity(job_of(model, "rtn_w4a16", *base), out)
    assert work_identity(job_of(model, "rtn_w4a16", *base), out) == identity
    # what changes no result is not part of it
    for same in ("model.path=/elsewhere", "save.save_path=there", "quant.weight.use_qtorch=true"):
        assert work_identity(job_of(model, "rtn_w4a16", *base, same), out) == identity
    monkeypatch.chdir(model.parent)
    assert work_identity(job_of(Path(model.name), "rtn_w4a16", *base), out) == identity


def test_other_work_has_another_identity(model: Path, job_of: JobOf, tmp_path: Path) -> None:
    out, base = tmp_path / "out", "quant.weight.group_size=32"
    linked = tmp_path / "another model"
    linked.symlink_to(model)
    fitting = "quant.weight.group_size=64"
    identities = [
        work_identity(job_of(model, "rtn_w4a16", base), out),
        work_identity(job_of(model, "rtn_w4a16", base), tmp_path / "elsewhere"),
        work_identity(job_of(model, "rtn_w4a16", base), None),
        work_identity(job_of(linked, "rtn_w4a16", base), out),
        work_identity(job_of(model, "rtn_w4a16_asym", base), out),
        work_identity(job_of(model, "rtn_w4a16", base, "eval.windows=3"), out),
        work_identity(job_of(model, "rtn_w4a16", base, "base.seed=7"), out),
        work_identity(job_of(model, "rtn_w4a16", base, "ignored_layers=[o_proj]"), out),
        work_identity(job_of(model, "rtn_w4a16", fitting, "ignored_layers=[down_proj]"), out),
    ]
    assert len(set(identities)) == len(identities)
    # left out because it was asked for, or because it does not fit: the same tensors, other recipes
    kept = work_identity(job_of(model, "rtn_w4a16", fitting, keep_incompatible=True), out)
    assert kept not in identities
