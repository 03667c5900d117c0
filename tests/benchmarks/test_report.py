"""What is made of recorded results: the page, pictures, comparisons, README's table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.suites import cli, compare, levels, machine, plots, report, results, summary
from benchmarks.suites.suites import SUITES

ROOT = Path(__file__).parents[2]


def row(side: str, length: int, seconds: float, **facts: str) -> results.Row:
    """A made-up measurement with a spread of 2 %."""
    flops = 4.0 * 64 * 64 * length
    made = dict.fromkeys(results.COLUMNS, "") | {
        "suite": "forward", "case": f"fp32 forward 1x1x{length}x64", "operation": "attention",
        "direction": "forward", "dtype": "fp32", "device": "cpu", "batch": "1",
        "heads": str(4096 // length), "heads_kv": str(4096 // length), "seqlen_q": str(length),
        "seqlen_k": str(length), "head_dim": "64", "variant": "full", "side": side,
        "ours": "yes" if side.startswith("fused_attn") else "no", "status": "ok",
        "clock": "CPU time, 1 thread", "samples": "9", "min_s": f"{seconds * 0.98}",
        "q25_s": f"{seconds * 0.99}", "median_s": f"{seconds}", "q75_s": f"{seconds * 1.01}",
        "max_s": f"{seconds * 1.2}", "flops": f"{flops}", "bytes": f"{flops / 32}",
        "gflops": f"{flops / seconds / 1e9}", "gbytes": f"{flops / seconds / 32e9}",
        "ceiling": "multiply-adds", "ceiling_rate": "100", "share": "0.5",
        "memory_bytes": str(2**20 * length), "memory_is": "growth of the process's peak",
        "machine": "Some CPU", "torch": "2.13", "commit": "abc", "date": "2026-01-02 03:04 UTC",
    }  # fmt: skip
    return made | facts


def recorded() -> list[results.Row]:
    lengths = (128, 256, 1024)
    return [
        *(row("fused_attn:cpu", n, 1e-3 * n) for n in lengths),
        *(row("sdpa-flash", n, 2e-3 * n) for n in lengths),
        *(row("sdpa-math", n, 3e-3 * n) for n in lengths),
        row("fused_attn:cpu", 128, 0.5, suite="backward", direction="backward", case="b"),
        row("sdpa-flash", 128, 0.25, suite="backward", direction="backward", case="b"),
        row("flex", 128, 1.0, status="wrong: out: error 1", clock="", median_s="", case="w"),
    ]


def write(path: Path, rows: list[results.Row]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    results._write(path / "forward.csv", rows)
    return path


def test_report_has_every_case_and_pictures(tmp_path: Path) -> None:
    folder = write(tmp_path, recorded())
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / report.NAME).read_text()
    assert "Some CPU" in text
    assert "| fp32 forward 1x1x256x64 | CPU time, 1 thread | cpu | 256 | 1 % |" in text
    assert "| sdpa-flash | 512 | 2.00 |" in text
    assert "| 50% of multiply-adds |" in text
    assert "| flex | wrong: out: error 1 | forward | w |" in text
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"ratios-cpu.png", "speed-cpu.png", "memory-cpu.png"}
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"({path.name})" in text


def test_changes_within_the_noise_are_none() -> None:
    before = [row("fused_attn:cpu", 128, 1.0)]
    assert not compare.compare(before, [row("fused_attn:cpu", 128, 1.04)]).regressions
    wide = {"q25_s": "0.9", "q75_s": "1.15"}  # quartiles that overlap
    assert not compare.compare(before, [row("fused_attn:cpu", 128, 1.1, **wide)]).regressions
    noisy = {"q25_s": "1.05", "q75_s": "1.35"}  # apart, but the spread is as large as the change
    assert not compare.compare(before, [row("fused_attn:cpu", 128, 1.2, **noisy)]).regressions
    assert compare.compare(before, [row("fused_attn:cpu", 128, 1.2)]).regressions


def test_peers_and_speed_ups_are_no_regressions() -> None:
    before = [row("fused_attn:cpu", 128, 1.0), row("sdpa-flash", 128, 1.0)]
    after = [row("fused_attn:cpu", 128, 0.5), row("sdpa-flash", 128, 2.0)]
    found = compare.compare(before, after)
    assert not found.regressions
    assert len(found.improvements) == len(found.peers) == 1


def test_what_moved_with_its_peers_is_the_machine() -> None:
    sides = ("fused_attn:cpu", "sdpa-flash", "sdpa-math")
    before = [row(side, 128, 1.0) for side in sides]
    after = [row(side, 128, 1.5) for side in sides]
    found = compare.compare(before, after)
    assert not found.regressions
    assert len(found.peers) == 2
    after[0] = row("fused_attn:cpu", 128, 3.0)
    assert len(compare.compare(before, after).regressions) == 1
    after[0] = row("fused_attn:cpu", 128, 1.0)  # faster than its peers, but not than before
    assert not compare.compare(before, after).improvements


def test_a_figure_that_is_lost_is_a_regression() -> None:
    before = [row("fused_attn:cpu", 128, 1.0), row("fused_attn:cpu", 256, 1.0)]
    lost = row("fused_attn:cpu", 128, 1.0, status="wrong: out", clock="", median_s="")
    found = compare.compare(before, [lost])
    assert found.regressions == [
        "fp32 forward 1x1x128x64 [fused_attn:cpu, CPU time, 1 thread]: "
        "has no figure any more, wrong: out"
    ]
    assert len(found.gone) == 1
    with pytest.raises(results.ResultsError, match="no measurement in common"):
        compare.compare(before, [row("sdpa-flash", 128, 1.0)])


def test_wall_times_of_several_threads_count_by_their_minimum() -> None:
    several = {"clock": "wall time, 2 threads"}
    ours = row("fused_attn:cpu", 128, 1.0, **several, min_s="0.5")
    peer = row("sdpa-flash", 128, 1.0, **several, min_s="0.75")
    assert results.ratio(ours, peer) == 1.5


def test_the_table_of_readme_is_that_of_the_recorded_results() -> None:
    text = (ROOT / "README.md").read_text()
    _, _, rest = text.partition(report.BEGIN)
    shown, _, _ = rest.partition(report.END)
    assert shown.strip() == report.readme_table(machine.RESULTS), "run `make readme`"


def test_the_table_of_readme_is_short_and_leaves_no_suite_out() -> None:
    table = report.readme_table(machine.RESULTS)
    folders = [path for path in machine.RESULTS.glob("*") if list(path.glob("*.csv"))]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "cases" not in line]
    assert 0 < len(rows) <= 8 * len(folders)
    shown = {name for _, suites, _ in summary.SUMMARY for name in suites}
    assert shown == {suite.name for suite in SUITES} - {"import"}


def test_the_table_has_machine_commit_and_ratios(tmp_path: Path) -> None:
    half = [row(side, 128, s, dtype="bf16", case="h") for side, s in
            (("fused_attn:cpu", 1.0), ("sdpa-math", 4.0))]  # fmt: skip
    write(tmp_path / "some-cpu", [*recorded(), *half])
    page = tmp_path / "README.md"
    page.write_text(f"# It\n\n{report.BEGIN}\nold\n{report.END}\nmore\n")
    assert cli.main(["report", str(tmp_path), "--readme", str(page)]) == 0
    text = page.read_text()
    assert (
        "Some CPU, one thread; torch 2.13; commit abc, 2026-01-02. Speed-up over the fastest"
        in text
    )
    assert "| | fp32 | bf16 | cases | most often the fastest alternative |" in text
    assert "| attention, forward | 2.00, 2.00, 2.00 | 4.00, 4.00, 4.00 | 4 | sdpa-flash |" in text
    assert "| attention, backward | 0.50, 0.50, 0.50 |  | 1 | sdpa-flash |" in text
    assert "blob/main/benchmarks/results/some-cpu/report.md)" in text
    assert text.startswith("# It\n")
    assert text.endswith("more\n")
    assert "old" not in text
    assert not report.update_readme(page, tmp_path)


def test_the_tables_of_the_page_on_performance_are_those_of_the_records() -> None:
    text = levels.PAGE.read_text()
    [(folder, _)] = summary.recorded()
    for begin, end, block in (
        (report.BEGIN, report.END, report.readme_table()),
        (levels.BEGIN, levels.END, levels.table(folder)),
    ):
        shown, _, _ = text.partition(begin)[2].partition(end)
        assert shown.strip() == block, "run `make readme`"


def test_a_class_of_no_kind_is_named() -> None:
    with pytest.raises(ValueError, match="fp32 something"):
        levels.kind("fp32 something")


def test_who_writes_into_memory_made_before_is_marked(tmp_path: Path) -> None:
    rows = [row("fused_attn:cpu", 128, 1.0), row("onnxruntime", 128, 1.5)]
    assert "| onnxruntime† |" in report.render(rows)
    assert summary.summary(rows)[0].fastest == "onnxruntime†"
    norm = {
        "operation": "add_norm",
        "suite": "layer_norm",
    }  # where ours writes into such memory too
    both = [row("fused_attn:cpu", 128, 1.0, **norm), row("onnxruntime", 128, 1.5, **norm)]
    assert "| onnxruntime |" in report.render(both)


def test_no_label_of_a_picture_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn lies within what is saved, however long names are."""
    seen = []

    def save(figure: plots.Any, path: Path, **how: object) -> None:
        figure.canvas.draw()
        box = figure.get_tightbbox(figure.canvas.get_renderer())
        inside = figure.bbox_inches
        cut = min(box.x0, box.y0) < 0 or box.x1 > inside.x1 or box.y1 > inside.y1
        seen.append(not cut or how["bbox_inches"] == "tight")

    monkeypatch.setattr(plots.pyplot.Figure, "savefig", save)
    long = [row | {"machine": "A machine of a very long name " * 5} for row in recorded()]
    plots.draw_all(tmp_path, long)
    plots.draw_summary(tmp_path / "s.png", summary.summary(long), summary.conditions(long))
    assert seen == [True] * 4


