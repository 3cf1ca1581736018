"""Print AP and costs of a run's models as a table, and write a model card with the student's weights."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from distill.cli.config.overrides import read_config, read_overrides
from distill.cli.startup import uncollected_imports
from distill.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """``distill card RUN [--license TEXT] [--out DIR] [--push-to-hub USER/NAME]``."""
    parser = argparse.ArgumentParser(prog="distill card", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--license", default="not stated", help="license of the student's weights, which the card states"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the card and the weights; default: RUN/export/card"
    )
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="also upload the folder to the Hugging Face Hub")
    args = parser.parse_args(list(argv))

    with uncollected_imports():
        from distill.cli.tables import print_table
        from distill.detectors.registry import load_detector
        from distill.detectors.student_files import read_extra, save_safetensors
        from distill.export.card import COLUMNS, card_folder, card_rows, write_card
        from distill.export.folder import complete_folder
        from distill.export.hub import hub_client, push_folder
        from distill.files import write_text

    run = RunFolder(args.run.absolute())
    client = hub_client() if args.push_to_hub else None
    split, rows = card_rows(run)
    print_table(f"{split}, percent", COLUMNS, [row.cells() for row in rows], compact=True)
    out = args.out or card_folder(run)
    with complete_folder(out, "student.safetensors") as folder:
        detector = load_detector(run.path)
        save_safetensors(detector, folder, {**read_extra(run.path), "license": args.license})
        text = write_card(run, read_config(run), read_overrides(run.path), args.license, detector.classes)
        write_text(folder / "README.md", text)
        onnx = run.path / "export" / "onnx"
        for name in ("student.onnx", "infer.py"):
            if (onnx / name).is_file():
                shutil.copyfile(onnx / name, folder / name)
    print(f"written: {out}")
    if client is not None:
        print(f"uploaded: {push_folder(out, args.push_to_hub, client)}")
    return 0
