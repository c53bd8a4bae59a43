"""The page of training examples: its figures, what it shows and hides, and in a browser its marks and the list that it saves."""

import csv
import functools
import io
import json
import re
import subprocess
from dataclasses import fields, replace
from urllib.parse import unquote

import pytest
import torch

from bayesrule.uses.curves import BARS, ClassLoss, concentration, first, score_chart
from bayesrule.uses.dependence import ENDS, PICTURES, TOP, Dependence, cards, number, render
from bayesrule.uses.scores import Scores

NASTY = [
    "<i>cat</i> & \"dog\", 'eel'",
    "plain",
    "a class with a name so long that no column of any table is wide enough to hold it",
]
HISTORY = [{"epoch": n, "train_loss": 1 / n, "validation_nll": 1.1 / n} for n in (1, 2, 3)]


def scores(count, **given):
    """Scores that differ, all positive."""
    generator = torch.Generator().manual_seed(count)
    made = {one.name: torch.rand(count, generator=generator) for one in fields(Scores)}
    right = {"correct": torch.ones(count), "loo_correct": torch.arange(count) % 2.0}
    return Scores(**{**made, **right, "leverage": made["leverage"] / 2, **given})


class Recorder:
    """Images that are made when they are asked for, and remember which were."""

    def __init__(self, shape):
        self.shape, self.read = shape, []

    def __getitem__(self, i):
        self.read.append(i)
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(i)).mul(200).to(torch.uint8)


def example(count=50, **changes):
    made = Dependence(
        title="Cats & <dogs>",
        scores=scores(count),
        indices=torch.arange(count) * 2,
        labels=torch.arange(count) % 3,
        predictions=torch.arange(count) % 3,
        without=torch.arange(1, count + 1) % 3,
        classes=("cat", "dog", "eel"),
        total=2 * count,
        test={"nll": 0.7, "accuracy": 0.6},
        names="shelf {}".format,
        images=Recorder((1, 8, 8)),
        history=HISTORY,
    )
    return replace(made, **changes)


def row(i):
    return [(f"column {k}", f"{i}.{k}") for k in range(15)]


FEW = {"images": None, "thing": "row"}
EXAMPLES = {
    "images": example(),
    "rows": example(**FEW, words=row),
    "texts": example(images=None, thing="text", words="A text of <b>many</b> words, {}.\n\nAnd more.".format),
    "nothing to see": example(**FEW, names=None),
    "no posterior": example(without=None, estimates=False, score="loss", warnings=["none <at> all"]),
    "too wide": example(scores=scores(50, leverage=torch.full((50,), 1.5))),
    "far": example(test={"nll": 3.0, "accuracy": 0.1}),
    "many": example(300, top=200, images=Recorder((3, 300, 200))),
    "curve": example(history=[line | {"loo_nll": 1.2 / line["epoch"]} for line in HISTORY]),
    "classes": example(class_losses=[ClassLoss("cat", 17, 0.1, 2.5), ClassLoss("$x_1$", 16, 0.2, 0.9)]),
    "nasty": example(classes=NASTY, names=(NASTY[0] + " {}").format, title=NASTY[0], top=3),
    "one": example(1, test=None, history=()),
    "all the same": example(scores=scores(50, sensitivity=torch.zeros(50), loo_loss=torch.ones(50))),
}


@functools.cache
def written(name):
    return render(EXAMPLES[name])


@pytest.mark.parametrize(
    ("values", "shares"),
    [([4.0, -5.0, 1.0], [0.5, 0.9, 1.0]), ([0.0, 0.0], [0.5, 1.0]), ([2.0], [1.0]), ([0.0, 0.0, 7.0], [1.0, 1.0, 1.0])],
)
def test_concentration(values, shares):
    assert concentration(torch.tensor(values)).tolist() == pytest.approx(shares)


@pytest.mark.parametrize(("count", "top"), [(1, 1), (99, 1), (100, 1), (101, 2), (1000, 10)])
def test_one_percent_is_rounded_up(count, top):
    assert first(count) == top


@pytest.mark.parametrize(
    ("x", "text"), [(0.00099, "9.9e-04"), (0.001, "0.001"), (999.9, "1e+03"), (1234.5, "1,234"), (-0.5, "-0.5")]
)
def test_numbers_are_short(x, text):
    assert number(x) == text


def test_a_histogram_of_one_value_and_of_huge_ones():
    for values in (torch.zeros(3), torch.full((2,), 1e30), torch.tensor([-1e-30, 1e30])):
        assert score_chart(values, "score", "images").startswith("data:image/svg") and BARS > 1


