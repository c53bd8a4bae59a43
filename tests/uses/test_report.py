"""The report: one page, complete in itself, its pictures there."""

import base64
import json
import re
import subprocess
from dataclasses import replace

import pytest
import torch

from bayesrule.uses.metrics import classification_metrics
from bayesrule.uses.report import Method, Report, render, table

HISTORY = [{"epoch": n, "train_loss": 1 / n, "validation_nll": 1 / n, "validation_accuracy": 1 - 1 / n} for n in (1, 2, 3)]


def probs(count, seed):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def example(unknown=True, methods=2):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Report(
        title="Cats & <dogs>",
        summary=["First words.", "Second words."],
        classes=["cat", "dog", "eel"],
        images=images,
        labels=torch.arange(40) % 3,
        methods=[
            Method(f"method {n}", probs(40, n), probs(20, n + 9) if unknown else None, 1.5, HISTORY if n == 0 else ())
            for n in range(methods)
        ],
        unknown_images=images[:20] if unknown else None,
        unknown_names=["fox"] * 20 if unknown else (),
        settings={"Run": {"lr": "0.1"}},
    )


def test_rows_are_the_metrics_of_each_method():
    report = example()
    for row, method in zip(report.rows, report.methods, strict=True):
        measured = classification_metrics(method.test, report.labels)
        assert {key: row[key] for key in measured} == measured
        assert row["method"] == method.name and row["seconds"] == 1.5 and 0 <= row["auroc_ood"] <= 1


def test_the_table_marks_the_best_as_shown():
    columns, cells = table([{"accuracy": 0.5, "nll": 0.11111}, {"accuracy": 0.4, "nll": 0.11112}])
    assert [column.heading for column in columns] == ["accuracy", "NLL"]
    assert cells == [[("50.0 %", True), ("0.111", True)], [("40.0 %", False), ("0.111", True)]]


@pytest.mark.parametrize("report", [example(), example(unknown=False), example(methods=1), example(methods=7)])
def test_the_page_is_complete_in_itself(report):
    page = render(report)
    addresses = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)["']""", page)
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert "url(" not in page and "@import" not in page and "<script" not in page and "<link" not in page
    assert "http" not in page.replace("http-equiv", "")
    for address in addresses:
        kind, _, data = address.partition(";base64,")
        content = base64.b64decode(data, validate=True)
        assert content.startswith(b"<?xml" if kind == "data:image/svg+xml" else b"\x89PNG")


def test_text_is_escaped_and_every_method_is_named():
    page = render(example())
    assert "Cats &amp; &lt;dogs&gt;" in page and "<dogs>" not in page
    assert "method 0" in page and "method 1" in page and "First words." in page


def test_what_is_absent_is_not_shown():
    page = render(example(unknown=False))
    assert "never learned" not in page and "fox" not in page
    assert "How it learned" not in render(replace(example(), methods=[Method("m", probs(40, 1))], unknown_images=None))


def test_the_same_report_is_the_same_page():
    assert render(example()) == render(example())


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="labels"):
        render(replace(example(), labels=torch.arange(39) % 3))


LOOK = """<script>addEventListener("load", () => document.documentElement.replaceChildren(JSON.stringify({
  pictures: [...document.images].map(image => [image.complete, image.naturalWidth, image.clientWidth]),
  fetched: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
  overflow: document.documentElement.scrollWidth > innerWidth})))</script></body>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 500])
def test_in_a_browser_the_pictures_are_there_and_nothing_is_fetched(chromium, tmp_path, width):
    page = render(example())
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
