"""Losses of outputs: values, slopes, columns and products, against automatic differentiation."""

import pytest
import torch
from tests.contracts import close, normal

from bayesrule.estimators.output_losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Custom,
    OutputLoss,
    SquaredError,
    output_loss,
)

CLASSES = torch.tensor([0, 2, 1, 1])
TOKENS = torch.tensor([[0, 2], [1, -100], [-100, -100], [2, 2]])
LOSSES: dict[str, tuple[OutputLoss, tuple[int, ...], torch.Tensor]] = {
    "classes": (CrossEntropy(), (4, 3), CLASSES),
    "tokens": (CrossEntropy(), (4, 2, 3), TOKENS),
    "labels": (BinaryCrossEntropy(), (4, 3), (normal(1, 4, 3) > 0).double()),
    "numbers": (SquaredError(0.25), (4, 3), normal(2, 4, 3)),
    "a function": (Custom(lambda f, y: torch.logsumexp(f, 1) - (f * y).sum(1)), (4, 3), normal(3, 4, 3)),
    "with derivatives": (
        Custom(
            lambda f, y: f.exp().sum(1) - (f * y).sum(1),
            lambda f, y: f.exp() - y,
            lambda f, y: torch.diag_embed(f.exp()),
        ),
        (4, 3),
        normal(4, 4, 3),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
class TestDerivatives:
    def test_slopes_are_those_of_the_values(self, name):
        loss, shape, y = LOSSES[name]
        f = normal(5, *shape).requires_grad_()
        y = loss.check(f, y)
        close(loss.residual(f.detach(), y), torch.autograd.grad(loss.values(f, y).sum(), f)[0], 1e-12)
        close(loss.slopes(f.detach(), y).error, loss.residual(f.detach(), y), 0)

    def test_both_roots_are_roots_of_the_second_derivatives(self, name):
        loss, shape, y = LOSSES[name]
        f = normal(5, *shape)
        y = loss.check(f, y)
        slopes, columns = loss.slopes(f, y), loss.root(f, y).flatten(2)
        for i in range(4):
            one = lambda v, i=i: loss.values(v.view(1, *shape[1:]), y[i : i + 1])[0]  # noqa: E731
            wanted = torch.autograd.functional.hessian(one, f[i].reshape(-1))
            close(torch.einsum("ck,cl->kl", columns[:, i], columns[:, i]), wanted, 1e-10)
            units = torch.eye(wanted.shape[0], dtype=torch.float64).view(-1, *shape[1:])
            rows = [slopes.half(slopes.across(torch.cat([f[:i], unit[None], f[i + 1 :]])))[i].reshape(-1) for unit in units]
            close(torch.stack(rows), wanted, 1e-10)

    def test_the_change_of_predictions_is_their_derivative(self, name):
        loss, shape, _ = LOSSES[name]
        f, moved = normal(5, *shape), normal(6, *shape)
        predicted = {"CrossEntropy": lambda v: v.softmax(-1), "BinaryCrossEntropy": torch.sigmoid}
        at = predicted.get(type(loss).__name__, lambda v: v)
        close(loss.change(f, moved), torch.autograd.functional.jvp(at, f, moved)[1], 1e-12)


def test_who_is_named_right():
    f = torch.tensor([[[3.0, 0, 0], [0, 0, 1]], [[0, 2, 0], [9, 9, 9]], [[1, 1, 2], [0, 1, 1]], [[0, 0, 1], [1, 0, 0]]])
    assert CrossEntropy().correct(f, TOKENS).tolist() == [True, True, True, False]
    assert BinaryCrossEntropy().correct(torch.tensor([[1.0, -1], [1, 1]]), torch.tensor([[1.0, 0], [1, 0]])).tolist() == [
        True,
        False,
    ]
    assert SquaredError().correct(normal(1, 2, 3), normal(2, 2, 3)) is None


def test_labels_are_drawn_as_often_as_they_are_likely():
    loss = output_loss("bce")
    f = torch.tensor([[-1.0, 0.5]], dtype=torch.float64).expand(20_000, 2)
    share = (f.sigmoid() - loss.drawn(f, torch.Generator().manual_seed(0))).mean(0)
    assert ((share - f[0].sigmoid()).abs() < 0.02).all()


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        ("bce", torch.ones(3, 1), "targets have shape .3, 1. and the outputs .3, 2.; they must agree"),
        ("bce", torch.full((3, 2), 1.5), "bce takes labels 0 and 1, or between them; 6 of 6 are not"),
        ("cross_entropy", torch.tensor([0, -100, 1]), "labels go from -100 to 1"),
    ],
)
def test_labels_of_another_kind_are_refused(loss, y, message):
    with pytest.raises(ValueError, match=message):
        output_loss(loss).check(normal(1, 3, 2), y)
