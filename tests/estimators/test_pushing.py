"""Derivatives of outputs along directions of the weights, against gradients that are formed one by one."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from tests.contracts import close, normal
from tests.estimators.architectures import DOUBLE, NAMES
from tests.estimators.architectures import made as built
from tests.estimators.test_per_example import jacobians, trainable
from torch import nn

from bayesrule.estimators.pushing import Push

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of even kernels


def directions(model):
    return {name: normal(number, *p.shape) for number, (name, p) in enumerate(trainable(model).items())}


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backwards"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_jacobian(name, backwards):
    model, x = built(name)
    found = jacobians(model, x)
    along, before = directions(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = sum((found[n].flatten(2) @ u.reshape(-1)) for n, u in along.items())
    push = Push(model)
    push._forward = not backwards
    with pytest.warns(UserWarning, match="has no forward") if name == "parametrized" and not backwards else nullcontext():
        first = push.along(along, lambda: model(x))
    for made in (first, push.along(along, lambda: model(x))):
        close(made.flatten(1), wanted, 1e-10)
    for n, p in model.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert torch.equal(p, before[n])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_move_with_their_weights(kind):
    """They keep a list of their weights beside them."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind(3, 4, batch_first=True, dtype=DOUBLE)

        def forward(self, x):
            return self.inner(x)[0][:, -1]

    torch.manual_seed(0)
    model, x = Last().eval(), normal(1, 5, 6, 3)
    along = directions(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # whether there is a forward derivative is torch's affair
        found = Push(model).along(along, lambda: model(x))

    def outputs(step):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(along[n], alpha=step)
            return model(x)

    ahead = outputs(1e-6)
    close(found, (ahead - outputs(-2e-6)) / 2e-6, 1e-7)
    assert found.abs().max() > 0.01


def test_weights_that_are_not_named_do_not_move():
    model, x = nn.Linear(3, 2, dtype=DOUBLE), normal(1, 4, 3)
    bias = normal(2, 2)
    close(Push(model).along({"bias": bias}, lambda: model(x)), bias.expand(4, 2), 0)
    for forward in (True, False):
        push = Push(model)
        push._forward = forward
        assert not push.along({}, lambda: model(x)).any()


def test_an_error_of_the_model_is_the_models():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no")

    model = Fails(2, 2)
    with pytest.raises(RuntimeError, match=r"^no$"):
        Push(model).along({"weight": torch.ones(2, 2)}, lambda: model(torch.ones(1, 2)))
    assert isinstance(model.weight, nn.Parameter)
