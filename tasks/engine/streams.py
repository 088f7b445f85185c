"""Hidden states between blocks: kept in memory, on disk now and then, or made again.

A stream is named by the chain of what led to it, so it can always be rebuilt: from the newest kept
point, forward through blocks that are quantized already.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantizers.activations import quantize_dequantize_activation
from quantizers.schemes import ActivationScheme
from tasks.engine.decoder import (
    InputHook,
    micro_batches,
    run_block,
)
from tasks.engine.errors import RunError
from tasks.engine.export_format import INPUT_SCALE, restore_block
from tasks.engine.job import Job, forget_result, require, result_files, result_tensors
from tasks.engine.store import load_tensors
from tasks.engine.transfer import beside, host_memory, reached, to_host
from tasks.engine.values import Later
from tasks.engine.version import SOURCE, Version, embedding_of, version_block
from tasks.engine.windows import read_tokens

HIDDEN = "hidden.safetensors"
KEPT_BOUNDARIES = 2


@dataclass(frozen=True)
class Link:
    """One block that the stream has passed.

    Attributes:
        key: lineage key of the stream after the block.
        packed: key of the block's exported tensors, or None where it ran with the source's.
    """

    key: str
    packed: str | None


@dataclass(frozen=True)
class Stream:
    """Hidden states before block ``len(links)``, starting from a set of token windows.

    Attributes:
        tokens: key of the windows.
        origin: digest of what turns them into the first block's input: embedding and config.
        links: the blocks passed so far.
        version: of the model before rounding that it passes through.
    """

    tokens: str
    origin: str = ""
    links: tuple[Link, ...] = ()
    version: Version = SOURCE

    @property
    def key(self) -> str:
        """Lineage key of the hidden states."""
        if self.links:
            return self.links[-1].key
        return hashlib.sha256(f"{self.tokens} {self.origin}".encode()).hexdigest()

    @property
    def kind(self) -> str:
        """Which of the streams that run side by side it is, for the memory."""
        unquantized = self.links and self.links[-1].packed is None
        return "stream before rounding" if unquantized else "stream"

    @property
    def block(self) -> int:
        """Number of the block that these hidden states enter."""
        return len(self.links)

    def after(self, key: str, packed: str | None) -> Stream:
        """Return the stream one block further."""
        return replace(self, links=(*self.links, Link(key, packed)))

    def back(self) -> Stream:
        """Return the stream one block before."""
        return replace(self, links=self.links[:-1])


@dataclass(frozen=True)
class Streams:
    """What a block is fed, and what it would be fed beside it were nothing rounded."""

    quantized: Stream
    float: Stream


def start_stream(job: Job, tokens: str, version: Version = SOURCE) -> Stream:
    """Return the stream of a set of token windows before the first block."""
    embedding = job.source.digest([job.plan.architecture.embedding])
    config = json.dumps(dict(job.source.config), sort_keys=True)
    origin = f"{embedding} {version.rotation or ''} {config}"
    return Stream(tokens, hashlib.sha256(origin.encode()).hexdigest(), version=version)


def windows_of_each(job: Job, stream: Stream) -> list[int]:
    """How many of the stream's windows each process of the team has."""

    def read() -> list[int]:
        return job.team.counts(require(job, stream.tokens).value["windows"])

    return job.memo.get("windows", stream.tokens, read)


def hidden_states(job: Job, stream: Stream) -> Tensor:
    """Return the stream's hidden states (W, T, D) in the compute dtype.

    Those of this process's windows; on the device while they fit there, else on the host.

    Taken from memory, from a boundary on disk, or made again from the newest one before.
    """
    if not job.memo.has(stream.kind, stream.key):
        # those of the block before stay until these are there: they are what these are made of
        job.memo.put(stream.kind, stream.key, _find_or_make(job, stream))
    hidden: Tensor = job.memo.get(stream.kind, stream.key, _never)
    return hidden


def _find_or_make(job: Job, stream: Stream) -> Tensor:
    # a loop, not a recursion: a deep model may have to go back to its tokens
    passed: list[Stream] = []
    while True:
        hidden = _kept(job, stream)
        if hidden is not None:
            break
        if not stream.links:
            hidden = _embed(job, stream)
            break
        passed.append(stream)
        stream = stream.back()
    for later in reversed(passed):
        hidden = pass_block(job, stream, hidden, later.links[-1].packed)
        stream = later
    return hidden


