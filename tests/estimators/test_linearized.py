"""Products with the covariance of outputs, and their matrices, against gradients that are formed one by one."""

import pytest
import torch
from tests.contracts import close, normal
from tests.estimators.architectures import DOUBLE, NAMES, made
from tests.estimators.test_per_example import jacobians, quiet, trainable
from torch import nn

from bayesrule.estimators.linearized import Block, Linearized, Spread

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of even kernels


class Case:
    """A model, and the Jacobian of its outputs by example, (B, K, P)."""

    def __init__(self, name):
        self.model, self.x = made(name)
        self.params = trainable(self.model)
        self.sizes = {name: p.numel() for name, p in self.params.items()}
        found = jacobians(self.model, self.x)
        self.jacobian = torch.cat([found[name].flatten(2) for name in self.params], 2)

    def spread(self, kind):
        """A covariance as it is given, and as a matrix."""
        matrix = normal(3, sum(self.sizes.values())).exp().diag()
        variance = dict(zip(self.params, matrix.diagonal().split(list(self.sizes.values())), strict=True))
        inside = {"independent": [], "together": list(self.params), "mixed": list(self.params)[1::2]}[kind]
        chosen = torch.cat([torch.full((n,), name in inside) for name, n in self.sizes.items()])
        root = normal(4, int(chosen.sum()), int(chosen.sum())) / max(1, int(chosen.sum())) ** 0.5
        matrix[torch.outer(chosen, chosen)] = (root @ root.T).reshape(-1)

        def solve_each(v):
            rows = torch.cat([v[name].flatten(1) for name in inside], 1) @ matrix[chosen][:, chosen]
            parts = rows.split([self.sizes[name] for name in inside], 1)
            return {name: part.view(-1, *self.params[name].shape) for name, part in zip(inside, parts, strict=True)}

        apart = {name: s.view(self.params[name].shape) for name, s in variance.items() if name not in inside}
        return Spread(apart, [Block(inside, solve_each)] if inside else []), matrix


@pytest.mark.parametrize("chunk", [1, 2**23], ids=["one-by-one", "at-once"])
@pytest.mark.parametrize("kind", ["independent", "together", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_jacobian(name, kind, chunk):
    case = Case(name)
    spread, matrix = case.spread(kind)
    wanted = case.jacobian @ matrix @ case.jacobian.mT
    with quiet(name):
        found = Linearized(case.model, lambda: case.model(case.x), spread, chunk)
    v = normal(5, *found.values.shape)
    product = (wanted @ v.flatten(1)[:, :, None]).view_as(v)
    close(found.values, case.model(case.x), 0)
    close(found.covariance(), wanted, 1e-10)
    for limit in (1, 2**30):
        close(found.variance(limit).flatten(1), wanted.diagonal(dim1=1, dim2=2), 1e-10)
    for _ in range(2):  # the graph is still there
        close(found.times(v), product, 1e-10)


def test_weights_that_are_not_named_are_certain():
    case = Case("perceptron")
    found = Linearized(case.model, lambda: case.model(case.x), Spread({}))
    assert not found.covariance().any()
    assert not found.variance().any()
    assert not found.times(normal(1, *found.values.shape)).any()


class Moody(nn.Module):
    """Takes another way when nobody asks for gradients."""

    def __init__(self, more):
        super().__init__()
        self.more, self.layer = more, nn.Linear(5, 5, dtype=DOUBLE)

    def forward(self, x):
        x = self.layer(x)
        return self.layer(x) if torch.is_grad_enabled() != self.more else x


@pytest.mark.parametrize(("more", "message"), [(True, "Linear ran once more"), (False, "Linear did not run again")])
def test_another_forward_without_gradients_is_refused(more, message):
    model = Moody(more)
    found = Linearized(model, lambda: model(normal(1, 4, 5)), Spread({"layer.weight": torch.ones(5, 5)}))
    with pytest.raises(RuntimeError, match=f"let it call the same layers: {message}"):
        found.times(normal(2, 4, 5))
