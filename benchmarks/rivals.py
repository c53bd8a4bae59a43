"""kronfluence on a classifier, where it is installed: ``pip install --no-deps kronfluence einconv einops opt_einsum``."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

BATCH = 128


class Kronfluence(NamedTuple):
    """EK-FAC influence of training examples on their own losses, in two parts."""

    fit: Callable[[], object]
    score: Callable[[], Tensor]


def kronfluence(model: nn.Module, x: Tensor, y: Tensor) -> Kronfluence | None:
    """For one model and its training data; None where it is not installed."""
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task
        from kronfluence.utils.dataset import DataLoaderKwargs
    except ImportError:
        return None

    class Classes(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            logits = model(inputs)
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    data, folder = TensorDataset(x, y), tempfile.mkdtemp()
    prepared = prepare_model(deepcopy(model), Classes())
    analyzer = Analyzer("rival", prepared, Classes(), cpu=True, output_dir=folder, disable_tqdm=True, disable_model_save=True)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))

    def fit() -> None:
        with _quiet():
            analyzer.fit_all_factors("own", data, per_device_batch_size=BATCH, overwrite_output_dir=True)

    def score() -> Tensor:
        with _quiet():
            analyzer.compute_self_scores("own", "own", data, per_device_train_batch_size=BATCH, overwrite_output_dir=True)
            found: Tensor = analyzer.load_self_scores("own")["all_modules"]
        return found

    return Kronfluence(fit, score)


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
