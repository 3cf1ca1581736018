"""The verb doctor: what a run would be like, in a minute and without training, ending in a verdict."""

from __future__ import annotations

import argparse
import json
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from distill.cli import compose, validate
from distill.run_folder import RunFolder
from distill.types import DistillError

if TYPE_CHECKING:
    import lightning as L
    import torch

    from distill.data.datamodule import DetectionData
    from distill.detectors.base import Detector
    from distill.teacher import Teacher
    from distill.training.distiller import Distiller

LOOKED_AT = 100
"""Validation images that the teacher is measured on, at most."""
PATIENCE = 15.0
"""Seconds that one measurement may take."""
BATCHES = 3
"""Batches whose passes are timed."""
Report = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """``distill doctor [--json FILE] [overrides as for train]``; 0 where the run is ready, 1 where something is to be mended."""
    from distill.cli import doctor_tables
    from distill.files import write_text

    parser = argparse.ArgumentParser(prog="distill doctor", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all that was found there as well")
    parser.add_argument("overrides", nargs="*", help="as for train: data=voc data.source.root=… distill=ssim")
    args = parser.parse_intermixed_args(list(argv))
    report = examine(compose.standalone(args.overrides))
    doctor_tables.show(report)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1))
    return int(report["verdict"] != "ready")


def examine(cfg: DictConfig) -> Report:
    """All sections, as far as they can be reached: what cannot be built ends the visit, with what to mend."""
    from lightning import seed_everything

    from distill.cli.train import quieten

    quieten()
    start = time.monotonic()
    report: Report = {"faults": [], "notes": []}
    try:
        validate.check(cfg)
        seed_everything(cfg.seed, workers=True, verbose=False)
        _visit(cfg, report)
    except DistillError as error:
        report["faults"].append(str(error))
    report["seconds"] = round(time.monotonic() - start, 1)
    report["verdict"] = "mend" if report["faults"] else "ready"
    return report


def _visit(cfg: DictConfig, report: Report) -> None:
    from distill.cli import train
    from distill.detectors.inherit import inherit
    from distill.training.distiller import Distiller
    from distill.training.schedule import channels_last

    train.check_parts(cfg, Path(cfg.paths.run))  # with the run's own callbacks and loggers, of which none is used here
    data = _data(cfg, report)
    train.check_metric(cfg, data)
    trainer = _trainer(cfg)
    min_size, max_size = data.input_size
    student = compose.build(cfg.model, classes=list(data.classes), min_size=min_size, max_size=max_size)
    train.check_masks(cfg, student, data)
    guest = _teacher(cfg, data, trainer, report)
    if guest is not None and cfg.init == "inherit":
        inherit(student, guest.detector)
    _classes(report, data, student, guest)
    losses = train.build_losses(cfg, student.spec, guest.spec if guest else None)
    schedule, metrics = compose.build(cfg.schedule), train.build_metrics(cfg)
    module = Distiller(student, guest, losses, schedule, compose.plain(cfg.supervised), metrics, cfg.seed)
    module.to(trainer.strategy.root_device)
    if cfg.channels_last:
        channels_last(module)
    check = compose.parts(cfg.callbacks).get("terms", {})
    _terms(report, module, data, trainer, check.get("times", float("inf")))
    _estimate(cfg, report, module, data, trainer)


# -- the sections, in their order


def _data(cfg: DictConfig, report: Report) -> DetectionData:
    from distill.diagnostics import doctor

    with _warned() as said:
        data: DetectionData = compose.build(cfg.data)
        data.setup("fit")
        splits = ["train", "val"]
        if cfg.test and data.has("test"):
            try:
                data.setup("test")
                splits.append("test")
            except DistillError as error:
                report["notes"].append(f"the test split is left out: {error}")
    # Images in two splits among them: data.on_overlap alone says whether these stop a run, so that "ready" means it starts.
    report["notes"] += said
    report["data"] = {split: doctor.describe_split(data, split) for split in splits}
    report["padding"] = doctor.padding_share(data)
    for split, found in report["data"].items():
        absent = [name for name, counts in found["classes"].items() if not counts["all"]]
        if absent:
            report["notes"].append(f"{split}: no box of {', '.join(absent)}: nothing is learnt or measured of these")
    return data


def _trainer(cfg: DictConfig) -> L.Trainer:
    """As the run's, without its loggers and callbacks: it knows the device, the precision and how many processes there are."""
    from distill.cli.train import build_trainer

    bare = OmegaConf.merge(cfg, {"trainer": {"enable_progress_bar": False}})
    assert isinstance(bare, DictConfig)
    bare.logger, bare.callbacks = {}, {}
    return build_trainer(bare, Path())


