"""Values ``auto`` of a configuration, and where a run finds them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.cli.config import compose
from distill.cli.config.auto_values import (
    COCO_CLASSES,
    PAPERS,
    UNREAD,
    VOC_CLASSES,
    DataFacts,
    auto_keys,
    resolve,
    resolve_as_recorded,
)
from distill.cli.config.instantiate import to_containers
from distill.cli.config.override_checks import compose_without_run
from distill.cli.config.overrides import read_config
from distill.cli.runs.assembly import build_student
from distill.cli.runs.preflight import plan_run
from distill.cli.runs.recorded_run import recompose
from distill.data.auto_size import SizeChoice, choose_size
from distill.run_folder import RunFolder
from distill.types import DistillError
from helpers.image_folders import write_coco

OWN = DataFacts(60, ("cell",), SizeChoice(240, 320, "kept"), SizeChoice(288, 288, "kept"))


def resolved(*words: str, facts: DataFacts = OWN) -> Any:
    cfg, _ = resolve(compose_without_run(words), facts, words)
    assert auto_keys(cfg) == []
    return to_containers(cfg)


@pytest.mark.parametrize("data", ["coco", "voc", "yolo"])
def test_own_data(data: str) -> None:
    cfg = resolved(f"data={data}")
    assert [cfg["data"][key] for key in ("min_size", "max_size", "batch_size")] == [240, 320, 8]
    assert cfg["schedule"]["epochs"] * (60 // 8) >= 1000
    assert cfg["schedule"]["optimizer"]["lr"] == 1e-3
    assert cfg["trainer"]["max_epochs"] == cfg["schedule"]["epochs"]


OWN_SIDES = {
    **{"rtdetr_r18": 640, "rtdetr_mini": 128, "dfine_n": 640, "dfine_mini": 128},
    **{"deimv2_n": 640, "deimv2_pico": 640, "deimv2_femto": 416, "deimv2_atto": 320},
    **{"rfdetr_nano": 384, "rfdetr_small": 512, "rfdetr_medium": 576, "rfdetr_large": 704},
}
"""The image sizes of the published models; 128 for the small ones of tests."""


@pytest.mark.parametrize("model", OWN_SIDES)
def test_a_detector_with_queries_gets_the_images_that_it_was_published_with(model: str) -> None:
    """All had squares of 640 px on public data, and on other data a side that the images alone decided."""
    full = OWN._replace(images=117_266, classes=COCO_CLASSES)
    words = ["data=coco", f"model={model}"]
    composed = compose_without_run(words)
    for facts in (OWN, full, UNREAD):
        cfg, lines = resolve(composed, facts, words)
        data, side = cfg.data, OWN_SIDES[model]
        assert (data.resize, data.min_size, data.max_size) == ("square", side, side)
        assert f"data.min_size={side}: the student's own image size" in lines


@pytest.mark.parametrize(
    ("words", "side"),
    [
        (["model=frcnn_r18", "teacher=rfdetr_nano"], 384),
        (["model=rfdetr_nano", "teacher=rfdetr_large"], 384),
        (["model=deimv2_atto", "teacher=frcnn_r50"], 320),
        (["model=rfdetr_nano", "data.min_size=512"], 512),
        (["model=rfdetr_large", "data.max_size=512"], 512),
        (["model=rfdetr_nano", "model.min_size=448"], 448),
        (["model=rfdetr_nano", "model.windows=5", "teacher=none"], 480),  # of 5 windows of 16 px, and of 32
        (["model=rfdetr_nano", "model.windows=5", "teacher=rfdetr_small"], 480),  # also of the teacher's 2 windows
        (["model=deimv2_femto", "teacher=rfdetr_nano", "teacher.model.windows=4"], 448),
        (["model=frcnn_r18", "teacher=retinanet_r50", "data.resize=square"], 288),  # the data decides
    ],
)
def test_the_side_of_squares_of_a_pair(words: list[str], side: int) -> None:
    data = resolved("data=coco", *words)["data"]
    assert (data["resize"], data["min_size"], data["max_size"]) == ("square", side, side)
    assert side % data["pad_to"] == 0  # padding would be seen as image


def test_squares_may_be_turned_off() -> None:
    assert resolved("data=coco", "model=rtdetr_r18", "data.resize=ratio")["data"]["min_size"] == 240


def test_a_run_as_teacher_brings_its_image_size(tmp_path: Path) -> None:
    """Its weights know objects of this size. ``teacher.model`` is another detector, which is not built."""
    description = {"family": "rfdetr", "classes": ["cat"], "min_size": 448, "max_size": 448, "windows": 4}
    RunFolder(tmp_path).description.write_text(json.dumps({"format": 2, "model": description}))
    RunFolder(tmp_path).student.write_bytes(b"weights")
    teacher = f"teacher.weights={tmp_path}"
    assert resolved("data=coco", "model=frcnn_r18", teacher)["data"]["min_size"] == 448
    assert resolved("data=coco", "model=deimv2_atto", teacher)["data"]["min_size"] == 320
    assert resolved("data=coco", "model=deimv2_femto", teacher)["data"]["min_size"] == 448  # 4 windows: not 416


def test_an_rfdetr_has_the_positions_of_its_own_image_size() -> None:
    for model in (name for name in compose.config_groups()["model"] if name.startswith("rfdetr_")):
        node = compose.compose_config([f"model={model}"]).model
        assert node.min_size == 16 * node.positions, model


def test_given_values_stay() -> None:
    cfg = resolved(
        *("data=coco", "data.min_size=96", "data.batch_size=2", "schedule.epochs=5"),
        *("schedule.optimizer.lr=0.02", "schedule.evaluate_every=5"),
    )
    assert [cfg["data"][key] for key in ("min_size", "max_size", "batch_size")] == [96, 128, 2]
    assert [cfg["schedule"][key] for key in ("epochs", "evaluate_every")] == [5, 5]
    assert cfg["schedule"]["optimizer"]["lr"] == 0.02


def test_several_sizes_leave_room_for_the_largest() -> None:
    assert resolved("data=coco", "data.min_size=[96,120]")["data"]["max_size"] == 160


def test_a_named_schedule_is_not_changed() -> None:
    plain = to_containers(compose.compose_config(["data=coco", "schedule=sgd_2x", "hydra.run.dir=."]).schedule)
    assert resolved("data=coco", "schedule=sgd_2x")["schedule"] == plain


@pytest.mark.parametrize(
    ("start", "rate"),
    [("start=imagenet", 1e-3), ("model.backbone.weights=crops.pt", 1e-3), ("model.weights=COCO_V1", 2e-4)],
)
def test_a_trained_detector_gets_a_lower_rate(start: str, rate: float) -> None:
    """On a pretrained backbone the heads are random, and 2e-4 left them undertrained."""
    assert resolved("data=coco", start)["schedule"]["optimizer"]["lr"] == rate


@pytest.mark.parametrize(
    ("data", "classes", "images", "schedule", "size"),
    [("coco", COCO_CLASSES, 117_266, "sgd_1x", [800, 1333]), ("voc", VOC_CLASSES, 5_717, "voc", [600, 1000])],
)
def test_public_data_sets_at_full_size_get_the_papers_settings(
    data: str, classes: tuple[str, ...], images: int, schedule: str, size: list[int]
) -> None:
    full = OWN._replace(images=images, classes=classes[::-1])  # in any order
    cfg = resolved(f"data={data}", "schedule.clip=5.0", facts=full)
    expected = compose.compose_config([f"schedule={schedule}", "schedule.clip=5.0", "hydra.run.dir=."])
    assert cfg["schedule"] == to_containers(expected.schedule)
    assert [cfg["data"][key] for key in ("min_size", "max_size", "batch_size")] == [*size, 2]
    part = resolved(f"data={data}", facts=full._replace(images=50))
    assert part["schedule"]["optimizer"]["_target_"] == "torch.optim.AdamW"
    other = resolved(f"data={data}", facts=full._replace(classes=classes[:-1]))
    assert other["schedule"]["optimizer"]["_target_"] == "torch.optim.AdamW"


@pytest.mark.parametrize(("data", "classes"), [("coco", COCO_CLASSES), ("voc", VOC_CLASSES)])
@pytest.mark.parametrize("model", ["rtdetr_r18", "dfine_n"])
def test_a_family_with_a_schedule_of_its_own_keeps_it_on_public_data(
    model: str, data: str, classes: tuple[str, ...]
) -> None:
    """SGD with a rate of 0.02 makes a transformer diverge."""
    full = OWN._replace(images=117_266, classes=classes)
    words = [f"data={data}", f"model={model}"]
    cfg, lines = resolve(compose_without_run(words), full, words)
    expected = compose.compose_config(["schedule=detr", "hydra.run.dir=."]).schedule
    assert to_containers(cfg.schedule) == to_containers(expected)
    assert [cfg.data[key] for key in ("min_size", "max_size", "batch_size")] == [640, 640, 4]
    assert any(line.startswith("schedule=detr: as in papers on ") for line in lines)
    convolutional = resolved(f"data={data}", "model=frcnn_r18", f"teacher={model}", facts=full)
    assert convolutional["data"]["min_size"] == 640
    assert convolutional["schedule"]["optimizer"]["_target_"] == "torch.optim.SGD"


def test_the_lists_of_classes() -> None:
    assert (len(COCO_CLASSES), len(VOC_CLASSES)) == (80, 20)
    assert {known.schedule for known in PAPERS.values()} <= set(compose.config_groups()["schedule"])


def plan(root: Path, *words: str) -> Any:
    files = [f"data.source.{split}.annotations=annotations/instances_{split}2017.json" for split in ("train", "val")]
    lines = ["data=coco", f"data.source.root={root}", *files, "distill=none", "data.workers=0", *words]
    return plan_run(compose_without_run(lines))


def test_a_plan_reads_the_images_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)
    reads: list[str] = []
    from distill.data.coco import Coco

    read_split = Coco.read_split
    monkeypatch.setattr(Coco, "read_split", lambda self, split: reads.append(split) or read_split(self, split))
    made = plan(tmp_path)
    made.data.setup("fit")
    assert sorted(reads) == ["train", "val"]
    assert made.data.input_size == choose_size(made.data.records("train"))[:2] != (800, 1333)
    assert made.config["data"]["min_size"] == made.data.input_size[0]
    assert made.schedule.epochs == made.config["schedule"]["epochs"] == made.trainer.settings["max_epochs"]
    assert any("schedule.epochs=" in line for line in made.choices)


def test_images_of_odd_sizes_fit_a_student_that_sees_squares(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra detr is not installed")
    write_coco(tmp_path)
    made = plan(tmp_path, "model=rtdetr_mini")
    assert made.config["data"]["resize"] == "square"
    assert build_student(made, made.data).options["min_size"] == made.data.input_size[1] == 128


def test_a_wrong_value_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="min_ap"):
        plan(tmp_path / "missing", "distill=defeat", "teacher.min_ap=3")


def test_an_evaluation_uses_the_values_of_the_run(tmp_path: Path) -> None:
    """Also those of an older run, whose configuration had numbers where there is ``auto`` now."""
    run = RunFolder(tmp_path)
    run.overrides.write_text(json.dumps(["data=coco", "distill=none", "schedule.optimizer.lr=0.5"]))
    schedule = to_containers(compose.compose_config(["schedule=sgd_1x", "hydra.run.dir=."]).schedule)
    run.config.write_text(json.dumps({"data": {"min_size": 77, "max_size": 99, "batch_size": 3}, "schedule": schedule}))
    cfg = to_containers(recompose(run, ["schedule.clip=7.0"]))
    assert [cfg["data"][key] for key in ("min_size", "max_size", "batch_size")] == [77, 99, 3]
    assert cfg["schedule"] == schedule | {"clip": 7.0, "optimizer": schedule["optimizer"] | {"lr": 0.5}}


def test_a_damaged_record_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[]")
    with pytest.raises(DistillError, match="expected the configuration of a run"):
        read_config(RunFolder(tmp_path))


@pytest.mark.parametrize(("given", "expected"), [(200, (200, 200)), (640, (240, 640))])
def test_a_given_limit_holds_for_the_chosen_size(given: int, expected: tuple[int, int]) -> None:
    data = resolved("data=coco", f"data.max_size={given}")["data"]
    assert (data["min_size"], data["max_size"]) == expected
    unread = resolved("data=coco", f"data.max_size={given}", facts=UNREAD)["data"]
    assert unread["min_size"] <= given


def test_auto_elsewhere_is_a_plain_word() -> None:
    """It is a car in German, and may be the name of a folder."""
    words = ["data=coco", "data.source.root=auto", "data.source.rename={car: auto}", "schedule.epochs=auto"]
    cfg = compose_without_run(words)
    recorded = resolved(*words)
    assert to_containers(resolve_as_recorded(cfg, recorded, words)) == recorded


def test_a_key_that_the_papers_schedule_lacks_is_explained() -> None:
    full = OWN._replace(images=5_000, classes=VOC_CLASSES)
    words = ["data=voc", "schedule.optimizer.betas=[0.8,0.9]"]
    with pytest.raises(DistillError, match=r"recognized as Pascal VOC, so schedule=voc was chosen\. It lacks a key"):
        resolve(compose_without_run(["data=voc"]), full, words)
