"""Kill a run anywhere, run it again: the same bytes, and only what was lost is computed again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tasks.clip import CLIP
from tasks.transform import DECISION
from tests.integration import resuming
from tests.integration.crashing import Ran, Work, finish, run, start
from tests.integration.resuming import (
    BLOCKS,
    KILLED,
    LINEARS,
    Case,
    assert_published,
    assert_tracked,
    boundaries,
    case_home,
    entries,
    kill_each,
)

# of the longest test, for any worker to take
PARTS = 4
CALIB = "calib: {name: text, path: TEXT, n_samples: 4, seq_len: 64}"
QUANT = {
    "w8a8": """
  method: Identity
  quant_out: true
  weight: {bit: 8, symmetric: true, granularity: per_channel}
  act: {bit: 8, symmetric: true, granularity: per_token}
""",
    "w4a16": """
  method: Identity
  quant_out: false
  weight: {bit: 4, symmetric: true, granularity: per_group, group_size: 128, need_pack: true}
""",
    "awq_w4a16": """
  method: Awq
  quant_out: true
  weight: {bit: 4, symmetric: true, granularity: per_group, group_size: 128, need_pack: true}
""",
    "awq_fp8_static": """
  method: Awq
  quant_out: true
  weight: {bit: e4m3, granularity: per_tensor}
  act: {bit: e4m3, granularity: per_tensor, static: true, calib_algo: static_minmax}
