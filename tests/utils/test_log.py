"""The log: what is written is read, and resuming cuts off what will be written again."""

import math

import pytest

from utils.errors import UserError
from utils.log import RunLog, format_line, read_log


def test_a_line_reads_as_promised():
    values = {
        "step": 10,
        "tokens": 123456789,
        "loss": 5.23184219,
        "lr": 0.001,
        "tok_s": 10432.54321,
        "max_vio": 1.0,
    }
    assert format_line(values) == (
        "step=10  tokens=123456789  loss=5.23184  lr=0.001  tok_s=10432.5  max_vio=1"
    )


def test_lines_come_back_as_numbers(tmp_path):
    log = RunLog(tmp_path / "deep" / "log.txt")
    log.write({"step": 1, "loss": 2.5, "lr": 1e-5, "ppl": math.inf})
    log.write({"step": 2, "loss": float("nan")})
    rows = read_log(tmp_path / "deep" / "log.txt")  # readable while the run goes on
    assert rows[0] == {"step": 1, "loss": 2.5, "lr": 1e-5, "ppl": math.inf}
    assert type(rows[0]["step"]) is int
    assert math.isnan(rows[1]["loss"])
    log.close()


def test_resuming_gives_the_log_of_the_unbroken_run(tmp_path):
    def steps(log, first, last):
        for step in range(first, last):
            log.write({"step": step, "loss": 1 / step})

    whole = RunLog(tmp_path / "whole.txt")
    steps(whole, 1, 9)
    broken = RunLog(tmp_path / "broken.txt")
    steps(broken, 1, 5)
    position = broken.position
    steps(broken, 5, 8)  # after the checkpoint, and then killed within a line
    broken.file.write(b"step=8  lo")
    broken.close()
    resumed = RunLog(tmp_path / "broken.txt", resume_at=position)
    assert resumed.position == position
    steps(resumed, 5, 9)
    assert (tmp_path / "broken.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


def test_a_new_run_starts_an_empty_log(tmp_path):
    RunLog(tmp_path / "log.txt").write({"step": 1})
    log = RunLog(tmp_path / "log.txt")
    assert log.position == 0
    log.write({"step": 2})
    assert read_log(tmp_path / "log.txt") == [{"step": 2}]


def test_a_log_shorter_than_the_checkpoint_says_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"step=1  loss=2\nstep=2  lo")
    RunLog(path, resume_at=999).write({"step": 3})
    assert read_log(path) == [{"step": 1, "loss": 2}, {"step": 3}]


@pytest.mark.parametrize("last", ["step=2  loss=1.2", "step=2  lo", "garbage\n", "step=2  loss=1.2.3\n"])
def test_a_crash_in_the_last_line_is_no_matter(tmp_path, last):
    (tmp_path / "log.txt").write_text("step=1  loss=2\n" + last)
    assert read_log(tmp_path / "log.txt") == [{"step": 1, "loss": 2}]


def test_a_file_that_is_no_log_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"log\.txt: cannot read"):
        read_log(tmp_path / "log.txt")
    (tmp_path / "log.txt").write_text("step=1\nhello there\nstep=2\n")
    with pytest.raises(UserError, match=r"log\.txt, line 2"):
        read_log(tmp_path / "log.txt")
    with pytest.raises(UserError, match="cannot write the log"):
        RunLog(tmp_path)
