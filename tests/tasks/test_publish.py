"""A checkpoint appears under its name as a whole, or not at all, with the same bytes each time."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tasks.engine.output as places
import tasks.engine.store as store_module
from tasks.engine.errors import InputError
from tasks.engine.publication import REPORT as REPORT_FILE
from tasks.engine.publication import begun
from tasks.engine.store import Entry, Store
from tasks.publish import TRANSFORMED, launch_line, model_card, publish

KEY = "ab" * 32
REPORT: dict[str, Any] = {
    "scheme": "FP8 dynamic",
    "method": "RTN",
    "format": "float-quantized",
    "source": {"name": "some-model", "digest": "0123"},
    "versions": {"blockquant": "9.9", "torch": "2"},
    "bytes": 12_345_678,
    "calibration": None,
    "unserved": None,
    "tensor_parallel": 1,
    "evaluation": "text, 4 windows of 64 tokens",
    "metrics": {
        **{"nll": 2.5, "reference_nll": 2.25, "nll_increase": 0.25, "kl": 0.125},
        **{"top1_agreement": 0.875, "perplexity": 12.18, "tokens": 252},
    },
    "recipe": {"quant": {"method": "RTN"}, "text": "für alle"},
    "linears": {"model.layers.0.mlp.up_proj": {"weight_error": 0.1, "digest": "ff"}},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def entry(store: Store) -> Entry:
    with store.lock(KEY), store.draft(KEY) as draft:
        draft.save_tensors("model.safetensors", {"w": torch.arange(8.0)})
        (draft.folder / "config.json").write_text('{"model_type": "llama"}\n')
        return store.commit(KEY, "export", draft, {})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


@pytest.fixture
def put(store: Store, entry: Entry, output: Path) -> Callable[..., str]:
    def make(place: Path = output, *, overwrite: bool = False, **changes: Any) -> str:
        return publish(store, "work", {".": entry}, REPORT | changes, place, overwrite)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_the_export_its_report_and_its_card(
    put: Callable[..., str], entry: Entry, output: Path
) -> None:
    assert put() == str(output)
    assert set(contents(output)) == {*entry.files, "blockquant.json", "README.md"}
    for name in entry.files:
        assert (output / name).samefile(entry.file(name)), "the store's own bytes"
    assert json.loads((output / "blockquant.json").read_text("utf-8")) == REPORT
    assert "für alle" in (output / "blockquant.json").read_text("utf-8")
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_it_appears_by_one_rename(
    put: Callable[..., str], store: Store, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    seen: list[tuple[set[str], str | None]] = []

    def watch(source: Path, target: Path) -> None:
        if Path(target) == output:
            assert not output.exists()
            # a run killed right after finds an output that is its own
            seen.append((set(contents(Path(source))), begun(store.root, output)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watch)
    put()
    assert seen == [(set(contents(output)), "work")]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_before_the_rename_publishes_nothing(
    put: Callable[..., str], output: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            put(overwrite=overwrite)
    assert not output.exists()
    put(overwrite=overwrite)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_folder_that_exists_is_refused(put: Callable[..., str], output: Path) -> None:
    output.mkdir(parents=True)
    (output / "precious").write_text("of somebody")
    with pytest.raises(InputError, match="exists already; give another or use --overwrite"):
        put()
    assert contents(output) == {"precious": b"of somebody"}
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_folder_is_replaced_where_that_is_asked(put: Callable[..., str], output: Path) -> None:
    put()
    (output / "leftover").write_text("of the first run")
    put(overwrite=True, bytes=2)
    assert "leftover" not in contents(output)
    assert json.loads((output / "blockquant.json").read_text())["bytes"] == 2
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_an_old_folder_is_exchanged_for_the_new_one_at_once(
    put: Callable[..., str], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put()
    old = contents(output)
    swap = places.exchange

    def watch(new: Path, place: Path) -> bool:
        assert place == output and contents(output) == old
        done = swap(new, place)
        assert contents(new) == old and contents(output)["blockquant.json"] != old
        return done

    def never(source: Path, target: Path) -> None:
        raise AssertionError("the output would not be there for a moment")

    monkeypatch.setattr(places, "exchange", watch)
    monkeypatch.setattr(os, "rename", never)
    put(overwrite=True, bytes=2)
    assert json.loads((output / "blockquant.json").read_text())["bytes"] == 2
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_without_an_exchange_the_old_folder_comes_back_after_a_kill(
    put: Callable[..., str], output: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put()
    old = contents(output)
    rename = os.rename

    def die(source: Path, target: Path) -> None:
        if Path(target) == output:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(places, "exchange", lambda one, other: False)
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            put(overwrite=True, bytes=2)
        assert not output.exists()
    # whoever publishes next finds it again, even one that may not replace it
    with pytest.raises(InputError, match="exists already"):
        put(bytes=3)
    assert contents(output) == old
    monkeypatch.setattr(places, "exchange", lambda one, other: False)
    put(overwrite=True, bytes=2)
    assert json.loads((output / "blockquant.json").read_text())["bytes"] == 2
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_system_that_cannot_exchange_says_so(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    assert places.exchange(tmp_path / "one", tmp_path / "other") is True
    with pytest.raises(FileNotFoundError):
        places.exchange(tmp_path / "one", tmp_path / "nowhere")


def test_one_that_waits_lies_beside_the_output_until_it_takes_that_place(
    store: Store, entry: Entry, output: Path
) -> None:
    def wait(**changes: Any) -> Path:
        report = REPORT | changes
        given = (store, "work", {".": entry}, report, output, True)
        return Path(publish(*given, waits=True))

    # nothing is there to be kept
    assert wait() == output
    old = contents(output)
    waiting = wait(bytes=2)
    content = places.content_of("work", (waiting / REPORT_FILE).read_text("utf-8"))
    assert waiting == output.with_name(f"out.{content[:8]}")
    assert contents(output) == old and wait(bytes=2) == waiting
    assert places.waiting_beside(output) == [waiting]
    # what lies at the output already need not wait
    assert wait() == output
    new = contents(waiting)
    assert not places.take_place(waiting, output, "work", "of another machine")
    assert places.take_place(waiting, output, "work", content)
    assert contents(output) == new and places.waiting_beside(output) == []
    # said again, also where a kill left what was replaced
    shutil.copytree(output, waiting)
    (waiting / REPORT_FILE).write_bytes(old["blockquant.json"])
    assert places.take_place(waiting, output, "work", content)
    assert contents(output) == new
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_whoever_publishes_at_an_output_waits_for_another_whatever_its_store(
    put: Callable[..., str], output: Path
) -> None:
    output.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with places.held(output):
            waits = pool.submit(put)
            with pytest.raises(TimeoutError):
                waits.result(1.0)
            assert not places.staging_folder(output).exists()
        assert waits.result(10) == str(output)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_same_bytes_stay(put: Callable[..., str], output: Path, store: Store) -> None:
    put()
    before = output.stat().st_ino
    assert put() == str(output)
    assert output.stat().st_ino == before
    # copies count by their bytes
    copied = output.with_name("copied")
    shutil.copytree(output, copied)
    put(copied)
    for damage in (
        lambda: (copied / "model.safetensors").write_bytes(b"other"),
        lambda: (copied / "config.json").unlink(),
        lambda: (copied / "more").write_text(""),
    ):
        shutil.rmtree(copied)
        shutil.copytree(output, copied)
        damage()
        with pytest.raises(InputError, match="exists already"):
            put(copied)


def no_links(source: Path, target: Path) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_files_are_copied_across_disks(
    put: Callable[..., str], entry: Entry, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    put()
    for name in entry.files:
        assert not (output / name).samefile(entry.file(name))
        assert (output / name).read_bytes() == entry.file(name).read_bytes()


def test_a_bad_copy_is_not_published(
    put: Callable[..., str], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:-1])

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(store_module.shutil, "copyfile", short)
    with pytest.raises(OSError, match="the copy differs from the export"):
        put()
    assert not output.exists()
    # as large as a model, and hidden
    assert list(output.parent.iterdir()) == []


# report and card


def test_report_and_card_are_the_same_each_time(
    store: Store, entry: Entry, put: Callable[..., str], output: Path, tmp_path: Path
) -> None:
    put()
    turned = json.loads(json.dumps(REPORT), object_pairs_hook=lambda p: dict(reversed(p)))
    assert list(turned) != list(REPORT)
    other = tmp_path / "other place" / "name"
    publish(store, "other work", {".": entry}, turned, other, False)
    assert contents(other) == contents(output)


def test_the_card_says_what_was_measured() -> None:
    card = model_card(REPORT)
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"tags": ["blockquant", "compressed-tensors", "fp8-dynamic"]}
    assert body.startswith("# some-model, quantized to FP8 dynamic\n")
    assert dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE)) == {
        "scheme": "FP8 dynamic",
        "method": "RTN",
        "format": "compressed-tensors, float-quantized",
        "source": "some-model (digest 0123)",
        "size": "12.3 MB",
        "calibrated on": "nothing",
        "evaluated on": "text, 4 windows of 64 tokens",
        "NLL, source": "2.2500",
        "NLL, this model": "2.5000 (+0.2500)",
        "KL to the source": "0.12500",
        "top-1 agreement": "87.50%",
    }
    assert "blockquant 9.9" in body
    assert str(launch_line(Path("."), REPORT)) in body


def test_the_launch_line_is_safe_to_paste() -> None:
    words = shlex.split(str(launch_line(Path("/models/it's; rm -rf x"), REPORT)))
    assert words == [
        *("python", "-m", "sglang.launch_server", "--model-path", "/models/it's; rm -rf x"),
        *("--host", "127.0.0.1", "--port", "30000"),
    ]


def test_what_sglang_cannot_load_is_not_offered_to_it() -> None:
    report = REPORT | {"unserved": "quant.weight.need_pack: false: read by transformers only"}
    assert launch_line(Path("out"), report) is None
    card = model_card(report)
    assert "read by transformers only" in card and "sglang.launch_server" not in card


def test_a_model_before_rounding_lies_in_a_folder_of_its_own(
    store: Store, entry: Entry, output: Path
) -> None:
    report = REPORT | {"format": None, "scheme": "not quantized"}
    publish(store, "work", {TRANSFORMED: entry}, report, output, False)
    assert set(p.name for p in output.iterdir()) == {"transformed_model", REPORT_FILE, "README.md"}
    assert set(contents(output / TRANSFORMED)) == set(entry.files)
    line = str(launch_line(output, report))
    assert shlex.split(line)[4] == str(output / "transformed_model")
    # a second time nothing is replaced
    before = (output / REPORT_FILE).stat().st_ino
    publish(store, "work", {TRANSFORMED: entry}, report, output, False)
    assert (output / REPORT_FILE).stat().st_ino == before
    # both beside each other
    both = output.with_name("both")
    publish(store, "work", {".": entry, TRANSFORMED: entry}, REPORT, both, False)
    assert set(contents(both / TRANSFORMED)) == set(entry.files) <= {p.name for p in both.iterdir()}