def test_figures():
    found = EXAMPLES["images"]
    assert found.figures == {
        "examples": 50,
        "training_examples": 100,
        "train_nll": pytest.approx(found.scores.loss.mean().item()),
        "train_accuracy": 1.0,
        "loo_nll": pytest.approx(found.scores.loo_loss.mean().item()),
        "loo_accuracy": 0.5,
        "test_nll": 0.7,
        "test_accuracy": 0.6,
        "top_share": pytest.approx((found.scores.sensitivity.max() / found.scores.sensitivity.sum()).item()),
        "leverage_above_1": 0,
    }
    assert [line["examples"] for line in found.rows()] == ["training", "leave-one-out", "test"]
    assert [line["examples"] for line in EXAMPLES["no posterior"].rows()] == ["training", "test"]
    assert EXAMPLES["no posterior"].figures["loo_nll"] is None and EXAMPLES["one"].figures["test_nll"] is None


def test_suspects_are_those_of_the_score_and_named_by_their_places():
    found = EXAMPLES["images"]
    order = found.scores.loo_loss.argsort(descending=True)
    assert found.suspects == order[:TOP].tolist()
    about = found.about(found.suspects[0])
    assert about["index"] == 2 * order[0] and about["source"] == f"shelf {2 * order[0]}"
    assert about["loo_loss"] == found.scores.loo_loss.max().item()
    assert EXAMPLES["no posterior"].suspects == found.scores.loss.argsort(descending=True)[:TOP].tolist()
    assert EXAMPLES["no posterior"].about(0)["loo_loss"] is None


def test_the_suggestion_is_what_the_model_says_without_the_example():
    assert EXAMPLES["images"].suggestion(4) == "eel" and EXAMPLES["no posterior"].suggestion(4) == "dog"


@pytest.mark.parametrize(
    ("nll", "accuracy", "far"),
    [
        (0.36, 0.5, True),
        (0.4, 0.5, False),
        (0.83, 0.5, False),
        (0.86, 0.5, True),
        (0.0, 0.5, True),
        (0.5, 0.36, False),
        (0.5, 0.34, True),
        (0.5, 0.66, True),
    ],
)
def test_an_estimate_far_from_the_test_data_is_called_so(nll, accuracy, far):
    found = example(scores=scores(50, loo_loss=torch.full((50,), 0.563)), test={"nll": nll, "accuracy": accuracy})
    assert found.far is far and not replace(found, test=None).far
    assert not replace(found, scores=scores(50, leverage=torch.full((50,), 1.5))).far and not replace(found, estimates=False).far


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_page_is_complete_in_itself(name):
    page = written(name)
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert addresses and all(any(part.startswith("data:image/") for part in pair) for pair in addresses)
    assert page.count("<img") == len(re.findall(r'<img[^>]* alt="[^"]+"', page))
    assert not re.search(r"\bnan\b", re.sub(r"data:image/[^\"]*", "", page))


@pytest.mark.parametrize(("name", "pictures"), [("images", TOP + 2 * ENDS), ("many", PICTURES)])
def test_pictures_are_few_and_no_others_are_read(name, pictures):
    found = replace(EXAMPLES[name], images=Recorder(EXAMPLES[name].images.shape))
    page = render(found)
    shown = len(re.findall(r"data:image/(?:png|jpeg)", page))
    assert len(found.images.read) == len(set(found.images.read)) <= PICTURES and shown >= len(found.images.read)
    assert shown == pictures
    assert page.count('data-mark="wrong" ') == found.top
    if name == "many":
        suspects, *ends = cards(found, [found.suspects, list(range(ENDS)), list(range(90, 90 + ENDS))])
        assert [card.picture is not None for card in suspects] == [True] * (PICTURES - 2 * ENDS) + [False] * (200 - 36)
        assert all(card.picture for group in ends for card in group)
        assert "more, without their pictures" in page and len(page) < 2_500_000


def test_the_ends_are_the_most_and_the_least_sensitive():
    found = EXAMPLES["images"]
    order = found.scores.sensitivity.argsort(descending=True).tolist()
    page = written("images").partition("Most sensitive")[2]
    most, _, least = page.partition("Least sensitive")
    for part, wanted in ((most, order[:ENDS]), (least, order[::-1][:ENDS])):
        assert re.findall(r'<span class="source">shelf (\d+)</span>', part)[:ENDS] == [f"{2 * i}" for i in wanted]


def test_rows_show_their_values_and_texts_their_words():
    assert "column 11" in written("rows") and "column 12" not in written("rows") and "and 3 more columns" in written("rows")
    assert 'class="tile' not in written("rows") and "<img" in written("rows")  # charts only
    assert "A text of &lt;b&gt;many&lt;/b&gt; words, 6." in written("texts")
    assert "training row 6" in written("nothing to see")
    assert cards(EXAMPLES["rows"], [[3]])[0][0].values[2] == ("column 2", "6.2")


