"""Lines of loss terms and gradient shares, from CSV files as a run writes them."""

from __future__ import annotations

from pathlib import Path

from distill.analysis.training_log import read_training
from distill.run_folder import RunFolder


def test_lines_of_the_csv_files(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text(
        "epoch,step,val/AP,loss/total,loss/student/loss_box_reg,loss/defeat/neck.foreground,term/defeat/neck.foreground\n"
        "1,10,0.1,9,2,4,1\n"
        "2,20,,8,nan,3,0.75\n"
        "3,30,0.2,7,1,2"  # the process was killed while it wrote this row
    )
    run.steps.write_text(
        "epoch,step,loss/total,gradient/student/loss_box_reg,gradient/defeat/neck.foreground\n"
        "1,5,9,,\n1,10,9,0.25,0.75\n2,20,9,0.5,0.5\n"
    )
    losses, shares = read_training(run)
    assert losses == {"student": {"loss_box_reg": ([1], [2])}, "defeat": {"neck.foreground": ([1, 2], [4, 3])}}
    assert shares == {
        "student/loss_box_reg": ([10, 20], [0.25, 0.5]),
        "defeat/neck.foreground": ([10, 20], [0.75, 0.5]),
    }


def test_a_run_without_the_files(tmp_path: Path) -> None:
    assert read_training(RunFolder(tmp_path)) == ({}, {})
