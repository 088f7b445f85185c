"""What is checked and predicted before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.loading import load_recipe
from configs.schema import Recipe
from tasks.calibration_set import calibration_set
from tasks.check import Request, check, check_device, describe, output_folder
from tasks.engine.errors import InputError
from tasks.engine.footprint import FLOAT, SCORE_BYTES, stages
from tasks.engine.job import Job
from tasks.engine.precision import compute_dtype
from tasks.engine.publication import begin, note_work, work_identity
from tasks.engine.source import INDEX, open_source
from tasks.engine.step import Step
from tasks.engine.store import MANIFEST
from tasks.engine.windows import TOKENS
from tasks.evaluation_set import evaluation_set
from tasks.load_model import load_model
from tasks.report import REPORT, means_of
from tests.models import make_checkpoint


def recipe(*overrides: str, name: str = "rtn_w4a16") -> Recipe:
    return load_recipe(name, overrides)


@pytest.fixture
def request_for(tmp_path: Path, tiny: Path) -> Callable[..., Request]:
    """A request to quantize the random model."""

    def make(asked: Recipe | None = None, **changes: Any) -> Request:
        given = {"model": str(tiny), "output": tmp_path / "out", "store": tmp_path / "store"}
        return Request(asked or recipe(), **(given | changes))

    return make


# where the output goes


@pytest.mark.parametrize(
    ("name", "model", "output", "expected"),
    [
        ("rtn_w4a16", "some/folder", "out", "out"),
        ("rtn_w4a16", "some/folder", None, "folder-rtn_w4a16"),
        ("configs/fp8/rtn_fp8.yml", "/some/folder/", None, "folder-rtn_fp8"),
        ("rtn_w4a16", "org/name", None, "name-rtn_w4a16"),
        ("rtn_w4a16", ".", None, "here-rtn_w4a16"),
        ("rtn_w4a16", "../other", None, "other-rtn_w4a16"),
        ("rtn_w4a16", None, None, "model-rtn_w4a16"),
    ],
)
def test_output_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    model: str | None,
    output: str | None,
    expected: str,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert output_folder(recipe(), name, model, output) == here / expected


def test_output_folder_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = recipe("save.save_path=exports/here", "model.path=models/llama")
    assert output_folder(asked, "rtn_w4a16", None, None) == tmp_path / "exports" / "here"
    assert output_folder(asked, "rtn_w4a16", None, "out") == tmp_path / "out"
    asked = recipe("model.path=models/llama")
    assert output_folder(asked, "rtn_w4a16", None, None) == tmp_path / "llama-rtn_w4a16"


def test_an_output_made_by_other_means_is_refused(request_for: Callable[..., Request]) -> None:
    asked = request_for()
    job, _ = check(asked)
    assert asked.output is not None
    asked.output.mkdir()
    begin(asked.store, asked.output, work_identity(job, asked.output))
    report = asked.output / REPORT
    for versions in (means_of(job), means_of(job) | {"torch": "0.1"}):
        report.write_text(json.dumps({"versions": versions}))
        check(asked, elsewhere=True)
        check(replace(asked, overwrite=True))
        if versions == means_of(job):
            check(asked)
    with pytest.raises(InputError, match=r"made by other means \(torch: 0\.1, now"):
        check(asked)


def test_a_work_goes_on_where_there_is_no_room_for_a_whole_one(
    request_for: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = request_for()
    job, _ = check(asked)
    monkeypatch.setattr("tasks.engine.places.free_bytes", lambda place: 1000)
    with pytest.raises(InputError, match=r"--store .* are free"):
        check(asked)
    check(asked, room=False)
    note_work(asked.store, work_identity(job, asked.output))
    with caplog.at_level("WARNING", "blockquant"):
        check(asked)
    assert len([line for line in caplog.messages if "it goes on" in line]) == 2
    with pytest.raises(InputError, match=r"--store .* are free"):
        check(replace(asked, output=asked.output.with_name("another")))  # type: ignore[union-attr]


# what an earlier run has found


def made_before(job: Job, step: Step[...], *args: Any, tokens: int | None = None) -> Path:
    """Put what a step would make into the store: of windows, one of a token; the entry's folder."""
    key = step.key(job, *args)
    with job.store.draft(key) as draft:
        if tokens is not None:
            draft.save_tensors(TOKENS, {"tokens": torch.full((1, 8), tokens, dtype=torch.int32)})
        return job.store.commit(key, step.name, draft, {}).folder


