"""Lambda is moved in retractions and nowhere else: counted in the source, and tried with the retractions held still."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import bayesrule as br
from bayesrule.algorithms.table import ROWS
from bayesrule.family import Family
from bayesrule.optimizers import execution

SOURCE = Path(__file__).parents[1] / "src" / "bayesrule"

# Every place outside of the families that makes another member of one: the five lines that are an update ...
MOVES = {
    "retractions.Natural.along": 1,
    "retractions.MeanAndPrecision.along": 1,
    "retractions.Additive.precision": 1,
    "retractions.Riemannian.precision": 1,
    "retractions.SquareRoot.precision": 1,
}
# ... and those that name a member without one: the prior centered on q, a metric that divides, the variable of a derivative, the
# prior, kept sites, a start of a test, other precisions of a posterior, a member in other coordinates, the moments of a mixture,
# a component of one
NAMES = {
    "momentum._seen": 1,
    "retractions._damped": 1,
    "estimators.expectations.Pathwise._one.draw": 1,
    "algorithms.cvi.fit_sites": 1,
    "algorithms.inference_rows._pair.difference": 1,
    "joints.law_of": 1,
    "posterior.Posterior.mixture": 1,
    "posterior.Posterior.exact": 1,
    "posterior.Posterior.rescale": 1,
    "algorithms.cvi.tuned.settled": 1,
    "algorithms.cvi.tuned.closure": 1,
    "uses.linear_prediction.linearization": 1,
}
# ... and sums and differences of posteriors, which know no rate: what merges, adapts and takes away
SUMS = {
    "uses.adaptation.anchors.Anchor.plus": 1,
    "uses.adaptation.anchors.Anchor.about": 1,
    "uses.adaptation.anchors.Anchor.above_prior": 2,
    "uses.merging.anchors.anchor_of": 1,
    "uses.merging.posteriors.Merger._joined": 1,
    "uses.merging.posteriors.Merger._anchor_of": 1,
    "uses.merging.posteriors.Merger._rebased": 1,
    "uses.merging.posteriors._with_precision": 1,
}
MAKERS = {"from_natural", "from_expected", "moved"}
FAMILIES = {name for name in vars(br)["_HOME"] if isinstance(getattr(br, name), type) and issubclass(getattr(br, name), Family)}


class Makers(ast.NodeVisitor):
    """How often each function of a module names what makes a member: a method, called or handed on, `replace` or `type(q)(...)`."""

    def __init__(self, module: str) -> None:
        self.path, self.found = [module], Counter()

    def within(self, node):
        self.path.append(node.name)
        self.generic_visit(node)
        self.path.pop()

    visit_ClassDef = visit_FunctionDef = within

    def visit_Attribute(self, node):
        self.found[".".join(self.path)] += node.attr in MAKERS
        self.generic_visit(node)

    def visit_Call(self, node):
        told = {keyword.arg for keyword in node.keywords}
        replaced = ast.unparse(node.func).split(".")[-1] == "replace" and told & {"mean", "hess", "precision", "sites"}
        of_its_type = isinstance(node.func, ast.Call) and ast.unparse(node.func.func) == "type"
        of_its_type = of_its_type and ast.unparse(node.func) != "type(error)"  # an exception is no member of a family
        # a family called by its name on something of a q: Full(q.mean - step, q.precision)
        by_name = ast.unparse(node.func) in FAMILIES and any(
            "q.solve" in ast.unparse(a) or "look." in ast.unparse(a) for a in node.args
        )
        self.found[".".join(self.path)] += bool(replaced or of_its_type or by_name)
        self.generic_visit(node)


def calls(root: Path) -> Counter:
    found = Counter()
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if not module.startswith("families."):
            visitor = Makers(module)
            visitor.visit(ast.parse(path.read_text()))
            found += visitor.found
    return found


def test_the_places_where_lambda_is_moved():
    assert calls(SOURCE) == MOVES | NAMES | SUMS


def test_families_only_name_members():
    """Within a family members are made by what names, checks or differentiates them: no method that takes a look or a rate."""
    for path in (SOURCE / "families").glob("*.py"):
        tree = ast.parse(path.read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            arguments = {argument.arg for argument in function.args.args}
            visitor = Makers(path.stem)
            visitor.generic_visit(function)
            assert not (+visitor.found and arguments & {"look", "rate", "rates", "rho", "gradient"}), f"{path.stem}.{function.name}"


@pytest.mark.parametrize(
    "update",
    [
        "q.from_natural(q.natural() - g)",
        "list(map(q.from_natural, [g]))",
        "type(q)(q.mean - g, q.precision)",
        "replace(q, mean=q.mean - g)",
        "dataclasses.replace(q, sites=g)",
        "Full(q.mean - q.solve(g), q.precision)",
    ],
)
def test_the_counter_sees_an_update(tmp_path, update):
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms" / "own.py").write_text(f"def go(q, g):\n    return {update}\n")
    assert calls(tmp_path) == {"algorithms.own.go": 1}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.algorithm)
def test_without_retractions_no_algorithm_gets_anywhere(row, monkeypatch):
    monkeypatch.setattr(execution, "SHARED", {})
    for retraction in (br.Natural, br.Additive, br.Riemannian, br.SquareRoot):
        monkeypatch.setattr(retraction, "along", lambda self, q, direction, rates: q)
        if hasattr(retraction, "precision"):
            monkeypatch.setattr(retraction, "precision", lambda self, q, curvature, rho: q)
    try:
        difference = row.difference()
    except ValueError:  # what it does not reach does not pass its own checks either
        return
    assert not difference < 1e-3
