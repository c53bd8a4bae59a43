"""Checkpoints on disk merged block by block: memory for a few blocks, whatever the size of the models."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from ...storage import write_text
from .checks import Checks
from .drafts import Draft, drafting
from .folders import ADAPTER, ADAPTER_CONFIG, INDEX, PRECISION, inside, open_checkpoint, read_json, sidecar_metadata
from .headers import Average, Constant, Room, Stored
from .inputs import Meeting, meet
from .methods import Method, Piece, Place, method_of, onto, threshold
from .writing import Planned, Writer, check_written, index_of, ordered, shards

RECORD = "merge.json"
FORMAT = 1
BLOCK = 2**20
"""Bytes of a block of one tensor of one model, in float32."""
EVERY = 2.0
"""Seconds after which what was written is put on the disk, and the journal says so."""
COPIED = (".json", ".txt", ".model", ".tiktoken", ".jinja")
"""Endings of the files beside weights that a user of the model needs."""
OWN = (INDEX, RECORD, ADAPTER_CONFIG, "run.json", "trainer_state.json")
"""Those that say something of one model alone."""
LARGEST = 2**26
"""Bytes of a file that is copied."""
KINDS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Progress = Callable[[str, int], Callable[[], object]]
"""Told what begins and its number of steps; gives what is called after each."""


def merge_checkpoints(
    base: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    alphas: float | Sequence[float] = 1.0,
    method: str = "gradient_matching",
    density: float | None = None,
    seed: int = 0,
    prior_precision: float | None = None,
    dtype: str = "same",
    max_shard_size: float = 5e9,
    block_bytes: int = BLOCK,
    progress: Progress = lambda name, steps: lambda: None,
) -> dict[str, Any]:
    r"""Merge checkpoints of Hugging Face tensor by tensor, whatever their architecture.

    The arithmetic is that of :func:`bayesrule.merge`, block by block and equal to it bit by bit: see
    :mod:`bayesrule.uses.merging.methods`. Costs a pass over the files (three for ties, which trims) and the memory of some blocks,
    never of a model. Precisions come from precision.safetensors (:func:`bayesrule.save_precision`) or from posterior.safetensors of
    a run, scaled to all its examples; where the base has none, its precision is that of the prior.

    ``out`` appears when all is written, with the files that the model needs (configuration, tokenizer), precision.safetensors if
    the method knows it, and merge.json. Interrupted, the same call goes on after the last whole tensor that is on the disk;
    repeated, it does nothing. Adapters (LoRA) become the weights that they make of a full base; beside a base that is the adapter
    they were trained from, they stay adapters.

    Args:
        base: The folder of the model that all were trained from.
        models: The folders of the trained models, or of adapters of the base.
        out: A new folder.
        alphas: A weight for each, or one for all; negative removes.
        method: gradient_matching, fisher, task_arithmetic, linear, ties, dare_linear, dare_ties.
        density: The part of a task vector that ties and dare keep, in (0, 1].
        seed: Of what dare drops.
        prior_precision: delta of the prior, where neither base nor models say it.
        dtype: Of the result: "same" is the base's, else float64, float32, bfloat16 or float16. Sums are in float32 or wider.
        max_shard_size: Bytes of a file, at most.
        block_bytes: Of a block of one tensor of one model in float32. The result does not depend on it.
        progress: Of a terminal.

    Returns:
        What merge.json says: method, alphas, and the SHA-256 of every file that was read.

    Raises:
        FileExistsError: ``out`` holds something else.
        FileNotFoundError: A folder holds no weights, or a method needs precisions that there are not.
        OSError: ``out`` cannot be written; nothing is left of it.
        ValueError: Names, shapes or settings do not fit, a file is damaged, or a precision of the result would not be positive.

    Warns:
        UserWarning: Precisions are of other scales, or a model seems to be from another base.

    Example:
        >>> import tempfile, torch, bayesrule as br
        >>> from safetensors.torch import load_file, save_file
        >>> root = Path(tempfile.mkdtemp())
        >>> for name, w in (("base", 0.0), ("one", 1.0), ("two", 3.0)):
        ...     (root / name).mkdir()
        ...     save_file({"w": torch.tensor([w])}, root / name / "model.safetensors")
        >>> models = [root / "one", root / "two"]
        >>> _ = br.merge_checkpoints(root / "base", models, root / "out", alphas=0.5, method="task_arithmetic")
        >>> load_file(root / "out" / "model.safetensors")["w"]
        tensor([2.])
    """
    place = Path(out)
    if dtype != "same" and dtype not in KINDS:
        raise ValueError(f"unknown dtype {dtype!r}; take 'same', {', '.join(map(repr, KINDS))}")
    for name, value in (("block_bytes", block_bytes), ("max_shard_size", max_shard_size)):
        if not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if not models:
        raise ValueError("there are no models to merge; name at least one")
    chosen = method_of(method, density)
    anchor, *others = (open_checkpoint(folder, chosen.needs_precision) for folder in (base, *models))
    names = [str(each.folder) for each in others]
    weights = chosen.weights(alphas, names)
    asked: dict[str, Any] = {
        **{"format": FORMAT, "method": chosen.name, "base": str(anchor.folder), "models": names, "alphas": list(weights)},
        **{"density": chosen.density, "seed": seed, "prior_precision": prior_precision, "dtype": dtype},
        **{"max_shard_size": max_shard_size},
    }
    files = list(dict.fromkeys(file for each in (anchor, *others) for file in each.files))
    states = [_state(file) for file in files]
    request = hashlib.sha256(json.dumps([asked, states]).encode()).hexdigest()
    if (place / RECORD).is_file() and (record := read_json(place / RECORD)).get("request") == request:
        open_checkpoint(place, False)  # refuses what was damaged since
        return record
    meetings = meet(anchor, others, chosen, prior_precision)
    merger = Merger(chosen, weights, names, seed, None if dtype == "same" else KINDS[dtype], block_bytes)
    with drafting(place, request) as draft, _hashing(files) as hashes:
        plan = merger.plan(meetings)
        parts = {ADAPTER: plan} if anchor.is_adapter else shards(plan, max_shard_size)
        for file, part in merger.run(meetings, draft, parts, progress).items():
            check_written(draft.folder / file, part)
        if len(parts) > 1:
            write_text(draft.folder / INDEX, json.dumps(index_of(parts), indent=2) + "\n")
        is_base = set(meetings) <= anchor.tensors.keys() or others[0].is_adapter
        _copy((anchor if is_base else others[0]).folder, draft.folder, [ADAPTER_CONFIG] if anchor.is_adapter else [])
        sums = hashes()
        if changed := [file for file, state in zip(files, states, strict=True) if _state(file) != state]:
            raise ValueError(f"{str(changed[0])!r} changed while it was read; start again")
        record = {**asked, "sha256": sums, "torch": torch.__version__, "request": request}
        write_text(draft.folder / RECORD, json.dumps(record, indent=2) + "\n")
    return record


class Merger:
    """Goes over the tensors.

    Args:
        method: How they are merged.
        alphas: The weight of each model.
        names: Of the models, for messages.
        seed: Of what is dropped.
        dtype: Of the result; None is that of the base.
        block_bytes: Of a block.
    """

    def __init__(
        self, method: Method, alphas: Sequence[float], names: Sequence[str], seed: int, dtype: torch.dtype | None, block_bytes: int
    ) -> None:
        self.method, self.alphas, self.names, self.seed, self.dtype = method, tuple(alphas), names, seed, dtype
        self.step = max(1, block_bytes // torch.float32.itemsize)
        self.checks = Checks(method, names, alphas)
        self._rooms: dict[int, Room] = defaultdict(Room)

    def run(
        self, meetings: Mapping[str, Meeting], draft: Draft, files: Mapping[str, Mapping[str, Planned]], progress: Progress
    ) -> dict[str, Mapping[str, Planned]]:
        """Write the files of weights, and one of precisions; go on after what is there.

        Returns:
            What each file holds.
        """
        plan = {name: planned for part in files.values() for name, planned in part.items()}
        sure = {name: Planned(torch.float32, plan[name].shape) for name in plan if meetings[name].precisions}
        shares = {name: self._shares(name, meeting) for name, meeting in meetings.items()}
        before = list(plan)[: draft.done]
        if before:
            self.checks.restore(draft.notes)
        numbers = {name: number for number, name in enumerate(name for name in sorted(plan) if meetings[name].method)}
        tick, saved = progress("merge", len(plan)), monotonic()
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # blocks are small, and hashing has a thread of its own

            def writer(file: str, part: Mapping[str, Planned], about: Mapping[str, str]) -> Writer:
                return stack.enter_context(Writer(draft.folder / file, part, about, sum(name in part for name in before)))

            precisions = writer(PRECISION, sure, _about(meetings)) if sure else None
            for file, part in files.items():
                weights = writer(file, part, {"format": "pt"})
                for done, name in enumerate(plan, 1):
                    if name not in part or done <= len(before):
                        continue
                    self._merge(
                        name, Place(numbers.get(name, 0), seed=self.seed), meetings[name], shares[name], weights, precisions
                    )
                    tick()
                    if monotonic() - saved > EVERY:
                        for each in filter(None, (weights, precisions)):
                            each.sync()
                        draft.save(done, self.checks.state())
                        saved = monotonic()
                weights.sync()
            if precisions:
                precisions.sync()
        self.checks.finish(stacklevel=3)
        return {**files, **({PRECISION: sure} if sure else {})}

    def plan(self, meetings: Mapping[str, Meeting]) -> dict[str, Planned]:
        """The tensors of the result, as they are written."""
        kinds = {name: meeting.like.dtype for name, meeting in meetings.items()}
        kinds |= {name: self.dtype for name, kind in kinds.items() if kind.is_floating_point and self.dtype}
        plan = {name: Planned(kinds[name], meeting.like.shape) for name, meeting in meetings.items()}
        return {name: plan[name] for name in ordered(plan)}

    def _shares(self, name: str, meeting: Meeting) -> tuple[float, ...]:
        """The weights of the models in one tensor."""
        if meeting.method is None or meeting.method.averages == self.method.averages:
            return self.alphas
        if min(self.alphas) < 0:
            raise ValueError(f"{name!r} is not in the base, so nothing can be taken out of it; name a base that holds it")
        return meeting.method.weights(self.alphas, self.names)

    def _merge(
        self, name: str, place: Place, meeting: Meeting, alphas: Sequence[float], weights: Writer, precisions: Writer | None
    ) -> None:
        """One tensor."""
        if meeting.method is None:
            for start, stop in self._blocks(meeting):
                weights.append(meeting.like.read(start, stop, self._rooms[0]).to(weights.plan[name].dtype))
            return
        method, kind = meeting.method, weights.plan[name].dtype
        if method.trims:
            place = place._replace(thresholds=tuple(self._threshold(meeting, t) for t in range(len(alphas))))
        for start, stop in self._blocks(meeting):
            base, *models = self._pieces(meeting, start, stop)
            merged = method(base, models, alphas, place._replace(start=start))
            if start == 0 or meeting.precisions:  # of means the beginnings tell enough
                self.checks.update(base, models, merged)
            mean = merged.mean.to(kind)
            if not mean.sum(dtype=merged.mean.dtype).isfinite() and (bad := int((~mean.isfinite()).sum())):
                raise ValueError(f"{name!r} would have {bad} entries that are not finite in {kind}; look into the models")
            weights.append(mean)
            if meeting.precisions and merged.precision is not None and precisions:
                precisions.append(merged.precision.float())

    def _blocks(self, meeting: Meeting) -> Iterator[tuple[int, int]]:
        size = math.prod(meeting.like.shape)
        return ((start, min(start + self.step, size)) for start in range(0, size, self.step))

    def _pieces(self, meeting: Meeting, start: int, stop: int) -> list[Piece]:
        """A block of the base and of each model, in float32 or wider; with two dimensions where the tensor has as many."""
        shape = (1, -1) if meeting.is_anchored and len(meeting.like.shape) > 1 else (-1,)
        numbers = itertools.count()

        def read(stored: Stored) -> Tensor:
            return stored.read(start, stop, self._rooms[next(numbers)]).to(meeting.wide).view(shape)

        means = [read(mean) for mean in (meeting.base, *meeting.models)]
        if not meeting.precisions:
            return [Piece(mean, None) for mean in means]
        anchor, *precisions = [read(precision) for precision in meeting.precisions]
        if not self.method.averages:
            own = [None if prior is None else read(prior) for prior in meeting.priors]
            precisions = [s if p is None else onto(anchor, s, p) for s, p in zip(precisions, own, strict=True)]
        return [Piece(mean, precision) for mean, precision in zip(means, [anchor, *precisions], strict=True)]

    def _threshold(self, meeting: Meeting, model: int) -> float:
        """Of a task vector, by passes over its blocks."""

        def steps() -> Iterator[Tensor]:
            for start, stop in self._blocks(meeting):
                base, *models = self._pieces(replace(meeting, models=meeting.models[model : model + 1], precisions=()), start, stop)
                yield models[0].mean - base.mean

        return threshold(steps, self.method.density)


def _about(meetings: Mapping[str, Meeting]) -> dict[str, str]:
    """The metadata of merged precisions: the prior's, where the base has no other and it is one number."""
    priors: dict[str, float] = {}
    for name, meeting in meetings.items():
        if meeting.precisions:
            first = meeting.precisions[0]
            of = first.of if isinstance(first, Average) else (first,)
            if all(isinstance(each, Constant) for each in of):
                number = first.read(0, 1, Room()).item()
                priors |= {name: number} if number > 0 else {}
    return sidecar_metadata("merge", priors)


def _copy(home: Path, draft: Path, also: Sequence[str]) -> None:
    """The files beside the weights that a user of the model needs."""
    for path in sorted(home.iterdir()):
        wanted = path.name in also or (path.suffix in COPIED and path.name not in OWN and not path.name.startswith("."))
        if wanted and path.is_file() and path.stat().st_size <= LARGEST:
            shutil.copyfile(inside(home, path.name), draft / path.name)


def _state(file: Path) -> tuple[str, int, int]:
    """What changes when a file does."""
    about = file.stat()
    return str(file.resolve()), about.st_size, about.st_mtime_ns


@contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """SHA-256 of files, computed beside other work; what is yielded waits for it."""
    stop = threading.Event()

    def one(file: Path) -> str:
        found, room = hashlib.sha256(), memoryview(bytearray(2**20))
        with file.open("rb", buffering=0) as source:
            while not stop.is_set() and (count := source.readinto(room)):
                found.update(room[:count])
        return found.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        found = {str(file): pool.submit(one, file) for file in files}
        try:
            yield lambda: {file: each.result() for file, each in found.items()}
        finally:
            stop.set()
