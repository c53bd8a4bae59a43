"""The page about language models, and how far their probabilities are to be believed."""

import pytest
import torch

import bayesrule as br
from bayesrule.uses.language import LanguageReport, Method, Trial, render_language, token_calibration

BINS = [[0.0] * 14 + [8.0], [0.0] * 14 + [7.5], [0.0] * 14 + [6.0]]


def trial(perplexity, averaged=None, seconds=2.0):
    figures = {"perplexity": perplexity, "bits_per_byte": 2.0, "ece": 0.1875, "bins": BINS}
    if averaged is not None:
        figures |= {"perplexity_mc": averaged, "ece_mc": 0.01, "bins_mc": BINS}
    history = [{"step": step, "train_loss": 2.0 / step, "validation_nll": 3.0 / step} for step in (1, 2)]
    return Trial(figures, seconds, history)


@pytest.mark.parametrize("draws", [None, 6])
def test_calibration_is_of_the_most_probable_token(draws):
    model = torch.nn.Embedding(3, 2).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 20.0], [20.0, 0.0]]))
    post = None if draws is None else br.Posterior.point(model)
    found = token_calibration(model, post, torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 1, 1]]), draws or 8)
    assert found["accuracy"] == 0.5 and found["ece"] == pytest.approx((0 * 2 + 0.5 * 2) / 4, abs=1e-6)
    assert sum(found["bins"][0]) == 4 and sum(found["bins"][2]) == 2


def test_a_draw_is_of_the_posterior_and_its_probabilities_are_averaged():
    model = torch.nn.Embedding(4, 5).eval()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    post = br.Posterior(mean, {name: torch.full_like(m, 2.0) for name, m in mean.items()})
    tokens, following = torch.arange(4)[None], torch.tensor([[0, 1, 2, 3]])
    probs = []
    for draw in range(5):
        with br.sampled(model, post, 3, draw), torch.no_grad():
            probs.append(model(tokens).softmax(-1))
    best = torch.stack(probs).mean(0).max(-1)
    found = token_calibration(model, post, tokens, following, 5, seed=3)
    assert found["accuracy"] == (best.indices == following).double().mean().item()
    assert sum(found["bins"][1]) == pytest.approx(best.values.sum().item(), rel=1e-5)


def test_rows_are_means_over_seeds():
    report = LanguageReport("t", [], [Method("A", [trial(5.0)]), Method("B", [trial(4.0, 3.0), trial(6.0, 5.0, 4.0)])])
    first, second = report.rows
    assert first == {"method": "A", "perplexity": 5.0, "bits_per_byte": 2.0, "ece": 0.1875, "seconds": 2.0}
    assert (second["perplexity"], second["perplexity_mc"], second["seconds"], second["seeds"]) == (5.0, 4.0, 3.0, 2)
    assert second["spread"]["perplexity_mc"] == pytest.approx(2**0.5)


def test_the_page_shows_all_and_loads_nothing():
    methods = [Method("A <b>", [trial(5.0)], {"steps": "9"}), Method("B", [trial(4.0, 3.0), trial(6.0, 5.0)])]
    page = render_language(LanguageReport("Title & more", ["Said."], methods, {"A": {"lr": 0.1}}))
    assert page == render_language(LanguageReport("Title & more", ["Said."], methods, {"A": {"lr": 0.1}}))
    assert "<h1>Title &amp; more</h1>" in page and "A &lt;b&gt;" in page and "5.000 <span" in page and "A <b>" not in page
    assert page.count('<img class="card"') == 2 + 1 + 2 and "B, averaged" in page and "A &lt;b&gt;, mean" not in page
    assert "<th>steps</th>" in page and "ECE 0.188" in page and 'src="http' not in page
