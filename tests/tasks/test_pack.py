"""How a block's tensors are laid out in files."""

from __future__ import annotations

import torch

from tasks.pack import split_into_shards


def test_shards_are_filled_in_the_order_of_names() -> None:
    sizes = {"d": 30, "a": 60, "c": 10, "b": 40, "e": 200, "f": 1}
    tensors = {name: torch.zeros(size, dtype=torch.int8) for name, size in sizes.items()}
    # what is larger than a shard has one of its own
    assert split_into_shards(tensors, largest=100) == [["a", "b"], ["c", "d"], ["e"], ["f"]]
