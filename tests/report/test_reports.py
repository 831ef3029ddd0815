"""The JSON round trip, the terminal table, and the HTML page."""

from __future__ import annotations

import html.parser
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from xformopt.errors import DataError, OutputError
from xformopt.report import wording
from xformopt.report.html import render
from xformopt.report.schema import BenchReport, PassRecord, Run
from xformopt.report.sweep import sweep
from xformopt.report.terminal import print_report

EVIL = "<script>alert('$x$')</script>"


def run(name: str, p50: float, ratio: tuple[float, float, float] | None = None, **more: object) -> Run:
    speedup = {"over": "eager", "ratio": ratio[0], "ci95": ratio[1:]} if ratio else None
    values = {
        "name": name,
        "target": "ort-cpu",
        "batch": 1,
        "length": 128,
        "threads": 2,
        "precision": "fp32",
        "latency_ms": {"p50": p50, "p90": p50 * 1.1, "p99": p50 * 1.3, "ci95": (p50 * 0.99, p50 * 1.01)},
        "samples_ms": [p50 * (1 + 0.01 * (index % 7)) for index in range(40)],
        "load_ms": 120.0,
        "first_run_ms": 20.0,
        "peak_memory_bytes": 300_000_000,
        "base_memory_bytes": 100_000_000,
        "size_bytes": 90_900_000,
        "fidelity": {"relative_l2": 3.1e-7, "cosine": 1.0, "top1_agreement": 0.9999},
        "speedup": speedup,
        "operators": [{"name": "MatMul", "ms": p50 * 0.8, "share": 0.8, "count": 36}]
        + [{"name": f"Op{index}", "ms": p50 * 0.01, "share": 0.01, "count": 1} for index in range(20)],
        "roofline": {
            **{"gflops": 90.0, "gbytes_s": 3.0, "peak_gflops": 180.0, "peak_gbytes_s": 20.0},
            **{"intensity": 30.0, "bound": "compute"},
        },
        **more,
    }
    return Run.model_validate(values)


def report(**more: object) -> BenchReport:
    runs = [
        run("eager", 25.0),
        run("exact", 9.5, (2.63, 2.55, 2.7)),
        run("same", 25.1, (1.0, 0.98, 1.02), fallbacks=["Gather runs on the host"], notes=["a note"]),
        Run(name=EVIL, target="tvm-cpu", error=f"died of {EVIL} & signal 9"),
    ]
    passes = [
        PassRecord.model_validate(
            {
                **{"name": "fuse-qkv", "effect": "exact", "changed": True, "fired": 6, "relative_l2": 3e-7},
                **{"rejected": [{"reason": f"reads {EVIL}", "count": 2}], "seconds": 0.4},
            }
        )
    ]
    machine = {"cpu": "Fast CPU", "cores": 2, "load_average": 0.1, "packages": {"torch": "2.13.0"}}
    values = {"machine": machine, "runs": runs, "passes": passes, "source": "minilm", **more}
    return BenchReport.model_validate(values)


def printed(width: int) -> str:
    stream = io.StringIO()
    print_report(report(), Console(file=stream, width=width))
    return stream.getvalue()


def test_json_round_trip(tmp_path: Path) -> None:
    report().to_json(tmp_path / "r.json")
    assert BenchReport.from_json(tmp_path / "r.json") == report()
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["schema"] == "xformopt/bench/1"
    assert values["runs"][3]["latency_ms"] is None
    assert values["runs"][1]["speedup"] == {"over": "eager", "ratio": 2.63, "ci95": [2.55, 2.7]}


def test_what_json_cannot_say_is_null() -> None:
    assert report(runs=[run("a", float("nan"))]).to_dict()["runs"][0]["latency_ms"]["p50"] is None


def test_reads_the_bench_of_an_optimize_report(tmp_path: Path) -> None:
    bench = report().to_dict()
    passes = bench.pop("passes")
    (tmp_path / "o.json").write_text(json.dumps({"bench": bench, "passes": passes, "model": "minilm"}))
    assert BenchReport.from_json(tmp_path / "o.json") == report()


