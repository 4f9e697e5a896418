"""The report: everything that was promised is in it, it needs nothing else, and it is written whole."""

import dataclasses
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from pyrobc.cli import main
from pyrobc.decide import decide
from pyrobc.diagnose import diagnose
from pyrobc.errors import MissingExtraError, OutputError
from pyrobc.export import FILES, save
from pyrobc.figures import (
    draw_bits,
    draw_candidates,
    draw_forest,
    draw_khats,
    draw_network,
    draw_odds_sensitivity,
    draw_rope_sensitivity,
    draw_scores,
    draw_shifts,
    draw_training,
)
from pyrobc.figures.canvas import INK
from pyrobc.report import report_run, tabulate, write_report
from pyrobc.rules import FalsePruneRate, HighestDensity
from pyrobc.run_record import make_record
from pyrobc.scores import score
from pyrobc.sensitivity import Sensitivity, measure_sensitivity

ROW = {"error": 0.031, "error_low": 0.02, "error_high": 0.05, "parameters": 137, "macs": 120, "bytes": 700,
       "latency_ms": 0.4, "latency_batch": 360, "cpu": "Some CPU", "threads": 1}  # fmt: skip
TABLE = [{"name": "dense", **ROW}, {"name": "compact", **ROW, "parameters": 13, "bytes": 100, "latency_ms": 0.1}]


FIGURES = {"network", "scores", "forest", "odds", "rope", "candidates", "khat", "training", "calibration", "shifts",
           "bits"}  # fmt: skip