def _kept(job: Job, stream: Stream) -> Tensor | None:
    if job.memo.has(stream.kind, stream.key):
        kept: Tensor = job.memo.get(stream.kind, stream.key, _never)
        return kept
    entry = job.store.get(boundary_key(stream, job.team.rank))
    if entry is None:
        return None
    try:
        place = job.stream_place(entry.size)
        return load_tensors(entry.file(HIDDEN), place)["hidden"]
    except FileNotFoundError:
        # another run of the store, further on, has dropped it
        return None


def _never() -> Tensor:
    raise AssertionError("asked for what is not kept")


def _embed(job: Job, stream: Stream) -> Tensor:
    tokens = read_tokens(require(job, stream.tokens))
    tokens = tokens[job.team.own(len(tokens))]
    embedding = keep_embedding(job, stream.version)
    drop_embedding(job)
    batches = micro_batches(tokens, job.device)
    place = job.stream_place(tokens.numel() * embedding.shape[1] * embedding.itemsize)
    return torch.cat(
        [job.decoder.embed(embedding, batch.to(job.device))[0].to(place) for batch in batches]
    )


def keep_embedding(job: Job, version: Version) -> Tensor:
    """The embedding (V, D) as it is exported, in the compute dtype, on the device; kept there."""
    key = version.rotation or "source"
    return job.memo.get("embedding", key, lambda: embedding_of(job, version).to(job.compute_dtype))


def drop_embedding(job: Job) -> None:
    """Keep the embedding no longer."""
    job.memo.forget("embedding")


def pass_block(job: Job, stream: Stream, hidden: Tensor, packed: str | None) -> Tensor:
    """Run the block that ``stream`` enters: with its exported weights, or with the version's."""
    block = stream.block
    if packed is None:
        tensors = version_block(job, stream.version, block)
        weights = {n: t.to(job.compute_dtype) for n, t in tensors.items()}
        return through_block(job, block, weights, hidden, None)
    plan = job.plan.blocks[block]
    stored = _packed_tensors(job, block, packed)
    weights = restore_block(stored, plan.quantized, job.scheme, job.compute_dtype)
    ending = f".{INPUT_SCALE}"
    scales = {n.removesuffix(ending): t for n, t in stored.items() if n.endswith(ending)}
    # a GPU has room for the pass instead
    del stored
    forget_result(job, packed)
    return through_block(
        job, block, weights, hidden, activation_hook(job.scheme.activation, scales)
    )


def _packed_tensors(job: Job, block: int, packed: str) -> dict[str, Tensor]:
    """A block's tensors as exported, by their names in it."""
    prefix = job.plan.blocks[block].prefix
    return {
        name.removeprefix(prefix): tensor
        for file in result_files(job, packed)
        for name, tensor in result_tensors(job, packed, file).items()
    }


def through_block(
    job: Job,
    block: int,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    on_input: InputHook | None,
) -> Tensor:
    """Run hidden states (W, T, D) through one block in micro-batches."""
    names = job.plan.blocks[block].quantized
    module = job.decoder.blocks[block]
    # filled in place: a list of parts and their concatenation would hold the stream twice
    passed, done = _room_for(job, hidden), 0
    for batch in micro_batches(hidden, job.device):
        arguments = block_arguments(job, batch.shape[0], batch.shape[1])[block]
        after = run_block(module, weights, batch.to(job.device), arguments, names, on_input)
        passed[done : done + len(batch)] = after
        done += len(batch)
    return passed


def _room_for(job: Job, hidden: Tensor) -> Tensor:
    """Memory for hidden states like these, where these are."""
    if hidden.is_cuda or not job.on_gpu:
        return torch.empty_like(hidden)
    return host_memory(hidden.shape, hidden.dtype, pinned=True)


def block_arguments(job: Job, batch: int, length: int) -> tuple[dict[str, Any], ...]:
    """What transformers hands each block beside the hidden states, for one batch shape."""

    def compute() -> tuple[dict[str, Any], ...]:
        width = int(job.source.config["hidden_size"])
        nothing = torch.zeros(1, width, dtype=job.compute_dtype, device=job.device)
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=job.device)
        return job.decoder.embed(nothing, tokens)[1]

    shape = f"{batch}x{length}"
    return job.memo.get(f"block arguments {shape}", shape, compute)


