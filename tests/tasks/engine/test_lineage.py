"""Keys change with everything that decides a result, and with nothing else."""

from __future__ import annotations

import ast
import gc
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import quantizers
from tasks.engine import lineage
from tasks.engine.lineage import code_digest, lineage_key, quantizer_imports

ROOT = Path(lineage.__file__).parents[2]
ROUNDING = "quantizers.rounding"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of quantizers/ that digests are taken of instead."""
    folder = tmp_path / "quantizers"
    folder.mkdir()
    for path in Path(quantizers.__file__).parent.glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    real = lineage._path

    def path_of(module: str) -> Path:
        found = real(module)
        return folder / found.name if found.parent.name == "quantizers" else found

    monkeypatch.setattr(lineage, "_path", path_of)
    _forget()
    yield folder
    _forget()


def _forget() -> None:
    code_digest.cache_clear()
    quantizer_imports.cache_clear()


def digest_after(path: Path, change: Callable[[str], str], *modules: str) -> tuple[str, str]:
    """The digest of modules before and after one file changes."""
    before = code_digest(*modules)
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_text(changed)
    _forget()
    after = code_digest(*modules)
    path.write_text(text)
    _forget()
    assert code_digest(*modules) == before
    return before, after


def test_the_closure_is_what_is_imported(package: Path) -> None:
    # read off the import statements of the sources
    assert lineage._closure((ROUNDING,)) == {
        ROUNDING,
        "quantizers.devices",
        "quantizers.errors",
        "quantizers.number_formats",
        "quantizers.rounding_kernel",
        "quantizers.scales",
        "quantizers.scales_kernel",
        "quantizers.schemes",
    }
    assert lineage._closure(("quantizers.packing",)) == {
        "quantizers.devices",
        "quantizers.number_formats",
        "quantizers.packing",
        "quantizers.packing_kernel",
    }
    assert lineage._closure(("quantizers.channel_transform",)) >= {"quantizers.statistics"}


def test_a_closure_with_the_package_itself_is_everything(package: Path) -> None:
    (package / "extra.py").write_text("from quantizers import round_to_nearest\n")
    named = set(quantizer_imports("quantizers"))
    assert {"quantizers.rounding", "quantizers.packing", "quantizers.activations"} <= named


@pytest.mark.parametrize("module", ["rounding", "schemes", "number_formats", "errors"])
def test_code_in_the_closure_counts(package: Path, module: str) -> None:
    def change(text: str) -> str:
        return text + "\nEXTRA = 1\n"

    before, after = digest_after(package / f"{module}.py", change, ROUNDING)
    assert after != before


@pytest.mark.parametrize("module", ["activations", "packing", "losses", "awq", "__init__"])
def test_unrelated_modules_do_not_count(package: Path, module: str) -> None:
    def change(text: str) -> str:
        return text + "\nEXTRA = 1\n"

    before, after = digest_after(package / f"{module}.py", change, ROUNDING)
    assert after == before


def test_one_changed_constant_counts(package: Path) -> None:
    path = package / "number_formats.py"
    before, after = digest_after(path, lambda t: t.replace("448.0", "240.0"), ROUNDING)
    assert after != before


COSMETIC: dict[str, Callable[[str], str]] = {
    "comment": lambda t: "# a comment\n" + t + "\n# another\n",
    "module docstring": lambda t: t.replace(t.split('"""')[1], "Other words.", 1),
    "function docstring": lambda t: t.replace("Quantize a weight by its own extremes", "Round"),
    "class docstring": lambda t: t.replace("A quantized weight (N, K)", "Codes (N, K)"),
    "layout": lambda t: t.replace("\n\n\n", "\n\n\n\n\n").replace("span == 0", "(span  ==  0)"),
    "no docstrings": lambda t: ast.unparse(_without_docstrings(t)),
}


def _without_docstrings(text: str) -> ast.Module:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@pytest.mark.parametrize("change", COSMETIC.values(), ids=COSMETIC.keys())
def test_comments_docstrings_and_layout_do_not_count(
    package: Path, change: Callable[[str], str]
) -> None:
    before, after = digest_after(package / "rounding.py", change, ROUNDING)
    assert after == before


def test_a_string_that_is_no_docstring_counts(package: Path) -> None:
    path = package / "rounding.py"
    before, after = digest_after(path, lambda t: t.replace("clip_low", "clip_lower"), ROUNDING)
    assert after != before


