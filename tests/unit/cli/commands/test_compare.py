"""The verb compare: which jobs it plans, its tables and files, equal time, and the prepared sweeps."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from distill.analysis.configurations import Configuration
from distill.cli.commands import compare
from distill.cli.config import compose, prepared_sweeps
from distill.cli.config.instantiate import to_containers
from distill.cli.config.overrides import parse_overrides
from distill.cli.runs import sweep
from distill.cli.runs.finished_runs import read_run
from distill.type_checks import leaves
from distill.types import DistillError
from helpers.finished_runs import write_run
from helpers.runs import Cli


def plan(*words: str) -> compare.Plan:
    own, others = compare.take_own_keys(words)
    return compare.plan_comparison(own, others)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distill=none,dsig", "seeds=2"], ["distill=none,dsig", "seed=0,1"]),
        (["distill=dsig"], ["distill=none,dsig", "seed=0,1,2"]),
        (["seed=4,7"], ["seed=4,7", "distill=none,dsig"]),
        (
            ["distill=dsig,[defeat,ssim]", "distill.losses.dsig.neck.all=1", "seed=1"],
            ["distill=none,dsig,[defeat,ssim]", "++distill.losses.dsig.neck.all=1", "seed=1"],
        ),
        (["distill=none", "seeds=1"], ["distill=none", "seed=0"]),
    ],
)
def test_the_plain_student_and_the_seeds_are_added(words: list[str], expected: list[str]) -> None:
    assert plan(*words).parts == [expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=3", "seed=1"], "seed and seeds are both given"),
        (["seeds=0"], "seeds=0: expected a number of seeds from 1"),
        (["seeds=a,b"], "expected a number of seeds from 1"),
        (["equal=steps"], "equal=steps: expected one of epochs, time"),
        (["seeds=1", "seeds=2"], "seeds is given twice"),
        (["sweep=defeat_table9"], "sweep=defeat_table9: there is no such sweep; did you mean defeat_table"),
        (["sweep=defeat_figure5", "distill=dsig"], "distill is given, but sweep=defeat_figure5 sets it"),
        (["sweep=defeat_figure5", "distill.losses.ssim.neck.all=1"], "no configuration of sweep=defeat_figure5 has"),
        (["schedule.epoch=3"], "schedule.epoch"),
    ],
)
def test_words_that_contradict_each_other_are_refused_before_a_run(words: list[str], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        plan(*words)


@cache
def composed_nodes() -> dict[str, Any]:
    cfg = compose.compose_config(["hydra.run.dir=."])
    return {name: to_containers(cfg[name]) for name in ("schedule", "data", "trainer")}


def resolved_nodes(words: Sequence[str]) -> dict[str, Any]:
    """The nodes of these words in the ``config.yaml`` of a run."""
    nodes = OmegaConf.create(composed_nodes())
    for override in parse_overrides(words):
        OmegaConf.update(nodes, override.key_or_group, override.value())
    nodes.trainer.check_val_every_n_epoch = nodes.schedule.evaluate_every
    return dict(OmegaConf.to_container(nodes))  # type: ignore[arg-type]


class Jobs:
    """Stands for the processes of jobs: writes finished runs, or an error. AP and time depend on the words."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def __call__(self, command: Sequence[str], sweep: str) -> tuple[int, str]:
        words = [word for word in command[4:] if not word.startswith("hydra.run.dir=")]
        (folder,) = (Path(word.partition("=")[2].strip("'")) for word in command if word.startswith("hydra.run.dir="))
        self.ran.append(words)
        values = dict(word.split("=", 1) for word in words)
        if values.get("schedule.shape") == "stairs":
            return 1, "schedule.shape: no stairs"
        name, seed, epochs = values["distill"], int(values["seed"]), int(values.get("schedule.epochs", 2))
        losses = [] if name == "none" else [name.partition("_")[0]]
        (folder / "overrides.yaml").rename(folder / "kept.yaml")
        files = write_run(
            folder / "new",
            ap=0.2 + 0.01 * seed + (0.05 + 0.01 * seed * seed if losses else 0.0) + 0.001 * epochs,
            losses=losses,
            seed=seed,
            teacher="teachers/x",
            seconds=[30.0 if losses else 20.0] * epochs,
            settings={
                **resolved_nodes(
                    [f"data.seed={seed}", *(word for word in words if word.startswith(("schedule.", "data.")))]
                ),
                "distill": {"losses": {loss: {"words": sorted(words[:-1]), "seed": seed} for loss in losses}},
            },
        )
        for file in files.iterdir():
            file.rename(folder / file.name)
        files.rmdir()
        (folder / "kept.yaml").rename(folder / "overrides.yaml")
        return 0, ""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    found = Jobs()
    monkeypatch.setattr(sweep, "run_process", found)
    return found


