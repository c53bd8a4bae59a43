"""The report: one page, complete in itself, its figures right, its pictures there and only those read."""

import base64
import functools
import json
import re
import subprocess
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image
from tests.sweeps import sweep

from bayesrule.uses.charts import POINTS, count_confusions, frequent, heat_map, mean_line, styles, thinned
from bayesrule.uses.galleries import SMALL, TILES, WIDEST, Shown, draw, galleries
from bayesrule.uses.metrics import auroc, classification_metrics, entropy, ood_metrics
from bayesrule.uses.metrics.classification import CLASSIFICATION
from bayesrule.uses.report import Method, Report, Trial, abstaining, costs, render
from bayesrule.uses.tables import COLUMNS, DETAILS, table, undecided

HISTORY = [{"epoch": n, "train_loss": 1 / n, "validation_nll": 1 / n, "validation_accuracy": 1 - 1 / n} for n in (1, 2, 3)]
NASTY = ["<i>cat</i> & \"dog\" 'eel'", "plain", "a class with a name so long that no column of any table is wide enough to hold it"]


class Recorder:
    """Images that are made when they are asked for, and remember which were."""

    def __init__(self, count, shape, dtype=torch.float32):
        self.count, self.shape, self.dtype, self.read = count, shape, dtype, []

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        self.read.append(i)
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(i)).mul(200).to(self.dtype)


def probs(count, seed, classes=3):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def trial(seed, unknown=True, history=(), classes=3):
    return Trial(probs(40, seed, classes), probs(20, seed + 90, classes) if unknown else None, 1.5 + seed, history)


def example(unknown=True, methods=2, seeds=1, classes=("cat", "dog", "eel")):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Report(
        title="Cats & <dogs>",
        summary=["First words.", "Second words."],
        classes=classes,
        labels=torch.arange(40) % 3,
        methods=[
            Method(
                f"method {n}",
                [trial(10 * n + seed, unknown, HISTORY if n == 0 else (), len(classes)) for seed in range(seeds)],
                {"weights": "37,514"},
            )
            for n in range(methods)
        ],
        images=images,
        unknown_images=images[:20] if unknown else None,
        unknown_names=["fox"] * 20 if unknown else (),
        settings={"Run": {"lr": "0.1"}},
    )


def one_hot(answers, classes=3):
    return torch.eye(classes)[torch.as_tensor(answers)]


EXAMPLES = {
    "usual": example(),
    "seeds": example(seeds=3),
    "no unknown": example(unknown=False),
    "one method": example(methods=1),
    "nine methods": example(methods=9, seeds=2),
    "unlike numbers of seeds": replace(example(), methods=[*example(seeds=3).methods[:1], *example(seeds=1).methods[1:]]),
    "no images": replace(example(seeds=2), images=None, unknown_images=None, thing="row", names="row {}".format),
    "no images, no names": replace(example(), images=None, unknown_images=None, unknown_names=(), thing="row"),
    "nasty names": replace(example(), classes=NASTY, methods=[replace(m, name=NASTY[0]) for m in example().methods]),
    "hundred classes": example(seeds=2, classes=[f"{NASTY[0]} {k}" for k in range(100)]),
    "a class without examples": replace(example(), labels=torch.arange(40) % 2),
    "always right": replace(example(), methods=[Method("right", [Trial(one_hot(torch.arange(40) % 3))])]),
    "never right": replace(example(), methods=[Method("wrong", [Trial(one_hot((torch.arange(40) + 1) % 3))] * 2)]),
    "large pictures": replace(example(), images=Recorder(40, (3, 300, 200), torch.uint8)),
    "bare": Report("t", [], ["a", "b"], torch.tensor([0]), [Method("m", [Trial(torch.tensor([[0.5, 0.5]]))])]),
}


@functools.cache
def written(name):
    """The page of an example, made once."""
    return render(EXAMPLES[name])


FEW = ("usual", "no unknown", "nine methods", "no images", "nasty names", "hundred classes", "always right", "bare")


