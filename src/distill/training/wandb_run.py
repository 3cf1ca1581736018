"""Weights & Biases: axes, summaries and files of a run."""

from __future__ import annotations

import csv
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from distill.data.datamodule import DetectionData
from distill.files import read_json, write_text
from distill.run_folder import RunFolder
from distill.training.distiller import Distiller
from distill.training.wandb_table import prediction_table
from distill.type_checks import leaves

STEP = "trainer/global_step"
"""Lightning's name of the horizontal axis: finished optimizer steps."""


ANALYZED = ("errors", "calibration", "agreement")
"""Parts of ``analysis.json`` whose numbers go into the summary of the W&B run."""
NAMES = ("model", "class", "true", "detected", "file", "picture")
"""Columns of an analysis that hold names, which may look like numbers."""


class WandbRun(WandbLogger):
    """Lightning's logger with the axes and summaries of a training with distillation.

    Means of an epoch (``epoch/…``) are drawn over epochs, all other values over steps. A run's summary holds the best
    value of each validation metric, and the lowest value of each loss, until the results of the best weights replace
    them. A file in the run's folder keeps the id, so a run that resumes continues its W&B run, see `choose_id`.

    Args:
        folder: the run's folder. W&B's own files are written there, too.
        project, entity, name: as of `wandb.init`.
        group: runs with one group can be averaged on the site. The name of the configuration without its seed.
        job_type: the methods.
        tags: words to filter by; null is left out.
        offline: write files only. `wandb sync` uploads them later.
        log_model: upload checkpoints, see Lightning's `WandbLogger`.
        log_student: upload the exported student as an artifact at the end.
        table_images: validation images in the table of predictions at the end; 0: no table.
        table_score: least score of a detection in this table.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str = "distill",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str | None] = (),
        offline: bool = False,
        log_model: bool | str = False,
        log_student: bool = False,
        table_images: int = 50,
        table_score: float = 0.3,
    ) -> None:
        options: dict[str, Any] = {
            "entity": entity,
            "group": group and shorten(group),
            "job_type": job_type,
            "tags": [shorten(tag, TAG_LENGTH) for tag in tags if tag],
        }
        super().__init__(
            name=name,
            save_dir=str(folder),
            offline=offline,
            project=project,
            log_model=log_model,  # type: ignore[arg-type]
            **options,
        )
        self.log_student, self.table_images, self.table_score = log_student, table_images, table_score

    @rank_zero_only
    def choose_id(self, resumed: bool) -> None:
        """Choose the id of the W&B run, before it is created.

        Args:
            resumed: whether the training continues an earlier one in its folder, whose id it keeps. A new training in
                the folder of an earlier one gets an id of its own.
        """
        file = RunFolder(str(self.save_dir)).wandb_id
        if not (resumed and file.is_file()):
            write_text(file, uuid.uuid4().hex[:12])
        self._id = self._wandb_init["id"] = file.read_text(encoding="utf-8").strip()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run. It is created on first access."""
        is_new = self._experiment is None
        run = super().experiment
        if is_new:
            run.define_metric("epoch/*", step_metric="epoch")
            for pattern, best in (("val/*", "max"), ("loss/*", "min"), ("term/*", "min")):
                run.define_metric(pattern, step_metric=STEP, summary=best)
        return run

    def log_results(self, values: Mapping[str, float]) -> None:
        """Write the results of the best weights to the summary, and as a table of metrics and splits.

        Args:
            values: ``split/metric`` -> value.
        """
        self.experiment.summary.update(dict(values))
        rows = [[*name.split("/", 1), value] for name, value in values.items()]
        self.log_table("AP", columns=["split", "metric", "value"], data=rows)

    def log_predictions(self, module: Distiller, data: DetectionData) -> None:
        """Write the table of predictions, see `wandb_table`."""
        if self.table_images:
            table = prediction_table(module, data, self.table_images, self.table_score)
            self.experiment.log({"predictions": table})

    def log_files(self, folder: RunFolder) -> None:
        """Upload the exported student as an artifact, if the run asks for it."""
        if self.log_student:
            import wandb

            artifact = wandb.Artifact(f"student-{self.experiment.id}", type="model")
            for file in (folder.student, folder.description):
                artifact.add_file(str(file))
            self.experiment.log_artifact(artifact)

    def log_analysis(self, folder: Path) -> None:
        """Add an analysis (``distill analyze``) to the run, below ``analysis/``, and its main numbers to the summary.

        Tables (``…_table``) are W&B tables, figures (``…_figure``) and the pictures of the to-do list are images.

        Args:
            folder: with ``analysis.json``, and the files CSV and PNG of the analysis.
        """
        import wandb

        logged: dict[str, Any] = {}
        for file in sorted(folder.glob("*.csv")):
            with file.open(newline="", encoding="utf-8") as lines:
                columns, *rows = csv.reader(lines)
            logged[f"analysis/{file.stem}_table"] = wandb.Table(list[Any](columns), _typed(columns, rows))
        for file in sorted(folder.glob("*.png")):
            logged[f"analysis/{file.stem}_figure"] = wandb.Image(str(file))
        if pictures := sorted(folder.glob("pictures/*.png")):
            logged["analysis/to_do"] = [wandb.Image(str(file), caption=file.stem) for file in pictures]
        self.experiment.log(logged)
        content = read_json(folder / "analysis.json")
        numbers = {key: content[key] for key in ANALYZED if key in content}
        self.experiment.summary.update(
            {
                f"analysis/{key.replace('.', '/')}": value
                for key, value in leaves(numbers)
                if isinstance(value, (int, float))
            }
        )

    def close(self, failed: bool) -> None:
        """End the W&B run, which records whether the training failed."""
        self.experiment.finish(exit_code=int(failed))


def _typed(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Rows of a CSV file, with numbers in columns that hold nothing else. An empty cell is None. Names stay texts."""
    cells = zip(*rows, strict=True)
    typed = [list(column) if name in NAMES else _numbers(column) for name, column in zip(columns, cells, strict=False)]
    return [list(row) for row in zip(*typed, strict=True)]


def _numbers(cells: Sequence[str]) -> list[Any]:
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError:
        return [cell or None for cell in cells]


GROUP_LENGTH, TAG_LENGTH = 128, 64
"""Most characters of a group and of a tag on W&B's site."""


def shorten(text: str, length: int = GROUP_LENGTH) -> str:
    """Cut a text, and end it with a hash of all of it, so that different texts stay different."""
    if len(text) <= length:
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: length - len(mark) - 1]}…{mark}"
