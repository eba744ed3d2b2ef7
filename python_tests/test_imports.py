"""The rules of the house that hold for every file: who may import whom, what stays lazy, what is never called."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import case_fast

PACKAGE = Path(case_fast.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A: the parts of case_fast that A may import. The base is open to all. "commands" may import everything.
# "": the package itself, its version
BASE = {"", "errors", "text_files", "files", "devices", "batch", "html", "memory", "optional", "arguments", "checksums"}
MAY_IMPORT = {
    "": set(),  # __init__.py: its lazy names are checked below
    "errors": set(),
    "text_files": set(),
    "files": set(),
    "checksums": set(),
    "memory": set(),
    "devices": set(),
    "batch": set(),
    "html": set(),
    "optional": set(),
    "arguments": set(),
    "terminal": set(),  # of the command line alone
    "ops": {"_native"},
    "equations": {"ops"},
    "equations_baselines": {"ops", "equations"},
    "models": {"ops", "equations", "equations_baselines"},
    "knowledge": set(),
    "data": {"knowledge"},
    "importing": {"data", "knowledge"},
    "runs": {"models", "data"},
    "references": {"models"},
    "diagnosis": {"models", "data", "references"},
    # ops: profile measures what they can reach; knowledge: several processes infer it together
    "training": {"models", "data", "runs", "references", "diagnosis", "generation", "ops", "knowledge"},
    "generation": {"models", "data", "equations"},
    "evaluation": {"models", "data", "runs", "references", "diagnosis", "generation"},
    "serving": {"models", "data", "knowledge", "runs", "generation"},
    "doctor": {"ops", "equations", "models", "knowledge", "data", "runs", "references", "generation", "training"},
    "tables": {"models", "data", "runs", "training", "evaluation"},
}
# What these parts may import from outside the standard library.
OUTSIDE = {part: set() for part in ("", "errors", "text_files", "files", "checksums", "memory")}
OUTSIDE |= {"devices": {"torch"}, "batch": {"torch"}, "equations": {"torch"}, "ops": {"torch", "numpy", "triton"}}
OUTSIDE |= {"arguments": {"torch", "numpy"}}
ALL = {"cli", "commands", "__main__"}
HEAVY = ("nltk", "sklearn", "transformers", "rich", "matplotlib", "jsonargparse")


def part_of(path: Path) -> str:
    """ "data" for case_fast/data/pack.py, "errors" for case_fast/errors.py, "" for case_fast/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import at any depth; `from package import name` gives package.name."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part_imported(module: str) -> str:
    """The part that a dotted name inside case_fast belongs to; a lazy name counts as the part that it loads."""
    first = [*module.split("."), ""][1]
    if first.startswith("__") and first.endswith("__"):
        return ""
    return case_fast._HOME.get(first, first)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_direction(path):
    part = part_of(path)
    if part in ALL:
        return
    assert part in MAY_IMPORT, f"case_fast/{part} has no row in MAY_IMPORT; decide what it may import"
    wrong = []
    for line, module in imported_modules(path, ast.parse(path.read_text())):
        top = module.split(".")[0]
        if top == PACKAGE.name:
            target = part_imported(module)
            allowed = target in {part, *BASE, *MAY_IMPORT[part]} or part == ""
        else:
            allowed = part not in OUTSIDE or top in sys.stdlib_module_names or top in OUTSIDE[part]
        if not allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


# ---- circles

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def module_of(dotted: str) -> str | None:
    """The module of the package that a dotted name is or lies in: case_fast.data.Store is a name of case_fast.data."""
    parts = dotted.split(".")
    return next((found for end in range(len(parts), 0, -1) if (found := ".".join(parts[:end])) in MODULES), None)


def module_graph() -> dict[str, set[str]]:
    """module -> the modules that it names in imports, inside functions too: those may be there for speed, never to hide that
    two files need each other."""
    graph = {name: {module_of(dotted) for _, dotted in imported_modules(path, ast.parse(path.read_text()))} - {None, PACKAGE.name}
             for name, path in MODULES.items()}
    return graph | {PACKAGE.name: set()}  # the package itself loads its lazy names when it is asked


def part_graph() -> dict[str, set[str]]:
    """part -> the parts that it imports; a lazy name counts as the part that it loads."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        found = {part_imported(module) for _, module in imported_modules(path, ast.parse(path.read_text()))
                 if module.split(".")[0] == PACKAGE.name}
        graph.setdefault(part_of(path), set()).update(found - {part_of(path), ""})
    return graph | {"": set()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle in order, [] if there is none."""
    done: set[str] = set()

    def walk(node: str, above: list[str]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := walk(other, [*above, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in graph if (found := walk(node, []))), [])


def test_no_circle_among_modules():
    graph = module_graph()
    assert "case_fast.data.store" in graph["case_fast.data"] and len(graph) == len(FILES)
    assert "case_fast.knowledge.comet" in graph["case_fast.knowledge.opening"]  # an import inside a function
    assert not circle(graph), " imports ".join(circle(graph))


def test_no_circle_among_parts():
    graph = part_graph()
    assert {"data", "training", "serving"} <= graph["commands"]
    assert not circle(graph), " imports ".join(circle(graph))


def test_the_search_for_circles_finds_each_of_them():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"outside"}}) == []


