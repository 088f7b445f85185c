"""What every step of a run is given: plain values, the same for the whole run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch

from configs.schema import Calibration, Evaluation, Recipe, ResolvedStep
from configs.schemes import unserved
from configs.vocabulary import DataName
from tasks.engine.architectures import architecture_of
from tasks.engine.behind import Behind
from tasks.engine.decoder import Decoder, build_decoder, device_fingerprint
from tasks.engine.doubts import Doubts
from tasks.engine.draft import Draft
from tasks.engine.encoding import tokenizer_files
from tasks.engine.errors import InputError
from tasks.engine.export_format import Scheme, scheme_of
from tasks.engine.kernel_limits import Shapes, misfits
from tasks.engine.memo import Memo
from tasks.engine.phases import Phases
from tasks.engine.plan import Plan, matrix_shape, plan_model
from tasks.engine.precision import compute_dtype
from tasks.engine.residency import OnHost, vacate
from tasks.engine.source import Source
from tasks.engine.store import Entry, Store, load_tensors
from tasks.engine.team import Team
from tasks.engine.text import text_digest, text_of
from tasks.engine.transfer import ToDevice, pinned, sent_beside

Value = TypeVar("Value")

# share of a device's memory that streams of hidden states may take
STREAM_SHARE = 0.5
# between two writings of hidden states: what a GPU makes of them in less is more than disks take
BOUNDARY_REST_S = 5.0


@dataclass(frozen=True)
class Job:
    """One quantization: a recipe, a source checkpoint, and where and with what to work.

    A lean one keeps as little on the device as it can; its results are the same.

    Attributes:
        behind: writes what a run could do without, each kind beside the others.
        before: digests what will be needed.
        loading: reads what will be needed next.
        held: files of results that are not in the store yet, by their keys.
        doubts: what the device has still to say of the steps that were computed.
        phases: where the time of its steps goes.
        team: the processes that compute it together, of which this is one.
        stride: from a block to the next that this process computes.
    """

    recipe: Recipe
    source: Source
    store: Store
    memo: Memo
    device: str
    memory: int
    keep_incompatible: bool = False
    lean: bool = False
    behind: defaultdict[str, Behind] = field(
        default_factory=lambda: defaultdict(partial(Behind, BOUNDARY_REST_S))
    )
    before: Behind = field(default_factory=Behind)
    loading: Behind = field(default_factory=Behind)
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    doubts: Doubts = field(default_factory=Doubts)
    phases: Phases = field(default_factory=Phases)
    team: Team = field(default_factory=Team)
    stride: int = 1

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the source's weights: that of its first quantizable linear."""
        architecture = architecture_of(self.source.config)
        name = architecture.first_linear
        if name not in self.source.tensors:
            raise InputError(
                f"model {self.source.path}: no tensor {name}; every block of a "
                f"{architecture.model_type} checkpoint has it, download it again"
            )
        return self.source.tensors[name].dtype

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of hidden states and block weights while running blocks."""
        return compute_dtype(self.dtype, self.device)

    @cached_property
    def steps(self) -> tuple[ResolvedStep, ...]:
        """The recipe's steps, in order."""
        return self.recipe.resolved_steps()

    @property
    def quantizes(self) -> bool:
        """Whether codes are exported: not where only the model before rounding is asked for."""
        return self.recipe.save.save_sgl or not self.recipe.save.save_trans

    @cached_property
    def scheme(self) -> Scheme:
        """How linears are quantized and stored: what the last step says."""
        return scheme_of(self.steps[-1].quant, self.dtype)

    @cached_property
    def plan(self) -> Plan:
        """Which linears are quantized."""
        serving = self.recipe.serving
        checked = serving.check_kernels and self.recipe.save.save_sgl and not unserved(self.recipe)
        return plan_model(
            self.source,
            self.scheme.weight,
            self.recipe.ignored_layers,
            self.keep_incompatible,
            partial(self._misfits, gpus=serving.tensor_parallel) if checked else None,
        )

    @cached_property
    def unserved(self) -> str | None:
        """Why SGLang would not serve the export, None if it would."""
        if (reason := unserved(self.recipe)) is not None:
            return reason
        if not tokenizer_files(self.source):
            return (
                f"model {self.source.path}: no tokenizer files, which a server needs; copy "
                "tokenizer.json and tokenizer_config.json beside the weights"
            )
        architecture = self.plan.architecture
        if architecture.head_is_embedding and not self.plan.tied:
            return (
                f"model.path: SGLang computes logits of {architecture.model_type} with the "
                f"embedding, not with the {architecture.head} that this model has"
            )
        for block in self.plan.blocks:
            names = {name: block.prefix + name for name in block.quantized}
            shapes = {name: matrix_shape(self.source, full) for name, full in names.items()}
            for line in self._misfits(shapes, self.recipe.serving.tensor_parallel).values():
                return block.prefix + line
        return None

    def _misfits(self, shapes: Shapes, gpus: int) -> dict[str, str]:
        return misfits(shapes, self.source.config, self.scheme, gpus)

    @cached_property
    def decoder(self) -> Decoder:
        """The model without weights."""
        return build_decoder(self.source.config, self.device)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The evaluation section with its seed, or the data-free default."""
        return self.recipe.resolved_eval()

    @cached_property
    def texts(self) -> list[str]:
        """Digests of the files of text that the recipe names, as they are when first asked."""
        calibrated = [step.calib for step in self.steps if step.calib is not None]
        sections: list[Calibration | Evaluation] = [*calibrated, self.evaluation]
        own = DataName.SELF_GENERATED
        texts = [text_of(section) for section in sections if section.name is not own]
        return [text_digest(text) for text in texts if not text.remote]

    @property
    def blocks(self) -> range:
        """Numbers of the blocks."""
        return range(len(self.plan.blocks))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides the last bits on this machine."""
        # only sums over calibration windows are sums of shares
        shared = self.team.size > 1 and self.recipe.calibrated
        together = {"devices": str(self.team.size)} if shared else {}
        return device_fingerprint(self.device) | together

    def block_digest(self, block: int) -> str:
        """Digest of the source's tensors of one block."""
        if block not in self._block_digests:
            self.before.wait()
        if block not in self._block_digests:
            self._digest(block)
        return self._block_digests[block]

    def digest_ahead(self, block: int) -> None:
        """Beside a GPU, digest a block's tensors while it works."""
        if self.on_gpu and block in self.blocks and block not in self._block_digests:
            self.before.offer(f"block {block}: digest ahead", partial(self._digest, block))

    def _digest(self, block: int) -> None:
        plan = self.plan.blocks[block]
        self._block_digests[block] = self.source.digest(plan.full(plan.tensors))

    @cached_property
    def _block_digests(self) -> dict[int, str]:
        return {}

    @property
    def on_gpu(self) -> bool:
        """Whether the work is done on a GPU, beside what the host does."""
        return torch.device(self.device).type == "cuda"

    def stream_place(self, size: int) -> str:
        """Where a stream of hidden states of so many bytes waits: on the device while it fits."""
        # what enters a block and what leaves it, and as much again before rounding
        fits = 4 * size <= STREAM_SHARE * self.memory
        return self.device if self.on_gpu and fits and not self.lean else "cpu"

    def leaner(self) -> Job | None:
        """The same job with less on the device, and room made there; None if there is none."""
        self.clear()
        return None if self.lean else replace(self, lean=True)

    def clear(self) -> None:
        """Keep nothing in memory, and give back what of a GPU's is not used."""
        self.memo.clear()
        self.loading.wait()
        self._loaded.clear()
        self._sent.clear()
        vacate(self.device)

    def resident(self, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """Values that are kept between steps: where they are, or on the host where that is lean."""
        return OnHost(values, self.device) if self.lean else values

    def read_block(self, block: int) -> Mapping[str, torch.Tensor]:
        """The source's tensors of one block as stored, by their names in it, on the device."""
        plan = self.plan.blocks[block]

        def read() -> Mapping[str, torch.Tensor]:
            place = "cpu" if self.lean else self.device
            stored = self._taken_ahead(block) or self.source.read(plan.full(plan.tensors), place)
            self._load_ahead(block + self.stride)
            return self.resident({n.removeprefix(plan.prefix): t for n, t in stored.items()})

        return self.memo.get("source block", f"{self.source.path} {block}", read)

    def _load_ahead(self, block: int) -> None:
        """Beside a GPU, bring a block to memory that it copies from by itself."""
        if not self.on_gpu or self.lean or block not in self.blocks:
            return

        def load() -> None:
            plan = self.plan.blocks[block]
            # the device says later whether it is finite: it is faster
            stored = self.source.read_unchecked(plan.full(plan.tensors))
            self._loaded[block] = {n: pinned(tensor) for n, tensor in stored.items()}

        self._loaded.clear()
        self.loading.offer(f"block {block}: load ahead", load)

    def send_ahead(self, block: int) -> None:
        """Have a GPU copy a block that was loaded ahead, beside what it is asked next."""
        # the device itself: where tests have a CPU pass for a GPU there is nowhere to send it
        on_gpu = torch.device(self.device).type == "cuda"
        if on_gpu and not self.loading.busy and block in self._loaded:
            self._sent[block] = sent_beside(self._loaded.pop(block), self.device)

    def _taken_ahead(self, block: int) -> dict[str, torch.Tensor] | None:
        """A block that was loaded ahead, on its way to the device; None if it was not."""
        self.loading.wait()
        sent = self._sent.pop(block, None)
        self._sent.clear()
        stored = self._loaded.pop(block, None)
        if sent is not None:
            there = sent.arrived()
        elif stored is not None and not self.lean:
            there = {n: tensor.to(self.device, non_blocking=True) for n, tensor in stored.items()}
        else:
            return None
        doubt = self.source.doubt(there)
        self.doubts.add(doubt.numbers, doubt.error)
        return there

    @cached_property
    def _sent(self) -> dict[int, ToDevice]:
        return {}

    @cached_property
    def _loaded(self) -> dict[int, dict[str, torch.Tensor]]:
        return {}


def require(job: Job, key: str) -> Entry:
    """Return an entry that an earlier step made.

    Raises:
        OSError: it is gone from the store since then.
    """
    entry = job.store.get(key)
    if entry is None:
        raise OSError(
            f"store {job.store.root}: the entry {key} is gone or damaged; run the command again"
        )
    return entry


def result_tensors(job: Job, key: str, file: str) -> Mapping[str, torch.Tensor]:
    """Tensors of a step's result, on the device: as the step left them, or from the store.

    Beside a GPU the newest of each kind of file stay in memory, so that no step waits for the disk.
    """
    read = partial(_read_result, job, key, file)
    kept = job.on_gpu and not job.lean
    return job.memo.get(_result_kind(file), key, read) if kept else read()


def forget_result(job: Job, key: str) -> None:
    """Keep a step's result on disk alone: no other step takes it from memory."""
    job.memo.forget(*map(_result_kind, result_files(job, key)))


def result_files(job: Job, key: str) -> tuple[str, ...]:
    """Names of the files of a step's result, be it written or not."""
    held = job.held.get(key)
    return tuple(sorted(require(job, key).files)) if held is None else held


def keep_result(job: Job, key: str, draft: Draft) -> None:
    """Keep what a step saved for the steps that come next, where the work is done on a GPU."""
    if job.on_gpu and not job.lean:
        for file, saved in draft.saved.items():
            # sizes are read by the host
            moved = {
                name: tensor if tensor.dtype == torch.int64 else tensor.to(job.device)
                for name, tensor in saved.tensors.items()
            }
            job.memo.put(_result_kind(file), key, moved)


def _read_result(job: Job, key: str, file: str) -> Mapping[str, torch.Tensor]:
    return load_tensors(require(job, key).file(file), job.device)


def _result_kind(file: str) -> str:
    return f"result {file}"


def scheme_lineage(job: Job) -> dict[str, Any]:
    """What of the recipe decides codes: the weight scheme and the dtype scales are rounded to."""
    weight = job.scheme.weight
    return {
        "codes": weight.number_format.name,
        "symmetric": weight.symmetric,
        "granularity": str(weight.granularity),
        "group_size": weight.group_size,
        "block_shape": list(weight.block_shape) if weight.block_shape else None,
        "scale_dtype": str(weight.scale_dtype),
    }


def activation_lineage(job: Job) -> dict[str, Any] | None:
    """What of the recipe decides how activations are quantized."""
    activation = job.scheme.activation
    if activation is None:
        return None
    return {
        "codes": activation.number_format.name,
        "granularity": str(activation.granularity),
        "group_size": activation.group_size,
        "dynamic": activation.dynamic,
    }
