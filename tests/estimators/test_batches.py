"""Batches as training loops have them give inputs, labels, and outputs, whatever form they come in."""

from collections import UserDict

import pytest
import torch
from torch import nn

from bayesrule.estimators.batches import examples_in, inputs_and_labels, inputs_of, joined, on_device, outputs_of, pairs, rows_of

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)


class Named(nn.Module):
    """Called by name, as a model of Hugging Face, and answers with an object that has logits."""

    def __init__(self, loss_type: str | None = None) -> None:
        super().__init__()
        self.layer, self.loss_type = nn.Linear(2, 3), loss_type

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None):
        return Answer(self.layer(x))


class Answer:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], {"x": X, "labels": Y}, UserDict({"x": X, "labels": Y})], ids=lambda b: type(b).__name__
)
def test_inputs_and_labels_of_each_form(batch):
    inputs, labels = inputs_and_labels(batch, Named())
    assert labels is Y and torch.equal(inputs["x"] if isinstance(inputs, dict) else inputs, X)
    assert examples_in(inputs) == 6
    again = inputs_of(batch)
    assert torch.equal(again["x"] if isinstance(again, dict) else again, X)


def test_what_has_no_length_says_nothing_of_how_many_there_are():
    assert examples_in({"scale": torch.ones(()), "x": X}) == 6


def test_labels_of_a_causal_language_model_are_the_tokens_that_follow():
    text = torch.tensor([[1, 2, 3], [4, 5, -100]])
    _, labels = inputs_and_labels({"x": text, "labels": text}, Named("ForCausalLM"))
    assert labels.tolist() == [[2, 3, -100], [5, -100, -100]]


@pytest.mark.parametrize("batch", [X, (X,), (X, Y, Y), {"x": X}, (X, [1, 2])], ids=["tensor", "one", "three", "no labels", "list"])
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(TypeError, match=r"a batch is a pair \(inputs, labels\) or a mapping with 'labels', got"):
        list(pairs([batch], Named()))


def test_inputs_and_labels_of_different_lengths_are_refused_and_empty_batches_left_out():
    with pytest.raises(ValueError, match="a batch holds 6 inputs and 5 labels"):
        list(pairs([(X, Y[:5])], Named()))
    assert len(list(pairs([(X[:0], Y[:0]), (X, Y)], Named()))) == 1


def test_rows_are_of_what_has_a_row_an_example():
    found = rows_of({"x": X, "scale": torch.ones(()), "name": "a"}, slice(2, 4), 6)
    assert torch.equal(found["x"], X[2:4]) and found["scale"].dim() == 0 and found["name"] == "a"


def test_outputs_are_a_tensor_or_its_logits():
    model = Named()
    assert torch.equal(outputs_of(model, {"x": X}), model.layer(X)) and torch.equal(outputs_of(model.layer, X), model.layer(X))
    with pytest.raises(TypeError, match="must return a tensor, or something with logits; got tuple"):
        outputs_of(lambda x: (x, x), X)


def test_what_was_made_in_inference_mode_can_go_backward_again():
    with torch.inference_mode():
        x = X.clone()
    assert not on_device(Named(), {"x": x})["x"].is_inference()


class TinyLMHeadModel(torch.nn.Module):
    """As transformers has GPT-2, whose kind of loss is not said."""

    def __init__(self, loss_type: str | None = None) -> None:
        super().__init__()
        self.loss_type = loss_type


class TinyForCausalLM(TinyLMHeadModel):
    pass


CAUSAL = {
    "GPT-2": (TinyLMHeadModel, True),
    "by its kind": (lambda: TinyForCausalLM("ForCausalLM"), True),
    "in DataParallel": (lambda: torch.nn.DataParallel(TinyForCausalLM("ForCausalLM")), True),
    "another kind": (lambda: TinyForCausalLM("ForMaskedLM"), False),
    "a model of one's own": (torch.nn.Module, False),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_labels_of_causal_language_models_are_those_of_the_token_that_follows(name):
    make, follows = CAUSAL[name]
    text = torch.arange(6).view(2, 3)
    _, labels = inputs_and_labels({"input_ids": text, "labels": text}, make())
    assert torch.equal(labels, torch.tensor([[1, 2, -100], [4, 5, -100]]) if follows else text)


def test_batches_are_joined_and_filled_up():
    short, long = (torch.ones(2, n, dtype=torch.long) for n in (3, 5))
    assert joined([short, long], -100)[:2].tolist() == [[1, 1, 1, -100, -100]] * 2
    found = joined([{"input_ids": each, "attention_mask": each} for each in (short, long)])
    assert found["attention_mask"].sum(1).tolist() == [3, 3, 5, 5]
    assert torch.equal(joined([torch.eye(2), torch.eye(2)]), torch.cat([torch.eye(2)] * 2))
    assert joined([(short, 7), (short, 7)])[1] == 7


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"input_ids": x}])
def test_inputs_of_different_shapes_need_a_mask(wrap):
    with pytest.raises(ValueError, match=r"inputs of different shapes, such as .* need an 'attention_mask'"):
        joined([wrap(torch.ones(2, 3)), wrap(torch.ones(2, 5))])