def _teacher(cfg: DictConfig, data: DetectionData, trainer: L.Trainer, report: Report) -> Teacher | None:
    """The teacher, measured; an untrained one of its shape where it is not there yet; None where nobody needs one."""
    from distill.cli import teacher, train
    from distill.diagnostics import doctor

    if not (train.needs_teacher(cfg) or cfg.init == "inherit"):
        report["teacher"] = {"state": "not needed"}
        return None
    teacher.planned(cfg, data.classes)  # refuses what cannot be, before anything is made
    if cfg.teacher.weights is None:
        folder, overrides = teacher.place(cfg)
        if not RunFolder(folder).finished:
            detector = compose.build(cfg.teacher.model, classes=list(data.classes), weights=None, backbone_weights=None)
            report["teacher"] = _missing(detector, data, trainer, folder, overrides)
            if cfg.teacher.train == "never":
                report["faults"].append(f"there is no trained teacher at {folder} and teacher.train=never")
            else:
                report["notes"].append(
                    "no teacher is cached: the run trains one first; terms are those of an untrained one"
                )
            return teacher.guest(cfg, detector, "untrained")
    guest = teacher.find(cfg, data)
    found: Report = {
        "state": "ready",
        "source": guest.source,
        "promised": _promise(guest),
        "here": _ap(guest.values, "val/"),
    }
    report["teacher"] = found
    try:
        device, metrics = trainer.strategy.root_device, train.build_metrics(cfg)
        found["sample"] = doctor.measure_ap(guest.detector, data, metrics, device, LOOKED_AT, PATIENCE)
    except DistillError as error:
        report["notes"].append(f"the teacher's AP is not known: {error}")
        return guest
    _judge(cfg, found, report)
    return guest


def _judge(cfg: DictConfig, found: Report, report: Report) -> None:
    ap = found["sample"]["AP"] = _ap(found["sample"]["values"])
    what = f"the teacher's AP on {found['sample']['images']} validation images is {ap:.3f}"
    check = "check its weights, its class list and the image size that it was trained with"
    expected = found["promised"] if found["here"] is None else found["here"]
    if expected is not None and ap < expected / 2:
        words = f"{what}, but {found['source']} promises {expected:.3f}: {check}"
        # A promise on other images than these may well not hold here.
        report["notes" if found["here"] is None else "faults"].append(words)
    if cfg.teacher.min_ap is not None and ap < cfg.teacher.min_ap:
        report["faults"].append(f"{what}, below teacher.min_ap={cfg.teacher.min_ap}: {check}")


def _ap(values: Mapping[str, float], split: str = "") -> float | None:
    """COCO's or VOC's number, whichever was measured."""
    return values.get(f"{split}AP", values.get(f"{split}mAP"))


def _promise(guest: Teacher) -> float | None:
    """The AP that a run's summary or torchvision's enum states of these weights, on whatever images."""
    from distill.cli import teacher

    measured = teacher.summary(guest.source).get("student")
    if measured:
        return _ap(measured, "val/")
    named = getattr(type(guest.detector).enum, "__members__", {}).get(guest.source)
    metrics = named.meta["_metrics"].get("COCO-val2017", {}) if named is not None else {}
    return metrics["box_map"] / 100 if "box_map" in metrics else None


def _missing(
    detector: Detector, data: DetectionData, trainer: L.Trainer, folder: Path, overrides: Sequence[str]
) -> Report:
    """What would be trained, and for how long: the teacher's own run, whose passes are timed here as a student's."""
    from distill.training.distiller import Distiller

    made_by = compose.composed(overrides)
    module = Distiller(detector, schedule=compose.build(made_by.schedule)).to(trainer.strategy.root_device)
    estimate = _pace(made_by.trainer, module, data, trainer)
    command = shlex.join(["python", "-m", "distill", "train", *overrides])
    return {"state": "not trained yet", "folder": str(folder), "command": command, "estimate": estimate}


def _classes(report: Report, data: DetectionData, student: Detector, guest: Teacher | None) -> None:
    from distill.diagnostics import doctor

    theirs = guest.spec.classes if guest else None
    report["classes"] = doctor.class_lists(data.classes, student.spec.classes, theirs)
    untaught = [row["data"] for row in report["classes"] if row["taught"] is False]
    if untaught:
        report["notes"].append(
            f"the teacher does not know {', '.join(untaught)}; class lists are matched by exact name"
        )


