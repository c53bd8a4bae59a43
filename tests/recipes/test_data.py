"""Data: split once and for all, looked through once, scaled by the training part, and streamed in their order."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from bayesrule.recipes import data as module
from bayesrule.recipes.data import READERS, Data, Part, Scale, arrange, check, load, survey
from bayesrule.recipes.sources import ANY, TEST, TRAIN, VALIDATION, Collection, Files, Paths, stored


def collection(labels, part=ANY, values=None, kind="image", classes=None, **options):
    """Examples that all differ, with these labels and parts."""
    labels = torch.as_tensor(labels)
    if values is None:
        values = torch.randint(0, 256, (len(labels), 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    part = torch.full((len(labels),), part) if isinstance(part, int) else torch.as_tensor(part)
    classes = classes or tuple("abcdefghij"[: int(labels.max()) + 1])
    return Collection("mine", kind, stored(values, "mine"), labels, classes, part.to(torch.int8), "arrays", **options)


def counts(data):
    return {name: part.labels.bincount(minlength=len(data.classes)).tolist() for name, part in data.parts.items()}


def surveyed(*arguments, **options):
    return survey(arrange(collection(*arguments, **options)))


class TestNamed:
    @pytest.mark.parametrize(
        ("name", "held_out", "classes", "sizes"),
        [
            ("digits", (), 10, (898, 270, 629)),
            ("digits", ("8", "9"), 8, (721, 217, 505)),
            ("mnist5k", ("8", "9"), 8, (2000, 600, 1400)),
        ],
    )
    def test_parts_are_whole_disjoint_and_stratified(self, name, held_out, classes, sizes):
        data = load(name, held_out)
        assert tuple(map(len, data.parts.values())) == sizes and len(data.classes) == classes
        for part in data.parts.values():
            share = part.labels.bincount(minlength=classes) / len(part)
            assert (share - 1 / classes).abs().max() < 0.02 and part.labels.dtype == torch.int64
        pieces = [*data.parts.values(), *([data.unknown] if held_out else [])]
        everything = torch.cat([part.indices for part in pieces])
        assert sorted(everything.tolist()) == list(range(len(data.train.source)))
        inputs = data.scale(data.train.source.read(data.train.indices))
        assert inputs.dtype == torch.float32 and abs(inputs.mean()) < 1e-4 and abs(inputs.std() - 1) < 1e-4

    def test_held_out_classes_are_only_among_the_unknown(self):
        data = load("digits", held_out=("8", "9"))
        assert set(data.unknown_names) == {"8", "9"} and len(data.unknown) == len(data.unknown_names) == 354
        assert data.classes == tuple("01234567") and (data.unknown.labels == -1).all()
        assert load("digits").unknown is None and load("digits").unknown_names == ()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("digit",), "there is no data 'digit'.*did you mean 'digits'"),
            (("digits", ("8", "12")), r"there is no class '12' in digits to hold out; did you mean '2'\?"),
            (("digits", ("zzz",)), r"there is no class 'zzz' in digits to hold out; its classes are 0, 1, 2, 3, 4 and 5 more"),
            (("digits", tuple("0123456789")), "has no classes|one class"),
            (("digits", tuple("012345678")), "digits has one class only, '9'"),
        ],
    )
    def test_what_is_not_there_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            load(*arguments)


class TestSplit:
    @pytest.mark.parametrize(
        ("sizes", "split", "expected"),
        [
            ([20, 100], None, ([14, 70], [3, 15], [3, 15])),
            ([20, 100], (0.5, 0.25), ([10, 50], [5, 25], [5, 25])),
            ([1, 100], None, ([1, 70], [0, 15], [0, 15])),
            ([2, 100], None, ([1, 70], [1, 15], [0, 15])),
            ([3, 100], None, ([1, 70], [1, 15], [1, 15])),
            ([4, 100], None, ([2, 70], [1, 15], [1, 15])),
            ([3, 10], (0.9, 0.05), ([1, 8], [1, 1], [1, 1])),
            ([3, 10], (0.05, 0.05), ([1, 1], [1, 1], [1, 8])),
        ],
    )
    def test_each_class_is_split_by_the_shares(self, sizes, split, expected):
        labels = [k for k, size in enumerate(sizes) for _ in range(size)]
        data = arrange(collection(labels), split=split)
        assert tuple(counts(data).values()) == expected

    def test_what_is_given_is_kept(self):
        part = [TRAIN, VALIDATION, TEST] * 10
        data = arrange(collection([0, 1] * 15, part))
        for which, found in zip((TRAIN, VALIDATION, TEST), data.parts.values(), strict=True):
            assert found.indices.tolist() == [i for i, p in enumerate(part) if p == which]
        assert arrange(collection([0, 1] * 15, part), split=(0.5, 0.25)).train.indices.tolist() == data.train.indices.tolist()

    @pytest.mark.parametrize(
        ("given", "sizes"),
        [
            ([TRAIN] * 200 + [TEST] * 40, (180, 20, 40)),
            ([TRAIN] * 200 + [VALIDATION] * 40, (170, 40, 30)),
            ([TRAIN] * 240, (180, 24, 36)),
        ],
    )
    def test_what_is_missing_is_taken_of_the_training_part(self, given, sizes):
        data = arrange(collection([0, 1] * 120, given))
        assert tuple(map(len, data.parts.values())) == sizes
        assert all(abs(row[0] - row[1]) <= 1 for row in counts(data).values())
        kept = [i for i, part in enumerate(given) if part == TEST]
        assert not kept or data.test.indices.tolist() == kept

    def test_a_part_of_held_out_classes_alone_counts_as_missing(self):
        labels, part = [0, 1] * 50 + [2] * 10, [TRAIN] * 100 + [TEST] * 10
        data = arrange(collection(labels, part), held_out=("c",))
        assert counts(data) == {"training": [38, 38], "validation": [4, 4], "test": [8, 8]}
        assert len(data.unknown) == 10 and data.classes == ("a", "b")

    def test_the_seed_decides(self):
        found = [arrange(collection([0, 1] * 50), seed=seed).train.indices.tolist() for seed in (0, 0, 1)]
        assert found[0] == found[1] != found[2]

    def test_labels_are_renumbered_where_classes_are_held_out(self):
        labels = torch.arange(60) % 3
        data = arrange(collection(labels), held_out=("b",))
        assert data.classes == ("a", "c") and data.unknown_names == ("b",) * 20
        for part in data.parts.values():
            assert (labels[part.indices] == part.labels * 2).all()

    def test_examples_without_a_class_are_left_out(self):
        data = arrange(collection([0, 1, -1] * 20, classes=("a", "b")))
        assert sum(map(len, data.parts.values())) == 40 and all((part.labels >= 0).all() for part in data.parts.values())

    @pytest.mark.parametrize("split", [(0.0, 0.5), (0.5, 0.0), (1.0, 0.1), (0.7, 0.3), (-1.0, 0.5), (float("nan"), 0.1)])
    def test_shares_that_are_none_are_refused(self, split):
        with pytest.raises(ValueError, match="split must be two shares > 0 with a sum < 1"):
            arrange(collection([0, 1] * 20), split=split)


class TestCheck:
    @pytest.mark.parametrize(
        ("labels", "part", "options", "message"),
        [
            ([0] * 20, ANY, {}, "mine has one class only, 'a'; there is nothing to tell it from"),
            ([-1] * 20, ANY, {"classes": ()}, "mine has no classes to learn: its images lie in no class folders"),
            ([0, 1], ANY, {}, r"the validation part of mine is empty; give more images or other shares \(--split 0.7 0.15\)"),
            (
                [0, 1] * 9 + [2] * 3,
                [TRAIN] * 18 + [TEST] * 3,
                {},
                r"3 test images of mine are of classes without any training image ",
            ),
            ([0, 1] * 9 + [2], [TRAIN] * 18 + [VALIDATION], {}, r"1 validation images? of mine (are|is) of .*: --held-out c"),
            ([0, 1] * 9, [TEST] * 9 + [VALIDATION] * 9, {}, "the training part of mine is empty"),
        ],
    )
    def test_what_nothing_can_be_learned_from_is_refused(self, labels, part, options, message):
        with pytest.raises(ValueError, match=message):
            check(arrange(collection(labels, part, **options)))

    def test_classes_that_are_held_out_may_be_in_the_test_part_alone(self):
        labels = [0, 1] * 20 + [2] * 3
        check(arrange(collection(labels, [TRAIN] * 30 + [TEST] * 13), held_out=("c",)))


class TestScale:
    @pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 2)])
    @pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
    def test_is_that_of_the_training_part_for_each_channel(self, shape, kind):
        values = (
            torch.rand(300, *shape, generator=torch.Generator().manual_seed(1)) * 50 + torch.arange(300)[:, None, None, None] % 3
        )
        values = (values * torch.arange(1, shape[0] + 1)[:, None, None]).to(kind)
        data = surveyed([0, 1] * 150, values=values)
        rows = values[data.train.indices].double().numpy()
        np.testing.assert_allclose(data.scale.center, rows.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(data.scale.spread, rows.std((0, 2, 3), ddof=1), rtol=1e-9)
        scaled = data.scale(values[data.train.indices]).double()
        assert scaled.mean((0, 2, 3)).abs().max() < 1e-5 and (scaled.std((0, 2, 3)) - 1).abs().max() < 1e-3

    def test_of_a_table_yes_and_no_stay_and_what_is_constant_becomes_nothing(self):
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(100, 1, generator=generator) * 1e-3 + 7
        values = torch.cat([numbers, numbers.gt(7).float(), torch.full((100, 1), 5.5), torch.zeros(100, 1), numbers * 1e8], 1)
        data = surveyed([0, 1] * 50, values=values, kind="row")
        center, spread = (torch.tensor(side) for side in (data.scale.center, data.scale.spread))
        assert center[1] == center[3] == 0 and spread[1] == spread[2] == spread[3] == 1
        scaled = data.scale(values)
        assert (scaled[:, 1] == values[:, 1]).all() and (scaled[:, 2:4] == 0).all() and scaled.dtype == torch.float32
        assert (scaled[data.train.indices].std(0)[[0, 4]] - 1).abs().max() < 0.02

    def test_pixels_of_two_values_are_scaled(self):
        values = torch.randint(0, 2, (100, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        data = surveyed([0, 1] * 50, values=values)
        assert data.scale.center[0] == pytest.approx(0.5, abs=0.05) and data.scale.spread[0] == pytest.approx(0.5, abs=0.01)

    @pytest.mark.parametrize("kind", ["image", "row"])
    def test_what_is_constant_throughout_is_refused(self, kind):
        values = torch.full((40, 1, 2, 2), 9.0) if kind == "image" else torch.full((40, 3), 9.0)
        with pytest.raises(ValueError, match=f"all training {kind}s of mine are the same; there is nothing to learn"):
            surveyed([0, 1] * 20, values=values, kind=kind)

    def test_images_that_are_all_the_same_are_refused(self):
        values = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).repeat(40, 1, 1, 1)
        with pytest.raises(ValueError, match="all training images of mine are the same"):
            surveyed([0, 1] * 20, values=values)

    def test_a_scale_that_is_given_is_taken_and_nothing_is_read(self, tmp_path, monkeypatch):
        np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).integers(0, 9, (60, 4, 4), np.uint8), y=np.arange(60) % 2)
        first = load(str(tmp_path / "a.npz"))
        monkeypatch.setattr(module, "survey", lambda *_: pytest.fail("it was read"))
        monkeypatch.setattr(Part, "stream", lambda *_: pytest.fail("it was read"))
        again = load(str(tmp_path / "a.npz"), scale=first.scale)
        assert again.scale == first.scale and again.fingerprint == first.fingerprint and isinstance(again, Data)

    def test_means_are_exact_where_numbers_are_large(self):
        values = torch.full((100, 2), 1e6) + torch.arange(100)[:, None] % 5
        data = surveyed([0, 1] * 50, values=values, kind="row")
        rows = values[data.train.indices].double()
        assert data.scale.spread[0] == pytest.approx(rows[:, 0].std().item(), rel=1e-4)
        assert Scale((1e6,), (2.0,))(torch.tensor([[1e6 + 4]])).item() == 2.0


class TestNotes:
    def values(self, number=100):
        return torch.randint(0, 256, (number, 1, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)

    def test_clean_data_have_none(self):
        assert surveyed([0, 1] * 50).notes == ()

    def test_those_of_the_reader_come_first(self):
        values = self.values()
        values[:] = values[0:1] + torch.arange(100, dtype=torch.uint8)[:, None, None, None]
        values[3] = 7
        assert surveyed([0, 1] * 50, values=values, notes=("it was read",)).notes[0] == "it was read"

    def test_what_occurs_in_two_parts_is_counted_and_named(self):
        values = self.values()
        values[60], values[61], values[85] = values[5], values[5], values[6]
        notes = surveyed([0, 1] * 50, [TRAIN] * 60 + [TEST] * 25 + [VALIDATION] * 15, values=values).notes
        assert notes == (
            "2 of 25 test images also occur in the training part (the first: mine[60] is mine[5]); "
            "figures on the test part flatter",
            "1 of 15 validation images also occur in the training part (the first: mine[85] is mine[6]); "
            "figures on the validation part flatter",
        )

    def test_what_occurs_in_the_training_part_twice_is_counted_and_told_apart_by_class(self):
        values = self.values()
        values[10], values[12], values[13] = values[0], values[0], values[0]
        notes = surveyed([0, 1] * 50, [TRAIN] * 60 + [TEST] * 20 + [VALIDATION] * 20, values=values).notes
        assert notes == (
            "3 training images occur more than once",
            "1 of them under different classes (the first: mine[13] and mine[0])",
        )

    def test_what_occurs_in_the_test_part_twice_is_counted(self):
        values = self.values()
        values[61] = values[60]
        assert surveyed([0, 1] * 50, [TRAIN] * 60 + [TEST] * 20 + [VALIDATION] * 20, values=values).notes == (
            "1 test images occur more than once in the test part",
        )

    def test_what_test_and_validation_share_is_counted(self):
        values = self.values()
        values[61] = values[81]
        (note,) = surveyed([0, 1] * 50, [TRAIN] * 60 + [TEST] * 20 + [VALIDATION] * 20, values=values).notes
        assert note.startswith("1 of 20 test images also occur in the validation part")

    def test_blank_images_are_counted(self):
        values = self.values()
        values[7], values[66] = 3, 200
        part = [TRAIN] * 60 + [TEST] * 20 + [VALIDATION] * 20
        assert surveyed([0, 1] * 50, part, values=values).notes == ("2 images are of one color throughout (the first: mine[7])",)
        values[66, 0, 0, 0] = 1
        assert surveyed([0, 1] * 50, part, values=values).notes == ("1 image is of one color throughout (the first: mine[7])",)

    def test_rows_that_are_constant_are_no_blank_images(self):
        values = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
        assert surveyed([0, 1] * 20, values=values, kind="row").notes == ()

    @pytest.mark.parametrize(("rare", "said"), [(10, True), (11, False)])
    def test_uneven_classes_are_told(self, rare, said):
        part = [TRAIN] * (100 + rare) + [VALIDATION, TEST] * 2
        values = self.values(104 + rare)
        notes = surveyed([0] * 100 + [1] * rare + [0, 0, 1, 1], part, values=values).notes
        expected = "classes are uneven: 100 training images of 'a', 10 of 'b'; accuracy says little of rare classes"
        assert notes == ((expected,) if said else ())


@pytest.mark.parametrize("change", ["pixel", "label", "split", "seed", "class held out", "part"])
def test_the_fingerprint_changes_with_what_is_learned(change):
    labels, values = torch.arange(100) % 2, TestNotes().values()
    first = arrange(collection(labels, values=values.clone()))
    assert first.fingerprint == arrange(collection(labels, values=values.clone())).fingerprint
    if change == "pixel":
        values[50, 0, 3, 3] ^= 1
    if change == "label":
        labels[50] = 1 - labels[50]
    options = {"split": {"split": (0.5, 0.2)}, "seed": {"seed": 1}, "class held out": {"held_out": ("b",)}}.get(change, {})
    part = ANY if change != "part" else [TRAIN] * 60 + [VALIDATION, TEST] * 20
    assert first.fingerprint != arrange(collection(labels, part, values=values), **options).fingerprint


class TestStream:
    @pytest.fixture
    def parts(self, tmp_path):
        """The same examples as files and in memory."""
        values = torch.randint(0, 256, (60, 1, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
        for i, value in enumerate(values):
            Image.fromarray(value[0].numpy()).save(tmp_path / f"{i}.png")
        files = Files(tmp_path, Paths([f"{i}.png".encode() for i in range(60)]), "L", (4, 4))
        indices, labels = torch.arange(59, 9, -1), torch.arange(50) % 2
        return [Part(source, indices, labels) for source in (files, stored(values, "x"))]

    @pytest.mark.parametrize("size", [1, 7, 50, 100])
    def test_files_come_in_the_order_that_is_asked_for(self, parts, size):
        batches = torch.randperm(50, generator=torch.Generator().manual_seed(0)).split(size)
        first, second = ([batch.clone() for batch in part.stream(batches)] for part in parts)
        assert len(first) == len(second) == len(batches)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(parts[0][3], parts[1][3]) and parts[0].name(3) == "56.png" and parts[1].name(3) == "x[56]"

    def test_no_batches_are_none(self, parts):
        assert [list(part.stream([])) for part in parts] == [[], []]

    def test_an_error_comes_at_its_place_and_threads_end(self, parts, tmp_path):
        before = threading.active_count()
        (tmp_path / "30.png").write_bytes(b"no image")
        seen = []
        with pytest.raises(ValueError, match=r"cannot read .*30\.png"):
            for batch in parts[0].stream(torch.arange(50).split(2)):
                seen.append(len(batch))
        assert len(seen) == 14 and threading.active_count() == before

    def test_who_stops_listening_leaves_no_threads(self, parts):
        before = threading.active_count()
        stream = parts[0].stream(torch.arange(50).split(1))
        next(stream)
        stream.close()
        assert threading.active_count() == before

    def test_no_more_is_read_than_is_needed_soon(self, parts, monkeypatch):
        asked, real = [], Files.read
        monkeypatch.setattr(Files, "read", lambda self, indices: asked.append(indices) or real(self, indices))
        stream = parts[0].stream(torch.arange(50).split(1))
        next(stream), next(stream)
        stream.close()
        assert 2 <= len(asked) <= READERS + 2

    def test_files_and_memory_are_looked_through_alike(self, parts):
        first, second = (
            survey(arrange(Collection("x", "image", part.source, torch.arange(60) % 2, ("a", "b"), torch.full((60,), ANY), "f")))
            for part in parts
        )
        assert first.scale == second.scale and [len(p) for p in first.parts.values()] == [42, 10, 8]

    @pytest.mark.parametrize("which", [0, 1])
    def test_the_look_ticks_as_often_as_it_said(self, which, parts, monkeypatch):
        monkeypatch.setattr(module, "CHUNK", 64)
        said, ticks = [], []

        def bars(name, steps):
            said.append((name, steps))
            return lambda: ticks.append(1)

        survey(
            arrange(Collection("x", "image", parts[which].source, torch.arange(60) % 2, ("a", "b"), torch.full((60,), ANY), "f")),
            bars,
        )
        assert said == [("look", len(ticks))]
