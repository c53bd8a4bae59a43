"""Sentences of four domains with their sentiment, as tables: from the source archive of vaderSentiment (Hutto and Gilbert, 2014).

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python tables.py vaderSentiment-3.3.2.tar.gz data/

writes data/{movies,tweets,amazon,news}/{train,validation,test}.csv, and data/all, the three tasks together. The score of a
sentence is the mean of twenty people's, from -4 to 4; those nearer to 0 than 0.5 are left out. One sentence is in one part only.
"""

import csv
import io
import sys
import tarfile
from hashlib import blake2b
from pathlib import Path

FILES = {"movies": "movieReviewSnippets", "tweets": "tweets", "amazon": "amazonReviewSnippets", "news": "nytEditorialSnippets"}
TASKS = ("tweets", "amazon", "news")
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"


def sentences(archive: Path) -> dict[str, list[tuple[str, str]]]:
    """Texts and labels by domain; of a text that occurs twice the first."""
    with tarfile.open(archive) as outer:
        inner = next(member for member in outer if member.name.endswith(INNER))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as files:
            seen, found = set(), {}
            for domain, name in FILES.items():
                lines = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read().decode("utf-8", "replace")
                rows = [line.split("\t", 2) for line in lines.splitlines()]
                scored = [(text.strip(), float(score)) for _, score, text in rows if abs(float(score)) >= 0.5]
                found[domain] = [
                    (text, "positive" if score > 0 else "negative")
                    for text, score in scored
                    if not (text in seen or seen.add(text))
                ]
    return found


def part(text: str) -> str:
    """Decided by the text alone: 70 % train, 10 % validation, 20 % test."""
    place = blake2b(text.encode(), digest_size=1).digest()[0] / 256
    return "train" if place < 0.7 else "validation" if place < 0.8 else "test"


def main(archive: Path, out: Path) -> None:
    found = sentences(archive)
    found["all"] = [row for task in TASKS for row in found[task]]
    for domain, rows in found.items():
        (out / domain).mkdir(parents=True, exist_ok=True)
        for name in ("train", "validation", "test"):
            with open(out / domain / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                own = [row for row in rows if part(row[0]) == name]
                csv.writer(file).writerows([("text", "label"), *own])
                positive = sum(label == "positive" for _, label in own)
                print(f"{domain:8} {name:10} {len(own):6,} sentences, {positive / len(own):.0%} positive")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