def refused(*_: object, **__: object) -> None:
    raise AssertionError("that was looked at before")


def test_what_fitted_before_is_not_built_again(
    request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_before(check(request_for())[0], load_model)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.engine.job.build_decoder", refused)
        check(request_for())
        # other headers, and an entry that is damaged
        with pytest.raises(AssertionError, match="looked at before"):
            check(request_for(recipe("ignored_layers=[down_proj]")))
        (folder / MANIFEST).write_text("{}")
        with pytest.raises(AssertionError, match="looked at before"):
            check(request_for())
    check(request_for())


def test_texts_that_were_cut_before_are_not_read_again(
    request_for: Callable[..., Request], words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{{name: text, path: {words}, seq_len: 8}}"
    given = ("quant.method=Identity", f"calib={text}", f"eval={text}")
    asked = recipe(*given)
    job, _ = check(request_for(asked))
    (step,) = job.steps
    folder = made_before(job, calibration_set, step.calib, tokens=5)
    monkeypatch.setattr("tasks.engine.windows.check_text", refused)
    # the other one is still to be read
    with pytest.raises(AssertionError, match="looked at before"):
        check(request_for(asked))
    made_before(job, evaluation_set, job.evaluation, tokens=5)
    check(request_for(asked))
    vocabulary = int(job.source.config["vocab_size"])
    made_before(job, calibration_set, step.calib, tokens=vocabulary)
    with pytest.raises(InputError, match=f"gives token {vocabulary}"):
        check(request_for(asked))
    with (folder / TOKENS).open("ab") as file:
        file.write(b"0")
    with pytest.raises(AssertionError, match="looked at before"):
        check(request_for(asked))
    longer = recipe(*given, "calib.seq_len=4096")
    with pytest.raises(InputError, match=r"calib\.seq_len: .* context"):
        check(request_for(longer))


# what is predicted


def test_prediction_follows_the_scheme(request_for: Callable[..., Request]) -> None:
    sizes = {}
    for name in ("rtn_w4a16", "rtn_w4a16_asym", "rtn_w8a16"):
        job, prediction = check(request_for(recipe(name=name)))
        described = describe(job, prediction)
        assert described["export_bytes"] == prediction.export_bytes
        assert described["linears"] == 14
        sizes[name] = prediction.export_bytes
    assert sizes["rtn_w4a16"] < sizes["rtn_w4a16_asym"] < sizes["rtn_w8a16"]


def test_prediction_grows_with_the_calibration_set(
    request_for: Callable[..., Request], words: Path
) -> None:
    text = ("quant.method=Identity", "calib.name=text", f"calib.path={words}", "calib.seq_len=64")
    few, small = check(request_for(recipe(*text, "calib.n_samples=64")))
    many, large = check(request_for(recipe(*text, "calib.n_samples=65536")))
    # hidden states before a block and after it
    width = compute_dtype(torch.bfloat16, "cpu").itemsize
    tokens = (65536 - 64) * 64
    assert stages(many)["advance"] - stages(few)["advance"] == 2 * tokens * 128 * width
    assert large.peak_memory_bytes > small.peak_memory_bytes + tokens * 128 * width
    assert large.seconds > small.seconds


def test_prediction_counts_the_dtype_of_an_evaluation(
    request_for: Callable[..., Request], words: Path
) -> None:
    def held(dtype: str) -> int:
        text = f"eval={{name: text, path: {words}, windows: 64, seq_len: 64, dtype: {dtype}}}"
        return stages(check(request_for(recipe(text)))[0])["evaluate"]

    assert held("auto") == held("float32")
    # last hidden states of both models and those a block before, and two heads, of half the bytes
    assert held("float32") - held("bfloat16") >= 2 * (3 * 64 * 64 * 128 + 2 * 8192 * 128)


def test_prediction_counts_what_is_published(
    request_for: Callable[..., Request], tmp_path: Path, words: Path
) -> None:
    text = f"{{name: text, path: {words}, n_samples: 4, seq_len: 64}}"
    model = str(make_checkpoint(tmp_path / "tied", tied=True))

    def bytes_of(*more: str, rotated: bool = False) -> tuple[int, int]:
        place = "steps.1.calib" if rotated else "calib"
        name = "w8a8_combin" if rotated else "rtn_w8a8"
        asked = recipe(f"{place}={text}", f"eval={{name: text, path: {words}}}", *more, name=name)
        found = check(request_for(asked, model=model))[1]
        return found.export_bytes, found.store_bytes

    plain, source = bytes_of()[0], (tmp_path / "tied" / "model.safetensors").stat().st_size
    # a rotated head is no longer the embedding
    assert bytes_of(rotated=True)[0] == plain + 8192 * 128 * 2
    both = bytes_of("save.save_trans=true", "save.save_sgl=true")[0]
    assert both - plain == pytest.approx(source, rel=0.01)
    alone = ("save.save_trans=true", "save.save_sgl=false")
    assert bytes_of(*alone)[0] == both - plain
    assert bytes_of("save.save_sgl=false") == (0, bytes_of()[1])
    # embedding and final norm are in the store once, whatever is made of the blocks
    together = bytes_of("save.save_trans=true", "save.save_sgl=true")[1]
    assert bytes_of()[1] + bytes_of(*alone)[1] - together == (8192 + 1) * 128 * 2


def test_learning_takes_longer_and_holds_more(
    request_for: Callable[..., Request], words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.engine.prediction._throughput", lambda device: 1e9)
    text = f"calib={{name: text, path: {words}, n_samples: 64, seq_len: 64}}"
    weight = "weight: {bit: 4, granularity: per_channel, need_pack: true}"
    checked = [
        check(request_for(recipe(text, f"quant={{method: {method}, {weight}}}")))
        for method in ("Identity", "GPTQ", "OmniQuant")
    ]
    seconds = [cost.seconds for _, cost in checked]
    assert seconds[0] < seconds[1] < seconds[2]
    held = [stages(job) for job, _ in checked]
    assert "learn" not in held[0] | held[1]
    assert held[2]["learn"] > max(size for name, size in held[1].items() if name != "evaluate")


@pytest.mark.parametrize(
    ("length", "windows", "tokens"), [(64, 1, 64), (64, 64, 2048), (4096, 2, 4096)]
)
def test_prediction_holds_the_scores_that_attention_writes_out(
    request_for: Callable[..., Request],
    tmp_path: Path,
    words: Path,
    length: int,
    windows: int,
    tokens: int,
) -> None:
    text = ("eval.name=text", f"eval.path={words}", f"eval.seq_len={length}")
    text = (*text, f"eval.windows={windows}")
    needed = []
    for name, model_type in (("fused", "gemma"), ("written", "gemma2")):
        model = make_checkpoint(tmp_path / name, model_type, tied=True, context=4096)
        needed.append(check(request_for(recipe(*text), model=str(model)))[1].device_bytes)
    # Gemma 2 has two norms of a block more, and both are evaluated in float32
    norms = 2 * 128 * FLOAT
    assert needed[1] - needed[0] == 4 * tokens * length * SCORE_BYTES + norms


def test_gradients_of_attention_hold_its_scores_on_a_gpu(
    request_for: Callable[..., Request], words: Path
) -> None:
    text = f"calib={{name: text, path: {words}, n_samples: 64, seq_len: 64}}"
    held = []
    for augmented in (False, True):
        method = f"method: OmniQuant, special: {{aug_loss: {str(augmented).lower()}}}"
        weight = "weight: {bit: 4, granularity: per_channel, need_pack: true}"
        job, _ = check(request_for(recipe(text, f"quant={{{method}, {weight}}}")))
        beside = replace(job, device="cuda")
        # what it is built of is the same, and no GPU is here
        beside.__dict__["decoder"] = job.decoder
        heads = int(job.decoder.model.config.num_attention_heads)
        held.append((stages(job)["learn"], stages(beside)["learn"]))
    (on_cpu, plain), (augmented_on_cpu, twice) = held
    scores = 64 * 64 * 64 * heads
    assert augmented_on_cpu == on_cpu
    # in float32 after the softmax, of both outputs; and before it, or their gradients
    assert twice - plain == 4 * scores
    assert plain > 12 * scores


def test_text_that_the_model_writes_costs_time(
    request_for: Callable[..., Request], words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the measured speed of the machine would make the difference of two runs swing
    monkeypatch.setattr("tasks.engine.prediction._throughput", lambda device: 1e12)
    text = ("eval.name=text", f"eval.path={words}", "eval.windows=16", "eval.seq_len=512")
    _, read = check(request_for(recipe(*text)))
    _, sampled = check(request_for(recipe("eval.windows=16", "eval.seq_len=512")))
    # 512 times two blocks, two milliseconds each, beside the arithmetic
    assert sampled.seconds - read.seconds == pytest.approx(2.05, abs=0.05)


def test_a_device_is_timed_where_seconds_are_asked_for_alone(
    request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(
        "tasks.engine.prediction._throughput", lambda device: timed.append(device) or 1e12
    )
    job, prediction = check(request_for())
    assert timed == []
    assert describe(job, prediction)["seconds"] > 0
    assert set(timed) == {"cpu"}


def test_memory_that_is_not_there(
    request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=2**20, available=2**20)
    )
    with pytest.raises(InputError, match=r"memory: the run needs about .* use fewer calibration"):
        check(request_for())


def test_nothing_is_left_behind(request_for: Callable[..., Request], tmp_path: Path) -> None:
    check(request_for())
    assert list(tmp_path.iterdir()) == []


# which models are taken


def test_float32_and_float16_sources(request_for: Callable[..., Request], tmp_path: Path) -> None:
    for dtype, name in ((torch.float32, "float32"), (torch.float16, "float16")):
        model = make_checkpoint(tmp_path / name, blocks=1, hidden=128, dtype=dtype)
        job, _ = check(request_for(recipe(f"model.torch_dtype={name}"), model=str(model)))
        assert job.dtype is dtype


@pytest.mark.parametrize("shard_size", ["1GB", "500KB"])
def test_rotary_tables_of_older_checkpoints_are_skipped(
    request_for: Callable[..., Request], tmp_path: Path, shard_size: str
) -> None:
    """Llama checkpoints of 2023 hold a table in every block; transformers skips it too."""
    model = make_checkpoint(tmp_path / "model", shard_size=shard_size)
    files = sorted(model.glob("*.safetensors"))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(files[-1]) | {name: torch.ones(16)}, files[-1], {"format": "pt"})
    if (model / INDEX).is_file():
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][name] = files[-1].name
        (model / INDEX).write_text(json.dumps(index))
    assert name not in open_source(model).tensors
    check(request_for(model=str(model)))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "no place for model.layers.0.self_attn.q_proj"),
        ("model.layers.2.input_layernorm.weight", "beyond the 2 of config.json"),
        ("vision.weight", "no place for vision.weight"),
    ],
)
def test_tensors_of_another_model(
    request_for: Callable[..., Request], tmp_path: Path, name: str, says: str
) -> None:
    model = make_checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[name] = torch.zeros(128, dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=says):
        check(request_for(model=str(model)))


# devices


@pytest.mark.parametrize("device", ["", "gpu", "cuda:x", "meta", "cuda:-1"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(InputError, match="--device"):
        check_device(device)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [check_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]
    with pytest.raises(InputError, match="this machine has 2 CUDA devices"):
        check_device("cuda:2")
