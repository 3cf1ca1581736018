"""The command doctor: checks data, teacher and losses in about a minute before a run, without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.cli.config import override_checks
from distill.cli.startup import uncollected_imports
from distill.cli.tables import gib, print_line, print_table
from distill.units import duration, percent

COUNTED = ("images", "boxes", "crowds", "difficult", "empty")


def main(argv: Sequence[str]) -> int:
    """``distill doctor [--json FILE] [overrides as for train]``: exit code 0 for a run that is ready, 1 for faults."""
    parser = argparse.ArgumentParser(prog="distill doctor", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("overrides", nargs="*", help="as for train: data=voc data.source.root=… distill=ssim")
    args = parser.parse_intermixed_args(list(argv))
    cfg = override_checks.compose_without_run(args.overrides)

    with uncollected_imports():
        from distill.cli.reports.doctor_report import examine_run
        from distill.files import write_text

    report = examine_run(cfg)
    print_report(report)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1))
    return int(report["verdict"] != "ready")


def print_report(report: Mapping[str, Any]) -> None:
    """Print the sections that were reached, and the verdict."""
    data = report.get("data", {})
    rows: list[list[Any]] = []
    for split, counts in data.items():
        corrected = ", ".join(f"{number} {name}" for name, number in counts["corrected"].items())
        rows.append([split, *(counts[name] for name in COUNTED), corrected or "nothing"])
    share = f"{100 * report.get('padding', 0):.1f} % of the training batches' pixels are padding"
    print_table(f"data; {share}", ("", *COUNTED, "corrected"), rows)
    classes = next(iter(data.values()))["classes"] if data else {}
    rows = [[name, *("/".join(map(str, data[split]["classes"][name].values())) for split in data)] for name in classes]
    print_table("boxes: small/medium/large/all", ("class", *data), rows)
    columns = ["label", "data", "student", "teacher"]
    print_table("classes", columns, [[row[name] for name in columns] for row in report.get("classes", ())])
    shapes = report.get("shapes", [])
    columns = list(shapes[0]) if shapes else []
    rows = [
        [row["stride"], *("×".join(map(str, row[name])) if row[name] else None for name in columns[1:])]
        for row in shapes
    ]
    print_table("maps, C×H×W", columns, rows)
    rows = [[row["name"], row["layer"], f"{row['parameters']:,}"] for row in report.get("adapters", ())]
    print_table("adapters", ("name", "layer", "parameters"), rows)
    rows = [
        [name, f"{term['value']:.4g}", f"{term['weight']:g}", f"{term['loss']:.4g}", f"{100 * term['share']:.1f} %"]
        for name, term in report.get("terms", {}).items()
    ]
    print_table("terms at step 0", ("term", "value", "weight", "in the loss", "of the neck's gradient"), rows)
    if "teacher" in report:
        _print_teacher(report["teacher"])
    if "baseline" in report:
        _print_baseline(report["baseline"])
    if "estimate" in report:
        _print_estimate(report["estimate"])
    for kind, color in (("notes", "yellow"), ("faults", "red")):
        for text in report[kind]:
            print_line(kind.removesuffix("s"), text, color)
    ready = report["verdict"] == "ready"
    verdict = "ready" if ready else f"{len(report['faults'])} to fix, named above"
    print_line("verdict", f"{verdict} ({report['seconds']:.0f} s)", "green" if ready else "red")


def _print_teacher(teacher: Mapping[str, Any]) -> None:
    if teacher["state"] != "ready":
        print_line("teacher", teacher["state"])
    if "command" in teacher:
        expected = duration(teacher["estimate"]["seconds"]["total"])
        print_line("", f"would go to {teacher['folder']}, in about {expected}:")
        print_line("", teacher["command"])
    if "source" in teacher:
        sample = teacher.get("sample")
        promised = teacher["promised"] if teacher["here"] is None else teacher["here"]
        measured = "AP not known"
        if sample:
            shared = sample["shared_AP"]
            of_shared = "" if shared is None else f" ({percent(shared)} of the classes that it knows)"
            measured = f"AP {percent(sample['AP'])}{of_shared} on {sample['images']} images"
        expected = f"{percent(promised)} promised" if promised is not None else "its file promises nothing"
        print_line("teacher", f"{teacher['source']}: {measured}, {expected}")


def _print_baseline(baseline: Mapping[str, Any]) -> None:
    print_line("baseline", f"the student alone, {baseline['epochs']} epochs: {baseline['state']}, {baseline['folder']}")
    if "command" in baseline:
        expected = duration(baseline["estimate"]["seconds"]["total"])
        print_line("", f"would be trained in about {expected}:\n{baseline['command']}")


def _print_estimate(estimate: Mapping[str, Any]) -> None:
    seconds = estimate["seconds"]
    print_line(
        "time",
        f"about {duration(seconds['total'])}: {estimate['batches']} batches of {estimate['seconds_per_batch']:.3f} s "
        f"on each of {estimate['processes']} {estimate['device']} at {estimate['precision']}, and "
        f"{duration(seconds['evaluation'])} of evaluation",
    )
    print_line("memory", f"about {gib(estimate['bytes'])} of {gib(estimate['device_bytes'])}")
