"""Figures are those of the metrics on what predict says; those of classes as usual are held in test_prediction."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

import bayesrule as br
from bayesrule.uses.metrics.classification import CLASSIFICATION

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(6, (24,), generator=GENERATOR)
FAR = 4 * torch.randn(9, 3, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.randn(24, 2, generator=GENERATOR, dtype=torch.float64)


def linear(outputs: int, precision: float = 4.0) -> tuple[nn.Module, br.Posterior]:
    model = nn.Linear(3, outputs).double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, br.Posterior(mean, {name: torch.full_like(m, precision) for name, m in mean.items()})


class Words(nn.Module):
    """Logits of the next token from this one."""

    def __init__(self, size: int = 7, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.table = nn.Embedding(size, size, dtype=dtype)
        self.table.weight.data.copy_(2 * torch.randn(size, size, generator=torch.Generator().manual_seed(2)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)

    def posterior(self, **more) -> br.Posterior:
        w = self.table.weight.detach().clone()
        return br.Posterior({"table.weight": w}, {"table.weight": torch.full_like(w, 2.0)}, **more)


TOKENS = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(3))
FOLLOWING = TOKENS.roll(-1, 1)
FOLLOWING[:, -1] = -100


class TestClasses:
    def test_those_that_are_asked_for_in_that_order(self):
        model, post = linear(6)
        names = [*reversed(CLASSIFICATION), "fpr95", "aupr_in", "auroc_ood", "aupr_out"]
        figures = br.evaluate(model, post, [(X, LABELS)], num_samples=8, metrics=iter(names), ood=[FAR])
        assert list(figures) == names and all(type(value) is float for value in figures.values())
        found = br.predict(model, post, torch.cat([X, FAR]), num_samples=8)
        for name in CLASSIFICATION:
            assert figures[name] == pytest.approx(CLASSIFICATION[name](found.probs[:24], LABELS).item(), abs=1e-12), name
        assert br.evaluate(model, post, [(X, LABELS)], num_samples=8, metrics="mce") == {"mce": figures["mce"]}

    @pytest.mark.parametrize(
        ("score", "of"),
        [
            ("entropy", lambda found: found.entropy),
            ("max_probability", lambda found: -found.probs.amax(-1)),
            ("mutual_information", lambda found: found.mutual_information),
            ("variance", lambda found: found.variance.sum(-1)),
            ("energy", lambda found: -found.mean.logsumexp(-1)),
        ],
    )
    def test_the_unknown_are_told_by_the_score_that_is_asked_for(self, score, of):
        model, post = linear(6)
        found = br.predict(model, post, torch.cat([X, FAR]), num_samples=8)
        names = ("auroc_ood", "fpr95", "aupr_in", "aupr_out")
        figures = br.evaluate(model, post, [(X, LABELS)], num_samples=8, ood=[FAR], ood_score=score, metrics=names)
        assert figures == pytest.approx(br.metrics.ood_metrics(of(found)[:24], of(found)[24:]), abs=1e-12)


class TestNumbers:
    @pytest.mark.parametrize(
        "noise", [0.3, torch.tensor([0.2, 0.7], dtype=torch.float64), None], ids=["number", "each output", "the posterior's"]
    )
    def test_are_of_the_variance_over_draws_and_that_of_the_noise(self, noise):
        model, post = linear(2)
        given = torch.as_tensor([0.4, 0.6] if noise is None else noise, dtype=torch.float64)
        post = br.Posterior(post.mean, post.precision, noise_variance=(0.4, 0.6))
        names = ("rmse", "nll", "crps", "coverage", "interval_width")
        parts = [(X[:5], TARGETS[:5]), (X[5:], TARGETS[5:])]
        figures = br.evaluate(model, post, parts, "regression", num_samples=8, noise_variance=noise, metrics=names)
        found = br.predict(model, post, X, num_samples=8, link="identity")
        total = found.variance + given
        assert list(figures) == list(names)
        for name, expected in zip(
            names,
            (
                br.metrics.rmse(found.mean, TARGETS),
                br.metrics.gaussian_nll(found.mean, total, TARGETS),
                br.metrics.crps(found.mean, total, TARGETS),
                br.metrics.coverage(found.mean, total, TARGETS),
                br.metrics.interval_width(total),
            ),
            strict=True,
        ):
            assert figures[name] == pytest.approx(expected.item(), rel=1e-9), name
        usual = br.evaluate(model, post, parts, "regression", num_samples=8, noise_variance=noise)
        assert usual == {name: figures[name] for name in names[:4]}

    @pytest.mark.parametrize(("more", "targets"), [((), (24,)), ((nn.Flatten(0),), (24, 1))])
    def test_a_column_may_be_left_out(self, more, targets):
        model, wanted = nn.Sequential(linear(1)[0], *more).eval(), TARGETS[:, 0]
        figures = br.evaluate(model, None, [(X, wanted.view(targets))], "regression", noise_variance=1.0)
        with torch.no_grad():
            gap = model(X).flatten() - wanted
        assert figures["rmse"] == pytest.approx(gap.square().mean().sqrt().item(), rel=1e-12)

    def test_at_the_mean_there_is_a_crps_but_without_noise_no_nll(self):
        model, _ = linear(2)
        assert br.evaluate(model, None, [(X, TARGETS)], "regression", metrics=("crps", "rmse"))["crps"] > 0
        with pytest.raises(ValueError, match=r"variance must be > 0 everywhere; got 0; .*noise_variance"):
            br.evaluate(model, None, [(X, TARGETS)], "regression")


class TestTokens:
    def expected(self, model, post, **given):
        found = br.predict(model, post, TOKENS, num_samples=8, **given)
        nll = br.metrics.token_nll(found.log_probs, FOLLOWING).item()
        return {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / math.log(2)}

    @pytest.mark.parametrize("given", [{}, {"method": "mean"}, {"antithetic": True}, {"seed": 4}], ids=str)
    @pytest.mark.parametrize("temperature", [1.0, 1.7])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_probabilities_are_averaged_over_draws_token_by_token(self, given, temperature, dtype):
        model = Words(dtype=dtype)
        post = model.posterior(temperature=temperature)
        figures = br.evaluate(model, post, [(TOKENS, FOLLOWING)], "lm", num_samples=8, **given)
        assert figures == pytest.approx(self.expected(model, post, **given), rel=1e-12 if dtype == torch.float64 else 1e-6)

    def test_batches_may_have_any_length_and_all_tokens_weigh_the_same(self):
        model = Words()
        post = model.posterior()
        parts = [(TOKENS[:1, :4], FOLLOWING[:1, :4]), (TOKENS[:1, 4:], FOLLOWING[:1, 4:]), (TOKENS[1:], FOLLOWING[1:])]
        figures = br.evaluate(model, post, parts, "lm", num_samples=8)
        assert figures == pytest.approx(self.expected(model, post), rel=1e-12)

    def test_bits_are_by_bytes_and_left_out_where_they_are_not_known(self):
        model = Words(300)
        tokens = torch.arange(300).view(1, -1)
        sizes = 1 + torch.arange(300) % 5
        data = [(tokens, tokens.flip(1))]
        assert set(br.evaluate(model, None, data, "lm")) == {"nll", "perplexity"}
        for given in (sizes, int(sizes.sum())):
            found = br.evaluate(model, None, data, "lm", token_bytes=given)
            assert found["bits_per_byte"] == pytest.approx(found["nll"] * 300 / sizes.sum().item() / math.log(2))
        with pytest.raises(ValueError, match="bits_per_byte needs token_bytes, the bytes of each of the 300 tokens"):
            br.evaluate(model, None, data, "lm", metrics=["bits_per_byte"])

    def test_a_token_that_is_certain_costs_nothing_and_one_that_is_not_is_counted(self):
        model = Words(2, torch.float32)
        model.table.weight.data = torch.tensor([[0.0, 200.0], [0.0, 200.0]])
        assert br.evaluate(model, None, [(torch.zeros(1, 3).long(), torch.ones(1, 3).long())], "lm")["nll"] == 0
        assert br.evaluate(model, None, [(torch.zeros(1, 3).long(), torch.zeros(1, 3).long())], "lm")["nll"] == 200

    def test_the_model_is_left_as_it_was(self):
        model = Words()
        br.evaluate(model, model.posterior(), [(TOKENS, FOLLOWING)], "lm", num_samples=4)
        with pytest.raises(ValueError):
            br.evaluate(model, None, [(TOKENS, FOLLOWING + 7)], "lm")
        assert not model._forward_hooks and model(TOKENS).shape == (4, 9, 7)


class Both(nn.Module):
    """Two logits, 0 and that of yes."""

    def __init__(self, yes: nn.Module) -> None:
        super().__init__()
        self.yes = yes

    def forward(self, x: Tensor) -> Tensor:
        f = self.yes(x).reshape(-1, 1)
        return torch.cat([torch.zeros_like(f), f], -1)


@pytest.mark.parametrize("column", [True, False], ids=["column", "row"])
@pytest.mark.parametrize("how", [{"method": "mean"}, {}, {"method": "glm"}, {"method": "glm", "variance": "exact"}], ids=str)
def test_one_logit_for_yes_is_two_classes(how, column):
    one, post = linear(1)
    model = one if column else nn.Sequential(one, nn.Flatten(0))
    wrap = (
        {}
        if column
        else {"mean": {f"0.{n}": m for n, m in post.mean.items()}, "precision": {f"0.{n}": s for n, s in post.precision.items()}}
    )
    own = br.Posterior(**wrap) if wrap else post
    model, two = model.eval(), Both(one).eval()
    both = br.Posterior({f"yes.{n}": m for n, m in post.mean.items()}, {f"yes.{n}": s for n, s in post.precision.items()})
    how = {"num_samples": 64, "ood": [FAR], "metrics": [*CLASSIFICATION, "auroc_ood", "fpr95"], "temperature": 0.7, **how}
    how["metrics"].remove("top5_accuracy")
    labels = LABELS % 2
    found = br.evaluate(model, own, [(X, labels.double())], link="sigmoid", **how)
    wanted = br.evaluate(two, both, [(X, labels)], **how)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_a_certain_no_keeps_its_log_probability():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    found = br.evaluate(model.eval(), None, [(torch.tensor([[60.0]]), torch.tensor([0]))], link="sigmoid", metrics="nll")
    assert found["nll"] == pytest.approx(60.0)


@pytest.mark.parametrize(
    "how", [{"tau": 3.0}, {"temperature": 2.0}, {"method": "glm", "tau": 3.0}, {"method": "glm", "variance": "exact"}], ids=str
)
def test_predictions_are_those_of_predict(how):
    model, post = linear(6)
    found = br.evaluate(model, post, [(X, LABELS)], num_samples=8, metrics="nll", **how)["nll"]
    logs = br.predict(model, post, X, num_samples=8, **how).log_probs
    assert found == pytest.approx(-logs.gather(1, LABELS[:, None]).mean().item(), rel=1e-12)


def test_tokens_take_a_temperature():
    model = Words()
    given = br.evaluate(model, model.posterior(), [(TOKENS, FOLLOWING)], "lm", num_samples=4, temperature=1.7)
    own = br.evaluate(model, model.posterior(temperature=1.7), [(TOKENS, FOLLOWING)], "lm", num_samples=4)
    assert given == own


LM = {"task": "lm", "loader": [(TOKENS, FOLLOWING)], "model": Words(), "posterior": None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "ranking"}, "unknown task 'ranking'; take 'classification', 'regression' or 'lm'"),
        ({"metrics": ["f1"]}, "unknown metric 'f1'; take of accuracy, top5_accuracy"),
        ({"metrics": ["crps"]}, "unknown metric 'crps'"),
        ({"task": "regression", "metrics": ["ece"]}, "unknown metric 'ece'; take of rmse, nll, crps, coverage, interval_width"),
        ({"metrics": ["accuracy", "fpr95"]}, "fpr95 tells unknown data from known data; pass ood="),
        ({"ood": [FAR], "ood_score": "logits"}, "unknown ood_score 'logits'; take of entropy, max_probability, "),
        (
            {"task": "regression", "ood": [FAR]},
            "ood data are told from those of classes; take task='classification', not",
        ),
        ({"task": "regression", "loader": [(X, TARGETS[:, :1])]}, "targets have shape (24, 1) and the outputs (24, 6)"),
        (
            {"task": "regression", "noise_variance": torch.ones(2), "loader": [(X, X.repeat(1, 2))]},
            "one number or one for each output, (24, 6); got (2,)",
        ),
        ({"link": "identity"}, "unknown link 'identity' of classes; take 'softmax' or 'sigmoid'; numbers have task='regression'"),
        ({"link": "sigmoid", "loader": [(X, LABELS % 2)]}, "measured for one logit an input, got outputs of shape (24, 6)"),
        ({"method": "glm", "link_approx": "quadrature"}, "unknown link_approx 'quadrature' for link='softmax'"),
        ({"tau": 0.0}, "tau must be a number > 0"),
        ({"task": "regression", "noise_variance": -1.0}, "noise_variance must be >= 0, got -1"),
        ({**LM, "metrics": ["accuracy"]}, "unknown metric 'accuracy'; take of nll, perplexity, bits_per_byte"),
        ({**LM, "vmap": 2}, "draw by draw, without vmap and batch_norm"),
        ({**LM, "batch_norm": [TOKENS]}, "draw by draw, without vmap and batch_norm"),
        ({**LM, "method": "glm"}, "tokens are predicted by 'mean' or 'mc', not 'glm'"),
        ({**LM, "loader": [(TOKENS, FOLLOWING[:, 1:])]}, "outputs of shape (4, 9, 7) for tokens of shape (4, 8)"),
        ({**LM, "loader": [(TOKENS, FOLLOWING + 1)]}, "labels must lie in [0, 7); got"),
        ({**LM, "loader": [(TOKENS, 0 * TOKENS - 100)]}, "all 36 tokens are -100, which do not count"),
        ({**LM, "model": nn.Sequential(Words(), nn.Softmax(-1)).eval()}, "outputs sum to 1 in every row"),
        ({**LM, "token_bytes": 0}, "token_bytes must come to more than 0 bytes"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(given, message):
    model, post = linear(6)
    with pytest.raises(ValueError, match=re.escape(message)):
        br.evaluate(**{"model": model, "posterior": post, "loader": [(X, LABELS)], "num_samples": 4, **given})
