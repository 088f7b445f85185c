"""Texts in the forms that a recipe names."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from tasks.engine.text import TextSource

DOCUMENTS = [
    "The river rose in the night.\nIn the morning it had gone back.",
    "Nobody had seen the captain since winter.",
    "A letter lay on the garden table, and nobody read it.",
]
ANY = TextSource("calib", "text", "words.txt")


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def save_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> TextSource:
    """Save rows as a kind of file and say how a recipe names it."""
    data = Dataset.from_list(rows)
    path = folder / f"rows.{kind}"
    name = kind
    if kind == "parquet":
        data.to_parquet(str(path))
    elif kind == "folder":
        data.save_to_disk(str(path))
        name = "dataset"
    elif kind == "splits":
        other = Dataset.from_list([{"text": "of the other split"}])
        DatasetDict({"train": other, "test": data}).save_to_disk(str(path))
        return TextSource("calib", "dataset", str(path), "test")
    elif kind == "jsonl.gz":
        with gzip.open(path, "wt") as file:
            file.write("\n".join(json.dumps(row) for row in rows))
        name = "pileval"
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return TextSource("calib", name, str(path))
