"""Language models: the tokens that came against the probabilities they were given. All figures weigh tokens, not documents."""

import math

import torch
from torch import Tensor

from ...estimators.output_losses import IGNORED as IGNORED
from .checks import check_labels, wide


def token_nll(log_probs: Tensor, tokens: Tensor, ignored: int = IGNORED) -> Tensor:
    """Mean negative log-likelihood of the tokens that came.

    Args:
        log_probs: Log probabilities of all tokens at every position, shape (..., K).
        tokens: Tokens that came, integers in [0, K), shape (...).
        ignored: A token that is not counted: padding.

    Returns:
        A number >= 0 in nats a token, shape ().

    Raises:
        ValueError: If shapes disagree, a token is out of range, a row is no log probability or no token counts.

    Example:
        >>> round(token_nll(torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log(), torch.tensor([0, 1])).item(), 4)
        1.0397
    """
    total, count, _ = token_totals(log_probs, tokens, ignored=ignored)
    return total / count


def perplexity(log_probs: Tensor, tokens: Tensor, ignored: int = IGNORED) -> Tensor:
    """The exponential of :func:`token_nll`: as if so many tokens were equally likely.

    Args:
        log_probs: As for :func:`token_nll`.
        tokens: As for :func:`token_nll`.
        ignored: As for :func:`token_nll`.

    Returns:
        A number >= 1, shape (). Of several documents it is not the mean of their perplexities.

    Raises:
        ValueError: As :func:`token_nll`.

    Example:
        >>> round(perplexity(torch.full((3, 4), 0.25).log(), torch.tensor([0, 1, 2])).item(), 4)
        4.0
    """
    return token_nll(log_probs, tokens, ignored).exp()


def bits_per_byte(log_probs: Tensor, tokens: Tensor, token_bytes: int | Tensor | None = None, ignored: int = IGNORED) -> Tensor:
    """Bits that the text takes for each of its bytes, so that models with other tokens can be compared.

    Args:
        log_probs: As for :func:`token_nll`.
        tokens: As for :func:`token_nll`.
        token_bytes: Bytes of all tokens that count together, or of each token of the vocabulary, shape (K,); None where every
            token is one byte.
        ignored: As for :func:`token_nll`.

    Returns:
        A number >= 0, shape ().

    Raises:
        ValueError: As :func:`token_nll`, or there are no bytes.

    Example:
        >>> round(bits_per_byte(torch.full((3, 4), 0.25).log(), torch.tensor([0, 1, 2]), token_bytes=6).item(), 4)
        1.0
    """
    total, _, size = token_totals(log_probs, tokens, token_bytes, ignored)
    return total / (size * math.log(2))


def token_totals(log_probs: Tensor, tokens: Tensor, token_bytes: int | Tensor | None = None, ignored: int = IGNORED) -> Tensor:
    """Summed NLL in nats, number of tokens and number of bytes, shape (3,); those of parts of the data add up.

    Raises:
        ValueError: As :func:`token_nll` and :func:`bits_per_byte`.
    """
    if log_probs.ndim < 1 or log_probs.shape[:-1] != tokens.shape:
        raise ValueError(f"log_probs must have shape (*tokens, K), tokens {tuple(tokens.shape)}; got {tuple(log_probs.shape)}")
    counted = tokens != ignored
    rows, came = log_probs.detach()[counted], tokens[counted]
    if not len(came):
        raise ValueError(f"there is no token to measure: none of {tokens.numel()} differs from the ignored {ignored}")
    check_labels(came, len(came), log_probs.shape[-1])
    rounding = 1e-3 if log_probs.element_size() >= 4 else 5e-2
    worst = rows.float().logsumexp(-1).abs().max().item()
    if not worst <= rounding:
        raise ValueError(f"log_probs must be log probabilities; a row sums to exp({worst:.4g}); pass log_softmax(logits)")
    nll = -rows.gather(-1, came.long()[:, None]).squeeze(-1)
    return token_sums(nll, came, token_bytes)


def token_sums(nll: Tensor, came: Tensor, token_bytes: int | Tensor | None = None) -> Tensor:
    """The same of the NLL of each token that counts, shape (M,), and of the tokens, shape (M,)."""
    sizes: int | Tensor = len(came) if token_bytes is None else token_bytes
    if isinstance(sizes, Tensor) and sizes.ndim:
        if (most := int(came.max())) >= len(sizes):
            raise ValueError(f"token_bytes must have a size for each token of the vocabulary; got {len(sizes)}, and token {most}")
        sizes = sizes.to(came.device)[came.long()].sum()
    if not sizes > 0:
        raise ValueError(f"token_bytes must come to more than 0 bytes; got {float(sizes):g}")
    total = wide(nll).sum()
    return torch.stack([total, total.new_tensor(len(came)), total.new_tensor(float(sizes))])