""",
}
STEPS = [
    "load_model",
    "evaluation_set",
    "calibration_set",
    "transform[block 0]",
    "quantize[block 0]",
    "pack[block 0]",
    "advance[block 0]",
    "transform[block 1]",
    "quantize[block 1]",
    "pack[block 1]",
    "outside",
    "export",
    "verify",
    "evaluate",
]
FIRST_BLOCK = STEPS[: STEPS.index("advance[block 0]") + 1]
CLIPPED = [
    each
    for step in STEPS
    for each in ([step, step.replace("transform", "clip")] if "transform" in step else [step])
]


@pytest.fixture(scope="module")
def w8a8(
    services: dict[str, str], prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    return make_case(tmp_path_factory.mktemp("one"), "w8a8", prepared_home)


@pytest.fixture(scope="module")
def w4a16(
    services: dict[str, str], prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    return make_case(tmp_path_factory.mktemp("one"), "w4a16", prepared_home)


@pytest.fixture(
    scope="module",
    params=["awq_w4a16", pytest.param("awq_fp8_static", marks=pytest.mark.long)],
)
def searched(
    request: pytest.FixtureRequest,
    services: dict[str, str],
    prepared_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    return make_case(tmp_path_factory.mktemp("one"), request.param, prepared_home)


def make_case(folder: Path, scheme: str, prepared: Path) -> Case:
    clips = {"clip": 1} if "method: Awq" in QUANT[scheme] else {}
    return resuming.make_case(
        folder,
        f"{CALIB}\nquant:{QUANT[scheme]}",
        prepared,
        CLIPPED if clips else STEPS,
        {"decide": 1, "round": 1} | clips,
    )


def used_home(case: Case, name: str) -> Path:
    """The home that the undisturbed run left, to be damaged."""
    home = case.folder / name / "home"
    # real copies: the damage must not reach the original through a hard link
    shutil.copytree(case.folder / "undisturbed" / "home", home)
    return home


def test_one_kill_of_each_kind(w8a8: Case) -> None:
    points = (
        "open_tracked: open told",
        "offer sent",
        "finish sent",
        "flow: digests torn",
        "quantize[block 0]: committed",
        "advance[block 0]: hidden.safetensors torn",
        f"transform[block 1]: {DECISION} torn",
        "quantize[block 1]: locked",
        "quantize[block 1]: record torn",
        "pack[block 1]: block.safetensors torn",
        "pack[block 1]: manifest torn",
        "pack[block 1]: before rename to entries",
        "drop_boundaries: trash made",
        "export: before link to model-00002-of-00003.safetensors",
        "publish: blockquant.json torn",
        "publish: before rename to out",
        "publish: ends",
        "offer: offer told",
        "register: finish told",
    )
    kill_each(w8a8, points, "kind")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_another_kill_of_each_kind(w8a8: Case) -> None:
    points = (
        "open sent",
        "set_tags sent",
        "log_first_points sent",
        "advance[block 0]: before rename to entries",
        "transform[block 1]: committed",
        "pack[block 1]: block.safetensors written",
        "pack[block 1]: before replace to manifest.json",
        "evaluate: committed",
        "publish: .out.blockquant-old removed",
        "log_measured: log_points told",
    )
    kill_each(w8a8, points, "other kind")


def test_kills_where_blocks_run_with_their_source_weights(w4a16: Case) -> None:
    points = (
        "calibration_set: committed",
        "advance[block 0]: committed",
        "transform[block 1]: locked",
        "quantize[block 1]: committed",
    )
    kill_each(w4a16, points, "source")


def test_kills_of_searches(searched: Case) -> None:
    points = (
        f"transform[block 0]: {DECISION} torn",
        "transform[block 1]: committed",
        f"clip[block 1]: {CLIP} torn",
        "clip[block 1]: committed",
        "quantize[block 1]: committed",
        "log_measured: log_file told",
    )
    kill_each(searched, points, "searched")


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.xdist_group("searches killed")
def test_searches_killed_at_every_task_boundary(searched: Case) -> None:
    kill_each(searched, boundaries(searched), "boundary")


def test_kills_while_an_older_output_is_replaced(w8a8: Case) -> None:
    points = (
        "publish: before exchange with out",
        "publish: exchanged with out",
        "publish: ends",
    )
    kill_each(w8a8, points, "overwrite", old=True, overwrite=True)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "part", [pytest.param(n, marks=pytest.mark.xdist_group(f"every {n}")) for n in range(PARTS)]
)
def test_a_kill_at_every_event(w8a8: Case, part: int) -> None:
    kill_each(w8a8, range(part, len(w8a8.undisturbed.events), PARTS), "every")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("boundaries")
def test_a_kill_at_every_task_boundary(w4a16: Case) -> None:
    kill_each(w4a16, boundaries(w4a16), "boundary")


# What was found, what was damaged


def again(case: Case, home: Path, name: str = "again", **more: Any) -> Ran:
    """Run once more with another output, and compare what is published."""
    output = home.parent / name / "out"
    ran = run(Work(home, case.parameters(output, **more), home.parent / f"{name}.trace"))
    assert ran.exitcode == 0, ran.result
    if "overrides" not in more:
        assert_published(case, output)
    return ran


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    replace(path, b"")


def flip(path: Path) -> None:
    """Change a number's first digit or the last byte: the file still reads as what it was."""
    data = bytearray(path.read_bytes())
    # the last of many digits may stand for the same number
    digits = [i for i, byte in enumerate(data) if byte in b"0123456789" and data[i - 1] in b' "']
    place = digits[len(digits) // 2] if path.suffix == ".json" else len(data) - 1
    data[place] ^= 1
    replace(path, bytes(data))


def replace(path: Path, data: bytes) -> None:
    # a new file: the old one may be linked from the export and from what was published
    path.unlink()
    path.write_bytes(data)


DAMAGES = [delete, truncate, flip]


def test_a_second_run_finds_everything(w8a8: Case) -> None:
    home = used_home(w8a8, "second")
    ran = again(w8a8, home)
    assert ran.made == []
    assert ran.counts == {}
    assert_tracked(home, runs=2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_payload_is_computed_again(w8a8: Case, damage: Callable[[Path], None]) -> None:
    home = used_home(w8a8, f"payload-{damage.__name__}")
    damage(entries(home, "calibration_set")[0] / "tokens.safetensors")
    damage(entries(home, "transform")[1] / DECISION)
    damage(entries(home, "pack")[0] / "block.safetensors")
    damage(entries(home, "export")[0] / "model-00003-of-00003.safetensors")
    damage(entries(home, "evaluation_set")[0] / "tokens.safetensors")
    ran = again(w8a8, home)
    assert ran.made == [
        "evaluation_set",
        "calibration_set",
        "pack[block 0]",
        "transform[block 1]",
        "export",
    ]


def test_damage_that_reaches_the_export_through_its_link(w8a8: Case) -> None:
    home = case_home(w8a8, "linked")
    again(w8a8, home, "first")
    shard = entries(home, "pack")[1] / "block.safetensors"
    assert shard.stat().st_nlink == 3, "in the store, in the export, published"
    os.truncate(shard, 1000)
    assert again(w8a8, home, "next").made == ["pack[block 1]", "export"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_computed_again(w8a8: Case, damage: Callable[[Path], None]) -> None:
    home = used_home(w8a8, f"manifest-{damage.__name__}")
    tasks = {"load_model": 0, "quantize": 1, "advance": 0, "verify": 0, "evaluate": 0}
    for folder in [entries(home, task)[number] for task, number in tasks.items()]:
        damage(folder / "manifest.json")
    made = ["load_model", "advance[block 0]", "quantize[block 1]", "verify", "evaluate"]
    assert again(w8a8, home).made == made


@pytest.mark.parametrize("damage", [delete, truncate, empty, flip])
def test_damaged_records_of_prefect_and_of_digests(
    w8a8: Case, damage: Callable[[Path], None]
) -> None:
    home = used_home(w8a8, f"records-{damage.__name__}")
    records = list((home / "store" / "prefect").iterdir())
    memos = list((home / "store" / "digests").iterdir())
    assert len(records) == len(STEPS)
    assert len(memos) == 1
    for path in (*records, *memos):
        damage(path)
    assert again(w8a8, home).made == []


def test_a_lost_store_is_made_again(w8a8: Case) -> None:
    home = used_home(w8a8, "lost")
    shutil.rmtree(home / "store" / "entries")
    assert again(w8a8, home).made == STEPS


def test_a_changed_scheme_computes_only_what_depends_on_it(w4a16: Case, w8a8: Case) -> None:
    rounded = ["quantize[block 0]", "pack[block 0]", "quantize[block 1]", "pack[block 1]"]
    measured = ["export", "verify", "evaluate"]
    home = used_home(w4a16, "changed")
    smaller = again(w4a16, home, overrides=["quant.weight.group_size=64"])
    assert smaller.made == [*rounded, *measured]
    assert smaller.counts == {"round": BLOCKS * LINEARS}
    # quantized blocks pass on other hidden states: what comes later is searched again
    home = used_home(w8a8, "changed")
    other = again(w8a8, home, overrides=["quant.act=null", "quant.weight.need_pack=true"])
    assert "transform[block 0]" not in other.made
    assert "transform[block 1]" in other.made


def test_kills_while_a_damaged_entry_is_replaced(w8a8: Case) -> None:
    for point in (
        "pack[block 1]: before rename to trash",
        "pack[block 1]: trash made",
        "pack[block 1]: before rename to entries",
    ):
        home = used_home(w8a8, point.replace(": ", "-").replace(" ", "-"))
        truncate(entries(home, "pack")[1] / "block.safetensors")
        work = w8a8.parameters(home.parent / "published" / "out")
        killed = run(Work(home, work, home.parent / "killed", kill_at=point))
        assert killed.exitcode == KILLED, killed.result
        resumed = run(Work(home, work, home.parent / "resumed"))
        assert resumed.exitcode == 0, resumed.result
        assert resumed.made == ["pack[block 1]"]
        assert_published(w8a8, home.parent / "published" / "out")


# Locks, failures, company


def test_locks_of_a_killed_process_are_free(w8a8: Case) -> None:
    home = case_home(w8a8, "locks")
    work = w8a8.parameters(home.parent / "published" / "out")
    killed = run(
        Work(home, work, home.parent / "killed", "advance[block 0]: hidden.safetensors torn")
    )
    assert killed.exitcode == KILLED
    locks = set((home / "store" / "locks").iterdir())
    assert len(locks) == len(FIRST_BLOCK) + 2, "of its steps, of the boundary and of the output"
    resumed = run(Work(home, work, home.parent / "resumed"))
    assert resumed.exitcode == 0, resumed.result
    assert_published(w8a8, home.parent / "published" / "out")


def test_a_failed_run_is_kept_beside_that_of_mended_weights(w8a8: Case) -> None:
    from mlflow import MlflowClient

    home = case_home(w8a8, "failed")
    model = home.parent / w8a8.model.name
    shutil.copytree(w8a8.model, model)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    work = w8a8.parameters(home.parent / "published" / "out", model=str(model))
    failed = run(Work(home, work, home.parent / "failed"))
    assert failed.exitcode == 1
    assert "model.layers.1.mlp.up_proj.weight" in failed.result["error"]
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("blockquant").experiment_id])
    assert tracked.info.status == "FAILED"
    assert "model.layers.1.mlp.up_proj.weight" in tracked.data.tags["failure"]
    assert not (home.parent / "published").exists()

    weights.write_bytes(whole)
    mended = run(Work(home, work, home.parent / "mended"))
    assert mended.exitcode == 0, mended.result
    assert mended.made == [step for step in STEPS if step not in FIRST_BLOCK]
    assert_published(w8a8, home.parent / "published" / "out")
    # mended weights are another source: their run is their own, and the failed one stays as it was
    kept = client.get_run(tracked.info.run_id)
    assert (kept.info.status, kept.data.tags) == ("FAILED", tracked.data.tags)
    client.delete_run(tracked.info.run_id)
    assert_tracked(home)


def test_two_processes_share_the_work(w8a8: Case) -> None:
    home = case_home(w8a8, "company")
    works = [
        Work(home, w8a8.parameters(home.parent / name / "out"), home.parent / f"{name}.trace")
        for name in ("one", "other")
    ]
    processes = [start(work) for work in works]
    both = [finish(work, process) for work, process in zip(works, processes, strict=True)]
    assert [ran.exitcode for ran in both] == [0, 0], [ran.result for ran in both]
    for name in ("one", "other"):
        assert_published(w8a8, home.parent / name / "out")
    assert sorted([*both[0].made, *both[1].made]) == sorted(STEPS), "each step once in total"
    assert_tracked(home, runs=2)


def test_two_processes_with_one_output(w8a8: Case) -> None:
    home = case_home(w8a8, "rivals")
    output = home.parent / "published" / "out"
    works = [
        Work(home, w8a8.parameters(output), home.parent / f"{name}.trace") for name in ("a", "b")
    ]
    processes = [start(work) for work in works]
    both = [finish(work, process) for work, process in zip(works, processes, strict=True)]
    assert 0 in [ran.exitcode for ran in both], [ran.result for ran in both]
    for ran in both:
        # the other is refused, whether it comes meanwhile or when all is done
        refusal = ran.result.get("error", "")
        refused = "another run works for it" in refusal or "exists already" in refusal
        assert ran.exitcode == 0 or refused, ran.result
    assert_published(w8a8, output)