@pytest.mark.parametrize(
    ("words", "there"),
    [
        ("The leave-one-out loss by epoch", {"curve"}),
        ("What if a whole class had been missing?", {"classes"}),
        ("To be kept in mind", {"no posterior"}),
        ("On the test ", set(EXAMPLES) - {"one"}),
        ("as if it had been trained without it, it would lose", set(EXAMPLES) - {"no posterior", "too wide"}),
        ("far from the estimate", {"far"}),
        ("cannot be told from this posterior", {"too wide"}),
        ("scores are a ranking only", {"no posterior"}),
        ("loss without", set(EXAMPLES) - {"no posterior"}),
    ],
)
def test_what_is_absent_is_not_shown(words, there):
    assert {name for name in EXAMPLES if words in written(name)} == there


def test_text_is_escaped():
    page = written("nasty")
    assert "<i>cat" not in page and "&lt;i&gt;cat&lt;/i&gt; &amp; &#34;dog&#34;" in page
    assert "none &lt;at&gt; all" in written("no posterior") and "Cats &amp; &lt;dogs&gt;" in written("images")
    assert "</script><b>" not in render(replace(EXAMPLES["one"], identity="</script><b>"))


def test_the_same_scores_are_the_same_page():
    assert render(example()) == written("images")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": scores(0)}, "there are no examples to show"),
        ({"labels": torch.zeros(3)}, r"labels must have shape \(50,\), got \(3,\)"),
        ({"without": torch.zeros(50, 2)}, r"without must have shape \(50,\), got \(50, 2\)"),
        ({"score": "lo_loss"}, "unknown score 'lo_loss'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        render(replace(example(), **changes))


LOOK = """<script>addEventListener("load", async () => {
  const saved = [], open = URL.createObjectURL;
  URL.createObjectURL = blob => { saved.push(blob); return open(blob); };
  HTMLAnchorElement.prototype.click = function () { saved.name = this.download; };
  const suspects = [...document.querySelectorAll(".suspect")];
  const button = (i, mark) => suspects[i].querySelector(`[data-mark=${mark}]`);
  const save = document.getElementById("save"), state = () => document.getElementById("marked").textContent;
  const before = [save.disabled, state()];
  button(0, "wrong").focus();
  const focused = document.activeElement === button(0, "wrong");
  button(0, "wrong").click();
  button(1, "wrong").click(); button(1, "fine").click();
  button(2, "fine").click(); button(2, "fine").click();
  const marked = [save.disabled, state(), ...["fine", "wrong"].map(mark => button(1, mark).getAttribute("aria-pressed"))];
  save.click();
  const text = await saved[0].text();
  document.getElementById("clear").click();
  document.documentElement.replaceChildren(JSON.stringify({
    pictures: [...document.images].map(image => [image.complete, image.naturalWidth, image.clientWidth]),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    overflow: document.documentElement.scrollWidth > innerWidth,
    before, focused, marked, text: encodeURIComponent(text), name: saved.name, after: [save.disabled, state()]}));
})</script></body>"""


@pytest.mark.browser
@pytest.mark.parametrize(("name", "width"), [("nasty", 500), ("rows", 500), ("many", 1100)])
def test_in_a_browser_labels_are_marked_and_the_list_is_saved(chromium, tmp_path, name, width):
    page = written(name)
    (tmp_path / "page.html").write_text(page.replace("</body>", LOOK), encoding="utf-8")
    quiet = "--disable-background-networking --disable-component-update --disable-sync --no-first-run --disable-quic"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split(), f"--user-data-dir={tmp_path / 'home'}"]
    rest = [f"--window-size={width},2000", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run([*command, *rest], capture_output=True, text=True, timeout=60, check=True)
    seen = json.loads(re.search(r"\{.*\}", done.stdout, re.DOTALL).group().replace("&amp;", "&"))
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in seen["pictures"])
    assert seen["fetched"] == [] and seen["focused"]
    total = EXAMPLES[name].top
    assert seen["before"] == seen["after"] == [True, "Nothing is marked yet."]
    assert seen["marked"] == [False, f"1 wrong, 1 fine, {total - 2} to look at.", "true", "false"] and seen["name"] == "labels.csv"
    text = unquote(seen["text"])
    assert text.endswith("\r\n")
    lines = list(csv.DictReader(io.StringIO(text, newline="")))
    found, places = EXAMPLES[name], EXAMPLES[name].suspects
    assert [line["mark"] for line in lines] == ["wrong", "fine"]
    for line, i in zip(lines, places, strict=False):
        about = found.about(i)
        wanted = {key: str(about[key]) for key in ("index", "source", "label", "prediction")}
        assert line == wanted | {"suggestion": found.suggestion(i), "mark": line["mark"]}
    assert not seen["overflow"]
