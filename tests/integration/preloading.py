"""What a forkserver does once for all its children: imports, digests of code, and no garbage."""

from __future__ import annotations

import gc
import importlib
import sys

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from tasks.engine.lineage import code_digest, quantizer_imports
from tasks.engine.step import Step

MODULES = [
    "flows.quantize_model",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.quantizer_compressed_tensors",
    "datasets.packaged_modules.text.text",
    "prefect.client.orchestration",
    # what a run imports only when it comes to it
    "alembic.config",
    "anyio._backends._asyncio",
    "graphviz",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "prefect.concurrency._sync",
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.telemetry.run_telemetry",
    "scipy.io",
    "sqlalchemy.dialects.sqlite.aiosqlite",
]


def digest_steps() -> None:
    """Digest the code of every step: the digests are kept for the process and its children."""
    found = [value for module in list(sys.modules.values()) for value in vars(module).values()]
    for step in found:
        if isinstance(step, Step):
            code_digest(*quantizer_imports(step.compute.__module__), *step.code)


for name in MODULES:
    importlib.import_module(name)
digest_steps()
# transformers makes all of them when it loads its first model
get_checkpoint_conversion_mapping("llama")
# a child's collector would touch, and so copy, all that was imported here
gc.collect()
gc.freeze()