@pytest.mark.parametrize("name", sweep(EXAMPLES, *FEW))
def test_the_page_is_complete_in_itself(name):
    page = written(name)
    addresses = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)["']""", page)
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert "url(" not in page and "@import" not in page and "<script" not in page and "<link" not in page
    assert "http" not in page.replace("http-equiv", "")
    starts = {"data:image/svg+xml": b"<?xml", "data:image/png": b"\x89PNG", "data:image/jpeg": b"\xff\xd8\xff"}
    for address in addresses:
        kind, _, data = address.partition(";base64,")
        assert base64.b64decode(data, validate=True).startswith(starts[kind])
    assert "<i>" not in page and not re.search(r">\s*(nan|None)\s*<", page)


def test_rows_of_one_seed_are_its_metrics():
    report = example()
    for row, method in zip(report.rows, report.methods, strict=True):
        (only,) = method.trials
        scores = entropy(torch.cat((only.test, only.unknown)))
        ood = auroc(scores, torch.arange(60) >= 40).item()
        measured = classification_metrics(only.test, report.labels) | {"auroc_ood": ood, "seconds": only.seconds}
        assert row == {"method": method.name, **measured}


def test_detailed_rows_tell_of_calibration_selection_and_the_unknown():
    report = example()
    for row, more, method in zip(report.rows, report.detailed, report.methods, strict=True):
        (only,) = method.trials
        told = {column.key for columns in DETAILS.values() for column in columns}
        assert row.items() <= more.items() and set(more) == set(row) | told
        names = [name for name in more if name in CLASSIFICATION]
        assert {name: more[name] for name in names} == classification_metrics(only.test, report.labels, names)
        assert more["fpr95"] == ood_metrics(entropy(only.test), entropy(only.unknown))["fpr95"]


def test_rows_of_several_seeds_are_means_with_their_spread():
    labels = torch.tensor([0, 0, 1, 1])
    trials = [
        Trial(one_hot(answers, 2), seconds=s) for answers, s in (([0, 0, 1, 1], 1.0), ([0, 0, 1, 0], 2.0), ([0, 1, 0, 1], 6.0))
    ]
    (row,) = Report("t", [], ["a", "b"], labels, [Method("m", trials)]).rows
    assert (row["method"], row["seeds"], row["accuracy"], row["seconds"]) == ("m", 3, 0.75, 3.0)
    # of 1, 3/4, 1/2 and of 1, 2, 6: the deviations' squares over two
    assert row["spread"]["accuracy"] == pytest.approx(0.25) and row["spread"]["seconds"] == pytest.approx(7**0.5)
    assert row["brier"] == pytest.approx(0.5) and row["spread"]["brier"] == pytest.approx(0.5)
    assert "auroc_ood" not in row and set(row["spread"]) == set(row) - {"method", "seeds", "spread"}


def test_what_only_some_seeds_have_is_left_out():
    (row,) = replace(example(), methods=[Method("m", [trial(0), Trial(probs(40, 1))])]).rows
    assert "seconds" not in row and "auroc_ood" not in row and row["seeds"] == 2


@pytest.mark.parametrize(
    ("rows", "headings", "cells"),
    [
        (
            [{"accuracy": 0.5, "nll": 0.11111}, {"accuracy": 0.4, "nll": 0.11112}],
            ["accuracy", "NLL"],
            [[("50.0 %", True), ("0.111", True)], [("40.0 %", False), ("0.111", True)]],
        ),
        (
            [{"accuracy": 0.9749, "spread": {"accuracy": 0.0021}}, {"accuracy": 0.975, "spread": {"accuracy": 0.0104}}],
            ["accuracy"],
            [[("97.5 ± 0.2 %", True)], [("97.5 ± 1.0 %", True)]],
        ),
        ([{"ece": 0.081, "spread": {"ece": 0.00401}}, {"ece": 0.08}], ["ECE"], [[("0.081 ± 0.004", False)], [("0.080", True)]]),
        (
            [{"seconds": 12.34, "spread": {"seconds": 0.96}}, {"auroc_ood": 0.9}],
            ["AUROC unknown", "seconds"],
            [[("", False), ("12.3 ± 1.0", False)], [("0.900", True), ("", False)]],
        ),
    ],
)
def test_the_table_shows_spread_and_marks_the_best_as_shown(rows, headings, cells):
    columns, found = table(rows)
    assert [column.heading for column in columns] == headings and found == cells