def test_a_comparison_runs_what_is_missing_and_ends_in_tables_and_files(
    cli: Cli, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "compare",
        "distill=none,defeat",
        "seeds=2",
        "schedule.epochs=2",
        "hydra.sweep.dir=sweep",
        "metric=test/AP",
    ]
    assert cli(words) == 0
    assert len(jobs.ran) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert "not decided" not in said
    assert "no difference shown defeat: +5.5 AP over none, 95 % interval -0.9 to +11.9 over 2 seeds (t = 12.71)" in said
    assert "about 1 more seed would decide it" in said
    assert "job 4 of 4" in said
    assert "it took 50 % more time at equal epochs" in said
    assert "no interval over images" in said
    rows = list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open()))
    assert [row["configuration"] for row in rows] == ["teacher", "none", "defeat"]
    assert float(rows[1]["test/AP"]) == pytest.approx(0.207)
    assert float(rows[2]["difference"]) == pytest.approx(0.055)
    content = json.loads((tmp_path / "sweep" / "comparison.json").read_text())
    assert content["rows"][2]["difference"]["extra_time"] == pytest.approx(0.5)
    assert cli([*words, "--csv", "again.csv", "--no-images", "--html", "again.html"]) == 0
    assert "over images for" not in capsys.readouterr().out
    assert len(jobs.ran) == 4  # nothing is repeated
    for suffix in (".csv", ".html"):
        assert (tmp_path / f"again{suffix}").read_text() == (tmp_path / "sweep" / f"comparison{suffix}").read_text()


