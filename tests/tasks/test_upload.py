"""Uploads to places of fsspec: here a folder, in tests/operations a store of objects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from tasks.engine.errors import InputError, RunError
from tasks.upload import MANIFEST, check_upload, upload


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "transformed_model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "transformed_model/model.safetensors"):
        (folder / name).write_text(f"bytes of {name}")
    return folder


def there(place: Path) -> dict[str, str]:
    """All files of a place but the manifest."""
    files = {str(p.relative_to(place)): p for p in place.rglob("*") if p.is_file()}
    return {name: p.read_text() for name, p in files.items() if name != MANIFEST}


def counts(folder: Path, place: Path) -> tuple[int, int]:
    found = upload(folder, f"file://{place}/")
    assert found["url"] == f"file://{place}"
    assert there(place) == there(folder)
    assert json.loads((place / MANIFEST).read_text())["complete"] is True
    return found["sent"], found["kept"]


def test_all_files_arrive_and_equal_ones_stay(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert counts(checkpoint, place) == (3, 0)
    before = (place / "model.safetensors").stat().st_mtime_ns
    assert counts(checkpoint, place) == (0, 3)
    assert (place / "model.safetensors").stat().st_mtime_ns == before
    (checkpoint / "config.json").write_text("another")
    (checkpoint / "model.safetensors").write_text("bytes of model.safetensorZ")
    shutil.rmtree(checkpoint / "transformed_model")
    assert counts(checkpoint, place) == (2, 0)


def test_an_upload_goes_on_where_it_stopped(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    counts(checkpoint, place)
    for path in (p for p in checkpoint.rglob("*") if p.is_file()):
        path.write_text(f"new {path.name}")
    # in the way of the last file
    shutil.rmtree(place / "transformed_model")
    (place / "transformed_model").write_text("a file")
    with pytest.raises(RunError):
        upload(checkpoint, f"file://{place}")
    assert json.loads((place / MANIFEST).read_text())["complete"] is False
    (place / "transformed_model").unlink()
    assert counts(checkpoint, place) == (1, 2)


def test_an_upload_that_ended_while_it_removed_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    for name in ("one.txt", "other.txt"):
        (checkpoint / name).write_text("of an older checkpoint")
    counts(checkpoint, place)
    for name in ("one.txt", "other.txt"):
        (checkpoint / name).unlink()
    remove = LocalFileSystem.rm_file

    def end_after(system: LocalFileSystem, path: str) -> None:
        remove(system, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalFileSystem, "rm_file", end_after)
        upload(checkpoint, f"file://{place}")
    assert set(there(place)) == {*there(checkpoint), "other.txt"}
    assert json.loads((place / MANIFEST).read_text())["complete"] is False
    # what is gone is no fault, and what is left is still known for ours
    assert counts(checkpoint, place) == (0, 3)


def test_a_file_that_is_gone_or_cut_is_sent_again(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    counts(checkpoint, place)
    (place / "config.json").unlink()
    (place / "model.safetensors").write_text("cut")
    assert counts(checkpoint, place) == (2, 1)


def test_a_damaged_manifest_is_written_again(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    counts(checkpoint, place)
    (place / MANIFEST).write_text("{")
    assert counts(checkpoint, place) == (3, 0)


def test_what_is_not_an_upload_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="none of an upload"):
        upload(checkpoint, f"file://{place}")
    assert there(place) == {"diary.txt": "mine"}


def test_a_manifest_cannot_remove_what_lies_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    place, other = tmp_path / "place", tmp_path / "other.txt"
    other.write_text("mine")
    counts(checkpoint, place)
    record = json.loads((place / MANIFEST).read_text())
    record["files"] |= {"../other.txt": "0", str(other): "0", "sub/../../other.txt": "0"}
    (place / MANIFEST).write_text(json.dumps(record))
    assert counts(checkpoint, place) == (0, 3)
    assert other.read_text() == "mine"


def test_a_place_that_takes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    before = there(checkpoint)
    with pytest.raises(RunError) as raised:
        upload(checkpoint, f"file://{tmp_path}/file/place")
    assert f"the checkpoint is whole in {checkpoint}" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert there(checkpoint) == before


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/a/folder", "no address"),
        ("s3://", "no address"),
        ("nosuch://bucket/folder", "nosuch"),
        ("s3://key:secret@bucket/folder", "password"),
    ],
)
def test_an_address_that_is_none(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        check_upload(url)
    assert "secret" not in str(raised.value)


def test_an_address(tmp_path: Path) -> None:
    for url in (None, f"file://{tmp_path}/place", "memory://place"):
        check_upload(url)
    assert not list(tmp_path.iterdir())


def test_a_place_that_an_upload_would_not_get(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="holds files, but none of an upload"):
        check_upload(f"file://{checkpoint}")
    with pytest.raises(InputError, match=r"cannot be read .*mend the address"):
        check_upload(f"file://{checkpoint}/config.json/place")
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="cannot be read") as raised:
        check_upload("s3://bucket/folder")
    assert "\n" not in str(raised.value) and "word" not in str(raised.value)