IMPORTS = [
    "import quantizers.losses",
    "import quantizers.losses as other",
    "from quantizers.losses import relative_weight_error",
    "from quantizers import losses",
    "from . import losses",
    "from .losses import relative_weight_error",
    "def inside():\n    from quantizers import losses\n",
    "try:\n    import quantizers.losses\nexcept ImportError:\n    pass\n",
]


@pytest.mark.parametrize("statement", IMPORTS)
def test_every_way_to_import_is_followed(package: Path, statement: str) -> None:
    path = package / "packing.py"
    path.write_text(path.read_text() + "\n" + statement + "\n")
    _forget()
    assert "quantizers.losses" in lineage._closure(("quantizers.packing",))
    assert "quantizers.activations" not in lineage._closure(("quantizers.packing",))


def test_steps_depend_on_what_their_module_imports() -> None:
    assert set(quantizer_imports("tasks.quantize")) == {
        "quantizers.channel_transform",
        "quantizers.output_error",
        ROUNDING,
    }
    # statistics are collected elsewhere, and decide what these compute
    for task in ("tasks.transform", "tasks.clip", "tasks.quantize"):
        assert "quantizers.statistics" in lineage._closure(quantizer_imports(task))


# keys

BASE = ("quantize/1", "c0de", {"weights": "w", "scheme": {"bits": 4, "sym": True}, "of": ["a"]})
CHANGED = [
    ("quantize/2", BASE[1], BASE[2]),
    ("pack/1", BASE[1], BASE[2]),
    (BASE[0], "c0df", BASE[2]),
    (BASE[0], BASE[1], BASE[2] | {"weights": "v"}),
    (BASE[0], BASE[1], BASE[2] | {"weights": None}),
    (BASE[0], BASE[1], BASE[2] | {"more": None}),
    (BASE[0], BASE[1], {k: v for k, v in BASE[2].items() if k != "of"}),
    (BASE[0], BASE[1], BASE[2] | {"of": ["a", "b"]}),
    (BASE[0], BASE[1], BASE[2] | {"of": "a"}),
    (BASE[0], BASE[1], BASE[2] | {"scheme": {"bits": 8, "sym": True}}),
    (BASE[0], BASE[1], BASE[2] | {"scheme": {"bits": 4, "sym": False}}),
    (BASE[0], BASE[1], BASE[2] | {"scheme": {"bits": "4", "sym": True}}),
]


def test_keys_differ_with_every_input() -> None:
    keys = [lineage_key(*given) for given in [BASE, *CHANGED]]
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in keys)
    assert all(one != other for one, other in itertools.combinations(keys, 2))


def test_the_order_of_names_is_no_input_and_that_of_lists_is() -> None:
    turned = dict(reversed(BASE[2].items()))
    assert lineage_key(BASE[0], BASE[1], turned) == lineage_key(*BASE)
    one, other = (lineage_key("t", "c", {"blocks": b}) for b in (["x", "y"], ["y", "x"]))
    assert one != other


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"[Oo]ut of range"):
        lineage_key("t", "c", {"x": float("nan")})


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from tasks.engine.lineage import code_digest, lineage_key;"
        "print(code_digest('quantizers.rounding', 'quantizers.packing'),"
        f"lineage_key(*{BASE!r}))"
    )
    digest, key = code_digest(ROUNDING, "quantizers.packing"), lineage_key(*BASE)
    # torch comes with the import of quantizers: two processes side by side
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    for process in running:
        printed, _ = process.communicate(timeout=120)
        assert printed.split() == [digest, key]


def test_the_order_of_modules_is_no_input() -> None:
    one = code_digest(ROUNDING, "quantizers.packing")
    assert one == code_digest("quantizers.packing", ROUNDING)
    assert one != code_digest(ROUNDING)


class Cycle:
    """What only the collector finds; its end gives other threads their turn."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(0)


def test_threads_digest_at_the_same_time(request: pytest.FixtureRequest) -> None:
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    request.addfinalizer(lambda: (sys.setswitchinterval(interval), gc.set_threshold(*thresholds)))
    # they take turns in the middle of a tree
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50, 2, 2)
    texts = [path.read_text() for path in sorted(Path(lineage.__file__).parent.glob("*.py"))]

    def digest(_: int) -> list[str]:
        found = []
        for text in texts:
            Cycle()
            found.append(lineage._normalised.__wrapped__(text))
        return found

    with ThreadPoolExecutor(4) as threads:
        one, *others = threads.map(digest, range(4))
    assert others == [one] * 3
