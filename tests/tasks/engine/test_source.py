"""A source checkpoint: what its headers say, its digests, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tasks.engine.source as module
from tasks.engine.errors import InputError, NonFiniteWeightError
from tasks.engine.source import (
    INDEX,
    SINGLE,
    TensorInfo,
    free_bytes,
    one_spelling,
    open_source,
    tensor_digest,
)

Tensors = dict[str, Tensor]


def make_tensors(seed: int = 0) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(4, 8, generator=draw).bfloat16(),
        "b": torch.randn(3, generator=draw),
        "c": torch.randn(2, 2, 2, generator=draw).half(),
    }


def write(folder: Path, *shards: Tensors, config: str = "{}") -> Path:
    """A checkpoint of one file, or of one for each of several sets of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE)
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"part-{number}.safetensors")
        weight_map |= {name: f"part-{number}.safetensors" for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def digest_of(folder: Path) -> str:
    source = open_source(folder)
    return source.digest(source.tensors)


# reading


DTYPES = [
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = torch.arange(12).reshape(3, 4).to(dtype)
    source = open_source(write(tmp_path / "m", {"t": kept, "none": kept[:0].clone()}))
    assert source.tensors["t"] == TensorInfo(SINGLE, dtype, (3, 4))
    assert source.tensors["t"].size == kept.nbytes
    assert source.tensors["none"].size == 0
    found = source.read(["t", "none"])
    assert found["t"].dtype is dtype
    assert torch.equal(found["t"].view(torch.uint8), kept.view(torch.uint8))
    assert found["none"].shape == (0, 4)


def test_dtype_that_is_not_known(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"t": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(InputError, match=r"model\.safetensors: t has the dtype C64, not known"):
        open_source(folder)


def test_shards_are_read_by_name(tmp_path: Path) -> None:
    made = make_tensors()
    one = {"a": made["a"], "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    two = {"b": made["b"], "c": made["c"]}
    source = open_source(write(tmp_path / "m", one, two, config='{"model_type": "llama"}'))
    assert source.config == {"model_type": "llama"}
    # rotary tables follow from the config
    assert {name: info.file for name, info in source.tensors.items()} == {
        "a": "part-0.safetensors",
        "b": "part-1.safetensors",
        "c": "part-1.safetensors",
    }
    found = source.read(["c", "a"])
    assert set(found) == {"a", "c"}
    assert all(torch.equal(found[name], made[name]) for name in found)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", make_tensors())
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"found pytorch_model\.bin: pickles are never read"):
        open_source(folder)


@pytest.mark.parametrize("way", ["../outside.safetensors", "{}/outside.safetensors", "sub/x", ".."])
def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path, way: str) -> None:
    made = make_tensors()
    folder = write(tmp_path / "m", {"a": made["a"]}, {"b": made["b"]})
    save_file({"b": made["b"]}, tmp_path / "outside.safetensors")
    (folder / "sub").mkdir()
    save_file({"b": made["b"]}, folder / "sub" / "x")
    leading = way.format(tmp_path)
    index = {"weight_map": {"a": "part-0.safetensors", "b": leading}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError) as refused:
        open_source(folder)
    assert f"names the shard {leading}, which is not in the folder" in str(refused.value)


NON_FINITE = [
    *((dtype, value) for dtype in DTYPES[:4] for value in ("nan", "inf", "-inf")),
    (torch.float8_e4m3fn, "nan"),
    *((torch.float8_e5m2, value) for value in ("nan", "inf", "-inf")),
]


@pytest.mark.parametrize(("dtype", "value"), NON_FINITE, ids=str)
def test_not_a_number_is_named(tmp_path: Path, dtype: torch.dtype, value: str) -> None:
    damaged = torch.ones(3, 4)
    damaged[2, 3] = float(value)
    largest = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
    folder = write(tmp_path / "m", {"x.weight": damaged.to(dtype), "fine": largest})
    source = open_source(folder)
    source.read(["fine"])
    with pytest.raises(NonFiniteWeightError, match=r"model\.safetensors: x\.weight holds NaN"):
        source.read(["fine", "x.weight"])


# digests


def test_digest_does_not_depend_on_the_sharding(tmp_path: Path) -> None:
    made = make_tensors()
    whole = digest_of(write(tmp_path / "one", made))
    for number, first in enumerate(made):
        rest = {name: tensor for name, tensor in made.items() if name != first}
        assert digest_of(write(tmp_path / f"{number}", {first: made[first]}, rest)) == whole
    assert digest_of(write(tmp_path / "three", *({n: t} for n, t in made.items()))) == whole
    source = open_source(tmp_path / "one")
    assert source.digest(["c", "a", "b"]) == source.digest(iter(["b", "c", "a"])) == whole


def one_bit(made: Tensors) -> None:
    made["a"].view(torch.int16)[3, 7] ^= 1


def one_sign(made: Tensors) -> None:
    made["b"][0] *= -1


def one_name(made: Tensors) -> None:
    made["d"] = made.pop("c")


def one_dtype(made: Tensors) -> None:
    # the same bytes
    made["a"] = made["a"].view(torch.float16)


def one_shape(made: Tensors) -> None:
    made["a"] = made["a"].reshape(8, 4)


def one_more(made: Tensors) -> None:
    made["d"] = torch.zeros(0)


CHANGES = [one_bit, one_sign, one_name, one_dtype, one_shape, one_more]


def test_digest_sees_every_change(tmp_path: Path) -> None:
    digests = {digest_of(write(tmp_path / "as it was", make_tensors()))}
    for change in CHANGES:
        made = make_tensors()
        change(made)
        digests.add(digest_of(write(tmp_path / change.__name__, made)))
    assert len(digests) == len(CHANGES) + 1


def test_tensor_digest_is_of_the_values_in_order() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(matrix.t()) == tensor_digest(matrix.t().contiguous())
    assert tensor_digest(matrix.t()) != tensor_digest(matrix.reshape(3, 2))
    # equal as numbers, not as bytes
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))


