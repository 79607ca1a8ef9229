"""Run output: valid JSON lines that are a function of the run, TensorBoard, text logs, progress."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pretrain.engine.report import metrics_log as module
from pretrain.engine.report.captioned_images import contact_strip
from pretrain.engine.report.metrics_log import LoggingSettings, MetricsLog, drop_later_steps
from pretrain.engine.report.progress import ProgressReport

QUIET = LoggingSettings(tensorboard=False)


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def lines_of(path: Path) -> list[dict]:
    def no_constants(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constants) for line in path.open(encoding="utf-8")]


def open_log(run_dir, rank=0, resume_step=0, settings=QUIET, **options) -> MetricsLog:
    options.setdefault("console", console())
    return MetricsLog(run_dir, rank, resume_step, 100, settings, **options)


def test_a_line_holds_what_was_logged(tmp_path):
    with open_log(tmp_path) as log:
        log.log(1, "caption", {"loss": 2.5, "samples": 64, "skipped": False})
        values = {"loss": torch.tensor(1.5), "norm": np.float32(0.5), "count": np.int64(3)}
        log.log(2, "caption", values, kind="evaluation")
        assert len(lines_of(tmp_path / "metrics.jsonl")) == 2, "lines are flushed at once"
    first, second = lines_of(tmp_path / "metrics.jsonl")
    times = [line.pop("time") for line in (first, second)]
    assert times == sorted(times)
    expected = {"step": 1, "task": "caption", "kind": "train"}
    assert first == {**expected, "loss": 2.5, "samples": 64, "skipped": 0}
    assert second == {
        "step": 2,
        "task": "caption",
        "kind": "evaluation",
        "loss": 1.5,
        "norm": 0.5,
        "count": 3,
    }


def test_values_that_are_not_finite_stay_json(tmp_path):
    with open_log(tmp_path) as log:
        log.log(1, "a", {"loss": float("nan"), "norm": torch.tensor(float("-inf")), "lr": 0.1})
    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["norm"] is None and line["lr"] == 0.1
    assert line["non_finite"] == {"loss": "nan", "norm": "-inf"}


def test_a_metric_of_nothing_is_null_and_no_point_of_a_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, settings=LoggingSettings()) as log:
        log.log(1, "a", {"loss": None, "labelled": 0.0})
        log.log(2, "a", {"loss": 0.5, "labelled": 1.0})
    first, second = lines_of(tmp_path / "metrics.jsonl")
    assert first["loss"] is None and first["labelled"] == 0.0 and "non_finite" not in first
    assert second["loss"] == 0.5
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {tag: [p.step for p in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    (curve,) = [steps for tag, steps in points.items() if tag.endswith("loss")]
    assert curve == [2]


def test_metric_names_must_not_hide_the_line_itself(tmp_path):
    with open_log(tmp_path) as log, pytest.raises(ValueError, match=r"\['step'\] are taken"):
        log.log(1, "a", {"step": 3})


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    def run(folder: Path, first: int, last: int) -> None:
        with open_log(folder, resume_step=first) as log:
            for step in range(first + 1, last + 1):
                log.log(step, "a", {"loss": 1 / step})

    run(tmp_path / "whole", 0, 9)
    run(tmp_path / "parts", 0, 6)  # killed after step 6, the last checkpoint is that of step 4
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "task": "a", "lo')
    run(tmp_path / "parts", 4, 9)
    stripped = [
        [{k: v for k, v in line.items() if k != "time"} for line in lines_of(path)]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "parts/metrics.jsonl")
    ]
    assert stripped[0] == stripped[1]
    run(tmp_path / "parts", 0, 2)
    assert [line["step"] for line in lines_of(tmp_path / "parts/metrics.jsonl")] == [1, 2]


def test_lines_that_are_no_metrics_are_dropped_and_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\x00\x00\n[3]\n{"step": 2}\n{"step": 3}', encoding="utf-8")
    drop_later_steps(path, 3)
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'
    assert f"{path}:2: not a line of JSON" in caplog.text and f"{path}:3" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def read_board(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return board


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    settings = LoggingSettings(tensorboard=True)
    with open_log(tmp_path, settings=settings) as log:
        for step in (1, 2, 3, 4):
            log.log(step, "caption", {"loss": 10.0 + step})
    with open_log(tmp_path, resume_step=2, settings=settings) as log:
        for step in (3, 4, 5):
            log.log(step, "caption", {"loss": 20.0 + step})
    events = read_board(tmp_path).Scalars("at_a_glance/train/caption/loss")
    shown = [(event.step, event.value) for event in events]
    assert shown == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0), (5, 25.0)]


def test_tensorboard_shows_images_with_captions(tmp_path):
    images = [np.full((40, 60, 3), value, dtype=np.uint8) for value in (10, 90, 200)]
    with open_log(tmp_path, settings=LoggingSettings(images=2)) as log:
        log.images(7, "caption", images, ["one", "two\n(a second one)", "three"])
    board = read_board(tmp_path)
    (event,) = board.Images("at_a_glance/examples/caption")
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    assert event.step == 7 and picture.shape[1] == 2 * 224
    # First the pictures in their colours, below them black text on white.
    assert tuple(picture[60, 100]) == (10, 10, 10) and tuple(picture[60, 324]) == (90, 90, 90)
    text = text_of(board, "at_a_glance/examples/caption")
    assert "one" in text and "three" not in text


def text_of(board, tag: str) -> str:
    return board.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_begins_with_what_matters(tmp_path):
    """It sorts groups of curves by their names."""
    with open_log(tmp_path, settings=LoggingSettings(), recipe="name: tiny\n") as log:
        log.log(
            1,
            "a",
            {
                "gradient_norm": 2.0,
                "loss": 1.0,
                "learning_rate": 0.1,
                "samples": 8,
                "samples_per_second": 3.0,
            },
        )
        log.log(1, "a", {"top1": 0.5, "top5": 0.7, "loss": 1.0}, kind="evaluation")
        log.images(1, "a", [np.zeros((4, 4, 3), np.uint8)], ["x"])
    board = read_board(tmp_path)
    tags = sorted([*board.Tags()["scalars"], *board.Tags()["images"]])
    assert tags == [
        "at_a_glance/evaluation/a/top1",
        "at_a_glance/evaluation/a/top5",
        "at_a_glance/examples/a",
        "at_a_glance/train/a/learning_rate",
        "at_a_glance/train/a/loss",
        "at_a_glance/train/a/samples_per_second",
        "detail/evaluation/a/loss",
        "detail/train/a/gradient_norm",
        "detail/train/a/samples",
    ]
    assert "name: tiny" in text_of(board, "recipe")


def test_contact_strip_wraps_rows_and_text():
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    short = contact_strip([image] * 5, ["x"] * 5)
    assert short.shape[1] == 4 * 224 and short.shape[0] > 2 * 216
    long = contact_strip([image] * 5, ["word " * 40] * 5)
    assert long.shape[0] > short.shape[0] + 100
    assert (long[230:, :224] < 128).any(), "text is drawn"
    with pytest.raises(ValueError, match="2 images for 1 captions"):
        contact_strip([image, image], ["x"])


def test_only_rank_0_writes_metrics_and_every_rank_its_log(tmp_path):
    terminal = console()
    for rank in (1, 0):
        with open_log(tmp_path, rank=rank, console=terminal) as log:
            log.log(1, "a", {"loss": 1.0})
            log.images(1, "a", [np.zeros((4, 4, 3), np.uint8)], ["x"])
            log.progress(100, "loss 1")
            logging.getLogger("omnipretrain.test").info("[bold] hello from %d", rank)
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 1
    files = [tmp_path / "logs" / f"rank_0000{rank}.log" for rank in (0, 1)]
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert "rank 0 omnipretrain.test: [bold] hello from 0" in texts[0]
    assert "rank 1 omnipretrain.test: [bold] hello from 1" in texts[1]
    printed = terminal.file.getvalue()
    assert "[bold] hello from 0" in printed and "hello from 1" not in printed
    assert not logging.getLogger("omnipretrain").handlers


def test_the_end_by_an_error_is_in_the_ranks_log(tmp_path):
    with pytest.raises(RuntimeError), open_log(tmp_path, rank=3):
        raise RuntimeError("no more memory")
    text = (tmp_path / "logs" / "rank_00003.log").read_text(encoding="utf-8")
    assert "the run ends here" in text and "RuntimeError: no more memory" in text


def test_due_steps(tmp_path):
    with open_log(tmp_path, settings=LoggingSettings(every_steps=4, tensorboard=False)) as log:
        assert [step for step in range(1, 11) if log.due(step, 10)] == [4, 8, 10]


def test_progress_without_a_terminal_prints_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pretrain.engine.report.progress.time.monotonic", lambda: now[0])
    plain = console()
    report = ProgressReport(plain, done_steps=40, total_steps=100, plain_seconds=10.0)
    for step in range(41, 101):
        now[0] += 1.0
        report.update(step, f"loss {step}")
    report.close()
    lines = plain.file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"step {step}/100" for step in (50, 60, 70, 80, 90, 100)
    ]
    assert lines[0] == "step 50/100, 0:00:50 left  loss 50"


def test_progress_on_a_terminal_is_one_bar():
    terminal = console(terminal=True)
    report = ProgressReport(terminal, done_steps=5, total_steps=10, plain_seconds=1.0)
    report.update(10, "loss 0.5")
    report.close()
    report.close()
    assert "10/10" in terminal.file.getvalue() and "loss 0.5" in terminal.file.getvalue()


def test_logs_of_a_rank_have_a_bound(tmp_path, monkeypatch):
    """What a run says in each of a million steps; the newest lines are kept."""
    monkeypatch.setattr(module, "LOG_BYTES", 2000)
    with MetricsLog(tmp_path, 1, 0, 10, LoggingSettings()):
        for step in range(500):
            logging.getLogger("omnipretrain.test").warning("step %d was skipped", step)
    files = sorted((tmp_path / "logs").glob("rank_00001.log*"))
    assert len(files) == 1 + module.LOG_FILES
    assert all(path.stat().st_size <= 2000 for path in files)
    assert "step 499 was skipped" in files[0].read_text(encoding="utf-8")
