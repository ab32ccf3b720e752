"""The report: numbers from synthetic runs of every shape, a self-contained page, typed errors, bounded time."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import DataError
from tests.train.synthetic_run import TOKENS_PER_STEP, make_run
from train.report import summary_lines, write_report
from train.report.__main__ import main
from train.report.columns import step_parts
from train.report.data import load_run
from train.report.html import page
from train.report.load import family_bands
from train.report.loss import loss_before, set_names
from train.report.plot import WIDE, curve, envelope, mean_line, moving_mean, new_figure
from train.run_files import RunFiles

REPOSITORY = Path(__file__).resolve().parents[2]

SHAPES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "switch": (
        {"stages": [(120, 4), (100, 8)]},
        {"loss", "family_tree", "expert_load_map", "expert_load", "divergence", "optimizer", "throughput"},
    ),
    "several": (
        {"stages": [(60, 4), (50, 6), (50, 18)], "layers": 6, "greedy": True, "full": True},
        {
            *("loss", "validation_sets", "family_tree", "expert_load_map", "expert_load", "divergence", "optimizer"),
            *("norms", "throughput", "step_time", "memory"),
        },
    ),
    "no_expansion": (
        {"stages": [(80, 4)]},
        {"loss", "expert_load_map", "expert_load", "optimizer", "throughput"},
    ),
    "dense": ({"stages": [(80, 0)]}, {"loss", "optimizer", "throughput"}),
    "three_steps": (
        {"stages": [(2, 4), (1, 8)], "every": 1, "finished": False},
        {"loss", "family_tree", "expert_load_map", "expert_load", "divergence", "optimizer", "throughput"},
    ),
    "one_step": (
        {"stages": [(1, 4)], "every": 1, "finished": False},
        {"loss", "expert_load_map", "expert_load", "optimizer", "throughput"},
    ),
}


@pytest.fixture(scope="module")
def switch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with one expansion and its report. Tests that change it take a copy."""
    run_dir = tmp_path_factory.mktemp("runs") / "switch"
    make_run(run_dir, [(120, 4), (100, 8)])
    write_report(run_dir)
    return run_dir


