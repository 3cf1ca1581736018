"""The doctor: every section with numbers counted in another way, a verdict, and nothing trained or left behind."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distill import load_detector
from distill.cli.config import compose, instantiate
from distill.cli.main import main
from distill.cli.runs.related_runs import RelatedRun
from distill.data.shapes import CLASSES, Shapes
from distill.evaluation.evaluate import evaluate
from distill.training.distiller import Distiller
from helpers.image_folders import write_coco, write_voc
from helpers.runs import TINY, TINY_DATA, Cli, summary

OWN_DATA = [line for line in TINY if not line.startswith("data.source")]
SIZES = {"small": (0, 1024), "medium": (1024, 9216), "large": (9216, 10**9)}


def visit(cli: Cli, *lines: str, file: Path = Path("doctor.json")) -> dict[str, Any]:
    """What the doctor writes; its exit code says the verdict."""
    code = cli(["doctor", "--json", str(file), *lines])
    report: dict[str, Any] = json.loads(file.read_text())
    assert code == {"ready": 0, "not ready": 1}[report["verdict"]]
    assert bool(report["faults"]) == bool(code)
    return report


@pytest.fixture(scope="module")
def ready(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("doctor") / "report.json"
    return visit(main, "distill=defeat", f"teacher.weights={tiny_teacher}", *TINY, file=file)


def test_a_fine_run_is_ready_and_nothing_is_left_behind(
    cli: Cli, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["doctor", "distill=defeat", f"teacher.weights={tiny_teacher}", "teacher.min_ap=null", *TINY]) == 0
    said = capsys.readouterr().out
    for words in ("data;", "boxes:", "classes", "maps,", "adapters", "terms at step 0", "teacher", "time", "memory"):
        assert words in said, words
    assert re.search(r"verdict +ready", said)
    assert list(tmp_path.iterdir()) == []


def test_data_is_counted_as_an_independent_count_has_it(ready: dict[str, Any]) -> None:
    names = list(CLASSES)
    for split, count in (("train", 8), ("val", 4)):
        _, records = Shapes(**{"train": 0, "val": 0, "test": 0, "size": 64, split: count}).read_split(split)
        expected: Counter[tuple[str, str]] = Counter()
        for record in records:
            for (x1, y1, x2, y2), label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True):
                area = (x2 - x1) * (y2 - y1)
                size = next(name for name, (low, high) in SIZES.items() if low <= area < high)
                expected[names[label - 1], size] += 1
        found = ready["data"][split]
        assert found["images"] == count
        assert found["boxes"] == sum(expected.values())
        for name in names:
            assert found["classes"][name] == {size: expected[name, size] for size in SIZES} | {
                "all": sum(expected[name, size] for size in SIZES)
            }
    assert set(ready["data"]) == {"train", "val"}  # there are no test images
    assert ready["padding"] == 0  # all are square


def test_terms_are_those_of_the_run_s_first_step(cli: Cli, ready: dict[str, Any], tiny_teacher: Path) -> None:
    assert (
        cli(["train", "distill=defeat", f"teacher.weights={tiny_teacher}", *TINY, "pictures=0", "hydra.run.dir=run"])
        == 0
    )
    rows = list(csv.DictReader(Path("run/steps.csv").read_text().splitlines()))
    first = next(row for row in rows if row.get("loss/total"))
    assert ready["terms"].keys() == {name.removeprefix("term/") for name in first if name.startswith("term/")}
    for name, term in ready["terms"].items():
        assert term["value"] == pytest.approx(float(first[f"term/{name}"]), rel=1e-5), name
        assert term["loss"] == pytest.approx(float(first[f"loss/{name}"]), rel=1e-5), name
        assert term["reaches"], name
        assert term["share"] > 0, name
    assert sum(term["share"] for term in ready["terms"].values()) == pytest.approx(1)


def test_the_teacher_is_measured_against_its_promise(ready: dict[str, Any], tiny_teacher: Path) -> None:
    known = summary(tiny_teacher)["student"]["val/AP"]
    data = instantiate.build_node(compose.compose_config([*TINY_DATA, "paths.run=x"]).data)
    found = ready["teacher"]
    assert found["promised"] == found["here"] == known
    assert found["sample"]["images"] == 4
    assert found["sample"]["AP"] == pytest.approx(evaluate(load_detector(tiny_teacher), data)["AP"])


def test_shapes_adapters_and_classes_are_those_of_the_models(ready: dict[str, Any], tiny_teacher: Path) -> None:
    teacher = load_detector(tiny_teacher)
    rows = {row["stride"]: row for row in ready["shapes"]}
    assert list(rows) == [4, 8, 16, 32, 64]
    for stride in (4, 8, 16, 32):
        assert rows[stride]["student neck"] == [16, 64 // stride, 64 // stride]
        assert rows[stride]["teacher neck"] == [teacher.spec.neck[stride], 64 // stride, 64 // stride]
        assert rows[stride]["teacher body"] == [teacher.spec.body[stride], 64 // stride, 64 // stride]
    assert [row["data"] for row in ready["classes"]] == list(CLASSES)
    assert all(row["data"] == row["student"] == row["teacher"] and row["taught"] for row in ready["classes"])
    assert [row["name"] for row in ready["adapters"]] == [f"defeat.maps.neck.adapters.{s}" for s in (4, 8, 16, 32, 64)]
    each = 16 * teacher.spec.neck[4] * 9 + teacher.spec.neck[4]
    assert all(row["parameters"] == each for row in ready["adapters"])


def test_time_and_memory_are_estimated(ready: dict[str, Any]) -> None:
    found = ready["estimate"]
    assert found["batches"] == 2
    assert found["evaluations"] == 2
    assert found["seconds"]["training"] == pytest.approx(2 * found["seconds_per_batch"])
    assert 0.005 < found["seconds_per_batch"] < 30
    assert 2**27 < found["bytes"] < found["device_bytes"]
    assert (found["device"], found["processes"], found["precision"]) == ("cpu", 1, "32-true")


@pytest.mark.parametrize(
    ("lines", "batches", "expected"),
    [
        (["trainer.max_epochs=12"], 100, (1200, 13)),
        (
            ["trainer.max_epochs=12", "trainer.max_steps=250"],
            100,
            (250, 4),
        ),  # after 100, 200 and 250, and the final one
        (["trainer.max_epochs=12", "trainer.max_steps=250", "schedule.accumulate=2"], 100, (500, 6)),
        (["trainer.max_epochs=3", "trainer.limit_train_batches=0.25"], 100, (75, 4)),
        (["trainer.max_epochs=3", "trainer.limit_train_batches=7", "schedule.evaluate_every=2"], 100, (21, 3)),
        (["trainer.max_epochs=3", "schedule.evaluate_every=null"], 100, (300, 1)),
        (["trainer.max_epochs=3", "trainer.max_steps=99"], 100, (99, 1)),
    ],
)
def test_a_schedule_is_counted_in_batches(lines: list[str], batches: int, expected: tuple[int, int]) -> None:
    from distill.cli.reports.run_estimate import planned_batches

    assert planned_batches(compose.compose_config([*lines, "paths.run=x"]).trainer, batches) == expected


def test_a_missing_teacher_and_a_missing_baseline_are_planned_and_not_trained(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *args, **named: pytest.fail("something was started"))
    lines = [*TINY, "trainer.max_steps=-1", "teacher.model.neck_channels=24", "teacher.schedule.epochs=3"]
    report = visit(cli, *lines, "baseline=train", "baseline_epochs=5")
    found = report["teacher"]
    assert found["state"] == "not trained yet"
    assert "model=frcnn_r18_mini" in found["command"]
    assert "distill=none" in found["command"]
    assert found["estimate"]["batches"] == 6  # its own three epochs of two batches
    alone = report["baseline"]
    assert (alone["state"], alone["epochs"], alone["estimate"]["batches"]) == ("not trained yet", 5, 10)
    assert "schedule.epochs=5" in alone["command"]
    assert [row["teacher neck"] for row in report["shapes"]] == [[24]] * 5
    assert any("no teacher is cached" in note for note in report["notes"])
    assert not (tmp_path / "outputs").exists()
    assert "not trained yet" in capsys.readouterr().out
    refused = visit(cli, *TINY, "teacher.train=never")
    assert any("teacher.train=never" in fault for fault in refused["faults"])


def test_the_baseline_needs_no_teacher(cli: Cli) -> None:
    report = visit(cli, "distill=none", *TINY)
    assert report["verdict"] == "ready"
    assert report["teacher"] == {"state": "not needed"}
    assert all(name.startswith("student/") for name in report["terms"])
    assert report["adapters"] == []


def test_crowds_empties_clips_and_padding_are_counted(cli: Cli, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    truth = json.loads(file.read_text())
    of = {
        image["id"]: [each for each in truth["annotations"] if each["image_id"] == image["id"]]
        for image in truth["images"]
    }
    crowded, bare, clipped, broad = list(of)[:4]
    of[crowded][0]["iscrowd"] = 1
    truth["annotations"] = [each for each in truth["annotations"] if each["image_id"] != bare]
    of[clipped][0]["bbox"] = [50, 50, 30, 30]  # 16 pixels over the edge
    for image in truth["images"]:
        if image["id"] == broad:
            image["width"] = 128
            path = tmp_path / "coco" / "train2017" / image["file_name"]
            Image.open(path).resize((128, 64)).save(path)
    file.write_text(json.dumps(truth))
    lines = [
        "data=coco",
        "data.source.root=coco",
        *OWN_DATA,
        "distill=none",
        "data.max_size=128",
        "data.aspect_groups=false",
    ]
    report = visit(cli, *lines, "data.keep_empty=true", "data.batch_size=8")
    found = report["data"]["train"]
    assert (found["images"], found["crowds"], found["empty"]) == (8, 1, 1)
    assert found["corrected"] == {"clipped": 1}
    assert found["boxes"] == len(truth["annotations"])
    assert sum(counts["all"] for counts in found["classes"].values()) == len(truth["annotations"]) - 1
    assert report["padding"] == pytest.approx(1 - (7 * 64 * 64 + 64 * 128) / (8 * 64 * 128))


@pytest.mark.parametrize("trouble", ["box", "image", "overlap"])
def test_broken_data_is_named_with_what_to_mend(trouble: str, cli: Cli, tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", {"train": ("train", 8), "val": ("val", 4)})
    xml = sorted((tmp_path / "voc" / "Annotations").glob("*_train_*.xml"))[2]
    if trouble == "box":
        xml.write_text(xml.read_text().replace("<xmin>", "<xmin>90", 1))
    elif trouble == "image":
        (tmp_path / "voc" / "JPEGImages" / f"{xml.stem}.jpg").write_bytes(b"\xff\xd8 no more")
    else:
        first, second = (
            sorted((tmp_path / "voc" / "JPEGImages").glob(f"*_{split}_*"))[0] for split in ("train", "val")
        )
        second.write_bytes(first.read_bytes())
    lines = ["data=voc", "data.source.root=voc", "distill=none", *OWN_DATA, "data.min_size=64"]
    report = visit(cli, *lines, "data.on_overlap=raise")
    assert report["verdict"] == "not ready"
    (fault,) = report["faults"]
    expected = {"box": xml.name, "image": f"{xml.stem}.jpg", "overlap": "1 images of val are in train as well"}
    assert expected[trouble] in fault
    remedy = {"box": "data.on_error=skip", "image": "data.on_error=skip", "overlap": "Remove them from one split"}
    assert remedy[trouble] in fault
    if trouble == "overlap":  # as training does, which is told by the same option
        goes_on = visit(cli, *lines)
        assert any(expected[trouble] in note for note in goes_on["notes"])
        assert goes_on["verdict"] == "ready"
        assert "terms" in goes_on


def test_a_weak_teacher_is_named(
    cli: Cli, tiny_teacher: Path, ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any("no run of the same student with distill=none was found" in note for note in ready["notes"])
    summary: dict[str, Any] = {"losses": [], "teacher": None, "student": {"val/AP": 0.8}}
    alone = RelatedRun(Path("alone"), summary)
    monkeypatch.setattr("distill.cli.reports.doctor_report.find_related_runs", lambda *_: [alone])
    report = visit(cli, f"teacher.weights={tiny_teacher}", *TINY, "teacher.min_ap=0.9")
    assert any("below teacher.min_ap=0.9" in fault for fault in report["faults"])
    assert any(
        "the student alone (distill=none) 80.0: a teacher that is not better" in note for note in report["notes"]
    )


def test_a_teacher_that_does_not_keep_its_promise_is_named(
    cli: Cli, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.cli.runs.teacher_cache._known_values", lambda *_: {"val/AP": 0.4})
    report = visit(cli, f"teacher.weights={tiny_teacher}", *TINY)
    assert any("promises 40.0 %: check its weights" in fault for fault in report["faults"])


def test_a_pair_that_cannot_be_is_named(cli: Cli, tiny_teacher: Path) -> None:
    lines = [f"teacher.weights={tiny_teacher}", *TINY, "distill.losses.dsig.neck.levels=[4,128]"]
    report = visit(cli, *lines)
    assert any("expected strides that both models have" in fault for fault in report["faults"])
    assert "classes" in report
    assert "terms" not in report


def test_a_term_that_is_not_finite_is_named(cli: Cli, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.losses.defeat import DeFeat

    forward = DeFeat.forward

    def broken(self: DeFeat, student: Any, teacher: Any) -> dict[str, torch.Tensor]:
        found = forward(self, student, teacher)
        return found | {"neck.background": found["neck.background"].log() * torch.inf}

    monkeypatch.setattr(DeFeat, "forward", broken)
    report = visit(cli, f"teacher.weights={tiny_teacher}", *TINY, "distill=defeat")
    assert any("defeat/neck.background is not finite" in fault for fault in report["faults"])


@pytest.mark.parametrize("times", ["1e-9", "1e9", "null"])
def test_a_term_is_too_large_where_the_run_would_say_so(times: str, cli: Cli, tiny_teacher: Path) -> None:
    line = "callbacks.terms=null" if times == "null" else f"callbacks.terms.times={times}"
    report = visit(cli, f"teacher.weights={tiny_teacher}", *TINY, line)
    named = [note for note in report["notes"] if "times the detection loss at step 0" in note]
    assert bool(named) == (times == "1e-9")


@pytest.mark.parametrize("line", ["callbacks.best.mode=maxx", "seed=-1", "schedule.optimizer.lr=-1"])
def test_what_training_would_refuse_is_a_fault(line: str, cli: Cli) -> None:
    report = visit(cli, *TINY, "distill=none", line)
    assert report["verdict"] == "not ready"
    assert "data" not in report


def test_a_weight_stays_as_it_is(cli: Cli, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No optimiser is at work, and no parameter of either model, or of what the losses train, moves."""
    before: list[tuple[torch.nn.Module, dict[str, torch.Tensor]]] = []
    start = Distiller.__init__

    def kept(self: Distiller, *args: Any, **named: Any) -> None:
        start(self, *args, **named)
        models = [self, *([self.teacher.detector] if self.teacher else [])]
        before.extend((model, {name: p.detach().clone() for name, p in model.named_parameters()}) for model in models)

    monkeypatch.setattr(Distiller, "__init__", kept)
    hook = register_optimizer_step_pre_hook(lambda *_: pytest.fail("an optimiser was at work"))
    try:
        visit(cli, f"teacher.weights={tiny_teacher}", *TINY)
    finally:
        hook.remove()
    assert len(before) == 2
    for model, weights in before:
        after = dict(model.named_parameters())
        assert len(weights) == len(after) > 20
        assert [name for name, value in weights.items() if not torch.equal(value, after[name])] == []
