"""The order of the house: who imports whom, what a wheel holds, and how the code reads."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from scripts import ROOT, environment

SCRIPTS = ("train_base", "train_sft", "train_rl", "eval")
# The core lies flat in nanorl/; what a reader of the algorithm need not open is in folders.
CORE = {
    "attention": set(),
    "compilers": set(),
    "flex": {"attention", "compilers"},
    "chat": set(),
    "grpo": set(),
    "muon": set(),
    "optim": {"muon"},
    "gpt": {"attention"},
    "tokenizer": {"chat"},
    "sampling": {"gpt"},
    "hf": {"gpt", "tokenizer"},
    "lora": {"hf"},
    "policy": {"hf", "lora"},
    "sampler": {"gpt", "attention", "sampling"},
    "cache": {"gpt", "attention", "sampling"},
    "gpu": {"cache"},
    "engine": {"gpt", "attention", "sampling", "cache", "gpu", "sampler"},
    "problems": {"tasks"},
    "rollout": {"grpo", "sampling", "tasks"},
    "batch": {"rollout"},
    "learner": {"batch", "attention", "flex", "grpo"},
}
FOLDERS = {
    "dynamics": {*CORE, "tasks", "runtime"},
    "tasks": set(),
    "runtime": set(),
    "data": {"tokenizer", "tasks"},
    "evaluate": {"rollout", "tasks", "sampling", "batch", "learner"},
    "report": {*CORE, "tasks", "runtime"},
    "tools": {*CORE, "tasks", "runtime", "data", "dynamics", "evaluate", "report"},
}
# What stands on text alone does without torch.
WITHOUT_TORCH = ("tokenizer", "chat", "tasks")


def python_files():
    """{module, such as 'nanorl.report.cost': path} of the scripts and the package."""
    found = {name: os.path.join(ROOT, f"{name}.py") for name in SCRIPTS}
    for folder, _, names in os.walk(os.path.join(ROOT, "nanorl")):
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                module = os.path.relpath(path, ROOT).removesuffix(".py").replace(os.sep, ".")
                found[module.removesuffix(".__init__")] = path
    return found


FILES = python_files()


def parsed(path):
    with open(path, encoding="utf-8") as f:
        return ast.parse(f.read())


def imports(path):
    """Every module that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else node.module)
    return found


def part(module):
    """'nanorl.report.cost' -> 'report', 'nanorl.grpo' -> 'grpo'."""
    return module.split(".")[1] if "." in module else ""


def test_every_file_has_its_place():
    parts = {part(module) for module in FILES if module.startswith("nanorl.")}
    assert parts == CORE.keys() | FOLDERS.keys()


def test_imports_go_one_way():
    allowed = {**CORE, **FOLDERS}
    for module, path in FILES.items():
        if not module.startswith("nanorl."):
            continue
        own = part(module)
        used = {part(name) for name in imports(path) if name.startswith("nanorl.")} - {own}
        assert used <= allowed[own], f"{module} imports {sorted(used - allowed[own])}"


def test_no_circles():
    """Nor within a folder: there is an order in which each file only imports earlier ones."""
    uses = {
        module: {name for name in imports(path) if name in FILES and name != module}
        for module, path in FILES.items()
    }
    while uses:
        free = {module for module, used in uses.items() if not used & uses.keys()}
        assert free, f"a circle among {sorted(uses)}"
        uses = {module: used for module, used in uses.items() if module not in free}


def test_scripts_import_no_tools_but_the_selfcheck():
    for name in SCRIPTS:
        tools = {module for module in imports(FILES[name]) if part(module) == "tools"}
        assert tools <= ({"nanorl.tools.selfcheck"} if name == "train_rl" else set())


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_needs_no_torch_imports_none(name):
    code = f"import sys, nanorl.{name}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def test_a_wheel_holds_every_module(tmp_path):
    """pyproject.toml lists the packages: a new folder would be missing from a wheel alone."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # where pip may leave what it builds
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(os.path.join(ROOT, "nanorl"), source / "nanorl", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(os.path.join(ROOT, name), source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    modules = [name for name in FILES if name.startswith("nanorl")]
    code = f"""
import importlib, os
for name in {modules!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path / "installed")!r}), module.__file__
from nanorl.report import page
assert page.asset("page.html") and all(map(page.asset, page.SCRIPTS))
"""
    only = environment(PYTHONPATH=str(tmp_path / "installed"))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=only, check=True)


# ---- how it reads --------------------------------------------------------------------------------
# A formatter breaks a line and leaves the thought. These bounds are what it cannot hold: how much
# one statement, one function and one list of parameters ask of a reader.

MOST_LINES = 60  # of a function; a script's main() is the whole story
MOST_PARAMETERS = 8
MOST_EXPRESSIONS = 45  # of a statement; tables of literals at the top of a file apart
USUAL_EXPRESSIONS = 18  # 95 of 100 statements have no more


def functions_of(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def own_expressions(statement):
    """Expressions of a statement, those of the statements inside it not counted."""
    count, todo = 0, [statement]
    while todo:
        for child in ast.iter_child_nodes(todo.pop()):
            if not isinstance(child, ast.stmt):
                count += isinstance(child, ast.expr)
                todo.append(child)
    return count


@pytest.mark.parametrize("module", FILES)
def test_statements_and_functions_are_of_a_readable_size(module):
    tree = parsed(FILES[module])
    for function in functions_of(tree):
        length = function.end_lineno - function.lineno + 1
        is_story = module in SCRIPTS and function.name == "main"
        assert length <= MOST_LINES or is_story, f"{function.name} has {length} lines"
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        named = [p for p in parameters if p.arg not in ("self", "cls", "ctx")]
        assert len(named) <= MOST_PARAMETERS, f"{function.name} has {len(named)} parameters"

    tables = {id(n) for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))}
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and id(n) not in tables]
    counts = sorted((own_expressions(n), n.lineno) for n in statements)
    if counts:
        most, line = counts[-1]
        assert most <= MOST_EXPRESSIONS, f"line {line}: {most} expressions in one statement"
        usual, line = counts[int(0.95 * (len(counts) - 1))]
        assert usual <= USUAL_EXPRESSIONS, f"{usual} expressions, such as in line {line}"


def test_the_loop_of_rl_is_on_one_screen():
    tree = parsed(FILES["train_rl"])
    (main,) = (f for f in functions_of(tree) if f.name == "main")
    (loop,) = (n for n in main.body if isinstance(n, ast.For))
    assert loop.end_lineno - loop.lineno + 1 <= 70
    assert len(main.body[: main.body.index(loop)]) <= 45
    assert len(functions_of(main)) - 1 <= 2


def test_ruff_finds_nothing():
    ruff = pytest.importorskip("ruff").__name__
    for command in (["check", "-q"], ["format", "--check", "-q"]):
        ended = subprocess.run(
            [sys.executable, "-m", ruff, *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
