import pytest
import torch
from tests.contracts import close, normal, positive, symmetric
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import bayesrule as br
from bayesrule.estimators.oracle import Seen

THETA = normal(0, 4)
X = normal(1, 9, 4)


def bumpy(theta):
    return theta.exp().sum() + (theta[0] * theta[1]).sin() + theta.square().sum() ** 2 / 4


def half_square(output, target):
    return (output - target).square() / 2


def logistic(output, target):
    return binary_cross_entropy_with_logits(output, target)


def linear(theta):
    return X @ theta


def three_logits(theta):
    """Linear, shape (examples, 3)."""
    return X[:, :3] * theta[:3] + X[:, 3:] * theta[3]


def bent(theta):
    return torch.tanh(X * theta).sum(dim=1) * theta[0]


SIGNS = (normal(2, 9) > 0).double()
MODELS = {
    "linear regression": br.ModelLoss(linear, half_square, normal(2, 9)),
    "logistic regression": br.ModelLoss(linear, logistic, SIGNS),
    "softmax regression": br.ModelLoss(three_logits, cross_entropy, torch.arange(9) % 3),
    "nonlinear regression": br.ModelLoss(bent, half_square, normal(2, 9)),
}


class TestLoss:
    """Everything that autograd says about the same function."""

    ORACLE = br.Loss(bumpy)(THETA)

    def test_value_and_gradient(self):
        close(self.ORACLE.value(), bumpy(THETA), 0)
        close(self.ORACLE.gradient(), jacobian(bumpy, THETA))

    def test_hessian_and_its_products(self):
        close(self.ORACLE.hessian(), hessian(bumpy, THETA))
        v = normal(3, 4)
        close(self.ORACLE.product(v), hessian(bumpy, THETA) @ v)

    def test_answers_carry_no_graph(self):
        theta = THETA.clone()
        oracle = br.Loss(bumpy)(theta)
        answers = (oracle.value(), oracle.gradient(), oracle.hessian(), oracle.product(theta))
        assert not any(answer.requires_grad for answer in answers)
        assert not theta.requires_grad

    def test_precision_is_kept(self):
        oracle = br.Loss(bumpy)(THETA.float())
        assert {a.dtype for a in (oracle.value(), oracle.gradient(), oracle.hessian())} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
class TestModelLoss:
    @staticmethod
    def each(model):
        """The loss of every example as functions of theta."""
        return [lambda theta, i=i: model.losses(model.outputs(theta)[i], model.targets[i]) for i in range(len(X))]

    def test_is_the_mean_over_examples(self, name):
        model = MODELS[name]
        losses = torch.stack([loss(THETA) for loss in self.each(model)])
        close(model.per_example(THETA), losses)
        close(model(THETA).value(), losses.mean())

    def test_gradient_hessian_and_products_are_those_of_the_mean(self, name):
        model = MODELS[name]

        def mean(theta):
            return torch.stack([loss(theta) for loss in self.each(model)]).mean()

        v = normal(3, 4)
        close(model(THETA).gradient(), jacobian(mean, THETA))
        close(model(THETA).hessian(), hessian(mean, THETA))
        close(model(THETA).product(v), hessian(mean, THETA) @ v)

    def test_squares_are_means_of_each_examples_squared_gradient(self, name):
        model = MODELS[name]
        gradients = torch.stack([jacobian(loss, THETA) for loss in self.each(model)])
        close(model(THETA).squares(), gradients.square().mean(dim=0))
        assert (model(THETA).squares() > model(THETA).gradient().square()).any()

    def test_gauss_newton_is_the_mean_of_j_l_j(self, name):
        model = MODELS[name]
        total = torch.zeros(4, 4, dtype=torch.float64)
        for i in range(len(X)):
            output = model.outputs(THETA)[i]
            J = jacobian(lambda theta, i=i: model.outputs(theta)[i], THETA).view(-1, 4)
            L = hessian(lambda f, i=i: model.losses(f, model.targets[i]), output).view(len(J), len(J))
            total += J.T @ L @ J
        close(model(THETA).gauss_newton(), total / len(X))

    def test_gauss_newton_is_never_negative(self, name):
        assert torch.linalg.eigvalsh(MODELS[name](THETA).gauss_newton()).min() > -1e-12

    def test_gauss_newton_is_the_hessian_exactly_where_outputs_are_linear(self, name):
        oracle = MODELS[name](THETA)
        gap = (oracle.gauss_newton() - oracle.hessian()).abs().max()
        assert gap < 1e-12 if name != "nonlinear regression" else gap > 0.1


class TestQuadratic:
    A, B = symmetric(1, 4), normal(2, 4)

    def test_answers_as_autograd_does(self):
        closed = br.Quadratic(self.A, self.B)(THETA)
        auto = br.Loss(lambda theta: theta @ self.A @ theta / 2 - self.B @ theta)(THETA)
        v = normal(3, 4)
        close(closed.value(), auto.value())
        close(closed.gradient(), auto.gradient())
        close(closed.hessian(), auto.hessian())
        close(closed.gauss_newton(), auto.hessian())
        close(closed.product(v), auto.product(v))

    def test_its_gradient_vanishes_at_the_minimum(self):
        A = positive(1, 4)
        close(br.Quadratic(A, self.B)(torch.linalg.solve(A, self.B)).gradient(), torch.zeros(4, dtype=torch.float64))


class TestSeen:
    def test_knows_a_gradient_and_nothing_else(self):
        gradient = normal(0, 3)
        assert Seen(gradient).gradient() is gradient
        assert Seen(gradient).value() is None


REFUSALS = [
    (br.Loss(bumpy)(THETA), "squares", "the gradient of each example"),
    (br.Loss(bumpy)(THETA), "gauss_newton", "the Gauss-Newton matrix"),
    (br.Quadratic(positive(0, 4), THETA)(THETA), "squares", "the gradient of each example"),
    (Seen(THETA), "squares", "the gradient of each example"),
    (Seen(THETA), "hessian", "the Hessian"),
    (Seen(THETA), "gauss_newton", "the Gauss-Newton matrix"),
]


@pytest.mark.parametrize(("oracle", "question", "what"), REFUSALS)
def test_an_oracle_that_cannot_answer_says_who_cannot_what_and_a_way_out(oracle, question, what):
    message = f"{type(oracle).__name__} cannot give {what}; use another curvature or another oracle"
    with pytest.raises(TypeError, match=message):
        getattr(oracle, question)()


def test_an_oracle_of_gradients_cannot_multiply_by_the_hessian():
    with pytest.raises(TypeError, match="Seen cannot multiply by the Hessian"):
        Seen(THETA).product(THETA)
