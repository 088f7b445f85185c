"""Token windows as the sections of a recipe ask for them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import Calibration, Evaluation
from tasks.engine.errors import InputError
from tasks.engine.source import Source, open_source
from tasks.engine.text import TextSource
from tasks.engine.windows import check_section, evaluation_windows, token_windows
from tests.models import edit_config, make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one block."""
    folder = tmp_path_factory.mktemp("windows") / "model"
    return make_checkpoint(folder, blocks=1, hidden=64, intermediate=64)


@pytest.fixture
def copy_model(model: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copy the model, to change the copy."""

    def copy() -> Path:
        return Path(shutil.copytree(model, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="module")
def source(model: Path) -> Source:
    return open_source(model)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def documents(words: Path) -> list[str]:
    """Documents of very different lengths."""
    sentences = words.read_text().split(". ")
    draw = random.Random(0)
    found = []
    while sentences:
        count = draw.choice([1, 2, 5, 20])
        found.append(". ".join(sentences[:count]) + ".")
        del sentences[:count]
    return found


@pytest.fixture(scope="module")
def rows(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as JSON lines."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return path


@pytest.fixture(scope="module")
def encoded(documents: list[str], tokenizer: Any) -> list[list[int]]:
    """Each document's ids with one BOS, by the tokenizer's own post-processing."""
    ids: list[list[int]] = [tokenizer(document).input_ids for document in documents]
    assert all(found[0] == 0 and found.count(0) == 1 for found in ids)
    return ids


def calibration(path: Path, **changes: Any) -> Calibration:
    given = {"name": "jsonl", "path": str(path), "n_samples": 16, "seq_len": 48, "seed": 7}
    return Calibration(**(given | changes))


def cut(source: Source, section: Calibration | Evaluation) -> list[list[int]]:
    """Windows as lists, after what every set of windows must be."""
    check_section(source, section)
    windows = token_windows(source, section, "cpu")
    assert windows.dtype is torch.int64
    assert windows.shape[1] == section.seq_len
    found: list[list[int]] = windows.tolist()
    return found


# evaluation


@pytest.mark.parametrize("count", [None, 3])
def test_evaluation_encodes_once_and_cuts_from_the_start(
    source: Source, tokenizer: Any, words: Path, count: int | None
) -> None:
    ids = tokenizer(words.read_text()).input_ids
    assert ids.count(0) == 1
    section = Evaluation(name="text", path=str(words), seq_len=64, windows=count)
    windows = cut(source, section)
    assert len(windows) == (count or len(ids) // 64)
    assert [token for window in windows for token in window] == ids[: 64 * len(windows)]


def test_evaluation_joins_rows_with_blank_lines(
    source: Source, tokenizer: Any, documents: list[str], rows: Path
) -> None:
    ids = tokenizer("\n\n".join(documents)).input_ids
    windows = cut(source, Evaluation(name="jsonl", path=str(rows), seq_len=64, windows=50))
    assert [token for window in windows for token in window] == ids[: 64 * 50]


def test_evaluation_does_not_look_at_the_seed(source: Source, words: Path) -> None:
    sections = [
        Evaluation(name="text", path=str(words), seq_len=64, windows=2, seed=seed)
        for seed in (1, 2)
    ]
    assert cut(source, sections[0]) == cut(source, sections[1])


def test_command_line_and_recipe_cut_alike(source: Source, words: Path) -> None:
    given = TextSource("--text", "text", str(words), evaluation=True)
    section = Evaluation(name="text", path=str(words), seq_len=64, windows=5)
    assert evaluation_windows(source, given, 64, 5).tolist() == cut(source, section)


# calibration


def test_documents_are_packed(source: Source, encoded: list[list[int]], rows: Path) -> None:
    ids = [token for document in encoded for token in document]
    every = [ids[start : start + 48] for start in range(0, len(ids) - 47, 48)]
    windows = cut(source, calibration(rows))
    places = [every.index(window) for window in windows]
    assert len(places) == 16
    assert places == sorted(set(places))
    # all there are, where more are asked for
    assert cut(source, calibration(rows, n_samples=10**6)) == every


def test_pileval_truncates_and_drops(source: Source, encoded: list[list[int]], rows: Path) -> None:
    """By the name with a local file, and by ``preproc`` as LLMC's files say it."""
    by_name = cut(source, calibration(rows, name="pileval", download=False))
    assert by_name == cut(source, calibration(rows, preproc="pileval_awq"))
    order = list(range(len(encoded)))
    random.Random(7).shuffle(order)
    fitting = [encoded[n][:48] for n in order if len(encoded[n]) >= 48]
    assert by_name == fitting[:16]
    assert all(window[0] == 0 and window.count(0) == 1 for window in by_name)
    few = cut(source, calibration(rows, preproc="pileval_awq", n_samples=10**6))
    assert few == fitting
    assert len(few) < len(encoded)


def test_wikitext2_crops_the_joined_text(
    source: Source, tokenizer: Any, documents: list[str], rows: Path
) -> None:
    ids = tokenizer("\n\n".join(documents)).input_ids
    windows = cut(source, calibration(rows, name="wikitext2", download=False))
    assert windows == cut(source, calibration(rows, preproc="wikitext2_gptq"))
    draw = random.Random(7)
    starts = [draw.randint(0, len(ids) - 48) for _ in range(16)]
    assert windows == [ids[start : start + 48] for start in starts]


def test_c4_crops_long_documents(source: Source, encoded: list[list[int]], rows: Path) -> None:
    windows = cut(source, calibration(rows, name="c4", download=False, n_samples=64))
    assert len(windows) == 64
    text = {
        " ".join(map(str, ids[start : start + 48]))
        for ids in encoded
        for start in range(len(ids) - 47)
    }
    assert all(" ".join(map(str, window)) in text for window in windows)
    assert len({tuple(window) for window in windows}) > 32


@pytest.mark.parametrize("preset", ["general", "pileval", "wikitext2", "c4"])
def test_seed_decides(source: Source, rows: Path, preset: str) -> None:
    first = cut(source, calibration(rows, preproc=preset))
    assert cut(source, calibration(rows, preproc=preset)) == first
    assert cut(source, calibration(rows, preproc=preset, seed=8)) != first


def global_generators_stay(source: Source, rows: Path) -> tuple[bool, bool]:
    """Whether Python's and torch's global generators are where they were after windows were cut."""
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    cut(source, calibration(rows, preproc="c4"))
    cut(source, Calibration(name="self_generated", n_samples=2, seq_len=8, seed=3))
    return random.getstate() == states[0], torch.equal(torch.get_rng_state(), states[1])


def test_seeds_do_not_touch_the_global_generators(source: Source, rows: Path) -> None:
    # in a process of its own: Prefect's threads in this one draw from Python's generator
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(global_generators_stay, source, rows).result() == (True, True)


def test_no_bos_where_the_tokenizer_has_none(
    copy_model: Callable[[], Path], documents: list[str], encoded: list[list[int]], rows: Path
) -> None:
    folder = copy_model()
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    del described["bos_token"]
    path.write_text(json.dumps(described))
    ids = [token for document in encoded for token in document[1:]]
    windows = cut(open_source(folder), calibration(rows, n_samples=10**6))
    assert [token for window in windows for token in window] == ids[: 48 * len(windows)]


def test_chats_are_packed_through_the_template(
    copy_model: Callable[[], Path], tokenizer: Any, tmp_path: Path
) -> None:
    folder = copy_model()
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    path.write_text(json.dumps(described | {"chat_template": template}))
    chats = [[{"role": "user", "content": f"the house of number {n}"}] for n in range(40)]
    rows = tmp_path / "chats.jsonl"
    rows.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    ids = [
        token
        for chat in chats
        for token in [0, *tokenizer(f"{chat[0]['content']}\n", add_special_tokens=False).input_ids]
    ]
    windows = cut(open_source(folder), calibration(rows, n_samples=10**6))
    assert [token for window in windows for token in window] == ids[: 48 * len(windows)]


# text that the model writes


def test_self_generated(source: Source) -> None:
    def windows(**changes: Any) -> list[list[int]]:
        given = {"name": "self_generated", "n_samples": 18, "seq_len": 12, "seed": 5}
        return cut(source, Calibration(**(given | changes)))

    first = windows()
    assert len(first) == 18
    assert all(window[0] == 0 for window in first)
    # random weights write all kinds of tokens, and nothing like the padding of an early end
    assert len({token for window in first for token in window}) > 150
    assert windows() == first
    assert windows(seed=6) != first
    # calibration and evaluation are the same function of their seeds
    section = Evaluation(name="self_generated", windows=18, seq_len=12, seed=5)
    assert cut(source, section) == first


def test_self_generated_text_is_likely(demo_model: Path) -> None:
    """A trained model finds its own text as likely as it is unsure: entropy, not chance."""
    section = Calibration(name="self_generated", n_samples=8, seq_len=32, seed=0)
    tokens = token_windows(open_source(demo_model), section, "cpu")
    network = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    with torch.no_grad():
        logs = network(tokens).logits[:, :-1].log_softmax(-1)
    nll = -logs.gather(-1, tokens[:, 1:, None]).mean().item()
    entropy = -(logs.exp() * logs).sum(-1).mean().item()
    assert nll == pytest.approx(entropy, abs=0.5)
    assert nll < 6


def test_self_generated_without_bos(copy_model: Callable[[], Path]) -> None:
    folder = copy_model()
    edit_config(folder, bos_token_id=None)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "generation_config.json").unlink()
    section = Calibration(name="self_generated", n_samples=2, seq_len=8, seed=5)
    windows = cut(open_source(folder), section)
    assert [len(window) for window in windows] == [8, 8]
    assert all(0 <= token < 8192 for window in windows for token in window)


