"""The file names of a run folder, for all modules."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
SUMMARY = "summary.json"
STUDENT = "student.pt"
DESCRIPTION = "student.json"
LAST = "last.ckpt"
BEST = "best.ckpt"
METRICS = "metrics.csv"
STEPS = "steps.csv"


class RunFolder:
    """Paths inside a run folder. No file has to exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG
        """The resolved configuration."""
        self.overrides = self.path / OVERRIDES
        """The overrides from which the configuration can be composed again."""
        self.options = self.path / "conf"
        """Copies of the options that are not distill's own, with the layout of a folder of options."""
        self.summary = self.path / SUMMARY
        """Results, versions and the teacher's identity; written at the end of the run."""
        self.student = self.path / STUDENT
        """Weights of the best student."""
        self.description = self.path / DESCRIPTION
        """Constructor arguments of the student, and how its data was resized."""
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / LAST
        self.previous = previous_checkpoint(self.last)
        self.best = self.checkpoints / BEST
        self.metrics = self.path / METRICS
        """One row per epoch: means of the losses, results of the evaluation."""
        self.steps = self.path / STEPS
        """One row per logged step: losses of a single batch."""
        self.curves = self.path / "curves.png"
        """Losses and AP by epoch."""
        self.report = self.path / "report.html"
        """The page that `analyze` writes."""
        self.pictures = self.path / "pictures"
        self.detections = self.path / "detections"
        """The student's detections on each evaluated split, with the ground truth: ``val.npz``, ``test.npz``."""
        self.non_finite = self.path / "non_finite"
        """Steps that stopped the run because their loss or gradient was not finite."""
        self.error = self.path / "error.txt"
        """Why a run failed that another run started: a job of a sweep, a teacher, a baseline."""
        self.lock = self.path / "lock"
        """Held by the process that trains the run."""
        self.wandb_id = self.path / "wandb_id"
        """Id of the run on the site of W&B."""
        self.slurm_job = self.path / "slurm_job"
        """Id of the SLURM job that made the run, or the sweep."""

    def detections_on(self, split: str) -> Path:
        """The file with the detections on a split."""
        return self.detections / f"{split}.npz"

    @property
    def finished(self) -> bool:
        """Whether the run has finished, and still has the student that it exported."""
        return self.summary.is_file() and self.description.is_file() and self.student.is_file()

    @property
    def resumable(self) -> list[Path]:
        """The last checkpoint and the previous one, if they exist.

        Only the previous one exists if the process was killed between the two renames.
        """
        return [file for file in (self.last, self.previous) if file.is_file()]


def previous_checkpoint(path: Path) -> Path:
    """Path that keeps the checkpoint that `path` replaced: ``last.ckpt`` -> ``last-1.ckpt``."""
    return path.with_name(f"{path.stem}-1{path.suffix}")