def _terms(report: Report, module: Distiller, data: DetectionData, trainer: L.Trainer, times: float) -> None:
    """The terms at step 0; one above `times` the detection loss is pointed out, as the run's own check of terms would do."""
    import torch

    from distill.diagnostics import doctor
    from distill.precision import autocast

    device, precision = trainer.strategy.root_device, str(trainer.precision)
    for loss in module.losses.values():
        loss.on_epoch_start(0, data, module.student, module.teacher)
    batch = next(iter(data.train_dataloader())).to(device)
    with autocast(precision, device):
        step = module.compute_step(batch, module.step_seed(0), 0.0)
    with torch.no_grad(), autocast(precision, device):
        untrained = module.teacher is not None and module.teacher.source == "untrained"
        report["shapes"] = doctor.shapes(
            step.student, module.teacher.spec if untrained and module.teacher else step.teacher
        )
    report["adapters"] = doctor.adapters(module.losses)
    report["terms"] = terms = doctor.measure_terms(step)
    report["batch"] = {"images": list(batch.ids), "shape": list(batch.images.shape)}
    detection = sum(term["loss"] for name, term in terms.items() if name.startswith("student/"))
    for name, term in terms.items():
        if not abs(term["value"]) < float("inf"):
            report["faults"].append(
                f"the term {name} is not finite at step 0: set its weight to 0, or look at the data"
            )
        elif term["weight"] and not term["reaches"]:
            report["notes"].append(
                f"the term {name} has no gradient at step 0: it is cut off, or this batch has none of it"
            )
        if not name.startswith("student/") and abs(term["loss"]) > times * abs(detection):
            ratio = abs(term["loss"]) / max(abs(detection), 1e-30)
            report["notes"].append(
                f"the term {name} is {ratio:.3g} times the detection loss at step 0 (callbacks.terms.times={times:g}): lower "
                "its weight"
            )


def _estimate(cfg: DictConfig, report: Report, module: Distiller, data: DetectionData, trainer: L.Trainer) -> None:
    from distill.cli.doctor_tables import gib
    from distill.diagnostics import doctor

    report["estimate"] = found = _pace(cfg.trainer, module, data, trainer)
    optimizer = str(cfg.schedule.optimizer.get("_target_", ""))
    found["bytes"] += doctor.state_bytes(module, optimizer)
    if found["bytes"] > found["device_bytes"]:
        report["faults"].append(
            f"a step takes about {gib(found['bytes'])}, but {found['device']} has {gib(found['device_bytes'])}: lower "
            "data.batch_size (with schedule.accumulate for the same total), or data.max_size"
        )


def _pace(limits: DictConfig, module: Distiller, data: DetectionData, trainer: L.Trainer) -> Report:
    """Time and memory of a schedule on this machine, from the passes of a few batches; `limits` is a ``trainer`` node."""
    from distill.diagnostics import doctor

    device: torch.device = trainer.strategy.root_device
    processes = trainer.num_devices * trainer.num_nodes
    loader = data.train_dataloader()
    step = doctor.backward(module, str(trainer.precision))
    pace = doctor.measure_pace(step, loader, device, BATCHES, PATIENCE)
    looked = doctor.measure_ap(module.student, data, (), device, 2 * data.eval_batch_size, PATIENCE)
    module.student.train()
    batches, evaluations = planned(limits, max(1, len(loader) // processes))
    training = batches * pace["seconds_per_batch"]
    evaluating = evaluations * looked["seconds_per_image"] * len(data.records("val")) / processes
    return {
        "device": str(device),
        "processes": processes,
        "precision": str(trainer.precision),
        "batches": batches,
        "evaluations": evaluations,
        "seconds_per_batch": pace["seconds_per_batch"],
        "seconds": {"training": training, "evaluation": evaluating, "total": training + evaluating},
        "bytes": pace["peak_bytes"],
        "device_bytes": doctor.memory(device),
    }


def planned(limits: DictConfig, batches: int) -> tuple[int, int]:
    """How many batches a process will train on, at `batches` an epoch, and how often it will evaluate, the end included."""
    part = 1.0 if limits.limit_train_batches is None else limits.limit_train_batches
    an_epoch = min(batches, part) if isinstance(part, int) else max(1, int(batches * part))
    total = an_epoch * limits.max_epochs
    if limits.max_steps >= 0:
        total = min(total, limits.max_steps * limits.accumulate_grad_batches)
    every = limits.check_val_every_n_epoch
    return total, (total // an_epoch // every if every else 0) + 1


@contextmanager
def _warned() -> Iterator[list[str]]:
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