# what is refused


def test_windows_over_the_context(source: Source, words: Path) -> None:
    for section, key in (
        (Evaluation(name="text", path=str(words), seq_len=2049), "eval.seq_len"),
        (calibration(words, name="text", seq_len=2049), "calib.seq_len"),
        (Calibration(name="self_generated", seq_len=2049, seed=0), "calib.seq_len"),
    ):
        with pytest.raises(InputError, match=f"{key}: .* 2049 .* context of 2048"):
            check_section(source, section)


def test_tokens_that_the_model_does_not_know(copy_model: Callable[[], Path], rows: Path) -> None:
    folder = copy_model()
    edit_config(folder, vocab_size=300)
    small = open_source(folder)
    with pytest.raises(InputError, match=r"gives token \d+, but the model knows 300"):
        check_section(small, calibration(rows))
    with pytest.raises(InputError, match=r"gives token \d+, but the model knows 300"):
        token_windows(small, calibration(rows), "cpu")


@pytest.mark.parametrize("name", ["pileval", "wikitext2", "c4"])
def test_hub_that_cannot_be_reached(source: Source, name: str) -> None:
    section = Calibration(name=name, n_samples=2, seq_len=8, seed=0)
    mend = "--set calib.name=text --set calib.path=FILE"
    with pytest.raises(InputError, match=mend):
        check_section(source, section)
    with pytest.raises(InputError, match=mend):
        token_windows(source, section, "cpu")
