"""Lineage keys: what a result depends on, as one hash.

A key covers the task, the code that computes it (its import closure inside ``quantizers/``), the
part of the recipe it reads, the keys of its inputs, and what decides the last bits of a result.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "quantizers"
# CPython 3.11 counts how deep the trees are that it builds for all threads together, and fails
_PARSING = threading.Lock()


def lineage_key(task: str, code: str, depends_on: Mapping[str, Any]) -> str:
    """Return the key (64 hex digits) of a result of ``task`` that depends on ``depends_on``."""
    record = {"task": task, "code": code, "depends_on": depends_on}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_digest(*modules: str) -> str:
    """Digest of ``modules`` and of everything in ``quantizers/`` that they import, transitively.

    Comments, docstrings and layout do not count: the digest is taken over the syntax tree.
    """
    closure = sorted(_closure(modules))
    digest = hashlib.sha256()
    for name in closure:
        digest.update(name.encode() + b"\0" + _normalised(_text(name)).encode() + b"\0")
    return digest.hexdigest()


def _closure(modules: tuple[str, ...]) -> set[str]:
    seen: set[str] = set()
    queue = list(modules)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        queue.extend(quantizer_imports(name))
    return seen


@functools.cache
def quantizer_imports(name: str) -> tuple[str, ...]:
    """Modules of ``quantizers/`` that module ``name`` imports itself."""
    found: list[str] = []
    for node in ast.walk(_tree(_text(name))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), _home(name))
            # the package's __init__ re-exports everything: only what is named counts
            found += _submodules(base, [alias.name for alias in node.names]) or [base]
    return tuple(sorted({m for m in found if _is_ours(m)}))


def _is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(PACKAGE + ".")


def _submodules(package: str, names: Sequence[str]) -> list[str]:
    """Those of some names in a package of ours that are modules of their own."""
    spec = importlib.util.find_spec(package) if _is_ours(package) else None
    # what is no package has none: to look for them there would import it, and what it imports
    if spec is None or spec.submodule_search_locations is None:
        return []
    inner = [f"{package}.{name}" for name in names]
    return [module for module in inner if importlib.util.find_spec(module) is not None]


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin)


def _text(module: str) -> str:
    return _path(module).read_text(encoding="utf-8")


def _home(module: str) -> str:
    """Return the package that the relative imports of ``module`` start from."""
    spec = importlib.util.find_spec(module)
    return (spec.parent if spec is not None else None) or PACKAGE


def _tree(text: str) -> ast.Module:
    with _PARSING:
        return ast.parse(text)


# each step asks for its own set of modules, and most of them are the same
@functools.cache
def _normalised(text: str) -> str:
    tree = _tree(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:]
    return ast.dump(tree)
