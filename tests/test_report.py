"""Tests of the page of results and the short table of README.md, which benchmarks/report.py generates."""

import json
import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import report


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Return a folder with copies of pages and results, which a test may change."""
    (tmp_path / "results").mkdir()
    for path in report.RESULTS.glob("*.json"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    for name in ("TEMPLATE", "PAGE"):
        path = getattr(report, name)
        (tmp_path / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(report, name, tmp_path / path.name)
    (tmp_path / "top.md").write_text("before\n<!-- results -->\n<!-- /results -->\nafter\n")
    monkeypatch.setattr(report, "TOP", tmp_path / "top.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "_read", set())
    return tmp_path


def test_the_pages_match_their_results():
    assert report.outdated_pages() == []


def test_a_changed_result_changes_the_page(copies, capsys):
    path = copies / "results" / report.GRADIENT
    results = json.loads(path.read_text())
    results["rows"]["maml"]["accuracy"]["transductive"]["mean"] = 0.12345
    path.write_text(json.dumps(results))
    before = report.PAGE.read_text()
    assert report.main(["--check"]) == 1
    assert str(report.PAGE) in capsys.readouterr().err
    assert report.PAGE.read_text() == before
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    after = report.PAGE.read_text()
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 1
    assert "| `maml` | 12.35 ± 0.44 |" in changed[0] or "| `maml` | 12.34 ± 0.44 |" in changed[0]
    assert "12.3 ± 0.4" in report.TOP.read_text()


def test_the_table_of_speed_has_the_first_steps_that_were_recorded(copies):
    name = "throughput-prototypical-amd-epyc-2-cores.json"
    (copies / "results" / name).unlink()
    results = json.loads((report.HERE / "results" / name).read_text())
    for seconds, contender in zip((2.84, 12.4), results["rows"][0]["contenders"].values(), strict=True):
        contender["first_step_s"] = seconds
    # Files of any machine are read, and rows are in the order of rows.py.
    (copies / "results" / "throughput-elsewhere.json").write_text(json.dumps(results))
    report.main([])
    lines = [line for line in report.PAGE.read_text().splitlines() if line.startswith("| `")]
    place = next(i for i, line in enumerate(lines) if line.startswith("| `prototypical`: 60-way"))
    assert "| 160 ms (2.8 s) |  | 1.6 × (12 s) |" in lines[place]
    assert lines[place - 1].startswith("| `mini-imagenet`: ")
    assert "(" not in lines[place - 1].split("inner steps")[1]


def test_rows_of_several_machines_name_them(copies):
    name = "throughput-prototypical-amd-epyc-2-cores.json"
    report.main([])
    assert ", on " not in next(
        line for line in report.PAGE.read_text().splitlines() if line.startswith("| `prototypical`: 60-way")
    )
    results = json.loads((report.HERE / "results" / name).read_text())
    results["machine"] |= {"cpu": "a processor", "device": "1 × NVIDIA H100"}
    (copies / "results" / "throughput-elsewhere.json").write_text(json.dumps(results))
    report.main([])
    lines = [line for line in report.PAGE.read_text().splitlines() if line.startswith("| `prototypical`: 60")]
    assert len(lines) == 2
    assert sum(", 1 task, on a processor, 1 × NVIDIA H100 |" in line for line in lines) == 1


def test_the_short_table_is_written_only_between_its_markers(copies):
    report.main([])
    text = report.TOP.read_text()
    match = re.fullmatch(r"before\n<!-- results -->\n(.*)\n<!-- /results -->\nafter\n", text, re.DOTALL)
    lines = match[1].splitlines()
    assert {line.count("|") for line in lines} == {6}
    assert any("| 98.7 ± 0.4 | 98.0 ± 0.4 |" in line for line in lines)  # MAML on Omniglot
    report.TOP.write_text("no markers\n")
    report.main([])
    assert report.TOP.read_text() == "no markers\n"


def test_an_unused_file_of_results_is_an_error(copies):
    (copies / "results" / "new.json").write_text("{}")
    with pytest.raises(ValueError, match=r"new\.json"):
        report.main(["--check"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{memory.table}}", "", r"memory\.table"),
        ("{{memory.table}}", "{{memory.tables}}", r"memory\.tables"),
    ],
)
def test_placeholders_and_values_must_match(copies, old, new, message):
    report.TEMPLATE.write_text(report.TEMPLATE.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        report.main([])


def test_linked_figures_and_data_exist():
    links = re.findall(r"\]\((results/[^)]+)\)", report.PAGE.read_text())
    assert len(links) > 20
    for link in links:
        assert (report.HERE / link).is_file(), link


def test_the_table_of_contents_links_to_headings():
    text = report.PAGE.read_text()
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    anchors = re.findall(r"\]\(#([^)]+)\)", text)
    assert anchors
    assert {*anchors} <= headings
