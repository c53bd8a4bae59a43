"""The house has floors: a file imports only from floors below its own, in no circles. Read from the source by `ast`."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bayesrule"

FLOORS = [
    {"vector", "rounding", "shards", "bases"},
    {"rule", "family", "noise", "lowering"},
    {"families", "estimators", "retractions", "momentum", "program", "plots"},
    {"posterior", "posthoc", "drawing", "storage", "archive", "joints", "parts"},
    {"optimizers", "algorithms"},
    {"uses"},
    {"integrations"},
    {"cli", "recipes"},
]
# (who imports, from whom) on the same floor; never the reverse
SAME_FLOOR = {
    ("bases", "vector"),
    ("rule", "noise"),
    ("family", "noise"),
    ("family", "rule"),
    ("posterior", "drawing"),
    ("posterior", "archive"),
    ("posterior", "joints"),
    ("posterior", "parts"),
    ("posterior", "posthoc"),
    ("posthoc", "drawing"),
    ("posthoc", "joints"),
    ("posthoc", "parts"),
    ("archive", "storage"),
    ("archive", "joints"),
    ("archive", "parts"),
    ("joints", "parts"),
    ("drawing", "parts"),
    ("algorithms", "optimizers"),
    ("cli", "recipes"),
}
MAX_LINES = 420
NO_DRAWERS = {"utils", "misc"}
FRONT_DOOR = "__init__"  # of the package: gathers the public names, so it is above all floors


class House:
    """The source files under a root, by dotted module name relative to the package, e.g. `families.gaussian`."""

    def __init__(self, root: Path) -> None:
        paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}
        self.text = {name.removesuffix(".__init__"): path.read_text() for name, path in paths.items()}
        self.tree = {name: ast.parse(text) for name, text in self.text.items()}
        self.package = {name.removesuffix(".__init__") for name in paths if name.endswith(".__init__")}

    def targets(self, name: str, node: ast.AST) -> set[str]:
        """The modules of the house that one import statement of the file `name` asks for."""
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                here = ["bayesrule", *([] if name == FRONT_DOOR else name.split("."))]
                up = node.level - (name in self.package or name == FRONT_DOOR)
                origin = ".".join(filter(None, [*here[: len(here) - up], origin]))
            # `from a import b` asks for the module a.b if there is one, else for a name in a
            asked = [f"{origin}.{alias.name}" for alias in node.names]
            asked = [full if full.removeprefix("bayesrule.") in self.tree else origin for full in asked]
        else:
            return set()
        inside = [full for full in asked if full == "bayesrule" or full.startswith("bayesrule.")]
        return {full.partition(".")[2] or FRONT_DOOR for full in inside}

    def imports(self, name: str, within: ast.AST | None = None) -> set[str]:
        return set().union(*(self.targets(name, node) for node in ast.walk(within or self.tree[name])))

    def faults(self) -> list[str]:
        return [fault for check in CHECKS for fault in check(self)]


def floor(module: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if module.split(".")[0] in rooms), None)


def may_import(who: str, whom: str) -> bool:
    if whom == FRONT_DOOR:
        return floor(who) == len(FLOORS) - 1  # recipes use the library as its users do
    room, other = who.split(".")[0], whom.split(".")[0]
    mine, theirs = floor(who), floor(whom)
    if room == other or (room, other) in SAME_FLOOR:
        return True
    return mine is not None and theirs is not None and theirs < mine


def floors(house: House) -> list[str]:
    files = [name for name in house.tree if name not in (FRONT_DOOR, "__main__")]
    homeless = [f"{name} stands on no floor" for name in files if floor(name) is None]
    upward = [
        f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        for name in files
        for target in sorted(house.imports(name))
        if not may_import(name, target)
    ]
    return homeless + upward


def circles(house: House) -> list[str]:
    graph = {name: house.imports(name) for name in house.tree if name != FRONT_DOOR}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["circle: " + " -> ".join(error.args[1])]
    return []


def hidden_imports(house: House) -> list[str]:
    return [
        f"{name}.{function.name} imports {target} inside a function"
        for name, tree in house.tree.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for target in sorted(house.imports(name, function))
    ]


def long_files(house: House) -> list[str]:
    lengths = {name: len(text.splitlines()) for name, text in house.text.items()}
    return [f"{name} has {length} lines, over {MAX_LINES}" for name, length in lengths.items() if length > MAX_LINES]


def drawers(house: House) -> list[str]:
    return [f"{name} is a drawer for anything" for name in house.tree if name.split(".")[-1] in NO_DRAWERS]


def steps(house: House) -> list[str]:
    """An optimizer fills the slots of the rule; only the shell may step."""
    return [
        f"{name}.{node.name} has a step of its own"
        for name, tree in house.tree.items()
        if name.startswith("optimizers") and name != "optimizers.shell"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if (isinstance(item, ast.FunctionDef) and item.name == "step")
        or (isinstance(item, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "step" for t in item.targets))
    ]


def unpickling(house: House) -> list[str]:
    found = []
    for name, tree in house.tree.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
            elif isinstance(node, ast.Attribute):
                used = {ast.unparse(node)}
            else:
                continue
            for forbidden in ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "torch.load"):
                if any(what == forbidden or what.startswith(forbidden + ".") for what in used):
                    found.append(f"{name} line {node.lineno} uses {forbidden}")
    return found


@functools.cache
def ours() -> House:
    return House(SOURCE)


CHECKS = (floors, circles, hidden_imports, long_files, drawers, steps, unpickling)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_house_is_sound(check):
    assert check(ours()) == []


SOUND = {
    "__init__.py": "from bayesrule.cli import main",
    "vector.py": "import torch",
    "noise.py": "from bayesrule.vector import Vector",
    "rule.py": "from .noise import Noise",
    "families/__init__.py": "from bayesrule.families.gaussian import Full",
    "families/gaussian.py": "from bayesrule.family import Family",
    "families/eigen.py": "from .gaussian import Diagonal",
    "optimizers/__init__.py": "",
    "optimizers/shell.py": "class Shell(Optimizer):\n    def step(self): ...",
    "optimizers/variational.py": "from bayesrule.optimizers import optimizer\nclass IVON(BayesOptimizer): ...",
    "algorithms/table.py": "import bayesrule.optimizers.variational",
    "recipes/image.py": "import bayesrule as br",
    "cli.py": "from bayesrule import recipes\nfrom bayesrule.recipes import image",
}


def build(root: Path, files: dict[str, str]) -> House:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(root)


def test_checker_accepts_a_sound_house(tmp_path):
    assert build(tmp_path, SOUND).faults() == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("vector.py", "from bayesrule.rule import Look", "vector (floor 0) imports rule (floor 1)"),
        ("vector.py", "from . import rule", "vector (floor 0) imports rule (floor 1)"),
        ("noise.py", "import bayesrule.rule", "noise (floor 1) imports rule (floor 1)"),
        ("retractions.py", "from bayesrule.families import Full", "retractions (floor 2) imports families (floor 2)"),
        ("families/eigen.py", "from ..momentum import Momentum", "families.eigen (floor 2) imports momentum (floor 2)"),
        ("posterior.py", "from bayesrule import __version__", "posterior (floor 3) imports __init__ (floor None)"),
        ("optimizers/sgd.py", "import bayesrule.algorithms", "optimizers.sgd (floor 4) imports algorithms (floor 4)"),
        ("recipes/text.py", "from bayesrule.cli import main", "recipes.text (floor 7) imports cli (floor 7)"),
        ("attic.py", "", "attic stands on no floor"),
        ("families/gaussian.py", "from .eigen import Eigen", "circle: "),
        ("cli.py", "def main():\n    from bayesrule import rule", "cli.main imports rule inside a function"),
        ("rule.py", "\n" * (MAX_LINES + 1), f"rule has {MAX_LINES + 1} lines, over {MAX_LINES}"),
        ("families/utils.py", "", "families.utils is a drawer for anything"),
        ("optimizers/sgd.py", "class SGD(X):\n    def step(self): ...", "optimizers.sgd.SGD has a step of its own"),
        ("optimizers/sgd.py", "class SGD(X):\n    step = f", "optimizers.sgd.SGD has a step of its own"),
        ("posterior.py", "import pickle", "posterior line 1 uses pickle"),
        ("posterior.py", "import torch\nx = torch.load('f')", "posterior line 2 uses torch.load"),
        ("posterior.py", "from torch import load", "posterior line 1 uses torch.load"),
    ],
)
def test_checker_catches(tmp_path, name, text, fault):
    faults = build(tmp_path, {**SOUND, name: text}).faults()
    assert any(found.startswith(fault) for found in faults), faults
