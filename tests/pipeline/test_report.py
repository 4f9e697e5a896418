"""The report: everything that was promised is in it, it needs nothing else, and it is written whole."""

import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from pyrobc import figures
from pyrobc.errors import MissingExtraError, OutputError
from pyrobc.figures import draw_scores, draw_sensitivity, draw_training
from pyrobc.report import tabulate, write_report

ROW = {"error": 0.031, "error_low": 0.02, "error_high": 0.05, "parameters": 137, "macs": 120, "bytes": 700,
       "latency_ms": 0.4, "latency_batch": 360, "cpu": "Some CPU", "threads": 1}  # fmt: skip
TABLE = [{"name": "dense", **ROW}, {"name": "compact", **ROW, "parameters": 13, "bytes": 100, "latency_ms": 0.1}]


class Checked(HTMLParser):
    """Counts open tags, and collects text and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses = [], "", []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path):
    page = Checked()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def result(compressed):
    return dataclasses.replace(compressed, table=TABLE)


def test_page_holds_what_was_promised(result, tmp_path):
    file = tmp_path / "model.pt2"
    file.write_bytes(b"x" * 1234)
    path = write_report(
        result,
        tmp_path / "report.html",
        files={"model.pt2": file},
        differences={"model.pt2": 3e-7},
        command="pyrobc demo",
    )
    page = read(path)
    for words in (
        "3.1% [2.0, 5.0]", "10.5\u00d7", "Some CPU", "1,234", "3e-07", "pyrobc demo", "@", "rope", "k-hat",
        *result.plan.widths, result.plan.left_alone["4"], *(v for v in result.plan.provenance["versions"].values()),
    ):  # fmt: skip
        assert words in page.text, words
    assert "(decided on)" in page.text
    assert page.text.count("\u0394F (nats)") >= 1


def test_page_stands_alone(result, tmp_path):
    path = write_report(result, tmp_path / "report.html")
    assert all(address.startswith("#") for address in read(path).addresses)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_same_result_same_page(result, tmp_path):
    first, again = (write_report(result, tmp_path / name, command="x").read_bytes() for name in ("a.html", "b.html"))
    assert first == again


def test_without_test_rows_and_without_evidence(result, tmp_path):
    bare = SimpleNamespace(plan=result.plan, evidence=None, history=[], table=[])
    page = read(write_report(bare, tmp_path / "report.html"))
    assert "No test data were given" in page.text
    assert [row["name"] for row in tabulate(bare)] == ["parameters", "multiply-accumulates"]


def test_without_matplotlib_the_tables_stay(result, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "pyrobc\[plots\]"'):
        draw_scores(result.plan)
    page = read(write_report(result, tmp_path / "report.html"))
    assert 'pip install "pyrobc[plots]"' in page.text and "3.1%" in page.text


def test_names_are_text_not_markup(result, tmp_path):
    plan = dataclasses.replace(result.plan, notes=("<script>alert(1)</script>",))
    path = write_report(dataclasses.replace(result, plan=plan), tmp_path / "report.html", command="<b>&")
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in read(path).text


def test_squared_errors_are_no_percentages(result):
    plan = dataclasses.replace(result.plan, provenance={**result.plan.provenance, "likelihood": "normal"})
    assert tabulate(dataclasses.replace(result, plan=plan))[0]["dense"] == "0.031 [0.02, 0.05]"


def test_unwritable_place_is_refused(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_report(result, tmp_path / "file" / "report.html")


def test_figures_are_inline_svg_with_the_page_s_ink(result):
    before = dict(__import__("matplotlib").rcParams)
    drawings = {"scores": draw_scores(result.plan), "training": draw_training(result.history)}
    assert "\u0394F (nats)" in drawings["scores"]
    assert dict(__import__("matplotlib").rcParams) == before
    for name, svg in drawings.items():
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg") and "width" not in root.attrib and "viewBox" in root.attrib
        assert figures._INK not in svg and "currentColor" in svg
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert all(i.startswith(f"{name}-") for i in ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


def test_undefined_scores_are_counted_not_drawn(mlp_spec, by_hand):
    from pyrobc.decide import decide

    odds = {"input": [-5.0] * 6, "0": [float("nan")] * 2 + [-3.0] * 8, "2": [float("inf"), -1, -1, -1, -1]}
    plan = decide(by_hand(mlp_spec, odds))
    assert "3 undefined" in draw_scores(plan)
    assert draw_sensitivity(plan).startswith("<svg")


def test_training_has_a_panel_per_fit(result):
    rows = [{"epoch": float(e), "elbo": -100.0 / e} for e in range(1, 6)]
    assert "Re-adapting" in draw_training(rows + rows[:3]) and "Re-adapting" not in draw_training(rows)
