"""A folder of files as LLMC's users have them, each run as it stands; only paths are local."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from tests.configs.test_seed_recipes import SEED, as_llmc_file
from tests.conftest import Outcome

Here = Callable[..., Outcome]
FORMATS = {"W4A16": "pack-quantized", "W8A16": "pack-quantized", "W8A8": "int-quantized"}
# sizes of the seed's presets, and those that two cores run in seconds
SMALLER = {
    "n_samples: 128": "n_samples: 4",
    "n_samples: 512": "n_samples: 6",
    "seq_len: 512": "seq_len: 64",
    "seq_len: 2048": "seq_len: 96",
    "epochs: 5": "epochs: 2",
}


@pytest.fixture(scope="module")
def data(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two data sets, as `datasets` saves them."""
    folder = tmp_path_factory.mktemp("data")
    lines = [line + "." for line in words.read_text().split(".") if line]
    documents = [" ".join(lines[i : i + 60]) for i in range(0, 1200, 60)]
    Dataset.from_dict({"text": documents}).save_to_disk(folder / "pileval")
    half = len(documents) // 2
    DatasetDict(
        train=Dataset.from_dict({"text": documents[:half]}),
        test=Dataset.from_dict({"text": [documents[half][:2000]]}),
    ).save_to_disk(folder / "wikitext2")
    return folder


@pytest.fixture
def files(tmp_path: Path, tiny: Path, data: Path, home: Path, services: object) -> Path:
    """The seed's recipes, one file each."""
    del home, services  # prepared once, they save seconds in every run
    folder = tmp_path / "llmc"
    for name in SEED:
        text = as_llmc_file(name)
        for old, new in SMALLER.items():
            text = text.replace(old, new)
        text = text.replace("/data/", f"{data}/")
        first = str(tmp_path / "saved" / name.replace("/step_2_omniq", "/step_1_awq"))
        first = first.replace("/step_2_gptq", "/step_1_quarot")
        source = f"{first}/transformed_model" if "/step_2" in name else str(tiny)
        text = text.replace("/models/llama", source)
        for place in ("/save/for/sgl/", "/save/for/step/2/"):
            text = text.replace(place, str(tmp_path / "saved" / name) + "/")
        file = folder / f"{name}.yml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def ran(here: Here, file: Path) -> dict[str, Any]:
    outcome = here("quantize", file, "--json", "--set", "eval.report=false")
    assert outcome.status == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.mark.parametrize("name", [name for name in SEED if "combin" not in name])
def test_a_file_gives_the_checkpoint_it_asks_for(name: str, files: Path, here: Here) -> None:
    result = ran(here, files / f"{name}.yml")
    folder = Path(result["checkpoint"])
    assert folder == files.parent / "saved" / name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = SEED[name][1]
    assert (result["scheme"], config["format"]) == (scheme, FORMATS.get(scheme, "float-quantized"))
    assert 0 < result["metrics"]["kl"] < 0.01


@pytest.mark.parametrize(
    ("combination", "first", "second"),
    [
        ("w4a16_combin", "step_1_awq", "step_2_omniq"),
        ("w8a8_combin", "step_1_quarot", "step_2_gptq"),
    ],
)
def test_the_second_file_goes_on_from_what_the_first_one_saved(
    combination: str, first: str, second: str, files: Path, here: Here
) -> None:
    result = ran(here, files / combination / f"{first}.yml")
    folder = Path(result["checkpoint"])
    assert {p.name for p in folder.iterdir()} == {
        "transformed_model",
        "README.md",
        "blockquant.json",
    }
    assert result["scheme"] == "not quantized"
    assert (
        not any(step["step"].startswith("pack") for step in result["steps"][:-3]) or "awq" in first
    )
    # transformed, but the same function, to what bf16 rounds
    assert 0 < result["metrics"]["kl"] < 1e-4
    assert "transformed_model" in result["launch"]
    result = ran(here, files / combination / f"{second}.yml")
    config = json.loads((Path(result["checkpoint"]) / "config.json").read_text())
    assert config["quantization_config"]["format"] == FORMATS[SEED[f"{combination}/{second}"][1]]
    assert config["tie_word_embeddings"] is False
    assert result["metrics"]["kl"] < 0.01