# ---- the rest


def test_every_folder_of_code_is_a_package():
    """Without its __init__.py a folder works from the source tree, and is missing from the wheel."""
    assert not [str(path.relative_to(ROOT)) for path in FILES if not (path.parent / "__init__.py").exists()]


def test_the_package_imports_nothing_of_itself_before_it_is_asked():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (for_type_checkers,) = [node for node in tree.body if isinstance(node, ast.If)]
    inside = {module for _, module in imported_modules(PACKAGE / "__init__.py", for_type_checkers)}
    everywhere = {module for _, module in imported_modules(PACKAGE / "__init__.py", tree)}
    assert not {module for module in everywhere - inside if module.startswith("case_fast")}
    lazy = {f"case_fast.{home}.{name}" for name, home in case_fast._HOME.items()} | {"case_fast.ops"}
    assert inside == lazy


def test_lazy_names():
    from case_fast.errors import CaseFastError

    assert case_fast.CaseFastError is CaseFastError
    assert case_fast.ops.__name__ == "case_fast.ops"
    assert {"CASE", "open_store", "load", "ops", "__version__"} <= set(dir(case_fast))
    with pytest.raises(AttributeError, match="no attribute 'CASEE'"):
        case_fast.CASEE  # noqa: B018


def test_ops_import_needs_only_torch_and_numpy():
    code = f"import sys, case_fast, case_fast.ops; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}  # reading one can run code


def forbidden(path: Path, tree: ast.AST) -> Iterator[str]:
    for line, module in imported_modules(path, tree):
        if module.split(".")[0] in PICKLES:
            yield f"{line} import of {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.removeprefix("builtins.") in {"eval", "exec"} or name in {"os.system", "os.popen"}:
            yield f"{node.lineno} {name}(...)"
        for keyword in node.keywords:
            said = (keyword.arg, keyword.value.value if isinstance(keyword.value, ast.Constant) else None)
            if said in {("allow_pickle", True), ("weights_only", False), ("shell", True)}:
                yield f"{node.lineno} {keyword.arg}={keyword.value.value}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_code_from_data(path):
    assert not [f"{path.relative_to(ROOT)}:{found}" for found in forbidden(path, ast.parse(path.read_text()))]


def test_the_search_for_forbidden_calls_finds_each_of_them():
    bad = ["import pickle", "from pickle import load", "np.load(p, allow_pickle=True)", "eval('1')", "exec('1')"]
    bad += ["torch.load(p, weights_only=False)", "run('ls', shell=True)", "os.system('ls')", "builtins.exec('1')"]
    for line in bad:
        assert list(forbidden(PACKAGE / "x.py", ast.parse(line))), line
    for line in ["model.eval()", "np.load(p, allow_pickle=False)", "run(['ls'])", "'eval(1)'"]:
        assert not list(forbidden(PACKAGE / "x.py", ast.parse(line))), line


# Names that only a run's folder has; config.json and manifest.json are other folders' as well.
RUN_PARTS = {"best", "checkpoints", "log.jsonl", "features", "evaluation", "diagnosis", "failure", "tensorboard", "report.html",
             "knowledge.sqlite", "knowledge.json", ".lock"}


def path_parts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every text that is joined to a path or asked of a folder."""
    for node in ast.walk(tree):
        found: list[ast.AST] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            found = [node.left, node.right]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"Path", "join", "joinpath", "with_name", "glob", "rglob"}:
                found = list(node.args)
        for text in found:
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield from ((node.lineno, part) for part in text.value.split("/"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_but_runs_knows_the_parts_of_a_run(path):
    found = [f"{path.relative_to(ROOT)}:{line} {part}" for line, part in path_parts(ast.parse(path.read_text()))
             if part in RUN_PARTS]
    assert found if part_of(path) == "runs" else not found, "\n".join(found)


def test_the_search_for_parts_of_a_run_finds_each_way_to_write_one():
    for line in ["run / 'best'", "Path(run, 'best')", "Path('run/best')", "os.path.join(run, 'best')", "run.joinpath('best')",
                 "run.glob('best/*')", "run / 'best' / 'config.json'"]:
        assert "best" in [part for _, part in path_parts(ast.parse(line))], line
    assert not list(path_parts(ast.parse("state = {'best': best}; load(run, checkpoint='best')")))


def test_every_folder_of_csrc_is_a_family_with_tests():
    families = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common", "tests"}
    for family in families:
        assert (ROOT / "csrc" / family / f"{family}.h").exists(), "CMakeLists.txt finds families by this header"
        assert (ROOT / "csrc/tests" / f"test_{family}.cpp").exists()
        assert (PACKAGE / "ops" / f"{family}.py").exists()


def test_kernel_families_in_csrc_never_see_each_other():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"}]
    assert sources
    for path in sources:
        family = path.relative_to(ROOT / "csrc").parts[0]
        if family in {"module.cpp", "tests"}:
            continue
        text = path.read_text()
        assert not re.search(r"Python\.h|pybind11", text), f"{path.relative_to(ROOT)}: Python belongs in module.cpp"
        for included in re.findall(r'#include "([^"]+)"', text):
            assert included.split("/")[0] in {family, "common"}, f"{path.relative_to(ROOT)} includes {included}"
