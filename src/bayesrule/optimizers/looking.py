"""What the closed draws of a step have shown.

A closed draw waits with its gradient in ``p.grad``. It is read by the step itself, straight from there; only a second draw costs
memory for running means, and no further draw costs more. Reading clears ``p.grad``: nothing counts twice. After a second draw
``hand_over`` puts the mean gradient into ``p.grad``, for whoever unscales or clips it, and ``settle`` takes it back as it then
stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..plots import Plot
from ..shards import here, is_shared_out
from .cells import Cell, Layout
from .examples import TOLD, Examples
from .execution import THEN, Execution, Flats
from .fingerprints import are_equal, fingerprint, marks
from .workers import LOCAL, Share, Workers

FIRST = "first"
"""The block of the gradient that says where to look."""


class Host(Protocol):
    """What looks need of their optimizer."""

    execution: Execution
    layout: Layout
    workers: Workers
    examples: Examples


@dataclass
class Written:
    """A sample written into the parameters of some cells.

    Its block holds the mean while the sample is open, and the offset from the mean once it is closed. Without a block, the
    offset is made again from the numbers that made it.
    """

    block: str | None
    cells: list[tuple[Cell, Mapping[str, Any]]] = field(default_factory=list)

    def of(self, cell: Cell) -> tuple[Cell, Mapping[str, Any]] | None:
        """The sample of a cell as it was made, and from what numbers; None if there is none."""
        return next(((c, numbers) for c, numbers in self.cells if c.plot is cell.plot and c.step == cell.step), None)


class Looks:
    """The closed draws of one optimizer step.

    Attributes:
        written: The sample that was learned from last.
        dropped: Draws thrown away for a gradient that was not finite, since the optimizer was made.
        begun: Draws closed in this step.
        waiting: Whether the last one has not been read.
    """

    def __init__(self, host: Host, written: Written) -> None:
        self.host, self.written = host, written
        self.dropped = 0
        self.forget()

    def forget(self) -> None:
        """Start a new step: no draws yet."""
        self.begun = 0
        self.waiting = False
        self._lost = False  # whether all draws until now were thrown away
        self._weight, self._total = 1.0, 0.0
        self._averaged: dict[Tensor, None] = {}  # parameters that have running means
        self._begun_means: set[int] = set()  # plots whose running means belong to this step
        self._curved: set[int] = set()  # those whose curvature was seen
        self._handed: dict[Tensor, Tensor] = {}  # mean gradients that stand in p.grad
        self._read: dict[Plot, Tensor] = {}  # gradients that lie flat at the moment
        self._copied: Plot | None = None  # whose gradient stands in scratch
        self.written.cells = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been shown yet."""
        return not self._averaged and all(p.grad is None for p in self.host.layout.trainable())

    def add(self, weight: float) -> None:
        """One more draw is closed; what backpropagation left in ``p.grad`` waits to be read."""
        self.begun += 1
        self.waiting, self._weight = True, weight
        self.host.examples.measure()
        if self._averaged:
            self.read()
            self._hand_over()

    def reopen(self) -> None:
        """The last draw goes on."""
        self.begun -= 1
        self.waiting = False

    def lose(self) -> None:
        """A draw was thrown away; the gradient that it left goes with it."""
        clear(self.host.layout.trainable())
        if self._averaged:
            self._hand_over()

    # Reading

    def first_look(self) -> float:
        """Take the gradient of a first look away, from ``p.grad``; its norm over all elements."""
        params, plots = self.host.layout.trainable(), self.host.layout.plots()
        self._with_gradient()
        squares = 0.0
        for plot in plots:
            block = plot.flat(FIRST).copy_(plot.read(_gradients(plot.params), "gradient"))
            squares += self.host.workers.dot(plot, block, block)
        clear(params)
        return math.sqrt(self.host.workers.total([squares])[0])

    @torch.no_grad()
    def read(self) -> None:
        """Take the gradient of the closed draw into the running means and clear ``p.grad``."""
        if not self.waiting:
            return
        self.waiting = False
        fresh = self._with_gradient()
        if not fresh:  # nobody ran backward: no draw
            self.begun -= 1
            self.written.cells = []
        elif self._finite(fresh):
            self._average(fresh)
        clear(fresh)

    def give_up(self) -> None:
        """If every draw until now was thrown away: the same noise is drawn again."""
        if self.begun and not self.waiting and not self._averaged:
            self.begun, self._lost = 0, True

    def _average(self, fresh: list[Tensor], kind: str = "average") -> None:
        """A running mean over draws; a parameter without a gradient in one of them had the gradient zero there."""
        self._averaged.update(dict.fromkeys(fresh))
        self._total += self._weight
        for cell in self.host.layout.cells(list(self._averaged)):
            gradient, curvature = self._means(cell.plot)
            flats, numbers, drawn = self._at_hand(cell)
            flats = {**flats, "mean_gradient": gradient, "mean_curvature": curvature}
            numbers = {**numbers, "weight": self._weight / self._total}
            how = "average_blindly" if cell.squares_mean else kind
            if "mean_curvature" in self.host.execution.run(how, cell, flats, numbers, drawn):
                self._curved.add(id(cell.plot))

    def _means(self, plot: Plot) -> tuple[Tensor, Tensor]:
        """The blocks of a plot's running means, zero when they are first asked for in a step."""
        means = plot.flat("mean_gradient"), plot.flat("mean_curvature")
        if id(plot) not in self._begun_means:
            self._begun_means.add(id(plot))
            for mean in means:
                mean.zero_()
        return means

    def _hand_over(self) -> None:
        """Put the mean gradient into ``p.grad``, so that unscaling and clipping act on the mean."""
        self._handed = {p: torch.empty_like(p) for p in self._averaged}
        for cell in self.host.layout.cells(list(self._handed)):
            gradients = [self._handed.get(p, p) for p in cell.plot.params]
            cell.plot.write(self._means(cell.plot)[0], gradients, cell.only, "mean_gradient")
        for p, gradient in self._handed.items():
            p.grad = gradient

    @torch.no_grad()
    def _settle(self) -> bool:
        """Take the mean gradient back as it now stands; the curvature follows, element by element, whatever rescaled it.

        Where the mean is zero the curvature follows the common factor. Returns whether all is finite.
        """
        if not self._handed:
            return True
        handed, self._handed, self._read = self._handed, {}, {}
        for p in [p for p in handed if p.grad is None]:  # held back
            self._averaged.pop(p)
        back = [p for p in handed if p.grad is not None]
        changes = []
        for cell in self.host.layout.cells(back):
            before = self._means(cell.plot)[0]
            before = before.to(cell.plot.params[0].dtype).to(cell.plot.dtype)  # as it was handed over
            gradients = _gradients(cell.plot.params)
            if not cell.plot.holds(before, gradients):
                changes.append((cell, before, cell.plot.read(gradients, "gradient").clone()))
        common = self._common(changes)
        for cell, before, after in changes:
            gradient, curvature = self._means(cell.plot)
            factor = torch.where(before == 0, common, after / before)
            cell.plot.keep(after, gradient, cell.only)
            cell.plot.keep(curvature * factor**cell.rule.curvature.degree, curvature, cell.only)
            self.host.execution.rescale(cell, common)
        finite = not back or self._finite(back)
        clear(back)
        return finite

    def _common(self, changes: Sequence[tuple[Cell, Tensor, Tensor]]) -> float:
        """The factor between gradients before and after, by least squares."""
        dot = self.host.workers.dot
        sizes = sum(dot(cell.plot, before, before) for cell, before, _ in changes)
        products = sum(dot(cell.plot, before, after) for cell, before, after in changes)
        size, product = self.host.workers.total([sizes, products])
        return product / size if size else 1.0

    def renew(self) -> bool:
        """Before more draws: take everything into the running means. False if it was not finite, and is forgotten."""
        self.read()
        finite = self._settle()
        if not finite:
            self.forget()
        return finite

    # The step

    @torch.no_grad()
    def take(self) -> tuple[list[Tensor], Callable[[Cell], Flats]] | None:
        """The parameters to move, and what moves a cell of them and returns its flats; None if every draw was dropped."""
        workers = self.host.workers
        workers.meet(self.shown)
        if workers.exchanges:
            return self._take_together()
        if self._averaged:
            self.read()
            finite = self._settle()
            return (list(self._averaged), self._on_average) if finite else None
        fresh = self._with_gradient()
        if self._lost and not fresh:
            return None
        if self.begun and (not self.waiting or (fresh and not self._finite(fresh))):
            clear(fresh)
            return None
        return fresh, self._by_gradient

    def _take_together(self) -> tuple[list[Tensor], Callable[[Cell], Flats]] | None:
        """The same over all ranks. Whatever this one has seen, if anything, it takes part in the sums."""
        workers, plots, params = self.host.workers, self.host.layout.plots(), self.host.layout.trainable()
        mine = self._share(params, plots)
        every = mine.summed(workers)
        if not every.weight:
            return None if every.drew else ([], self._on_average)
        gradients = every.gradients
        if not workers.apart and not are_equal(every.marks, workers.size):
            workers.part()
            gradients = workers.summed(self._gradients_of(plots, mine.weight))
        if not workers.apart and every.square * workers.size > every.weight**2 * (1 + 1e-5):
            raise RuntimeError(
                "the draws of the ranks differ in weight, but DistributedDataParallel has averaged their gradients equally; "
                "multiply each loss by its weight instead"
            )
        self._averaged = {p: None for p, weight in zip(params, every.present, strict=True) if weight}
        self._curved = {id(plot) for plot, weight in zip(plots, every.seen, strict=True) if weight}
        factors = every.factors(params)
        if not all(math.isfinite(float(total.sum())) for total in every.curvatures):  # of gradients that were mended since
            self.dropped += 1
            return None
        degrees = {id(cell.plot): cell.rule.curvature.degree for cell in self.host.layout.cells(params)}
        for plot, weight, total in zip(plots, every.seen, every.curvatures, strict=True):
            scales = [factors.get(p, 1.0) ** degrees[id(plot)] / (weight or 1.0) for p in plot.params]
            plot.scatter(total, self._means(plot)[1], scales)
        for plot, total in zip(plots, gradients, strict=bool(gradients)):
            plot.scatter(total, self._means(plot)[0], [1 / every.weight] * len(plot.params))
        return list(self._averaged), self._on_average

    def _share(self, params: Sequence[Tensor], plots: Sequence[Plot]) -> Share:
        """What this rank brings, all times the weight of its draws."""
        workers, drew = self.host.workers, self.begun or int(self._lost)
        alone = self.waiting and not self._averaged and workers.listens  # its gradient may have been rescaled since
        products, sizes, heard = self._rescaled(plots) if alone else ({}, {}, {})
        if not self.begun and (fresh := self._with_gradient()):  # a step at the mean: it shows no curvature
            if self._finite(fresh):
                self._average(fresh, "average_blindly")
            clear(fresh)
        self.read()
        weight = self._total if self._settle() else 0.0
        seen = [weight * (id(plot) in self._curved) for plot in plots]
        return Share(
            weight,
            weight**2,
            drew,
            marks(0 if workers.apart else fingerprint(self.shown())),
            seen,
            [weight and weight * products.get(p, 0.0) for p in params],
            [weight and weight * sizes.get(p, 0.0) for p in params],
            [weight and weight * heard.get(p, 0.0) for p in params],
            [weight * (p in self._averaged) for p in params],
            [_weighted(plot.joined(self._means(plot)[1]), w) for plot, w in zip(plots, seen, strict=True)],
            self._gradients_of(plots, weight) if workers.apart else [],
        )

    def _gradients_of(self, plots: Sequence[Plot], weight: float) -> list[Tensor]:
        return [_weighted(plot.joined(self._means(plot)[0]), weight) for plot in plots]

    def _rescaled(self, plots: Sequence[Plot]) -> tuple[dict[Tensor, float], dict[Tensor, float], dict[Tensor, float]]:
        """By parameter: the inner product of this rank's gradient with the one in ``p.grad``, and the squares of that and of this.

        If ``p.grad`` is f times the mean over ranks, or on each rank f times its own, f is the sum over ranks of the squares over
        that of the products, whoever unscaled or clipped.
        """
        products = dict.fromkeys(self.host.layout.trainable(), 0.0)
        sizes, heard = dict(products), dict(products)
        for plot in plots:
            after = plot.read(_gradients(plot.params), "gradient")
            for p, a, b in zip(plot.params, plot.views(plot.flat(LOCAL)), plot.views(after), strict=True):
                products[p] += float(a.reshape(-1).dot(b.reshape(-1)))
                sizes[p] += float(b.square().sum())
                heard[p] += float(a.square().sum())
        self._read = {}
        return products, sizes, heard

    def shown(self) -> list[Tensor]:
        """The gradients of this step, wherever they stand, of parameters that lie here as a whole."""
        if self._averaged and not self.waiting:
            plots = self.host.layout.plots()
            means = [(p, m) for plot in plots for p, m in zip(plot.params, plot.views(self._means(plot)[0]), strict=True)]
        else:
            means = [(p, p.grad) for p in self.host.layout.trainable() if p.grad is not None]
        return [mean for p, mean in means if not is_shared_out(p)]

    def _on_average(self, cell: Cell) -> Flats:
        """Move by the mean over the draws that were read."""
        gradient, curvature = self._means(cell.plot)
        flats = {"mean": cell.plot.mean(), **cell.kept}
        if cell.squares_mean:
            flats |= {"gradient": gradient}
        else:
            flats |= {"mean_gradient": gradient, **({"mean_curvature": curvature} if id(cell.plot) in self._curved else {})}
        self.host.execution.run("move" if cell.squares_mean else "move_on_average", cell, flats, cell.inputs)
        return flats

    def _by_gradient(self, cell: Cell) -> Flats:
        """Move by the gradient that stands in ``p.grad``; without a draw it tells no curvature to a rule that draws."""
        flats, numbers, drawn = self._at_hand(cell)
        kind = "move_blindly" if cell.rule.expectation.draws and not self.begun else "move"
        self.host.execution.run(kind, cell, flats, numbers, drawn)
        return flats

    def _at_hand(self, cell: Cell) -> tuple[Flats, Mapping[str, Any], Cell | None]:
        """What makes a look of the gradient in ``p.grad``: flats, numbers, and the cell as it was drawn if that is made again."""
        plot, numbers = cell.plot, cell.inputs
        flats = {"mean": plot.mean(), **cell.kept, "gradient": self._gradient(plot)}
        made = self.written.of(cell)
        if cell.climbs and self.begun:
            flats["first"] = plot.flat(FIRST)
        if cell.rule.curvature.squares_examples or cell.rule.curvature.asks_hessian:
            self.host.examples.check()
            self.host.examples.follow()
            flats["squares" if cell.rule.curvature.squares_examples else "probes"] = plot.flat(TOLD)
        if self.host.workers.listens and self.written.cells:  # what is not drawn itself was seen at this rank's draw, too
            flats["local"] = plot.flat(LOCAL)
        if made is None:
            return flats, numbers, None
        if self.written.block:
            return {**flats, "offset": plot.flat(self.written.block)}, numbers, None
        then = {THEN + name: n for name, n in made[1].items()}
        return {**flats, "pairs": plot.where.numbers}, {**numbers, **then}, made[0]

    def _with_gradient(self) -> list[Tensor]:
        given = [(p, p.grad) for p in self.host.layout.trainable()]
        fresh = [p for p, gradient in given if gradient is not None]
        if any(gradient is not None and gradient.layout != torch.strided for _, gradient in given):
            raise RuntimeError("sparse gradients are not supported; make the embedding with sparse=False")
        return fresh

    def _finite(self, params: Sequence[Tensor]) -> bool:
        """Whether all gradients are finite: one pass over each, and a second only where the sum of squares is not."""
        plots = {id(cell.plot): cell.plot for cell in self.host.layout.cells(params)}.values()
        self._read, sums = {}, []
        for plot in plots:
            flat = self._gradient(plot)
            sums.append(flat.dot(flat))
            self._read[plot] = flat
        total = self.host.workers.total
        finite = math.isfinite(*total([float(sum(sums))]))
        if not finite:
            finite = not any(total([float(sum(int((~here(p.grad).isfinite()).sum()) for p in params if p.grad is not None))]))
        self.dropped += not finite
        return finite

    def _gradient(self, plot: Plot) -> Tensor:
        """The gradient in ``p.grad``, flat; what was read to see whether it is finite need not be read again."""
        if plot in self._read:
            return self._read.pop(plot)
        gradients = _gradients(plot.params)
        if not plot.sees(gradients):  # the copy takes the place of another's
            self._read = {other: flat for other, flat in self._read.items() if other is not self._copied}
            self._copied = plot
        return plot.read(gradients, "gradient")


def _weighted(flat: Tensor, weight: float) -> Tensor:
    """Times a weight; what has none may hold anything."""
    return flat.mul_(weight) if weight else flat.zero_()


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    gradients = [p.grad for p in params]
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]


def clear(params: Sequence[Tensor]) -> None:
    """No gradients."""
    for p in params:
        p.grad = None