@pytest.mark.parametrize(
    ("first", "second", "spread", "error", "close"),
    [
        (0.97, 0.96, 0.02, 0.001, True),
        (0.97, 0.96, 0.005, 0.001, False),
        (0.97, 0.96, 0.005, 0.02, True),
        (0.96, 0.97, 0.0, 0.001, False),
    ],
)
def test_a_lead_within_the_noise_is_called_undecided(first, second, spread, error, close):
    rows = [{"accuracy": 0.1}, {"accuracy": first, "spread": {"accuracy": spread}}, {"accuracy": second}]
    assert undecided(COLUMNS[:1], rows, error) == ["accuracy"] * close
    assert undecided(COLUMNS[:1], rows[:2], 0.1) == []


@pytest.mark.parametrize(
    ("seeds", "said", "unsaid"),
    [
        (1, [], ["±", "the seeds", "first seed"]),
        (2, ["mean over 2 seeds", "rough", "first seed"], []),
        (5, ["mean over 5"], ["rough"]),
    ],
)
def test_the_page_says_what_the_spread_is(seeds, said, unsaid):
    page = render(example(seeds=seeds))
    assert all(words in page for words in said) and not any(words in page for words in unsaid)


@pytest.mark.parametrize("length", [1, 2, POINTS - 1, POINTS, POINTS + 1, 50_000])
def test_a_thinned_curve_keeps_its_ends(length):
    kept = thinned(length)
    assert kept[0] == 0 and kept[-1] == length - 1 and len(kept) == min(length, POINTS) and (kept.diff() > 0).all()


def test_abstaining_by_hand():
    # of 20 examples the second seed misses the two that it is least sure of
    sure = torch.linspace(0.99, 0.6, 20)
    trials = [Trial(torch.stack((1 - sure, sure), 1)), Trial(torch.stack((1 - sure, sure), 1))]
    trials[1].test[-2:] = trials[1].test[-2:].flip(1)
    report = Report("t", [], ["a", "b"], torch.ones(20).long(), [Method("m", trials), Method("n", trials[:1])])
    columns, cells = abstaining(report)
    assert [column.heading for column in columns] == [f"surest {share}\u00a0%" for share in (100, 95, 90, 80)]
    assert [text for text, _ in cells[0]] == ["5.0 ± 7.1 %", "2.6 ± 3.7 %", "0.0 ± 0.0 %", "0.0 ± 0.0 %"]
    assert cells[1] == [("0.0 %", True)] * 4 and [best for _, best in cells[0]] == [False, False, True, True]


def test_confusions_by_hand():
    counts = count_confusions([torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1])], torch.tensor([0, 0, 1, 1]), 3)
    assert counts.tolist() == [[1.5, 0.5, 0], [0, 1.5, 0.5], [0, 0, 0]]
    assert count_confusions([torch.tensor([199])], torch.tensor([199], dtype=torch.uint8), 200)[199, 199] == 1
    rows = heat_map(counts, "abc").rows
    assert [(name, total, [text for text, _, _ in cells]) for name, total, cells in rows] == [
        ("a", "2", ["1.5", "0.5", ""]),
        ("b", "2", ["", "1.5", "0.5"]),
        ("c", "0", ["", "", ""]),
    ]
    assert [[right for _, _, right in cells] for _, _, cells in rows] == torch.eye(3).bool().tolist()
    strength = torch.tensor([[strong for _, strong, _ in cells] for _, _, cells in rows])
    assert ((strength > 0) == (counts.clone().fill_diagonal_(0) > 0)).all() and strength.max() <= 0.7
    found = [(pair.truth, pair.answer, pair.count, pair.share) for pair in frequent(counts, "abc")]
    assert found == [("a", "b", "0.5", "25.0 %"), ("b", "c", "0.5", "25.0 %")]


@pytest.mark.parametrize(("classes", "heat"), [(3, True), (20, True), (21, False), (100, False)])
def test_many_classes_are_listed_not_mapped(classes, heat):
    page = render(example(classes=[f"class {k}" for k in range(classes)]))
    assert ('<table class="heat">' in page) == heat and ("most frequent confusions" in page) != heat
    assert len(frequent(torch.ones(classes, classes), [str(k) for k in range(classes)])) == min(12, classes * (classes - 1))


