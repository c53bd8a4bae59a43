"""Whatever is done to a file, reading it works or says in one line what is wrong: no other exception, no hang, no warning."""

import gzip
import os
import random
import shutil
import signal
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from bayesrule.recipes.formats import folders
from bayesrule.recipes.formats.reading import UNEXPECTED, read

SEEDS = 18  # mutants of each kind of data
LIMIT = 5  # seconds that one may take before it counts as a hang


@contextmanager
def alarm(seconds, what):
    def ring(*_):
        raise AssertionError(f"{what} hangs")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def idx(root, pack=False):
    for stem, n in (("train", 6), ("t10k", 4)):
        for what, header, content in (
            ("images-idx3", struct.pack(">IIII", 0x803, n, 5, 5), bytes(range(25)) * n),
            ("labels-idx1", struct.pack(">II", 0x801, n), bytes(i % 3 for i in range(n))),
        ):
            content = header + content
            (root / f"{stem}-{what}-ubyte{'.gz' * pack}").write_bytes(gzip.compress(content, mtime=0) if pack else content)


def images(root, ending, mode="RGB", **options):
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for i in range(2):
                pixels = (np.arange(300).reshape(10, 10, 3) * (i + 1) % 256).astype(np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / label / f"{i}.{ending}", **options)


def turned(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    images(root, "jpeg", exif=exif)


def arrays(root, pack=False):
    x, y = np.arange(200.0).reshape(8, 5, 5), np.array(["a", "b"] * 4) if pack else np.arange(8) % 3
    (np.savez_compressed if pack else np.savez)(root / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)


def cifar(root, labels=1):
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin") if labels == 1 else ("train.bin", "test.bin"):
        (root / name).write_bytes(b"".join(bytes([i] * labels) + bytes(3072) for i in range(3)))
    (root / ("batches.meta.txt" if labels == 1 else "fine_label_names.txt")).write_text("a\nb\nc\n")


LINES = "age,color,size,kind\n" + "".join(f'{i},{"red" if i % 2 else "blue"},"{i / 7}",{"xyz"[i % 3]}\n' for i in range(20))


def table(root, name="a.csv"):
    content = LINES.replace(",", "\t").encode() if "tsv" in name else LINES.encode()
    (root / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)


def tables(root):
    for name in ("train.csv", "test.csv", "val.csv.gz"):
        table(root, name)


MAKERS = {
    "idx": idx,
    "idx packed": lambda root: idx(root, pack=True),
    "png": lambda root: images(root, "png"),
    "png with a palette": lambda root: images(root, "png", "P", transparency=1),
    "png 16 bits": lambda root: images(root, "png", "I;16"),
    "gif named png": lambda root: images(root, "png", format="GIF"),
    "jpeg": turned,
    "npz": arrays,
    "npz packed": lambda root: arrays(root, pack=True),
    "cifar-10": cifar,
    "cifar-100": lambda root: cifar(root, 2),
    "csv": table,
    "tsv packed": lambda root: table(root, "a.tsv.gz"),
    "csv in parts": tables,
}


def truncate(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def flip(path, rng):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 4, 40)) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def head(path, rng):
    """Where the dimensions are, they are huge now, or all ones, or nothing."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(min(len(content), 48) or 1)
    content[start : start + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"9999"))
    path.write_bytes(content)


def inside(path, rng):
    """The same to what is packed, when it is packed again."""
    content = path.read_bytes()
    packed = content[:2] == b"\x1f\x8b"
    try:
        path.write_bytes(gzip.decompress(content) if packed else content)
    except (OSError, EOFError, ValueError, gzip.zlib.error):
        return
    rng.choice((truncate, flip, head, garbage, word))(path, rng)
    path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def garbage(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 100, 5000))))


OLD = (b",", b"\n", b"red", b"0.", b'"', b"1", b"kind", b"\t")
NEW = (b"nan", b"inf", b"1e999", b"", b'"', b"\n", b"\r", b",", b"\xff\xfe", b"\0", b"age", "ü".encode(), b"-", b"x" * 200_000)


def word(path, rng):
    """Something that a table may hold takes the place of something else."""
    path.write_bytes(path.read_bytes().replace(rng.choice(OLD), rng.choice(NEW), rng.choice((1, 2, -1))))


OTHER = (b"", bytes(1000), b"hello\n", b"\x1f\x8b" + bytes(30), b"PK\x03\x04" + bytes(40), b"\x89PNG\r\n\x1a\n" + bytes(99))


def replace(path, rng):
    path.write_bytes(rng.choice(OTHER))


def delete(path, rng):
    path.unlink()


def rename(path, rng):
    odd = os.fsdecode(b"caf\xe9\n" + os.fsencode(path.name))
    path.rename(path.with_name(rng.choice((odd, f"x{path.name}", f"{path.name}.gz", path.name.upper(), path.stem))))


def swap(path, rng):
    files = sorted(each for each in path.parent.rglob("*") if each.is_file())
    other = rng.choice(files or [path])
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def odd(path, rng):
    """No file at all, though it has the name of one."""
    path.unlink()
    rng.choice((lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(path.parent), lambda: path.symlink_to(os.devnull)))()


SHAPES = ((8, 0), (8,), (8, 2, 2, 2, 2), (7, 5), (8, 5))
KEYS = ["x_train", "y_train", "x_test", "y_test", "x", "y"]


def values(path, rng):
    """Arrays that are no data."""
    if path.suffix != ".npz":
        return flip(path, rng)
    x = np.full(rng.choice(SHAPES), rng.choice((np.nan, {}, np.datetime64(0, "s"), 1j, "text", 1e300)))
    np.savez(path, **dict(zip(rng.sample(KEYS, 4), (x, np.arange(8), x, x), strict=True)))


MUTATIONS = (truncate, flip, head, inside, garbage, word, replace, delete, rename, swap, odd, values)


def mutate(root, rng):
    """One to three changes; returns what they were."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        files = sorted(each for each in root.rglob("*") if each.is_file() and not each.is_symlink())
        if files:
            path, change = rng.choice(files), rng.choice(MUTATIONS)
            done.append(f"{change.__name__} {path.name!r}")
            change(path, rng)
    return ", ".join(done)