def test_readme_without_markers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "README.md"
    page.write_text("# It\n")
    assert cli.main(["report", str(tmp_path), "--readme", str(page)]) == 2
    assert report.BEGIN in capsys.readouterr().err


def test_a_class_measured_again_replaces_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "gates.csv"
    results.save_rows(path, [{"class": "a", "ratio": 1.0}, {"class": "b", "ratio": 2.0}], "class")
    results.save_rows(path, [{"class": "b", "ratio": 3.0}], "class")
    with path.open(newline="") as file:
        assert [(r["class"], r["ratio"]) for r in csv.DictReader(file)] == [
            ("a", "1.0"),
            ("b", "3.0"),
        ]
    results.save_rows(path, [{"class": "c", "speed": 1.0}], "class")
    with path.open(newline="") as file:
        assert [r["class"] for r in csv.DictReader(file)] == ["c"]


@pytest.mark.parametrize(("peers_move", "count"), [(0.01, 1), (0.20, 0)])
def test_a_change_counts_if_it_is_beyond_what_unchanged_peers_move(
    peers_move: float, count: int
) -> None:
    def run(ours: float, moved: float) -> list[results.Row]:
        others = [
            row("sdpa-flash", n, 1e-3 * (1 + moved * (-1) ** n), case=f"{n}") for n in range(1, 41)
        ]
        return [row("fused_attn:cpu", 99, ours, case="alone"), *others]

    found = compare.compare(run(1e-3, 0.0), run(1.3e-3, peers_move))
    assert len(found.regressions) == count
    assert (
        f"noise between the runs, CPU time, 1 thread, multiply-adds: {2 * peers_move:.0%}"
        in str(found)
    )