def test_images_and_names_are_read_for_those_shown_only():
    images, unknown = Recorder(40, (1, 4, 4)), Recorder(20, (1, 4, 4))
    asked = []
    names = lambda i: asked.append(i) or f"file {i}"  # noqa: E731
    page = render(replace(example(seeds=2), images=images, unknown_images=unknown, names=names))
    report = example()
    confidence, answer = report.methods[-1].trials[0].test.max(1)
    order = confidence.argsort(descending=True)
    mistakes = order[(answer != report.labels)[order]]
    expected = {*order[:TILES].tolist(), *order[-TILES:].tolist(), *mistakes[:TILES].tolist()}
    assert set(asked) == set(images.read) == expected and len(images.read) == len(expected) < 40
    assert len(unknown.read) == len(set(unknown.read)) <= 2 * TILES
    assert f"file {int(order[0])}<" in page


def test_a_gallery_by_hand():
    test = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    shown = [Shown("m", "red", test, torch.tensor([[0.3, 0.7]]))]
    rows = galleries(shown, ["cat", "dog"], torch.tensor([0, 0, 1]), "row", names="line {}".format, unknown_names=["fox"])
    told = {row.heading: [(t.source, t.truth, t.answers[0][1:]) for t in row.tiles] for row in rows}
    one, two, three = ("line 0", "cat", ("cat", "90 %")), ("line 1", "cat", ("dog", "80 %")), ("line 2", "dog", ("dog", "60 %"))
    assert told == {
        "Surest mistakes": [two],
        "Least certain": [three, two, one],
        "Most certain": [one, two, three],
        "Unknown, yet confident: m": [("unknown row 1", "fox", ("dog", "70 %"))],
    }
    assert not any(row.pictured or tile.picture for row in rows for tile in row.tiles)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "size", "mode"),
    [
        ((1, 8, 8), torch.float32, "PNG", (8, 8), "L"),
        ((3, 8, 6), torch.uint8, "PNG", (6, 8), "RGB"),
        ((3, SMALL, SMALL), torch.float64, "PNG", (SMALL, SMALL), "RGB"),
        ((3, SMALL + 1, 20), torch.float32, "JPEG", (20, SMALL + 1), "RGB"),
        ((1, 2 * WIDEST, WIDEST), torch.uint8, "JPEG", (WIDEST // 2, WIDEST), "L"),
    ],
)
def test_small_pictures_are_exact_and_large_ones_scaled_down(shape, dtype, kind, size, mode):
    images = Recorder(9, shape, dtype)
    drawn = draw(images, [3, 7, 3])
    assert images.read == [3, 7] == list(drawn)
    made = Image.open(BytesIO(base64.b64decode(drawn[3].address.partition(",")[2])))
    assert (made.format, made.size, made.mode, drawn[3].small) == (kind, size, mode, kind == "PNG")


@pytest.mark.parametrize(
    ("images", "pixels"),
    [
        (torch.tensor([[[[7, 200]]]], dtype=torch.uint8), [7, 200]),  # 8 bits as they are
        (torch.tensor([[[[-1.0, 0.0, 1.0]]]]), [0, 128, 255]),
        (torch.full((1, 1, 1, 2), 4.0), [0, 0]),
    ],
)
def test_pixels(images, pixels):
    address = draw(images, [0])[0].address
    assert list(Image.open(BytesIO(base64.b64decode(address.partition(",")[2]))).tobytes()) == pixels


@pytest.mark.parametrize(
    ("methods", "headings", "rows"),
    [
        ([Method("a", [Trial(probs(3, 0))])], [], [[]]),
        ([Method("a", [Trial(probs(3, 0), seconds=2.0)])], ["seconds"], [["2.0"]]),
        (
            [
                Method("a", [Trial(probs(3, 0), seconds=s) for s in (1.0, 3.0)], {"weights": "9"}),
                Method("b", [Trial(probs(3, 0), seconds=3.0)], {"weights": "8", "epochs": 10}),
                Method("c", [Trial(probs(3, 0))]),
            ],
            ["seconds", "times the first", "weights", "epochs"],
            [["2.0 ± 1.4", "1.00", "9", ""], ["3.0", "1.50", "8", "10"], ["", "", "", ""]],
        ),
        (
            [Method("a", [Trial(probs(3, 0))]), Method("b", [Trial(probs(3, 0), seconds=3.0)])],
            ["seconds"],
            [[""], ["3.0"]],
        ),
    ],
)
def test_costs(methods, headings, rows):
    assert costs(methods) == (headings, rows)


def test_training_curves_are_means_over_the_seeds_that_go_so_far():
    assert mean_line([{1: 1.0, 2: 3.0}, {1: 2.0, 2: 1.0, 3: 5.0}]) == {1: 1.5, 2: 2.0, 3: 5.0}
    assert Method("m", [trial(0, history=HISTORY), trial(1)]).lines("train_loss") == [{1: 1, 2: 1 / 2, 3: 1 / 3}]


def test_the_elbo_has_a_panel_where_there_is_one():
    with_elbo = [line | {"elbo": -line["train_loss"]} for line in HISTORY]
    page = render(
        replace(example(), methods=[Method("m", [trial(0, history=with_elbo)]), Method("n", [trial(1, history=HISTORY)])])
    )
    assert "ELBO, nats per example" in page and "lower bound on the log evidence" in page
    assert "ELBO" not in written("usual")


def test_twelve_methods_look_different():
    assert len(set(styles(12))) == 12 and len(styles(30)) == 30


def test_text_is_escaped_and_every_method_is_named():
    page = render(replace(example(), warnings=["Found <script>evil</script> & more."], unknown_title="<foxes>"))
    assert "Cats &amp; &lt;dogs&gt;" in page and "<dogs>" not in page
    assert "Found &lt;script&gt;evil&lt;/script&gt; &amp; more." in page and "<script" not in page
    assert "20 &lt;foxes&gt;." in page and "<foxes>" not in page
    assert "method 0" in page and "method 1" in page and "First words." in page and "37,514" in page


def test_what_is_absent_is_not_shown():
    page = written("no unknown")
    assert "never learned" not in page and "fox" not in page and "Noticed in the data" not in page
    bare = written("bare")
    assert not any(words in bare for words in ("How it learned", "What did it cost", "<h2>Settings", "±"))
    rows = written("no images")
    assert "The rows themselves" in rows and "test rows" in rows and "row 0" in rows and 'class="tile"' not in rows
    assert "image" not in re.sub(r"<style>.*?</style>|data:image/|images of classes never learned", "", rows, flags=re.DOTALL)


def test_the_same_report_is_the_same_page():
    assert render(example(seeds=3)) == written("seeds")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.arange(39) % 3}, "labels"),
        ({"methods": []}, "at least one method"),
        ({"methods": [Method("m", [])]}, "m has none"),
        ({"classes": ["cat", "dog"]}, r"2 classes; method 0 has shape \(40, 3\)"),
        ({"methods": [Method("m", [Trial(probs(40, 0), probs(5, 0, 4))])]}, r"3 classes; m has shape \(5, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        render(replace(example(), **changes))


LOOK = """<script>addEventListener("load", () => document.documentElement.replaceChildren(JSON.stringify({
  pictures: [...document.images].map(image => [image.complete, image.naturalWidth, image.clientWidth]),
  fetched: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
  overflow: document.documentElement.scrollWidth > innerWidth})))</script></body>"""


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("usual", 1100),
        ("nasty names", 500),
        ("hundred classes", 500),
        pytest.param("nine methods", 500, marks=pytest.mark.slow),
        pytest.param("large pictures", 1100, marks=pytest.mark.slow),
    ],
)
def test_in_a_browser_the_pictures_are_there_and_nothing_is_fetched(chromium, tmp_path, name, width):
    page = written(name)
    (tmp_path / "report.html").write_text(page.replace("</body>", LOOK), encoding="utf-8")
    quiet = "--disable-background-networking --disable-component-update --disable-sync --no-first-run --disable-quic"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), f"--user-data-dir={tmp_path / 'home'}"]
    done = subprocess.run(
        [
            *command,
            f"--window-size={width},2000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    seen = json.loads(re.search(r"\{.*\}", done.stdout, re.DOTALL).group())
    assert len(seen["pictures"]) == page.count("<img") > 20
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in seen["pictures"])
    assert seen["fetched"] == []
    assert not seen["overflow"]