class Checked(HTMLParser):
    """Counts open tags, and collects text, addresses, ids and the labels of pictures."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses, self.ids, self.labels = [], "", [], [], []
        self.metas = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "svg":
            assert dict(attrs)["role"] == "img"
            self.labels.append(dict(attrs)["aria-label"])
        if tag == "meta":
            self.metas.append(dict(attrs))
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


@pytest.fixture(scope="module")
def result(compressed):
    """Everything that ``compress`` hands over; the history is that of two fits."""
    before = compressed.posterior.to_module()
    return SimpleNamespace(
        **{f.name: getattr(compressed, f.name) for f in dataclasses.fields(compressed)}
        | {
            "table": TABLE,
            "history": compressed.history + compressed.history[:12],
            "diagnosis": diagnose(before, compressed.net, compressed.data),
            "sensitivity": measure_sensitivity(compressed.posterior, compressed.score, compressed.evidence),
        }
    )


def changed(result, **fields):
    return SimpleNamespace(**vars(result) | fields)


@pytest.fixture(scope="module")
def run(result, tmp_path_factory):
    """The directory of a run, with its report."""
    folder = tmp_path_factory.mktemp("run")
    files = save(result.net, result.plan, folder, evidence=result.evidence, example_inputs=result.example_inputs)
    record = make_record(result, command="pyrobc demo", differences={"model.pt2": 3e-7}, notes=files.notes)
    (folder / "report.json").write_text(record.to_json())
    report_run(folder)
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of the time; tests of the text do without."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_page_holds_what_was_promised(run, result):
    page = read(run / "report.html")
    for words in (
        "3.1% [2.0, 5.0]", "10.5\u00d7", "Some CPU", f"{(run / 'model.pt2').stat().st_size:,}", "3e-07", "pyrobc demo",
        "@", "rope", "k-hat", "coded file, bytes", "negative log likelihood", "noise 0.3 sd", "fast prediction, bits",
        result.plan.describe_rule(), *result.plan.widths, result.plan.left_alone["4"],
        *(v for v in result.plan.provenance["versions"].values()),
    ):  # fmt: skip
        assert words in page.text, words
    assert "(decided on)" in page.text
    assert page.text.count("\u0394F (nats)") >= 1


def test_page_stands_alone(run):
    """Whatever a browser would load lies in it; anchors lead somewhere; no id is there twice."""
    page, text = read(run / "report.html"), (run / "report.html").read_text(encoding="utf-8")
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    for word in ("<script", "@import", "@font-face", "<link", "<img", "<iframe", "<object", "<embed"):
        assert word not in text, word
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.metas
    assert "prefers-color-scheme: dark" in text


def test_every_figure_is_there_and_says_what_it_shows(run, result):
    page = read(run / "report.html")
    assert {i.removeprefix("figure-") for i in page.ids if i.startswith("figure-")} == FIGURES
    assert len(page.labels) == len(FIGURES) and min(map(len, page.labels)) > 30
    kept = sum(outcome == "keep" for block in result.plan.blocks for outcome in block.outcomes)
    assert any(f"{kept} keep" in label for label in page.labels)


def test_no_number_is_nan(run, result, tmp_path):
    """Neither here nor where scores are undefined."""
    columns = [tuple([np.nan, np.inf, *b.log_odds[2:]]) for b in result.plan.blocks]
    blocks = tuple(
        dataclasses.replace(b, log_odds=c, delta_f=c, mcse=(np.nan, *b.mcse[1:]))
        for b, c in zip(result.plan.blocks, columns, strict=True)
    )
    odd = changed(result, plan=dataclasses.replace(result.plan, blocks=blocks))
    for path in (run / "report.html", write_report(odd, tmp_path / "odd.html")):
        page, text = read(path), path.read_text(encoding="utf-8")
        assert not re.search(r"\b(nan|inf)\b", page.text, flags=re.IGNORECASE)
        assert not re.search(r'[ "]nan\b', text)


def test_a_run_is_enough_to_write_it_again(run, result, tmp_path, capsys):
    """The same bytes, without a fit and without data, from the command too; and from Python with the same arguments."""
    first = (run / "report.html").read_bytes()
    assert main(["report", str(run), "--output", str(tmp_path / "again.html")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'again.html'}\n"
    assert (tmp_path / "again.html").read_bytes() == first
    files = {path.name: path for path in run.iterdir() if path.name in ("plan.json", "posterior.nc")}
    files |= {path.name: path for path in run.iterdir() if path.name.startswith("model")}
    direct = write_report(
        result, tmp_path / "direct.html", files={n: files[n] for n in sorted(files, key=FILES.index)},
        differences={"model.pt2": 3e-7}, command="pyrobc demo",
    )  # fmt: skip
    assert direct.read_bytes() == first


def test_a_saved_plan_is_a_small_report(result, tmp_path, capsys):
    save(result.net, result.plan, tmp_path, example_inputs=result.example_inputs, onnx=False)
    page = read(report_run(tmp_path))
    assert "No test data were given" in page.text and "not recorded" in page.text
    assert {i for i in page.ids if i.startswith("figure-")} == {"figure-network", "figure-scores", "figure-odds"}
    (tmp_path / "report.json").write_text('{"format": 1}')
    for folder, words in ((tmp_path, "record .*report.json: got KeyError"), (tmp_path / "nowhere", "got no plan.json")):
        assert main(["report", str(folder)]) == 2
        assert re.search(words, capsys.readouterr().err)
    (tmp_path / "report.json").unlink()
    (tmp_path / "posterior.nc").write_bytes(b"no netCDF")
    assert main(["report", str(tmp_path)]) == 2
    assert "a file that save(..., evidence=...) of this release wrote" in capsys.readouterr().err


def test_what_to_cite_follows_what_was_used(result, tmp_path, no_figures):
    keys = re.findall(r"@misc{(\w+),", read(write_report(result, tmp_path / "a.html")).text)
    assert len(set(keys)) == len(keys)
    assert set(keys) >= {"breiman1984cart", "vehtari2024psis", "liebenwein2021lost", "bingham2019pyro"}
    rule = FalsePruneRate(0.1) & HighestDensity()
    other = changed(result, plan=decide(result.score, result.evidence, rule), diagnosis=None)
    page = read(write_report(other, tmp_path / "b.html"))
    assert {"newton2004fdr", "kruschke2018rope"} <= set(re.findall(r"@misc{(\w+),", page.text))
    assert "breiman" not in page.text and "liebenwein" not in page.text
    assert "FalsePruneRate(level=0.1" in page.text


def test_without_test_rows_and_without_evidence(result, tmp_path):
    bare = SimpleNamespace(plan=result.plan, evidence=None, history=[], table=[])
    page = read(write_report(bare, tmp_path / "report.html"))
    assert "No test data were given" in page.text
    assert [row["name"] for row in tabulate(bare)] == ["parameters", "multiply-accumulates"]


def test_without_matplotlib_the_tables_stay(result, tmp_path, no_figures):
    with pytest.raises(MissingExtraError, match=r'pip install "pyrobc\[plots\]"'):
        draw_scores(result.plan)
    page = read(write_report(result, tmp_path / "report.html"))
    assert 'pip install "pyrobc[plots]"' in page.text and "3.1%" in page.text


def test_names_are_text_not_markup(result, tmp_path, no_figures):
    plan = dataclasses.replace(result.plan, notes=("<script>alert(1)</script>",))
    path = write_report(changed(result, plan=plan), tmp_path / "report.html", command="<b>&")
    assert "<script" not in path.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in read(path).text


def test_squared_errors_are_no_percentages(result):
    plan = dataclasses.replace(result.plan, provenance={**result.plan.provenance, "likelihood": "normal"})
    assert tabulate(changed(result, plan=plan))[0]["dense"] == "0.031 [0.02, 0.05]"


def test_unwritable_place_is_refused(result, tmp_path, no_figures):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_report(result, tmp_path / "file" / "report.html")


def test_figures_are_inline_svg_with_the_page_s_ink(result):
    before = dict(__import__("matplotlib").rcParams)
    drawings = [draw_scores(result.plan), draw_training(result.history), draw_network(result.plan)]
    assert "\u0394F (nats)" in drawings[0].svg
    assert dict(__import__("matplotlib").rcParams) == before
    for name, svg, words, width in drawings:
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg") and "width" not in root.attrib and "viewBox" in root.attrib
        assert float(root.attrib["viewBox"].split()[2]) == pytest.approx(width, abs=1)
        assert root.attrib["aria-label"] == words
        assert INK not in svg and "currentColor" in svg
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert all(i.startswith(f"{name}-") for i in ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)


def test_undefined_scores_are_counted_not_drawn(mlp_spec, by_hand):
    odds = {"input": [-5.0] * 6, "0": [float("nan")] * 2 + [-3.0] * 8, "2": [float("inf"), -1, -1, -1, -1]}
    plan = decide(by_hand(mlp_spec, odds))
    assert "3 undefined" in draw_scores(plan).svg
    assert draw_odds_sensitivity(plan).svg.startswith("<svg")


def test_error_bars_are_drawn_where_there_are_errors(mlp_spec, by_hand):
    odds = {"input": np.linspace(-5, 5, 6), "0": np.linspace(-9, -1, 10), "2": np.linspace(-3, 3, 5)}
    exact, rough = (draw_scores(decide(by_hand(mlp_spec, odds, mcse=mcse))) for mcse in (0.0, 0.2))
    assert "LineCollection" in rough.svg and "LineCollection" not in exact.svg


def test_training_has_a_panel_per_fit():
    rows = [{"epoch": float(e), "elbo": -100.0 / e} for e in range(1, 6)]
    assert "Re-adapting" in draw_training(rows + rows[:3]).svg and "Re-adapting" not in draw_training(rows).svg


def test_network_shows_what_is_left(result):
    words = draw_network(result.plan).words
    for name, (before, after) in result.plan.widths.items():
        assert f"{name} {before} to {after}" in words
    assert "output 2 to 2" in words
    more = [dataclasses.replace(b, name=f"{b.name}.{i}") for b in result.plan.blocks for i in range(4)]
    wide = dataclasses.replace(result.plan, blocks=tuple(more))
    assert draw_network(wide).width > draw_network(result.plan).width


def test_candidates_mark_the_one_decided_on(result):
    checked = result.plan.evidence["checked"]
    assert "decided on" in draw_candidates(result.evidence.candidates, result.plan).svg
    assert f"{checked['parameters']} parameters" in draw_candidates(result.evidence.candidates, result.plan).words
    impossible = [dataclasses.replace(c, diff=-np.inf, diff_se=np.nan) for c in result.evidence.candidates[1:]]
    drawn = draw_candidates([result.evidence.candidates[0], *impossible], result.plan)
    assert "nan" not in drawn.svg and "inf" not in drawn.words


def test_forest_and_khats_know_when_there_is_nothing_to_show(result):
    evidence, plan = result.evidence, result.plan
    odds = {f"{b.name}[{i}]": abs(b.log_odds[i]) for b in plan.blocks for i in range(b.size)}
    drawn = draw_forest(plan, evidence).svg
    assert f">{min(odds, key=odds.get)}<" in drawn and "ROPE" in drawn
    other = dataclasses.replace(plan, blocks=tuple(dataclasses.replace(b, name=f"{b.name}x") for b in plan.blocks))
    assert draw_forest(other, evidence) is None
    tree = evidence.tree.copy(deep=True)
    tree["posterior"]["multiplier"].values[:] = 1.0
    constant = dataclasses.replace(evidence, tree=tree)
    assert draw_forest(plan, constant) is None, "a family without gates"
    tree["bmr"]["khat"].values[:] = np.nan
    assert "Change of prior" in draw_khats(evidence, plan).svg
    assert "Change of prior" not in draw_khats(constant, plan).svg
    assert draw_khats(dataclasses.replace(constant, good_k=float("nan")), plan) is None


def test_rows_with_a_high_khat_are_counted(result):
    """In words, as in the table of candidates."""
    bad = result.evidence.candidates[0].khat_bad
    assert f"{bad:.0%} of the rows of the full network" in draw_khats(result.evidence, result.plan).words


def test_shifts_have_a_panel_per_kind(result):
    found = result.diagnosis
    assert all(f">{kind}<" in draw_shifts(found).svg for kind in ("noise", "contrast"))
    worst = max(found.shifts, key=lambda s: s.excess).label
    assert worst in draw_shifts(found).words
    assert draw_shifts(dataclasses.replace(found, shifts=found.shifts[:1])) is None


def test_bits_are_drawn_for_networks_of_a_readable_size():
    layer = {"name": "0.weight", "dense": 60, "kept": 30, "bits": 7}
    assert "7 bits each" in draw_bits([layer]).svg
    assert draw_bits([layer] * 40) is None and draw_bits([layer | {"kept": 0}]) is None


def test_sensitivity_is_that_of_deciding_again(compressed):
    """At every epsilon, against score and decide by hand; a baseline and a spike have no ROPE."""
    found = measure_sensitivity(compressed.posterior, compressed.score, compressed.evidence, steps=1)
    assert found.chosen == 0.01 and found.epsilon == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    for i, epsilon in enumerate(found.epsilon):
        outcomes = score(compressed.posterior, epsilon=epsilon).log_odds()
        assert {name: counts[i] for name, counts in found.kept.items()} == {
            name: int((odds <= 0).sum()) for name, odds in outcomes.items()
        }
    rule = measure_sensitivity(compressed.posterior, compressed.score, compressed.evidence, HighestDensity(), steps=1)
    assert sum(map(sum, rule.kept.values())) >= sum(map(sum, found.kept.values()))
    for label in ("magnitude", "spike"):
        assert measure_sensitivity(compressed.posterior, score(compressed.posterior, label)) is None
    assert "0.01 was chosen" in draw_rope_sensitivity(found).words
    assert ">all<" not in draw_rope_sensitivity(Sensitivity(0.1, (0.1, 0.2), {"0": (3, 2)})).svg