# remembered digests


class Remembering:
    """A checkpoint of one file with remembered digests, and which tensors were digested anew."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = write(folder / "m", make_tensors())
        self.file = self.folder / SINGLE
        self.memo = folder / "memo"
        self.taken = 0

        def count(tensor: Tensor) -> str:
            self.taken += 1
            return tensor_digest(tensor)

        monkeypatch.setattr(module, "tensor_digest", count)

    def digest(self, *names: str) -> tuple[str, int]:
        """The digest, and how many tensors were read for it."""
        before = self.taken
        source = open_source(self.folder, self.memo)
        return source.digest(names or source.tensors), self.taken - before

    def overwrite(self, tensors: Tensors, *, inode: bool, mtime: bool) -> None:
        """Change the content of the file; say whether inode and modification time change too."""
        status = self.file.stat()
        fresh = self.file.with_name("fresh")
        save_file(tensors, fresh)
        if inode:
            os.replace(fresh, self.file)
        else:
            self.file.write_bytes(fresh.read_bytes())
            fresh.unlink()
        moved = status.st_mtime_ns + (1 if mtime else 0)
        os.utime(self.file, ns=(status.st_atime_ns, moved))


@pytest.fixture
def remembering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remembering:
    return Remembering(tmp_path, monkeypatch)


def test_digests_are_remembered_tensor_by_tensor(remembering: Remembering) -> None:
    plain = open_source(remembering.folder)
    assert remembering.digest("a") == (plain.digest(["a"]), 1)
    assert remembering.digest("a", "b") == (plain.digest(["a", "b"]), 1)
    assert remembering.digest() == (plain.digest(plain.tensors), 1)
    assert remembering.digest() == (plain.digest(plain.tensors), 0)
    assert remembering.digest("b") == (plain.digest(["b"]), 0)


@pytest.mark.parametrize("what", ["size", "mtime", "inode"])
def test_a_changed_file_is_read_again(remembering: Remembering, what: str) -> None:
    before, _ = remembering.digest()
    changed = make_tensors(seed=1)
    if what == "size":
        changed["b"] = torch.zeros(5)
    remembering.overwrite(changed, inode=what == "inode", mtime=what == "mtime")
    after, taken = remembering.digest()
    assert (after, taken) == (digest_of(remembering.folder), 3)
    assert after != before


def test_another_folder_is_another_memory(remembering: Remembering, tmp_path: Path) -> None:
    first, _ = remembering.digest()
    one_more_model = Path(shutil.copytree(remembering.folder, tmp_path / "copy"))
    source = open_source(one_more_model, remembering.memo)
    assert source.digest(source.tensors) == first
    # both are kept beside each other
    assert remembering.digest() == (first, 0)


def test_a_linked_file_is_known_by_what_it_leads_to(
    remembering: Remembering, tmp_path: Path
) -> None:
    first, _ = remembering.digest()
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("config.json", SINGLE):
        (linked / name).symlink_to(remembering.folder / name)
    source = open_source(linked, remembering.memo)
    assert (source.digest(source.tensors), remembering.taken) == (first, 3)


def another_digest(memo: Path) -> None:
    record = json.loads(memo.read_text())
    record["record"]["tensors"]["a"] = "0" * 32
    memo.write_text(json.dumps(record))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": lambda memo: memo.unlink(),
    "emptied": lambda memo: memo.write_text(""),
    "cut": lambda memo: os.truncate(memo, memo.stat().st_size // 2),
    "binary": lambda memo: memo.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda memo: memo.write_text("[]"),
    "without its checksum": lambda memo: memo.write_text(
        json.dumps(json.loads(memo.read_text())["record"])
    ),
    "another digest": another_digest,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_memory_is_made_again(
    remembering: Remembering, damage: Callable[[Path], object]
) -> None:
    digest, _ = remembering.digest()
    (memo,) = remembering.memo.iterdir()
    damage(memo)
    assert remembering.digest() == (digest, 3)
    assert remembering.digest() == (digest, 0)


def test_every_name_of_a_place_has_one_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "way").symlink_to(place)
    monkeypatch.chdir(place)
    for spelled in ("out", "../way/out", str(tmp_path / "way" / ".." / "place" / "out")):
        assert one_spelling(spelled) == place / "out"
    # its own name stays
    assert one_spelling(tmp_path / "way") == tmp_path / "way"


def test_free_bytes_of_a_place_that_is_not_there(tmp_path: Path) -> None:
    here = shutil.disk_usage(tmp_path).free
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(here, rel=0.05)


def test_threads_remember_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memo = write(tmp_path / "model", make_tensors()), tmp_path / "digests"
    source = open_source(folder, memo)
    # each is at its tensor before the other one has written what it found
    both = Barrier(2, timeout=10)

    def digested(tensor: Tensor) -> str:
        both.wait()
        return tensor_digest(tensor)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(module, "tensor_digest", digested)
        found = list(threads.map(source.digest, (["a"], ["b"])))
    monkeypatch.setattr(module, "tensor_digest", lambda _: 1 / 0)
    assert [open_source(folder, memo).digest([name]) for name in "ab"] == found


def test_a_digest_is_known_once_it_was_taken(tmp_path: Path) -> None:
    made, memo = make_tensors(), tmp_path / "memo"
    folder = write(tmp_path / "model", made)
    source = open_source(folder, memo)
    # to take it may last: not where nothing was read before, or not all
    assert source.known_digest() is None and not memo.exists()
    source.digest(["a"])
    assert source.known_digest() is None
    whole = source.digest(source.tensors)
    assert source.known_digest() == whole
    mark = source.files_mark()
    # written again: other files, which are read at once since others were known
    save_file(made, folder / SINGLE)
    os.utime(folder / SINGLE, ns=(1, 1))
    assert source.files_mark() != mark and source.known_digest() == whole
    save_file(made | {"b": made["b"] + 1}, folder / SINGLE)
    assert source.known_digest() not in (None, whole)
