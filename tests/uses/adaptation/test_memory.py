"""Examples that are kept: which, with what weights, and in files."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from tests.contracts import close
from tests.uses.adaptation.problems import BASE, GOLDEN, Logistic, T, X, digits, perceptron, tensor, trained
from torch import nn

import bayesrule as br
from bayesrule.estimators.output_losses import output_loss
from bayesrule.uses.adaptation.memory import SCORES, _surrogate_error
from bayesrule.uses.products import Products

PARTED = [(X[:7], T[:7]), (X[7:], T[7:])]


def select(problem, size, by, loader=PARTED, **how):
    return br.Memory.select(problem.model, problem.post, loader, size, by, **{"loss": "bce", **how})


@pytest.mark.parametrize("size", [6, 12, 30, 60])
@pytest.mark.parametrize(("by", "order"), [("surrogate_error", "order_by_surrogate_error"), ("curvature", "order_by_lambda")])
def test_the_best_are_those_that_are_stored(size, by, order):
    found = select(Logistic(), size, by, balanced=False)
    assert found.indices.tolist() == sorted(GOLDEN[order][:size])
    assert torch.equal(found.inputs, X[found.indices]) and torch.equal(found.labels, T[found.indices])
    close(found.outputs[:, 0], X[found.indices] @ BASE, 1e-12)
    assert torch.equal(found.weights, torch.ones(size).double())


def test_the_surrogates_error_is_what_is_stored():
    problem = Logistic()
    products = Products(problem.model, problem.post, "vjp_jvp")
    with products.at_the_mean():
        found = _surrogate_error(products, output_loss("bce"), X, T)
    close(found, tensor(GOLDEN["surrogate_error_score"]), 1e-10)


def test_sensitivity_is_the_published_score():
    problem = Logistic()
    want = br.Sensitivity(problem.model, problem.post, "bce", correction="first_order").scores([(X, T)]).sensitivity
    found = select(problem, 10, "sensitivity", balanced=False)
    assert found.indices.tolist() == sorted(want.argsort(descending=True)[:10].tolist())


@pytest.mark.parametrize("by", ["surrogate_error", "curvature", "sensitivity"])
@pytest.mark.parametrize("batch", [1, 7, 60])
def test_batches_do_not_matter(by, batch):
    loader = list(zip(X.split(batch), T.split(batch), strict=True))
    one, other = (select(Logistic(), 9, by, loader=each) for each in (loader, [(X, T)]))
    assert torch.equal(one.indices, other.indices) and torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("balanced", [True, False])
def test_random_examples_stand_for_all(balanced):
    found = select(Logistic(), 12, "random", balanced=balanced)
    assert len(found.indices.unique()) == 12
    close(found.weights.sum(), tensor(60.0), 1e-6)
    if balanced:
        for label in (0, 1):
            own = found.labels[:, 0] == label
            assert int(own.sum()) == 6
            close(found.weights[own].sum(), (label == T).sum().double(), 1e-4)


@pytest.mark.parametrize("by", SCORES)
def test_classes_are_balanced_and_rare_ones_are_there(by):
    x, y, _, _ = digits(300)
    keep = (y != 3) | (torch.arange(300) < 30)  # a rare class
    model = trained(perceptron(), x, y, steps=20)
    post = br.Posterior.laplace(model, [(x, y)], num_data=1000)
    found = br.Memory.select(model, post, [(x[keep], y[keep])], 40, by)
    counts, there = found.labels.bincount(minlength=10), y[keep].bincount(minlength=10)
    assert counts.sum() == 40
    most = counts.max()
    assert all(c >= min(most - 1, n) for c, n in zip(counts.tolist(), there.tolist(), strict=True))


def test_examples_that_are_fewer_than_asked_are_all_kept():
    found = select(Logistic(), 100, "random")
    assert len(found) == 60 and bool((found.weights == 1).all())


def test_a_surrogate_of_a_regression_has_no_error_and_its_labels_no_classes():
    x = torch.linspace(-1, 1, 10)[:, None]
    model = nn.Linear(1, 1).eval()
    post = br.Posterior.laplace(model, [(x, x)], loss="mse", num_data=100)
    found = br.Memory.select(model, post, [(x, x)], 4, "surrogate_error", loss="mse")
    assert found.indices.tolist() == [0, 1, 2, 3]


def test_mappings_of_different_lengths_are_filled_up():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask[..., None].to(torch.float32)
            return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))

    model = Mean().eval()
    batches = [
        {"input_ids": torch.randint(10, (4, n)), "attention_mask": torch.ones(4, n).long(), "labels": torch.arange(4) % 3}
        for n in (3, 5)
    ]
    post = br.Posterior.laplace(model, batches, num_data=100)
    found = br.Memory.select(model, post, batches, 6)
    assert found.inputs["input_ids"].shape == (6, 5)
    close(found.refresh(model).outputs, found.outputs, 1e-6)
    more = br.adapt(model, post, add=batches, memory=found, remove=batches[:1], epochs=1)
    assert more.num_data == 104


def test_extend_pad_and_refresh():
    problem = Logistic()
    few = problem.recall([3, 1])
    assert few.extend(problem.recall([5]), problem.recall([])).indices.tolist() == [3, 1, 5]
    padded = few.pad(3)
    assert padded.outputs.shape == (2, 3) and bool((padded.outputs[:, 1:] == -math.inf).all())
    with pytest.raises(ValueError, match=r"1 outputs are remembered of some examples and 3 of others; pad\(3\) the fewer"):
        few.extend(padded)
    with pytest.raises(ValueError, match="3 outputs are remembered, which cannot be padded to 2"):
        padded.pad(2)
    with torch.no_grad():
        problem.model.weight.add_(1)
    close(few.refresh(problem.model).outputs, problem.model(few.inputs).detach(), 1e-12)


# Files


@pytest.mark.parametrize("named", [False, True])
def test_a_file_keeps_all(tmp_path, named):
    memory = Logistic().memory.pad(2)
    memory = br.Memory({"x": memory.inputs, "mask": memory.labels} if named else memory.inputs, *list(vars(memory).values())[1:])
    memory.save(tmp_path / "memory.safetensors")
    found = br.Memory.load(tmp_path / "memory.safetensors")
    pairs = [(memory.inputs[name], found.inputs[name]) for name in memory.inputs] if named else [(memory.inputs, found.inputs)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(getattr(memory, n), getattr(found, n)) for n in ("labels", "outputs", "weights", "indices"))


def written(tmp_path, change=None, about=None):
    path = tmp_path / "memory.safetensors"
    Logistic().memory.save(path)
    if change is None:
        return path
    tensors = {"input.": X, "labels": T, "outputs": T.clone(), "weights": torch.ones(60), "indices": torch.arange(60)}
    save_file({**tensors, **change}, path, about or {"bayesrule": json.dumps({"format": "bayesrule-memory", "version": 1})})
    return path


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"labels": T[:3].clone()}, None),
        ({}, {"bayesrule": json.dumps({"format": "bayesrule-memory", "version": 2})}),
        ({}, {"bayesrule": "[" * 9}),
        ({}, {"other": "{}"}),
        ({"weights": torch.ones(())}, None),
    ],
    ids=["length", "version", "json", "format", "scalar"],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, about):
    with pytest.raises(ValueError, match="is damaged or no memory"):
        br.Memory.load(written(tmp_path, change, about))


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or no memory"):
        br.Memory.load(path)
    with pytest.raises(FileNotFoundError, match="no memory at"):
        br.Memory.load(tmp_path / "other")


# Failures


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"size": 0}, "size must be a whole number >= 1, got 0; it is how many examples to keep"),
        ({"by": "loss"}, "unknown way 'loss' to select; take 'surrogate_error', 'curvature', 'sensitivity', 'random'"),
        ({"loader": []}, "there is nothing to remember: the loader gave no example"),
        ({"loss": lambda f, y: (f - y).square().sum(1)}, "needs third derivatives, which a loss of your own may lack"),
    ],
)
def test_misuse(how, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        select(Logistic(), **{"size": 3, "by": "surrogate_error", **how})


def test_a_model_that_is_no_minimum_is_told():
    problem = Logistic()
    post = br.Posterior({"weight": BASE[None] + 1}, {"weight": torch.full((1, 4), 20.0).double()}, num_data=60, ess=60)
    with pytest.warns(UserWarning, match=r"base model is not at a stationary point \(grad norm 1 of loss grad, .* deviations"):
        br.Memory.select(problem.model, post, PARTED, 3, loss="bce")


def test_inputs_that_a_file_cannot_keep(tmp_path):
    memory = Logistic().memory
    with pytest.raises(TypeError, match="a file keeps inputs that are a tensor, or a mapping of tensors"):
        br.Memory({"x": X, "name": "digits"}, *list(vars(memory).values())[1:]).save(tmp_path / "memory")
    assert not list(tmp_path.iterdir())