def look(spec):
    """Read everything, the way that a run does."""
    data = read(str(spec))
    n = len(data.source)
    assert n and len(data.labels) == len(data.part) == n
    assert len(data.classes) > int(data.labels.max()) and all(note == " ".join(note.split()) for note in data.notes)
    examples = data.source.read(torch.arange(n))
    assert examples.shape == (n, *data.source.shape) and examples.dtype in (torch.uint8, torch.float32)
    assert examples.isfinite().all()
    assert all(data.source.name(i).isprintable() for i in range(n)) and data.source.fingerprint()


STREAMED = [kind for kind in MAKERS if "png" in kind or kind == "jpeg"]


@pytest.mark.parametrize(("kind", "memory"), [(kind, folders.MEMORY) for kind in MAKERS] + [(kind, 0) for kind in STREAMED])
def test_mutants(tmp_path, monkeypatch, kind, memory):
    monkeypatch.setattr(folders, "MEMORY", memory)
    made = tmp_path / "made"
    made.mkdir()
    MAKERS[kind](made)
    refused = 0
    for seed in range(SEEDS):
        rng = random.Random(f"{kind} {seed}")
        root = tmp_path / str(seed)
        shutil.copytree(made, root)
        what = f"{kind}, seed {seed}: {mutate(root, rng)}"
        files = sorted(root.iterdir())
        spec = files[0] if len(files) == 1 and files[0].suffix in (".npz", ".csv", ".tsv", ".gz") else root
        with alarm(LIMIT, what):
            try:
                look(spec)
            except (ValueError, OSError) as error:
                said = str(error)
                refused += 1
                assert said.isprintable() and str(tmp_path)[:20] in said and UNEXPECTED not in said, f"{what}: {said}"
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__} escapes") from error
        shutil.rmtree(root)
    assert refused >= SEEDS // 8, "the mutations do harm"


@pytest.mark.parametrize("kind", MAKERS)
def test_what_was_not_mutated_is_read(tmp_path, kind):
    MAKERS[kind](tmp_path)
    files = sorted(tmp_path.iterdir())
    look(files[0] if len(files) == 1 and files[0].is_file() else tmp_path)