def activation_hook(
    scheme: ActivationScheme | None, scales: Mapping[str, Tensor] | None = None
) -> InputHook | None:
    """Quantize the inputs of linears as the serving kernels do; None where nothing is."""
    if scheme is None:
        return None
    asked = scheme

    def quantize(linear: str, x: Tensor) -> Tensor:
        scale = None if asked.dynamic else (scales or {})[linear]
        return quantize_dequantize_activation(x, asked, scale=scale)

    return quantize


def boundary_key(stream: Stream, rank: int = 0) -> str:
    """Key of the stream's hidden states on disk, those of one process's windows."""
    place = f"boundary {stream.key}" + (f" {rank}" if rank else "")
    return hashlib.sha256(place.encode()).hexdigest()


def keep_boundary(job: Job, stream: Stream, hidden: Tensor) -> None:
    """Write the stream to disk and drop the older boundaries of its chain.

    Beside a GPU it is written behind the computation, and not where the one before still is or was
    a moment ago: after a kill the blocks since the last boundary are passed again, not searched
    again.
    """
    if not job.on_gpu:
        _write_boundary(job, stream, hidden)
    else:
        place = f"block {stream.block}: its hidden states could not be kept"
        ready, held = reached(job.device), [hidden]

        def write() -> None:
            with beside(job.device, ready):
                # the device keeps it no longer: a disk may take longer than the next blocks
                kept = held.pop()
                # its step fails, and the next try is not to find it
                finite = bool(torch.linalg.vector_norm(kept, torch.inf).isfinite())
                on_host = to_host(kept)
                del kept
            if finite:
                _write_boundary(job, stream, on_host)

        job.behind[stream.kind].offer(place, write)


def _write_boundary(job: Job, stream: Stream, hidden: Tensor) -> None:
    rank = job.team.rank
    key = boundary_key(stream, rank)
    with job.store.lock(key):
        if job.store.get(key) is None:
            with job.store.draft(key) as draft:
                draft.save_tensors(HIDDEN, {"hidden": hidden})
                job.store.commit(key, "boundary", draft, {"block": stream.block})
    older, kept = stream, 1
    while older.links:
        older = older.back()
        kept += job.store.folder(boundary_key(older, rank)).exists()
        if kept > KEPT_BOUNDARIES:
            job.store.remove(boundary_key(older, rank))


def drop_boundaries(job: Job, stream: Stream) -> None:
    """Drop all boundaries of a chain: its last block is done.

    The first process drops those of all: the others may be gone.
    """
    job.behind[stream.kind].wait()
    ranks = range(job.team.size) if job.team.rank == 0 else (job.team.rank,)
    while stream.links:
        for rank in ranks:
            job.store.remove(boundary_key(stream, rank))
        stream = stream.back()


def require_finite(job: Job, hidden: Tensor, block: int, windows: Sequence[int]) -> Later:
    """Refuse hidden states after a block with NaN or Inf; the mean square of all windows.

    Both are known by the end of the step.

    Args:
        job: the run, one of whose processes this is.
        hidden: (W, T, D), this process's.
        block: the block's number.
        windows: W of each process.

    Raises:
        RunError: names the block.
    """
    if hidden.is_cuda:
        roots, largest = (
            torch.linalg.vector_norm(hidden, order, dim=(1, 2), dtype=torch.float32)
            for order in (2, torch.inf)
        )
        squares = roots.double().square()
    else:
        # window by window: what is small stays in a cache
        squares = torch.stack([window.float().square().sum() for window in hidden]).double()
        # a square may overflow where its root does not
        known = bool(squares.isfinite().all())
        largest = squares if known else hidden.abs().amax((1, 2))
    found = job.team.joined(torch.stack((squares, largest.double()), 1), windows)
    job.doubts.add(
        found[:, 1],
        lambda: RunError(
            f"block {block}: its output holds NaN or Inf; the model overflows "
            f"{hidden.dtype}, or its weights are damaged"
        ),
    )
    count = sum(windows) * hidden[0].numel()
    return Later(lambda: math.fsum(found[:, 0].tolist()) / count)