def _copy(source: Path, target: Path) -> RunFiles:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("report*"))
    return RunFiles(target)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_run_has_a_self_contained_report(tmp_path: Path, shape: str) -> None:
    arguments, expected = SHAPES[shape]
    make_run(tmp_path / shape, **arguments)
    path = write_report(tmp_path / shape)
    assert path == tmp_path / shape / "report.html"
    text = path.read_text()

    figures = {png.stem: png.read_bytes() for png in (tmp_path / shape / "report").glob("*.png")}
    assert set(figures) == expected
    assert all(png.startswith(b"\x89PNG\r\n") and len(png) > 5000 for png in figures.values())
    # Everything is inside: each picture twice (desktop and phone), no script, no address, no file beside it.
    assert re.findall(r'(?:src|srcset|href)="(?!data:image/png;base64,)[^"]*', text) == []
    assert text.count("data:image/png;base64,") == 2 * len(figures)
    assert "<script" not in text and "://" not in re.sub(r"base64,[^\"]*", "", text)
    assert '<meta name="viewport"' in text and "@media (max-width:600px)" in text
    assert text.count("<figcaption>") == len(figures)
    # One opening tag for each closing one: nothing is torn in the page.
    for tag in ("table", "tr", "figure", "div", "details", "dl", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    assert summary_lines(tmp_path / shape)


def test_the_numbers_of_the_switch(switch_run: Path) -> None:
    record = load_run(switch_run)
    (expansion,) = record.expansions
    assert (expansion.step, expansion.from_experts, expansion.to_experts) == (120, 4, 8)
    assert [(s.index, s.num_experts, s.first_step, s.last_step) for s in record.stages] == [
        (0, 4, 1, 120),
        (1, 8, 121, 220),
    ]
    metrics = RunFiles(switch_run).read_metrics()
    for stage, rows in zip(record.stages, (metrics[:120], metrics[120:]), strict=True):
        assert stage.tokens == len(rows) * TOKENS_PER_STEP
        assert stage.tokens_per_second == pytest.approx(np.median([row["tokens_per_second"] for row in rows]))
    assert record.stages[0].end_loss == pytest.approx(np.mean([row["lm_loss"] for row in metrics[114:120]]))
    # The evaluation of the outcome lies behind the switch, the one before it in front.
    around = [e for e in record.evaluations if e.step == 120]
    assert [e.valid_loss for e in around] == [expansion.loss_before, expansion.loss_after]
    assert around[0].position < expansion.position < around[1].position

    text = (switch_run / "report.html").read_text()
    assert expansion.loss_before is not None and expansion.loss_after is not None
    for shown in (
        f"{expansion.loss_before:.4f}",
        f"{expansion.loss_after:.4f}",
        "+0.0600",
        "2.31 s",
        "rebuild",
        "Every expert of every layer has 2 copies.",
        "checkpoints/step-00000120-stage0",
        "megatron-core 0.16.1",
    ):
        assert shown in text, shown

    lines = summary_lines(switch_run)
    assert len(lines) <= 24 and all(len(line) <= 120 for line in lines if str(switch_run) not in line)
    joined = "\n".join(lines)
    assert f"before {expansion.loss_before:.4f} (step 120)" in joined
    assert f"right after {expansion.loss_after:.4f} (+0.0600)" in joined
    assert f"at the end {record.evaluations[-1].valid_loss:.4f} (step 220)" in joined
    assert "pause             2.31 s" in joined
    assert str(switch_run / "report.html") in joined and str(switch_run / "checkpoints") in joined


def test_the_numbers_of_optional_figures(tmp_path: Path) -> None:
    """Parts of a step, memory, FLOPs, validation sets and spreads between siblings; a step without times is left out."""
    files = make_run(tmp_path / "run", [(50, 4), (50, 8)], full=True)
    metrics = files.read_metrics()
    for key in ("data_seconds", "forward_backward_seconds", "all_to_all_seconds", "optimizer_seconds"):
        metrics[3][key] = None
    files.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    record = load_run(files.run_dir)

    parts = step_parts(record.columns)
    assert np.isnan([part[3] for part in parts.values()]).all()
    timed = np.arange(100) != 3
    assert np.sum(list(parts.values()), axis=0)[timed] == pytest.approx(record.columns["step_seconds"][timed])
    rows = [row for row in metrics[:50] if row["step"] != 4]
    first = record.stages[0].part_seconds
    passes = np.mean([row["forward_backward_seconds"] - row["all_to_all_seconds"] for row in rows])
    assert first["forward, backward"] == pytest.approx(passes)
    assert first["other"] == pytest.approx(0.05 * np.mean([row["step_seconds"] for row in rows]))
    assert record.stages[1].memory_bytes == max(row["memory_bytes"] for row in metrics[50:])
    assert record.stages[1].mfu == pytest.approx(np.median([row["mfu"] for row in metrics[50:]]))

    assert set_names(record) == ["general", "domain"]
    before, after = (e for e in record.evaluations if e.step == 50)
    assert before.spreads == {} and set(after.spreads) == {
        *("sibling_divergence", "sibling_moment_divergence", "routing_agreement")
    }
    assert loss_before(record, "general") == before.sets["general"]["loss"]
    end = record.evaluations[-1].sets["general"]
    text = page(record, [])
    cells = [before.sets["general"]["loss"], after.sets["general"]["loss"], end["loss"]]
    row = "".join(f'<td class="n">{loss:.4f}</td>' for loss in cells)
    change = f'<td class="n">{end["loss"] - cells[0]:+.4f}</td><td class="n">{end["perplexity"]:.3g}</td>'
    assert f'<td class="t">general</td>{row}{change}<td class="n">{end["bits_per_byte"]:.4g}</td>' in text
    shares = [first[name] / sum(first.values()) for name in ("forward, backward", "other")]
    assert f"{100 * shares[0]:.0f} % (" in text and f"{100 * shares[1]:.1f} % (" in text
    assert "TFLOP/s" in text and "peak memory" in text


def test_a_run_without_optional_figures_mentions_none(switch_run: Path) -> None:
    record = load_run(switch_run)
    assert step_parts(record.columns) == {} and set_names(record) == []
    text = page(record, [])
    for word in ("TFLOP", "MFU", "peak memory", "Validation sets", "Where a step", "all-to-all", "first moments"):
        assert word not in text, word


def test_the_same_run_gives_the_same_bytes(switch_run: Path) -> None:
    before = {p.name: p.read_bytes() for p in [switch_run / "report.html", *(switch_run / "report").iterdir()]}
    write_report(switch_run)
    after = {p.name: p.read_bytes() for p in [switch_run / "report.html", *(switch_run / "report").iterdir()]}
    assert before == after


def test_text_from_the_run_is_escaped(tmp_path: Path, switch_run: Path) -> None:
    files = _copy(switch_run, tmp_path / "<img src=x onerror=1>")
    files.config.write_text("name: </pre><script>alert(1)</script>\n")
    files.append_event("start", step=220, num_experts=8, versions={"<b>torch</b>": '"><i>'}, layout={"a&b": 1})
    files.append_event("checkpoint", step=220, path="<u>path</u>", seconds=1, bytes=1)
    files.append_event("<s>odd</s>", step=220, key="</td><h1>")
    text = page(load_run(files.run_dir), [])
    for raw in ("<img src=x", "<script", "<b>", '"><i>', "<u>", "<s>", "<h1>&lt;/td", "</td><h1>"):
        assert raw not in text, raw
    assert "&lt;img src=x onerror=1&gt;" in text and "a&amp;b" in text and "&lt;u&gt;path&lt;/u&gt;" in text


def test_superseded_events_count_for_nothing(tmp_path: Path) -> None:
    """A run that expanded, was killed, went back to before the expansion and made another one."""
    files = make_run(tmp_path / "run", [(60, 4), (60, 8)], finished=False)
    stale = [e.valid_loss for e in load_run(files.run_dir).evaluations if e.position > 60]
    files.append_event("start", step=60, num_experts=4, world_size=1)
    files.append_event("resume", step=60, checkpoint="checkpoints/step-00000060-stage0", stage=0, num_experts=4)
    assert files.truncate_after(60) == 60 + 6  # metrics and expert load

    record = load_run(files.run_dir)
    assert record.expansions == [] and len(record.stages) == 1
    assert not set(stale) & {e.valid_loss for e in record.evaluations}
    assert record.status == "unfinished: last recorded step 60"

    files.append_event("evaluation", step=60, valid_loss=3.0, tokens=1, sibling_divergence=None)
    files.append_event("evaluation", step=60, valid_loss=3.5, tokens=1, sibling_divergence=None)
    files.append_event(
        "expansion", step=60, stage=1, from_experts=4, to_experts=12, valid_loss_before=3.0, valid_loss_after=3.5
    )
    files.append_metrics({"step": 61, "stage": 1, "num_experts": 12, "tokens": 61 * TOKENS_PER_STEP, "lm_loss": 3.4})
    record = load_run(files.run_dir)
    assert [(e.from_experts, e.to_experts, e.loss_after) for e in record.expansions] == [(4, 12, 3.5)]
    assert record.end_loss == (3.5, 60, "validation")
    assert 'class="old"' in page(record, [])


def test_an_expansion_known_only_from_the_metrics(tmp_path: Path, switch_run: Path) -> None:
    """Killed between the publication of the new stage and the event: the switch is still shown."""
    files = _copy(switch_run, tmp_path / "run")
    kept = [line for line in files.events.read_text().splitlines(keepends=True) if '"expansion"' not in line]
    files.events.write_text("".join(kept))
    shutil.rmtree(files.plans)
    record = load_run(files.run_dir)
    assert [(e.step, e.from_experts, e.to_experts, e.loss_before) for e in record.expansions] == [(120, 4, 8, None)]
    assert "The plan of this expansion is not in plans/" in page(record, [])


def test_a_run_without_events_and_with_broken_numbers(tmp_path: Path) -> None:
    """Only metrics, some null: the loss became NaN, and the last line was torn by a kill."""
    lines = [{"step": s, "lm_loss": None if s % 3 == 0 else 2.0, "grad_norm": None} for s in range(1, 30)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 30, "lm_')
    record = load_run(tmp_path)
    assert record.last_step == 29 and not record.has("grad_norm")
    assert {p.stem for p in (write_report(tmp_path).parent / "report").iterdir()} == {"loss"}


def test_unequal_families(tmp_path: Path) -> None:
    files = make_run(tmp_path / "run", [(20, 4), (20, 10)], layers=3, greedy=True)
    plan = files.read_plans()[20]
    text = page(load_run(files.run_dir), [])
    copies = [size for layer in plan["layers"] for size in layer["copies"]]
    for size in set(copies):
        assert f'<td class="t">{size}</td><td class="n">{copies.count(size)}</td>' in text
    largest = max(copies)
    named = [(x["layer"], e) for x in plan["layers"] for e, size in enumerate(x["copies"]) if size == largest]
    assert f"Largest families, {largest} copies each" in text
    assert all(f"layer {layer} expert {expert} (" in text for layer, expert in named)


def test_replicas_lie_in_the_band_of_their_parent() -> None:
    first, second, third = family_bands([2, 4, 5], [[0, 1, 1, 1], [0, 1, 2, 3, 3]])
    assert first.edges.tolist() == [0.0, 0.5, 1.0]
    assert second.experts == [0, 1, 2, 3]
    assert second.edges == pytest.approx([0, 1 / 2, 1 / 2 + 1 / 6, 1 / 2 + 2 / 6, 1])
    assert third.edges == pytest.approx([0, 1 / 2, 1 / 2 + 1 / 6, 1 / 2 + 2 / 6, 1 / 2 + 5 / 12, 1])
    # Parents need not be in order, and an unknown plan starts afresh.
    assert family_bands([2, 4], [[1, 0, 1, 0]])[1].experts == [1, 3, 0, 2]
    assert family_bands([2, 4], [None])[1].edges == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert family_bands([2, 4], [[0, 0, 0, 7]])[1].experts == [0, 1, 2, 3]


def test_a_metric_of_some_steps_is_one_line(tmp_path: Path) -> None:
    """Recorded every tenth step, far apart for the moving mean: still joined, and not across the switch."""
    files = make_run(tmp_path / "run", [(60, 4), (60, 8)])
    metrics = files.read_metrics()
    for row in metrics:
        row["router_entropy"] = row["step"] / 1000 if row["step"] % 10 == 0 else None
    files.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    record = load_run(files.run_dir)
    axis = new_figure(WIDE, 2.0).subplots()
    curve(axis, record, "router_entropy", window=3)
    mean_line(axis, record, "router_entropy")
    lines = [line.get_xdata().tolist() for line in axis.lines]
    # The raw curve and its mean in each stage, then the mean alone.
    first, second = [10, 20, 30, 40, 50, 60], [70, 80, 90, 100, 110, 120]
    assert lines == [first, first, second, second, first, second]
    assert all(np.isfinite(line.get_ydata()).all() for line in axis.lines)


def test_thinning_keeps_every_spike() -> None:
    values = np.zeros(10_000)
    values[[17, 5_003, 9_999]] = 9.0, -7.0, 5.0
    steps, low, high = envelope(np.arange(10_000.0), values, 100)
    assert len(steps) == 100
    assert (high[0], low[50], high[-1]) == (9.0, -7.0, 5.0)


def test_the_moving_mean() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    assert moving_mean(values, 1)[[0, 1, 3, 4]].tolist() == [1.0, 2.0, 4.0, 5.0]
    assert moving_mean(values, 3) == pytest.approx([1.5, 1.5, 3.0, 4.5, 4.5])
    assert np.isnan(moving_mean(np.full(3, np.nan), 3)).all()


@pytest.mark.slow
def test_a_very_long_run(tmp_path: Path) -> None:
    """200,000 steps: CPU seconds are counted, so that a busy machine does not fail the test."""
    rng = np.random.default_rng(0)
    steps = 200_000
    losses = 2.0 + 4.0 * (np.arange(1, steps + 1) + 30) ** -0.45 + 0.05 * rng.standard_normal(steps)
    metrics = [
        f'{{"step": {step}, "stage": {int(step > 120_000)}, "num_experts": {8 if step <= 120_000 else 16}, '
        f'"tokens": {step * 8192}, "lm_loss": {loss:.6f}, "grad_norm": {loss / 3:.6f}, "learning_rate": 0.0003, '
        f'"step_seconds": 0.31, "tokens_per_second": 26000.5, "expert_load_max": 1.25, "expert_load_min": 0.75, '
        f'"expert_load_entropy": 0.98, "dead_experts": 0}}\n'
        for step, loss in zip(range(1, steps + 1), losses, strict=True)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(metrics))
    row = "[" + ", ".join(["0.125"] * 8) + "]"
    wide = "[" + ", ".join(["0.0625"] * 16) + "]"
    (tmp_path / "expert_load.jsonl").write_text(
        "".join(
            f'{{"step": {step}, "stage": {int(step > 120_000)}, "num_experts": 8, "layers": [1, 2], '
            f'"share_LE": [{row}, {row}]}}\n'.replace(row, row if step <= 120_000 else wide)
            for step in range(20, steps + 1, 20)
        )
    )
    before = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - before < 10.0
    assert path.stat().st_size < 5_000_000
    record = load_run(tmp_path)
    assert all(len(history.steps_R) <= 241 and history.stride > 1 for history in record.loads)


BROKEN = [
    ("no such directory", None),
    ("not a run directory", {}),
    ("metrics.jsonl: empty", {"metrics.jsonl": ""}),
    ("metrics.jsonl: empty", {"events.jsonl": '{"time": "", "step": 0, "event": "start", "details": {}}\n'}),
    ("metrics.jsonl:1: torn", {"metrics.jsonl": '{"step"\n{"step": 2}\n'}),
    (
        "metrics.jsonl:2: lm_loss='high' is not a number",
        {"metrics.jsonl": '{"step": 1}\n{"step": 2, "lm_loss": "high"}\n'},
    ),
    ("metrics.jsonl:1: step=None", {"metrics.jsonl": '{"lm_loss": 1}\n'}),
    ("events.jsonl:1: not an event", {"metrics.jsonl": '{"step": 1}\n', "events.jsonl": '{"a": 1}\n'}),
    (
        "expert_load.jsonl:1: not an expert load record",
        {"metrics.jsonl": '{"step": 1}\n', "expert_load.jsonl": '{"step": 1, "stage": 0}\n'},
    ),
    (
        "expert_load.jsonl:2: share_LE of shape (1, 3)",
        {
            "metrics.jsonl": '{"step": 1}\n',
            "expert_load.jsonl": '{"step": 1, "layers": [1], "share_LE": [[0.5, 0.5]]}\n'
            '{"step": 2, "layers": [1], "share_LE": [[0.5, 0.25, 0.25]]}\n',
        },
    ),
]


@pytest.mark.parametrize(("message", "contents"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_what_cannot_be_read_is_one_typed_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str, contents: dict[str, str] | None
) -> None:
    run_dir = tmp_path / "run"
    if contents is not None:
        run_dir.mkdir()
        for name, text in contents.items():
            (run_dir / name).write_text(text)
    with pytest.raises(DataError) as caught:
        write_report(run_dir)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError):
        summary_lines(run_dir)
    assert main([str(run_dir)]) == DataError.exit_code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out


def test_the_page_can_be_written_elsewhere(tmp_path: Path, switch_run: Path) -> None:
    files = _copy(switch_run, tmp_path / "run")
    assert write_report(files.run_dir, tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page" / "loss.png").exists()
    assert not files.report.exists() and not (files.run_dir / "report").exists()
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(DataError, match="does not exist"):
        write_report(files.run_dir, tmp_path / "none" / "page.html")
    with pytest.raises(DataError, match="is a folder"):
        write_report(files.run_dir, tmp_path)


def test_the_command_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [(12, 4)])
    environment = {**os.environ, "MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train.report"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
        )

    helped = run("--help")
    assert helped.returncode == 0 and "RUN_DIR" in helped.stdout and "--output" in helped.stdout
    missing = run(str(tmp_path / "none"))
    assert missing.returncode == 3 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr
    done = run(str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"written: {tmp_path / 'run' / 'report.html'}")