def test_keeps_what_a_later_version_adds(tmp_path: Path) -> None:
    values = report().to_dict() | {"novelty": 1}
    (tmp_path / "r.json").write_text(json.dumps(values))
    assert BenchReport.from_json(tmp_path / "r.json").to_dict()["novelty"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        ("[]", "not a JSON object"),
        ("{}", '"schema" is null'),
        ('{"schema": "xformopt/bench/9"}', "bench/9"),
        ('{"schema": "xformopt/bench/1", "runs": [{"name": "a"}]}', r"runs\.0\.target"),
    ],
)
def test_what_is_not_a_report(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        BenchReport.from_json(path)
    with pytest.raises(DataError, match="cannot read"):
        BenchReport.from_json(tmp_path / "absent.json")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_says_everything(width: int) -> None:
    text = printed(width)
    assert all(len(line) <= width for line in text.splitlines())
    assert f"minilm: exact is 2.63{wording.TIMES} as fast as eager" in text.replace("\n", " ")
    for part in (
        "no difference",
        f"2.55{wording.UNKNOWN}2.70{wording.TIMES}",
        "9.50",
        "300 MB",
        "200 MB",
        "90.9 MB",
        "3.1e-07",
        ">99.9%",
        "failed",
    ):
        assert part in text
    assert "died of" in text
    assert "same falls back: Gather" in text


def test_markup_in_names_is_text() -> None:
    stream = io.StringIO()
    print_report(report(runs=[run("[red]x[/red]", 1.0)]), Console(file=stream, width=100))
    assert "[red]x[/red]" in stream.getvalue()


class _Checker(html.parser.HTMLParser):
    """Counts tags, and notes what would reach out of the file."""

    VOID = frozenset({"meta", "col", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [] if tag in self.VOID else [tag]
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href"} and not (value or "").startswith("#"):
                self.outside.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_alone() -> None:
    other = report(source="vit", machine={"cpu": "Other CPU"})
    page = render([report(), other])
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.outside == []
    assert "script" not in checker.tags
    assert len(checker.ids) == len(set(checker.ids))
    assert page.count("<svg") == 4
    assert not re.search(r"@import|url\((?!#)", page)
    for part in (
        "2 comparisons",
        "Fast CPU",
        "Other CPU",
        "fuse-qkv",
        "Gather runs on the host",
        "no difference",
    ):
        assert part in page


def test_everything_from_outside_is_escaped() -> None:
    page = render([report(source=EVIL)])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_same_report_gives_the_same_page() -> None:
    assert render([report()]) == render([report()])


def test_a_page_of_failures_only() -> None:
    failed = BenchReport(runs=[Run(name="a", target="eager", error="no memory")])
    page = render([failed])
    assert "no run could be measured" in page
    assert "no memory" in page
    assert render([BenchReport()])


def test_nothing_to_render() -> None:
    with pytest.raises(DataError, match="no report"):
        render([])


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    report().to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(OutputError, match="is a directory"):
        report().to_html(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (0.5, "0.500"),
        (6.7, "6.70"),
        (25.04, "25.0"),
        (1234.5, "1,234"),
        (None, wording.UNKNOWN),
    ],
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert wording.milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (90_900_000, "90.9 MB"), (999_600, "1.0 MB")],
)
def test_bytes(value: int, text: str) -> None:
    assert wording.bytes_(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100.0%"), (0.99999, ">99.9%"), (0.00001, "<0.1%"), (0.0, "0.0%"), (0.5, "50.0%")],
)
def test_share_is_not_rounded_to_all_or_nothing(value: float, text: str) -> None:
    assert wording.share(value) == text


def test_a_busy_machine_is_told() -> None:
    busy = report(machine={"cpu": "CPU", "cores": 2, "load_average": 3.9})
    assert "busy" in wording.busy(busy)
    assert "busy" in render([busy])
    assert wording.busy(report()) == ""


def at_lengths(name: str, milliseconds: tuple[float, ...], over: str | None) -> list[Run]:
    speedup = {"over": over, "ratio": 2.0, "ci95": (1.9, 2.1)} if over else None
    lengths = (256, 1024, 4096)[: len(milliseconds)]
    return [run(name, ms, length=n, speedup=speedup) for n, ms in zip(lengths, milliseconds, strict=True)]


def test_runs_at_several_lengths_are_drawn_against_length() -> None:
    base = at_lengths("softmax", (1.0, 16.0, 256.0), None)
    linear = at_lengths("linear", (4.0, 16.0, 64.0), "softmax")
    slow = at_lengths("slow", (9.0, 99.0, 999.0), "softmax")
    fast = at_lengths("fast", (0.5, 2.0), "softmax")
    again = at_lengths("there and back", (0.9, 17.0, 100.0), "softmax")
    broken = Run(name="broken", target="ort-cpu", length=256, error="out of memory")
    runs = [*base, *linear, *slow, *fast, *again, broken]
    found = sweep(runs)
    assert found is not None
    said = {series.name: series.over for series in found.series}
    assert found.lengths == (256, 1024, 4096)
    assert said["softmax"] == ""
    assert said["linear"] == "from 1,024 on"
    assert said["slow"] == "never here"
    assert said["fast"] == "at every length here"
    assert said["there and back"].startswith("from 1,1")
    page = render([report(runs=runs, protocol={"rounds": 3})])
    assert "Latency against length" in page
    assert "length 256 to 4,096" in page
    assert sweep(report().runs) is None
