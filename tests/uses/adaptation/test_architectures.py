"""What a new model takes over."""

import re

import pytest
import torch
from tests.contracts import close
from tests.uses.adaptation.problems import accuracy, digits, perceptron, trained
from torch import nn

import bayesrule as br
from bayesrule.uses.adaptation.architectures import widened


def learned(classes=5):
    x, y, _, _ = digits(400)
    few = y < classes
    model = trained(perceptron(classes), x[few], y[few])
    post = br.Posterior.laplace(model, [(x[few], y[few])])
    return model, post, br.Memory.select(model, post, [(x[few], y[few])], 40), (x[~few], y[~few]), (x[few], y[few])


def test_a_head_that_grows_learns_new_classes():
    model, post, memory, new, old = learned()
    wide = widened(model, 10)
    with torch.no_grad():
        close(wide(old[0])[:, :5], model(old[0]), 1e-6)
        assert bool((wide(old[0])[:, 5:] == 0).all())
    found = br.adapt(model, post, memory=memory.pad(10), add=[new], new_model=wide, epochs=30, lr=0.01)
    assert accuracy(wide, *new) > 0.85 and accuracy(wide, *old) > 0.85
    assert found.mean["2.weight"].shape == (10, 32) and found.num_data == 400
    assert found.prior_precision["2.weight"].shape == (10, 32)
    close(found.prior_precision["2.weight"], torch.ones(10, 32), 1e-6)


def test_examples_leave_while_a_head_grows():
    model, post, memory, new, old = learned()
    found = br.adapt(
        model, post, memory=memory.pad(10), add=[new], remove=[(old[0][:5], old[1][:5])], new_model=widened(model, 10), epochs=1
    )
    assert found.num_data == 395


def test_new_classes_without_labels_are_refused():
    model, post, memory, new, _ = learned()
    says = "new classes [5, 6, 7, 8, 9] have no soft labels; pad old outputs with pad_value=-inf: memory.pad(10)"
    with pytest.raises(ValueError, match=re.escape(says)):
        br.adapt(model, post, memory=memory, add=[new], new_model=widened(model, 10))
    with pytest.raises(ValueError, match="labels go from 5 to 9, and there are 5 classes"):
        br.adapt(model, post, memory=memory, add=[new])
    with pytest.raises(ValueError, match="the model has 5 outputs, and the memory 10"):
        br.adapt(model, post, memory=memory.pad(10), add=[(new[0][:1], new[1][:1] - new[1][:1])])


def test_another_architecture_learns_what_the_memory_says():
    """Nothing has the same name: it is distilled."""
    model, post, memory, _, old = learned()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new = nn.ModuleDict({"body": nn.Linear(64, 24), "head": nn.Linear(24, 5)})

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = new

        def forward(self, x):
            return self.layers["head"](self.layers["body"](x).relu())

    other = Other().eval()
    before = accuracy(other, *old)
    found = br.adapt(model, post, memory=memory, new_model=other, lr=0.01)
    assert accuracy(other, *old) > 0.85 > before
    assert set(found.mean) == {name for name, _ in other.named_parameters()} and found.num_data == post.num_data


def test_what_is_taken_over_must_fit():
    model, post, memory, _, _ = learned()
    with pytest.raises(ValueError, match=r"'0.weight' is taken over with shape \(64, 32\), and has \(32, 64\) in the new model"):
        br.adapt(
            model,
            post,
            memory=memory,
            new_model=widened(model, 5),
            mapping=lambda old: {"0.weight": old["0.weight"].T},
        )


def test_a_model_without_a_layer_cannot_grow():
    with pytest.raises(ValueError, match=r"has no nn.Linear that could give more outputs; pass a new_model"):
        widened(nn.Conv2d(1, 1, 1), 3)
    assert widened(nn.Linear(2, 3, bias=False), 4).weight.shape == (4, 2)
