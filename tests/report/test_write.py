"""The report as a whole: files, text, figures that show something, and no traces elsewhere."""

import ast
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

import agwm_jax.report
from agwm_jax.errors import AgwmError
from agwm_jax.report import write_report
from agwm_jax.report.figures import searched
from agwm_jax.report.plots import Panel, _curves, _smooth
from agwm_jax.report.runs import read_records, read_run
from agwm_jax.report.write import ComparisonData


def assert_drawn(path: Path) -> None:
    """A PNG at least 900 pixels wide of which a fair part is neither white nor one colour."""
    from matplotlib.image import imread

    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width >= 900
    assert height >= 300
    pixels = imread(path)[..., :3]
    assert pixels.std() > 0.05
    assert (pixels.min(axis=-1) < 0.9).mean() > 0.01
    # Axes at the very edge would mean that the layout failed.
    assert (pixels[:2] > 0.99).all()


def test_three_methods_and_four_seeds(write_run, tmp_path):
    for seed in range(4):
        for method, gain in (("vanilla", 0.0), ("frozen_alpha", 0.001), ("agwm", 0.02)):
            write_run(method, seed, 0.7 + 0.01 * seed + gain, groups=True)
    write_run("agwm", 4, finished=False)
    report = write_report([tmp_path / "runs"], tmp_path / "out" / "deep")
    names = [path.name for path in report.files]
    assert names == [
        "report.html",
        "report.md",
        "results.csv",
        "overview.png",
        "scores.png",
        "curves.png",
        "heat.png",
        "histogram.png",
    ]
    assert sorted(path.name for path in (tmp_path / "out" / "deep").iterdir()) == sorted(names)
    for path in report.files[3:]:
        assert_drawn(path)
        assert f"]({path.name})" in report.markdown
    assert report.files[1].read_text(encoding="utf-8") == report.markdown
    assert "| agwm | 73.50 | 1.29 | 4 | +2.00 [+2.00, +2.00], n = 4 |" in report.markdown
    assert "95 % bootstrap-t interval" in report.markdown
    assert "### Scores by group" in report.markdown
    assert "## Unfinished runs" in report.markdown
    assert "agreement-agwm-4" in report.markdown
    assert report.warnings == []
    again = write_report([tmp_path / "runs"], tmp_path / "out" / "deep")
    assert again == report


def test_the_page_holds_its_figures_and_asks_for_nothing(write_run, tmp_path):
    for seed in range(2):
        write_run("vanilla", seed)
        write_run("agwm", seed)
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    text = report.files[0].read_text(encoding="utf-8")
    figures = [path for path in report.files if path.suffix == ".png"]
    assert text.count('src="data:image/png;base64,') == len(figures) == text.count("<img alt=")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert text.count('<td class="left">agwm</td><td>1</td>') == 1
    assert text.count('<table class="sortable">') >= 2


