"""The usual split of a network's parameters: matrices inside of it, and the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

HEADS = frozenset(["lm_head", "head", "classifier", "score"])
"""Names of output layers, in models of Hugging Face and others."""


def split_matrices(model: nn.Module, *, lr: float, exclude: Iterable[str] = (), **rest: Any) -> list[dict[str, Any]]:
    r"""Groups for :class:`bayesrule.EVON`: the matrices inside of a network to it, all else to AdamW.

    Embeddings and the output layer, whose rows are tokens or classes, and what has a single axis (biases, norms) are no linear
    maps between hidden states; in language models they are left to AdamW, without decay where they have one axis.

    Args:
        model: Its trainable parameters are split. Matrices are parameters with two axes or more that belong to no
            ``nn.Embedding`` and to no output layer: what ``get_output_embeddings()`` names in models of Hugging Face, modules
            called lm_head, head, classifier or score, and ``exclude``.
        lr: Of AdamW.
        exclude: Names of modules or parameters whose matrices go to AdamW as well, such as "head".
        **rest: More of AdamW: ``betas``, ``eps``, ``weight_decay``.

    Returns:
        One to three groups of named parameters: matrices, others that decay, others that do not.

    Raises:
        ValueError: ``exclude`` names what the model does not have.

    Example:
        >>> import torch, bayesrule as br
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 50))
        >>> groups = split_matrices(model, lr=3e-3, exclude=["2"], weight_decay=0.1)
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['1.weight'], ['0.weight', '2.weight'], ['1.bias', '2.bias']]
        >>> opt = br.EVON(groups, lr=0.02, ess=1e6, hess_init=0.5)

    Source: K. Jordan et al. (2024), Muon; section 8.5 of the experiments of EVON, arXiv:2606.23357.
    """
    names = list(exclude)
    known = {*dict(model.named_modules()), *dict(model.named_parameters())}
    if strange := [name for name in names if name not in known]:
        raise ValueError(
            f"split_matrices: the model has no module or parameter {strange[0]!r}; it has {', '.join(sorted(known)[1:5])}, ..."
        )
    apart = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    apart |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    inner, decaying, plain = list[tuple[str, Tensor]](), list[tuple[str, Tensor]](), list[tuple[str, Tensor]]()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        named = not HEADS.isdisjoint(name.split(".")) or any(name == other or name.startswith(f"{other}.") for other in names)
        (plain if p.dim() < 2 else decaying if named or id(p) in apart else inner).append((name, p))
    adamw = {"adamw": True, "lr": lr, **rest}
    groups = [{"params": inner}, {"params": decaying, **adamw}, {"params": plain, **adamw, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