def test_equal_time_trains_the_student_alone_for_longer(
    cli: Cli, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1.5 times the epochs. The interval between evaluations and the end of the augmentation grow with them."""
    words = ["compare", "distill=defeat", "seeds=2", "metric=test/AP", "hydra.sweep.dir=sweep"]
    words += ["schedule.epochs=4", "schedule.evaluate_every=2", "data.augment.stop_epoch=2"]
    assert cli([*words, "equal=time"]) == 0
    longer = [set(words) for words in jobs.ran if "schedule.epochs=6" in words]
    expected = {"distill=none", "schedule.evaluate_every=3", "data.augment.stop_epoch=3"}
    assert [expected | {f"seed={seed}"} <= words for seed, words in enumerate(longer)] == [True] * 2
    assert len(jobs.ran) == 6
    rows = {row["configuration"]: row for row in csv.DictReader((tmp_path / "sweep" / "comparison.csv").open())}
    distilled = next(row for name, row in rows.items() if name.startswith("defeat"))
    assert "epochs=6" in distilled["reference"]
    assert float(distilled["extra_time"]) == pytest.approx(0.0)
    assert cli([*words, "equal=time"]) == 0
    assert len(jobs.ran) == 6


@pytest.mark.parametrize("words", [["distill=defeat", "equal=time"], ["sweep=defeat_figure5"]])
def test_a_sweep_is_shown_again_as_its_comparison_was(
    words: list[str], cli: Cli, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With equal time, or with the names of a prepared sweep. Else the page and the table contradict each other."""
    sweep = tmp_path / "sweep"
    assert cli(["compare", *words, "seeds=2", "schedule.epochs=4", "metric=test/AP", "hydra.sweep.dir=sweep"]) == 0
    page, table = ((sweep / f"comparison.{suffix}").read_text() for suffix in ("html", "csv"))
    assert cli(["report", "sweep", "--no-images"]) == 0
    again = (sweep / "comparison.html").read_text()
    assert [line for line in again.splitlines() if "<td>" in line] == [
        line for line in page.splitlines() if "<td>" in line
    ]
    assert cli(["compare", "sweep", "--no-images", "--csv", "again.csv"]) == 0
    assert (tmp_path / "again.csv").read_text() == table
    assert cli(["compare", "sweep", "equal=epochs", "--no-images", "--csv", "epochs.csv"]) == 0
    assert ((tmp_path / "epochs.csv").read_text() == table) is ("equal=time" not in words)
    for damaged in ("{", "[]", "{}", '{"runs": [{}], "equal": 3}'):
        (sweep / "comparison.json").write_text(damaged)
        assert cli(["report", "sweep", "--no-images"]) == 0
    assert not capsys.readouterr().err


def test_a_longer_student_alone_trusts_what_the_command_line_trusts(tmp_path: Path) -> None:
    """The words of a job come from a file."""
    settings = resolved_nodes(["data.seed=4"])
    words = ["distill=none", "trust=[evil]", "config_dirs=[there]", "data.limit=7"]
    settings["data"]["limit"] = 7
    run = read_run(write_run(tmp_path / "0", 0.2, seed=4, words=words, settings=settings))
    found = compare.longer_words(Configuration({}, {4: run}), 2.0)
    assert {"distill=none", "data.limit=7"} <= set(found)
    assert f"schedule.epochs={2 * settings['schedule']['epochs']}" in found
    assert not [word for word in found if word.startswith(("trust", "config_dirs", "seed", "data.seed"))]


def test_a_failed_job_is_a_row_and_the_comparison_goes_on(
    cli: Cli, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["schedule.shape=constant,stairs", "metric=test/AP", "hydra.sweep.dir=sweep", "schedule.milestones=[1]"]
    assert cli(["compare", "distill=none", "seeds=1", *words]) == 1
    said = capsys.readouterr()
    assert "1 of the sweep's jobs failed, the first: job 1: schedule.shape: no stairs" in said.err
    assert "sweep/1: failed: schedule.shape: no stairs" in said.out
    assert (tmp_path / "sweep" / "comparison.csv").is_file()


def test_a_prepared_sweep_runs_its_configurations_under_their_names(cli: Cli, jobs: Jobs, tmp_path: Path) -> None:
    words = ["sweep=defeat_figure5", "seeds=1", "metric=test/AP", "distill.losses.defeat.adapter.kernel=1"]
    assert cli(["compare", *words, "hydra.sweep.dir=sweep"]) == 0
    rows = list(csv.DictReader((tmp_path / "sweep" / "comparison.csv").open()))
    assert [row["configuration"] for row in rows] == ["teacher", "student alone", "objects", "background"]
    kernels = [any("adapter.kernel=1" in word for word in words) for words in jobs.ran]
    assert kernels == [False, True, True]  # the student alone has no such loss


def test_finished_runs_are_compared_without_training(
    cli: Cli, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_run(tmp_path / f"a{seed}", 0.2 + seed / 10, seed=seed) for seed in (0, 1)]
    folders += [write_run(tmp_path / f"b{seed}", 0.3 + seed / 9, ["defeat"], seed=seed) for seed in (0, 1)]
    odd = write_run(tmp_path / "odd", 0.9, ["dsig"], classes=["owl"])
    assert cli(["compare", *map(str, folders), str(odd), "--json", "it.json", "--no-images"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "settings that differ" in said
    assert "{}" not in said  # the losses of the student alone
    assert f"left out {odd}: its classes are owl; those of {folders[0]} are cat, dog" in said
    assert [row["configuration"] for row in json.loads((tmp_path / "it.json").read_text())["rows"]] == [
        "teacher",
        "none",
        "defeat",
    ]
    assert cli(["compare", str(folders[0]), "seeds=3"]) == 1
    assert "seeds=3: finished runs are compared as they are" in capsys.readouterr().err
    assert cli(["compare", str(odd / "none")]) == 1
    assert "none: does not exist. Expected the folder of a run" in capsys.readouterr().err
    assert not jobs.ran


@pytest.mark.parametrize(
    ("epochs", "steps", "max_steps", "factor", "expected"),
    [(12, -1, -1, 1.5, True), (12, -1, -1, 1.01, False), (12, 100, 100, 1.01, True), (12, -1, -1, 0.5, False)],
)
def test_only_a_longer_training_is_added(
    epochs: int, steps: int, max_steps: int, factor: float, expected: bool
) -> None:
    config = {"schedule": {"epochs": epochs, "steps": steps}, "trainer": {"max_steps": max_steps}}
    assert compare.is_longer(config, factor) is expected


def test_a_word_that_deletes_a_key_is_no_folder(tmp_path: Path) -> None:
    words = ["~callbacks.rate", "seeds=3", str(tmp_path), "runs/gone"]
    assert [compare.is_folder(word) for word in words] == [False, False, True, True]


def test_a_sweep_s_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "configurations: {a: [distill=none], b: [distill=defeat, 'distill.losses.defeat.neck.foreground=1,4']}"
    assert prepared_sweeps.parse_sweep(text, file) == {
        "a": ["distill=none"],
        "b, defeat.neck.foreground=1": ["distill=defeat", "distill.losses.defeat.neck.foreground=1"],
        "b, defeat.neck.foreground=4": ["distill=defeat", "distill.losses.defeat.neck.foreground=4"],
    }
    for wrong in (
        "configurations: {}",
        "rows: {}",
        "configurations: {a: distill=none}",
        "configurations: {a: [1]}",
        "a: [",
    ):
        with pytest.raises(DistillError, match=r"mine\.yaml: "):
            prepared_sweeps.parse_sweep(wrong, file)


@pytest.mark.parametrize("name", prepared_sweeps.sweep_names())
def test_the_keys_of_every_prepared_sweep_exist(name: str) -> None:
    """Each option of ``distill`` is composed once. The first configuration is the student alone."""
    rows = prepared_sweeps.read_sweep(name)
    assert next(iter(rows.values())) == ["distill=none"]
    assert len({tuple(sorted(words)) for words in rows.values()}) == len(rows)
    composed: dict[str, dict[str, Any]] = {}
    for words in rows.values():
        option, *others = parse_overrides(words)
        assert option.key_or_group == "distill"
        choice = str(option.value())
        if choice not in composed:
            node = OmegaConf.to_container(compose.compose_config([f"distill={choice}"]).distill, resolve=False)
            composed[choice] = dict(leaves({"distill": node}))
        for override in others:
            default = composed[choice][override.key_or_group]
            assert isinstance(override.value(), (int, float, str)) == isinstance(default, (int, float, str))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", prepared_sweeps.sweep_names())
def test_every_configuration_of_a_prepared_sweep_composes(name: str) -> None:
    student = ["model=retinanet_r10_quarter"] if "retinanet" in name else []
    found = plan(f"sweep={name}", "seeds=2", *student)
    assert [words[-1] for words in found.parts] == ["seed=0,1"] * len(found.labels)