def test_what_a_user_wrote_stays_text(write_run, tmp_path):
    write_run("vanilla", 0, task="<script>alert(1)</script>", name="one")
    message = "<img src=x> [a](javascript:alert) ![y](http://example.org/y.png)"
    warning = {"warnings": [{"name": "odd", "message": message}]}
    write_run("agwm", 0, task="![x](http://example.org/x.png) <b>", name="two", result=warning)
    text = write_report([tmp_path / "runs"], tmp_path / "out").files[0].read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<b>" not in text
    assert "<img src=x>" not in text
    assert 'src="http' not in text
    assert 'href="javascript' not in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_shows_the_page_without_an_error(write_run, tmp_path):
    write_run("vanilla", 0)
    page = write_report([tmp_path / "runs"], tmp_path / "out").files[0]
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = ["chromium", *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr
    assert "<button>seed</button>" in done.stdout  # the heads of tables sort them


def test_one_run_of_one_seed(write_run, tmp_path):
    write_run("agwm", 0)
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    assert {path.name for path in report.files} >= {"curves.png", "heat.png", "histogram.png"}
    for path in report.files[3:]:
        assert_drawn(path)


def test_vanilla_alone_has_no_figure_of_alpha(write_run, tmp_path):
    write_run("vanilla", 0)
    write_run("vanilla", 1)
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    assert [path.name for path in report.files[3:]] == ["overview.png", "scores.png", "curves.png"]
    for path in report.files[3:]:
        assert_drawn(path)


def test_runs_without_metrics_still_have_scores(write_run, tmp_path):
    (write_run("vanilla", 0) / "metrics.jsonl").unlink()
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    assert [path.name for path in report.files[3:]] == ["overview.png", "scores.png"]


def test_several_tasks_a_regression_among_them_have_files_of_their_own(write_run, tmp_path):
    for method in ("vanilla", "agwm"):
        write_run(method, 0, 0.79, task="stsb", metric="spearman")
        write_run(method, 0, -0.02, task="cola", metric="matthews")
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    names = {path.name for path in report.files}
    assert {"curves-stsb_300.png", "curves-cola_300.png", "heat-stsb_300.png", "histogram-cola_300.png"} <= names
    assert "Metric: spearman on the test split." in report.markdown
    assert "| vanilla | -2.00 |" in report.markdown


def test_every_split_of_the_search_is_a_curve(write_run):
    folder = write_run("agwm", 0, num_splits=3, steps=20)
    records = read_records(read_run(folder))
    curves = _curves(records, Panel("search", "outer_loss"))
    assert [len(values) for _, values in curves] == [20, 20, 20]
    outer = [record["outer_loss"] for record in records if record["phase"] == "search-1"]
    np.testing.assert_array_equal(curves[1][1], outer)


def test_splits_of_different_length_and_gaps_are_drawn(write_run, tmp_path):
    write_run("agwm", 0, num_splits=3, steps=20)
    folder = write_run("agwm", 1, num_splits=2, steps=31)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(
        "".join(lines[::3]).replace('"outer_loss": 0.4', '"outer_loss": NaN, "was": 0.4')
    )
    write_report([tmp_path / "runs"], tmp_path / "out")
    assert_drawn(tmp_path / "out" / "curves.png")


def test_smoothing_keeps_constants_and_averages_the_window():
    np.testing.assert_allclose(_smooth(np.full(7, 2.0), 3), 2.0)
    np.testing.assert_allclose(_smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(_smooth(np.array([1.0, 5.0]), 1), [1.0, 5.0])


def test_the_heat_map_is_of_a_searched_alpha(write_run):
    runs = {method: [read_run(write_run(method, 0))] for method in ("frozen_alpha", "agwm")}
    records = {method: [read_records(run) for run in members] for method, members in runs.items()}
    from agwm_jax.report.comparisons import Comparison

    comparison = Comparison("t", "t", "t", "accuracy", "test", runs, {}, "vanilla")
    data = ComparisonData(comparison, records, dict.fromkeys(runs))
    assert searched(data) == ["agwm"]
    # Where nothing was searched the random start is still worth a look.
    data = data._replace(gates={"frozen_alpha": None})
    assert searched(data) == ["frozen_alpha"]


def test_failure_signatures_reach_the_report(write_run, tmp_path):
    for seed in range(3):
        write_run("vanilla", seed, 0.70 + 0.001 * seed)
        write_run("agwm", seed, 0.60 + 0.1 * seed)
    for seed in (3, 4):
        write_run("agwm", seed, result={"warnings": [{"name": "alpha_collapsed", "message": f"all of {seed}"}]})
    report = write_report([tmp_path / "runs"], tmp_path / "out")
    found = {warning.name: warning.message for warning in report.warnings}
    assert set(found) == {"spread_above_baseline", "alpha_collapsed"}
    assert "agwm, 2 of 5 runs (seed 3, 4): all of 3" in found["alpha_collapsed"]
    assert all(f"**{name}**" in report.markdown for name in found)


def test_the_control_is_not_blamed_for_its_spread(write_run, tmp_path):
    for seed in range(3):
        write_run("vanilla", seed, 0.70 + 0.001 * seed)
        write_run("frozen_alpha", seed, 0.60 + 0.1 * seed)
    assert write_report([tmp_path / "runs"], tmp_path / "out").warnings == []


def test_alphas_that_do_not_fit_together_are_refused(write_run, tmp_path):
    write_run("agwm", 0, layers=2)
    write_run("agwm", 1, layers=3)
    with pytest.raises(AgwmError, match="alphas of agwm have different layers"):
        write_report([tmp_path / "runs"], tmp_path / "out")


def test_an_output_that_is_a_file_is_refused(write_run, tmp_path):
    write_run("vanilla", 0)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AgwmError, match="cannot be written to"):
        write_report([tmp_path / "runs"], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_report_imports_neither_jax_nor_pyplot():
    allowed = ("agwm_jax.report", "agwm_jax.errors")
    package = Path(agwm_jax.report.__file__).parent
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("jax", "flax", "optax", "chex"), f"{path.name} imports {name}"
                assert name != "matplotlib.pyplot", f"{path.name} imports pyplot, which keeps global state"
                assert not name.startswith("agwm_jax") or name.startswith(allowed), f"{path.name} imports {name}"
