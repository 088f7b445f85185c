"""No pickles, no code of a model's, no open doors: read off the syntax trees of the source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "tasks", "quantizers", "configs")
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
LOOPBACK = "127.0.0.1"


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or an attribute; an empty text for anything else."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported, wherever in the file; relative ones with their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def calls(tree: ast.Module) -> Iterator[tuple[str, dict[str, ast.expr], list[ast.expr]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {k.arg: k.value for k in node.keywords if k.arg is not None}
            yield dotted(node.func), given, node.args


def constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else "computed"


# each rule gives what breaks it


PICKLES = re.compile(r"(c?[pP]ickle|cloudpickle|dill|joblib|marshal|shelve)(\..*)?")
PICKLE_CALLS = re.compile(
    r".*\b(torch|np|numpy)\.load|.*\bread_pickle|.*\btorch\.(hub|package|jit)\..*"
)


def pickles(_: str, tree: ast.Module) -> Iterator[str]:
    yield from (name for name in imports(tree) if PICKLES.fullmatch(name))
    yield from (name for name in imports(tree) if name in ("torch.load", "torch.save"))
    yield from (name for name, _, _ in calls(tree) if PICKLE_CALLS.fullmatch(name))


def remote_code(_: str, tree: ast.Module) -> Iterator[str]:
    for name, given, _ in calls(tree):
        said = constant(given.get("trust_remote_code", ast.Constant(None)))
        if said not in (None, False):
            yield f"{name}(trust_remote_code={said})"
        # the default may change: it is said each time
        loads = name.endswith((".from_pretrained", "AutoModelForCausalLM.from_config"))
        if loads and said is not False:
            yield f"{name} without trust_remote_code=False"
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if constant(key) == "trust_remote_code" and constant(value) is not False:
                    yield "a mapping with trust_remote_code"


def loaders(path: str, tree: ast.Module) -> Iterator[str]:
    allowed = {
        "tasks/verify.py": {"AutoModelForCausalLM.from_pretrained"},
        "tasks/engine/encoding.py": {"AutoTokenizer.from_pretrained"},
    }
    for name, given, _ in calls(tree):
        if not name.endswith("from_pretrained"):
            continue
        if name not in allowed.get(path, ()):
            yield f"{name} in {path}"
        if constant(given.get("local_files_only")) is not True:
            yield f"{name} without local_files_only=True"
        if "Model" in name and constant(given.get("use_safetensors")) is not True:
            yield f"{name} without use_safetensors=True"


def code_from_text(_: str, tree: ast.Module) -> Iterator[str]:
    for name, given, _ in calls(tree):
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield name
        if constant(given.get("shell")) not in ("computed", None, False) and "shell" in given:
            yield f"{name}(shell=...)"
        if re.fullmatch(r"yaml\.(unsafe_load|full_load|load_all|unsafe_load_all)", name):
            yield name
        if name == "yaml.load" and dotted(given.get("Loader", ast.Constant(None))) != "_Loader":
            yield "yaml.load without the safe loader"


def open_doors(_: str, tree: ast.Module) -> Iterator[str]:
    for name, given, arguments in calls(tree):
        if "host" in given and constant(given["host"]) != LOOPBACK:
            yield f"{name}(host={ast.unparse(given['host'])})"
        if name.endswith((".bind", "create_server")):
            address = arguments[0]
            if not isinstance(address, ast.Tuple) or constant(address.elts[0]) != LOOPBACK:
                yield ast.unparse(address)
        if name.endswith("uvicorn.Config") and "host" not in given:
            yield f"{name} without a host"
    # which names a proxy is not asked for opens nothing
    unproxied = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NEVER_PROXIED"
        for inner in ast.walk(node.value)
    }
    for node in ast.walk(tree):
        if id(node) in unproxied:
            continue
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::", "localhost"):
            yield str(node.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (h for h in re.findall(r"--host[ =](\S+)", node.value) if h != LOOPBACK)


Rule = Callable[[str, ast.Module], Iterator[str]]
RULES: list[Rule] = [pickles, remote_code, loaders, code_from_text, open_doors]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Rule) -> None:
    assert len(SOURCES) > 50
    broken = {path: found for path, tree in SOURCES.items() if (found := list(rule(path, tree)))}
    assert broken == {}


BAD: list[tuple[Rule, str]] = [
    (pickles, "import pickle"),
    (pickles, "def f():\n    from pickle import loads"),
    (pickles, "import cloudpickle as c"),
    (pickles, "torch.load(path)"),
    (pickles, "torch.load(path, weights_only=True)"),
    (pickles, "from torch import load"),
    (pickles, "pd.read_pickle(path)"),
    (pickles, "numpy.load(path)"),
    (remote_code, "AutoConfig.from_pretrained(p, trust_remote_code=True)"),
    (remote_code, "AutoConfig.from_pretrained(p, trust_remote_code=given)"),
    (remote_code, "AutoTokenizer.from_pretrained(p)"),
    (remote_code, "load(p, **{'trust_remote_code': True})"),
    (loaders, "AutoModel.from_pretrained(p, local_files_only=True, use_safetensors=True)"),
    (loaders, "AutoTokenizer.from_pretrained(p, local_files_only=True)"),
    (code_from_text, "eval(text)"),
    (code_from_text, "subprocess.run(line, shell=True)"),
    (code_from_text, "yaml.load(text, Loader=yaml.Loader)"),
    (code_from_text, "yaml.unsafe_load(text)"),
    (open_doors, "uvicorn.Config('app', host='0.0.0.0')"),
    (open_doors, "uvicorn.Config('app', port=3)"),
    (open_doors, "uvicorn.Config('app', host=given)"),
    (open_doors, "probe.bind(('', 0))"),
    (open_doors, "socket.create_server(('', 0))"),
    (open_doors, "socket.create_server(('localhost', 0))"),
    (open_doors, "line = f'serve --host 0.0.0.0 --port {port}'"),
]


@pytest.mark.parametrize(("rule", "text"), BAD, ids=[text for _, text in BAD])
def test_the_rule_sees_what_breaks_it(rule: Rule, text: str) -> None:
    assert list(rule("tasks/other.py", ast.parse(text)))


def test_quantizers_import_torch_and_the_standard_library_only() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "quantizers", ""}
    for path, tree in SOURCES.items():
        if path.startswith("quantizers/"):
            # kernels need torch's compiler, and are imported where it is only
            compiler = {"triton"} if path.endswith("_kernel.py") else set()
            assert {name.partition(".")[0] for name in imports(tree)} <= allowed | compiler, path


def test_servers_of_the_documents_listen_here_only() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("*.yaml"), *(ROOT / "docs").glob("*.md")]
    hosts = [h for path in documents for h in re.findall(r"--host[ =](\S+)", path.read_text())]
    assert hosts and set(hosts) == {LOOPBACK}


def test_no_model_of_the_repository_is_a_pickle() -> None:
    kinds = ("bin", "pt", "pth", "pkl", "pickle", "ckpt", "joblib")
    for folder in ("assets", *PACKAGES):
        assert [p for kind in kinds for p in (ROOT / folder).rglob(f"*.{kind}")] == []
