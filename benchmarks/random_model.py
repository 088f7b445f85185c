"""Make a model of a given shape with random weights: what is timed does not need trained ones.

    python benchmarks/random_model.py FOLDER --tokenizer MODEL --blocks 32 --device cuda

The default is Llama 3 8B's shape. Its tokenizer is another model's, whose ids must fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model is written.")],
    tokenizer: Annotated[Path, typer.Option(help="A model whose tokenizer is taken.")],
    blocks: Annotated[int, typer.Option(min=1)] = 32,
    hidden: Annotated[int, typer.Option(min=1, help="hidden_size")] = 4096,
    intermediate: Annotated[int, typer.Option(min=1, help="intermediate_size")] = 14336,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    kv_share: Annotated[int, typer.Option(min=1, help="Heads that share one key.")] = 4,
    vocabulary: Annotated[int, typer.Option(min=1, help="vocab_size")] = 128256,
    context: Annotated[int, typer.Option(min=2, help="max_position_embeddings")] = 8192,
    device: Annotated[str, typer.Option(help="Where weights are drawn.")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Draw the weights in bfloat16 and write them in shards of 4 GB."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    if len(words) > vocabulary:
        raise typer.BadParameter(f"--vocabulary {vocabulary}: the tokenizer has {len(words)} ids")
    heads = hidden // head_dim
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // kv_share,
        head_dim=head_dim,
        max_position_embeddings=context,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    words.save_pretrained(folder)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {size / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    typer.run(main)
