import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bayesrule.uses.metrics import bits_per_byte, perplexity, token_nll

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "metrics.json").read_text())["language"]


def problem(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 7, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (3, 7), generator=generator)
    tokens[1, 4:] = tokens[2, 1:] = -100  # documents of 7, 4 and 1 tokens
    return logits.log_softmax(-1).to(dtype), tokens


def test_golden_perplexity_weighs_tokens_not_documents():
    right = -torch.tensor(GOLDEN["token_nll"], dtype=torch.float64)
    log_probs = torch.stack([right, (-right.expm1()).log()], -1)
    tokens = torch.zeros(5, dtype=torch.long)
    assert perplexity(log_probs, tokens).item() == pytest.approx(GOLDEN["perplexity_token_weighted"], abs=1e-9)
    documents = [perplexity(*both).item() for both in zip(log_probs.split([3, 2]), tokens.split([3, 2]), strict=True)]
    assert sum(documents) / 2 == pytest.approx(GOLDEN["perplexity_mean_of_documents"], abs=1e-9)


def test_are_torchs_and_torchmetrics():
    from torchmetrics.functional.text import perplexity as theirs

    log_probs, tokens = problem()
    nll = token_nll(log_probs, tokens).item()
    assert nll == pytest.approx(F.cross_entropy(log_probs.flatten(0, 1), tokens.flatten()).item(), rel=1e-12)
    assert perplexity(log_probs, tokens).item() == pytest.approx(theirs(log_probs, tokens, ignore_index=-100).item(), rel=1e-6)


@pytest.mark.parametrize(("sizes", "count"), [(None, 12), (40, 40), (torch.tensor(40), 40), (torch.arange(1, 12), None)], ids=str)
def test_bits_are_counted_by_bytes(sizes, count):
    log_probs, tokens = problem()
    count = count or int((tokens[tokens >= 0] + 1).sum())
    total = 12 * token_nll(log_probs, tokens).item()
    assert bits_per_byte(log_probs, tokens, sizes).item() == pytest.approx(total / count / math.log(2), rel=1e-12)


def test_another_token_may_be_the_one_that_does_not_count():
    log_probs, tokens = problem()
    padded = tokens.where(tokens >= 0, 0)
    kept = padded != 0
    assert token_nll(log_probs, padded, ignored=0).item() == pytest.approx(token_nll(log_probs[kept], padded[kept]).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_are_summed_wide(dtype):
    log_probs, tokens = problem(dtype)
    wide = token_nll(log_probs.double(), tokens).item() if dtype == torch.float32 else token_nll(problem()[0], tokens).item()
    assert token_nll(log_probs, tokens).item() == pytest.approx(wide, rel=1e-7 if dtype == torch.float32 else 1e-2)


LOGS = torch.full((2, 4), 0.25).log()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_nll(LOGS, torch.zeros(3).long()), r"log_probs must have shape \(\*tokens, K\), tokens \(3,\); got \(2, 4\)"),
        (lambda: token_nll(LOGS, torch.tensor([0, 4])), r"labels must lie in \[0, 4\); got 4"),
        (lambda: token_nll(LOGS, torch.tensor([-100, -100])), "no token to measure: none of 2 differs from the ignored -100"),
        (lambda: token_nll(LOGS + 1, torch.tensor([0, 1])), r"a row sums to exp\(1\); pass log_softmax\(logits\)"),
        (lambda: token_nll(LOGS * math.nan, torch.tensor([0, 1])), "must be log probabilities"),
        (lambda: bits_per_byte(LOGS, torch.tensor([0, 1]), 0), "more than 0 bytes; got 0"),
        (lambda: bits_per_byte(LOGS, torch.tensor([0, 3]), torch.ones(3)), "for each token of the vocabulary; got 3, and token 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
