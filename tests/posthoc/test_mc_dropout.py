"""Dropout as a posterior over weights: draws are the model with one mask for all examples, or the readers are not found."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bayesrule as br


class Functions(nn.Module):
    """Two readers of one dropout, through functions that leave elements what they are."""

    def __init__(self):
        super().__init__()
        self.drop, self.one, self.two = nn.Dropout(0.25), nn.Linear(12, 3), nn.Linear(12, 2)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        h = self.drop(x)
        h = F.relu(h.view(x.size(0), -1))
        return self.last(self.one(h).tanh()) + self.two(h)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.one = nn.Dropout(0.25), nn.Linear(3, 3)

    def forward(self, x):
        h = self.drop(x)
        return self.one(h) + h


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.one = nn.Dropout(0.25), nn.Linear(3, 3)

    def forward(self, x):
        return self.one(self.drop(x)) if x.sum() > 0 else x


class Shapes(nn.Module):
    """A dropout whose readers have inputs of different shapes, by way of a view."""

    def __init__(self):
        super().__init__()
        self.drop, self.one, self.two = nn.Dropout(0.25), nn.Linear(3, 3), nn.Linear(6, 3)

    def forward(self, x):
        h = self.drop(x)
        return self.one(h).sum(1) + self.two(h.flatten(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.one = nn.Dropout(0.25), nn.Linear(3, 3)

    def forward(self, x):
        return self.one(self.drop(self.one(self.drop(x))))


class Idle(nn.Module):
    def __init__(self, called):
        super().__init__()
        self.drop, self.one, self.called = nn.Dropout(0.25), nn.Linear(3, 3), called

    def forward(self, x):
        if self.called:
            self.drop(x)
        return self.one(x)


MODELS = {  # a model, its input, and the weights that read dropouts together
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 2)),
        (7, 4),
        [("3.weight",), ("5.weight",)],
    ),
    "behind flattened pixels": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2)), (7, 3, 4), [("2.weight",)]),
    "channels": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.Dropout2d(0.5), nn.LeakyReLU(), nn.Conv2d(5, 3, 2), nn.Flatten(), nn.Linear(12, 2)
        ),
        (7, 2, 5, 5),
        [("3.weight",)],
    ),
    "one axis": (lambda: nn.Sequential(nn.Dropout1d(0.5), nn.Conv1d(4, 2, 2), nn.Flatten()), (7, 4, 3), [("1.weight",)]),
    "two readers": (Functions, (7, 3, 4), [("one.weight", "two.weight")]),
}


class Shared(nn.Module):
    """In the place of a dropout: the same mask for all examples, handed in."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def masks_of(post, names, model, draw):
    """0 or 1 / pi of every input, from the weights that a draw left."""
    drawn = post.sample(0, draw)
    ratio = (drawn[names[0]] / dict(model.named_parameters())[names[0]]).transpose(0, 1).flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-5)
    return ratio[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_a_draw_is_the_model_with_one_mask_for_all_examples(name, tmp_path):
    make, shape, readers = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    br.Posterior.mc_dropout(model).save(tmp_path / "p.safetensors")
    post = br.Posterior.load(tmp_path / "p.safetensors")
    assert [part.names for part in post.parts] == readers
    assert post.method_hint == "mc"
    x = torch.randn(shape)
    sources = [key for key, module in model.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    plain = {key: model.get_submodule(key) for key in sources}
    kept = set()
    for draw in range(20):
        for key, names in zip(sources, readers, strict=True):
            mask = masks_of(post, names, model, draw).detach()
            kept |= {round(float(m) * (1 - plain[key].p), 3) for m in mask}
            if isinstance(plain[key], nn.Dropout):
                mask = mask.view(-1 if len(shape) == 2 else shape[1:])
            else:
                mask = mask.view(-1, *[1] * (len(shape) - 2))
            model.set_submodule(key, Shared(mask))
        expected = model(x)
        for key in sources:
            model.set_submodule(key, plain[key])
        with br.sampled(model, post, seed=0, draw=draw):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert kept == {0.0, 1.0}


@pytest.mark.parametrize("name", MODELS)
def test_its_variance_is_that_of_dropout(name):
    make, _, readers = MODELS[name]
    model = make().eval()
    post = br.Posterior.mc_dropout(model)
    p = next(m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)).p
    params = dict(model.named_parameters())
    for weight in readers[0]:
        torch.testing.assert_close(post.variance[weight], params[weight].detach() ** 2 * p / (1 - p))
    others = set(post.mean) - {weight for names in readers for weight in names}
    assert all(post.precision[other].isinf().all() for other in others)


def test_predictions_average_over_masks():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)), torch.randn(5, 6)
    with torch.no_grad():
        exact = torch.stack([model(x).softmax(-1) for _ in range(4000)])
    found = br.predict(model.eval(), br.Posterior.mc_dropout(model), x, num_samples=2000).probs
    assert ((found - exact.mean(0)).abs() < 5 * exact.std(0) * (1 / 4000 + 1 / 2000) ** 0.5).all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "no nn.Dropout layer with p > 0; functional dropout"),
        (nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2)), "no nn.Dropout layer with p > 0"),
        (nn.Sequential(nn.AlphaDropout(0.1), nn.Linear(2, 2)), "'0' is a AlphaDropout"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "the dropout '1' is read by the output of the model"),
        (nn.Sequential(nn.Dropout(0.1), nn.Tanh(), nn.Linear(2, 2)), r"the dropout '0' is read by Tanh \(_1\)"),
        (nn.Sequential(nn.Dropout(0.1), nn.Conv2d(2, 2, 1)), r"'0' \(Dropout\) is read by '1', which is a Conv2d: .*nn.Dropout2d"),
        (nn.Sequential(nn.Dropout2d(0.1), nn.Linear(2, 2)), r"'0' \(Dropout2d\) is read by '1', which is a Linear: .*plain Conv2d"),
        (nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(2, 2, 1, groups=2)), "which has groups=2"),
        (nn.Sequential(nn.Dropout2d(0.1), nn.Flatten(), nn.Linear(8, 2)), "channels that '0' drops are flattened"),
        (Residual(), r"the dropout 'drop' is read by add \(add\)"),
        (Shapes(), "the dropout 'drop' have inputs of different shapes: one.weight, two.weight"),
        (Tied(), "'one.weight' reads two dropouts"),
        (Idle(called=True), "nothing reads the dropout 'drop'"),
        (Idle(called=False), "the dropout 'drop' is called by no forward of the model's own modules"),
        (Branching(), "torch.fx cannot trace Branching"),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1), "'self_attn' is a MultiheadAttention"),
        (nn.Sequential(nn.LSTM(2, 2, 2, dropout=0.1)), "'0' is a LSTM"),
    ],
)
def test_where_the_reader_is_not_found_it_is_told(model, message):
    with pytest.raises(ValueError, match=message):
        br.Posterior.mc_dropout(model)
