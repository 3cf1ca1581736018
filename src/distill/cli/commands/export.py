"""Write a run's student as a file for another program, and compare the file's detections and AP with the student's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cli.runs.recorded_run import find_run, load_student, recompose
from distill.cli.startup import uncollected_imports
from distill.types import DistillError

if TYPE_CHECKING:
    from distill.export.proof import Proof

MAX_LOSS = 0.5
"""Default of --max-loss: largest accepted loss of AP, in percentage points."""
MAX_LOSS_INT8 = 2.0


def main(argv: Sequence[str]) -> int:
    """``distill export RUN --to onnx [--parts dense] [--top 300] [--batch dynamic] [--out DIR] [overrides]``."""
    parser = argparse.ArgumentParser(
        prog="distill export", usage="distill export RUN --to FORMAT [options] [overrides]", description=__doc__
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help="onnx, openvino, torchscript, safetensors, torchvision"
    )
    parser.add_argument(
        "--parts",
        default="full",
        help="full (default): from pixels to detections; dense: batches of a fixed image size, without resize and NMS",
    )
    parser.add_argument(
        "--batch", default=None, choices=("1", "dynamic"), help="images per call of a dense file; default: dynamic"
    )
    parser.add_argument(
        "--top",
        type=int,
        metavar="K",
        help="dense: output the K best decoded candidates of each image; default: raw outputs",
    )
    parser.add_argument(
        "--canvas",
        type=_canvas,
        metavar="HxW",
        help="dense: height and width of the input images in pixels; default: the smallest "
        "size that holds all validation images",
    )
    parser.add_argument("--opset", type=int, default=18, help="ONNX's operator set; default: 18")
    parser.add_argument(
        "--int8", action="store_true", help="quantize a full ONNX file; calibration uses training images"
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=64,
        metavar="N",
        help="number of training images for the calibration of --int8; default: 64",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the files; default: RUN/export/FORMAT")
    parser.add_argument(
        "--split", default="val", choices=("train", "val", "test"), help="split on which AP is compared; default: val"
    )
    parser.add_argument(
        "--images", type=int, default=200, metavar="N", help="number of images on which AP is compared; default: 200"
    )
    parser.add_argument(
        "--timed",
        type=int,
        default=24,
        metavar="N",
        help="number of images for the latency; default: 24; 0: no measurement",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        metavar="AP",
        help=f"largest accepted loss of AP, in percentage points; default: {MAX_LOSS}, with --int8 {MAX_LOSS_INT8}",
    )
    parser.add_argument("--license", default="not stated", help="license of the weights, which the metadata states")
    parser.add_argument("overrides", nargs="*", help="overrides, as for train: data.source.root=…")
    args = parser.parse_intermixed_args(list(argv))
    run = find_run(args.source)
    cfg = recompose(run, args.overrides)

    with uncollected_imports():
        from distill.cli.runs.preflight import plan_run
        from distill.detectors.student_files import read_extra
        from distill.export.folder import complete_folder
        from distill.export.proof import ValidationImages, prove
        from distill.export.routes import ExportOptions, open_program, quantize_export, write_export
        from distill.files import write_text

    batch = args.batch or ("1" if args.parts == "full" else "dynamic")
    options = ExportOptions(args.to, args.parts, batch, args.top, args.canvas, args.opset, args.int8, args.license)
    options.check()
    detector = load_student(args.source).eval()
    name = options.to + ("-dense" if options.parts == "dense" else "-int8" if options.int8 else "")
    allowed = args.max_loss if args.max_loss is not None else MAX_LOSS_INT8 if options.int8 else MAX_LOSS
    out = args.out or run.path / "export" / name
    with complete_folder(out, "proof.json") as folder:
        plan = plan_run(cfg)
        images = ValidationImages(plan.data, args.split, args.images)
        written = write_export(detector, options, plan.data, read_extra(args.source), folder)
        if options.int8:
            written = quantize_export(written, options, plan.data, args.calibration)
        size = sum(x.numel() * x.element_size() for x in detector.net.state_dict().values()) / 1e6
        opened = open_program(options.to, written.main, detector)
        proof = prove(detector, opened, name, written.files, images, list(plan.metrics), size, args.timed)
        write_text(folder / "proof.json", json.dumps(proof.to_plain(), indent=1))
        print_proof(proof)
        if proof.loss > allowed:
            raise DistillError(
                f"export: the file loses {proof.loss:.2f} {proof.metric} on {proof.images} images of {proof.split}, "
                f"more than --max-loss {allowed:g}. Nothing was written. To accept this loss, set --max-loss"
            )
    print(f"written: {out}")
    return 0


def print_proof(proof: Proof) -> None:
    """Print the table of a proof, and how the detections agree."""
    from distill.cli.tables import print_line, print_table

    metrics = [name for name in ("AP", "AP50", "mask_AP", "mAP") if name in proof.student.results]
    times = [f"ms {kind}, {spread.threads} thr." for spread in proof.student.latency for kind in ("median", "p95")]
    print_table(
        f"{proof.split}, {proof.images} images; {proof.device}",
        ("", *metrics, "MB", *times),
        [row.cells(metrics) for row in (proof.student, proof.exported)],
        compact=True,
    )
    parity = proof.parity
    text = (
        f"{100 * parity.agreement:.2f} % of {parity.detections} detections in {parity.images} images; largest "
        f"difference {parity.pixels:.2g} pixels, {parity.score:.2g} in score"
    )
    print_line("equal", text + (f", {100 * parity.mask_pixels:.2g} % of a mask's image" if parity.mask_pixels else ""))


def _canvas(text: str) -> tuple[int, int]:
    """Height and width from ``HxW``."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise DistillError(f"--canvas {text}: expected HEIGHTxWIDTH in pixels, such as 320x480")
    return int(height), int(width)
