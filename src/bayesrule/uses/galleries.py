"""Galleries of the report: which examples to show, their pictures, and the answers that the methods gave."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

TILES = 8  # examples shown in a row
SMALL = 96  # pixels: up to here a picture is kept exactly, every pixel a square
WIDEST = 192  # pixels: larger pictures are scaled down to this


class Shown(NamedTuple):
    """A method whose answers stand under the pictures, and its class probabilities."""

    name: str
    color: str
    test: Tensor
    unknown: Tensor | None


class Picture(NamedTuple):
    """The address of a picture, and whether it is to be enlarged pixel by pixel."""

    address: str
    small: bool


@dataclass(frozen=True)
class Tile:
    """An example: its picture, if any, what it is, where it comes from, and the answers: color, class and probability."""

    picture: Picture | None
    truth: str
    source: str
    answers: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Gallery:
    """A row of examples, or a list where there are no pictures."""

    heading: str
    note: str
    pictured: bool
    tiles: list[Tile]


def choose(shown: Sequence[Shown], labels: Tensor, thing: str) -> list[tuple[str, str, str, list[int]]]:
    """Which examples are worth a look, by the last method's certainty: heading, note, ``test`` or ``unknown``, examples."""
    chooser = shown[-1]
    confidence, answer = chooser.test.max(1)
    order = confidence.argsort(descending=True, stable=True)
    mistakes = order[(answer != labels)[order]]
    rows = [
        ("Surest mistakes", f"Wrong answers by {chooser.name}, given with the largest probability.", "test", mistakes),
        ("Least certain", f"The smallest top probability by {chooser.name}: here a person should look.", "test", order.flip(0)),
        ("Most certain", f"Test {thing}s with the largest top probability by {chooser.name}.", "test", order),
    ]
    for method in shown:
        if method.unknown is not None:
            surest = method.unknown.max(1).values.argsort(descending=True, stable=True)
            note = "Inputs that it should not be sure of: small confidence would be right."
            rows.append((f"Unknown, yet confident: {method.name}", note, "unknown", surest))
    return [(heading, note, part, order[:TILES].tolist()) for heading, note, part, order in rows if len(order)]


def galleries(
    shown: Sequence[Shown],
    classes: Sequence[str],
    labels: Tensor,
    thing: str,
    images: Any = None,
    names: Callable[[int], str] | None = None,
    unknown_images: Any = None,
    unknown_names: Sequence[str] = (),
) -> list[Gallery]:
    """The galleries; images and names are asked for those few examples only that are shown."""
    chosen = choose(shown, labels, thing)
    stores = {"test": images, "unknown": unknown_images}
    pictures = {
        part: {} if store is None else draw(store, (i for row in chosen if row[2] == part for i in row[3]))
        for part, store in stores.items()
    }

    def tile(part: str, i: int) -> Tile:
        if part == "test":
            truth = classes[int(labels[i])]
            source = names(i) if names is not None else "" if pictures[part] else f"test {thing} {i + 1}"
        else:
            truth = unknown_names[i] if len(unknown_names) else "unknown"
            source = "" if pictures[part] else f"unknown {thing} {i + 1}"
        answers = []
        for method in shown:
            probs: Tensor | None = getattr(method, part)
            if probs is not None:
                p, k = probs[i].max(0)
                answers.append((method.color, classes[int(k)], f"{100 * p:.0f} %"))
        return Tile(pictures[part].get(i), truth, source, answers)

    return [Gallery(heading, note, bool(pictures[part]), [tile(part, i) for i in rows]) for heading, note, part, rows in chosen]


def draw(images: Any, chosen: Iterable[int]) -> dict[int, Picture]:
    """Pictures of the chosen images, each read once: 8-bit values as they are, others scaled to the range of those chosen."""
    read = {i: torch.as_tensor(images[i]) for i in sorted(set(chosen))}
    eight_bit = all(image.dtype == torch.uint8 for image in read.values())
    lowest = 0.0 if eight_bit else min((image.min().item() for image in read.values()), default=0.0)
    highest = 255.0 if eight_bit else max((image.max().item() for image in read.values()), default=1.0)
    return {i: picture(image, lowest, highest) for i, image in read.items()}


def picture(image: Tensor, lowest: float, highest: float) -> Picture:
    """A picture of an image of shape (1 or 3, height, width): PNG if it is small, else scaled down and JPEG."""
    scaled = (image.float() - lowest) * (255 / max(highest - lowest, 1e-12))
    made = Image.fromarray(scaled.round().clamp(0, 255).to(torch.uint8).movedim(0, -1).squeeze(-1).contiguous().numpy())
    small, file = max(made.size) <= SMALL, BytesIO()
    if small:
        made.save(file, "PNG")
    else:
        made.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
        made.save(file, "JPEG", quality=85)
    return Picture(f"data:image/{'png' if small else 'jpeg'};base64,{b64encode(file.getvalue()).decode()}", small)
