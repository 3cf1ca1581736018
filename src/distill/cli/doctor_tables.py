"""What the doctor found, on the terminal: tables, a few lines, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COUNTED = ("images", "boxes", "crowds", "difficult", "empty")


def show(report: Mapping[str, Any]) -> None:
    """The sections of `distill.cli.doctor.examine`'s report, as far as they were reached, and its verdict."""
    console = Console()
    for rows in (_data_rows, _count_rows, _class_rows, _shape_rows, _adapter_rows, _term_rows):
        title, columns, cells = rows(report)
        if cells:
            console.print(_table(title, columns, cells))
    for line in (*_teacher_lines(report), *_estimate_lines(report)):
        console.print(line, highlight=False, soft_wrap=True)
    for kind, colour in (("notes", "yellow"), ("faults", "red")):
        for words in report[kind]:
            console.print(f"[{colour}]{kind[:-1]}[/]  {escape(words)}", highlight=False, soft_wrap=True)
    count = len(report["faults"])
    verdict = "[green]ready[/]" if report["verdict"] == "ready" else f"[red]{count} to mend[/], named above"
    console.print(f"verdict  {verdict} ({report['seconds']:.0f} s)", highlight=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*("–" if cell is None else escape(str(cell)) for cell in row))
    return table


Rows = tuple[str, Sequence[str], list[list[Any]]]


def _data_rows(report: Mapping[str, Any]) -> Rows:
    rows: list[list[Any]] = []
    for split, found in report.get("data", {}).items():
        mended = ", ".join(f"{number} {what}" for what, number in found["mended"].items())
        rows.append([split, *(found[what] for what in COUNTED), mended or "nothing"])
    share = f"{100 * report.get('padding', 0):.1f} % of the training batches' pixels are padding"
    return f"data; {share}", ("", *COUNTED, "mended"), rows


def _count_rows(report: Mapping[str, Any]) -> Rows:
    data = report.get("data", {})
    names = next(iter(data.values()))["classes"] if data else {}
    rows = [[name, *("/".join(map(str, data[split]["classes"][name].values())) for split in data)] for name in names]
    return "boxes: small/medium/large/all", ("class", *data), rows


def _class_rows(report: Mapping[str, Any]) -> Rows:
    rows = [[row[name] for name in ("label", "data", "student", "teacher")] for row in report.get("classes", ())]
    return "classes", ("label", "data", "student", "teacher"), rows


def _shape_rows(report: Mapping[str, Any]) -> Rows:
    found = report.get("shapes", [])
    columns = list(found[0]) if found else []
    rows = [[row["stride"], *("×".join(map(str, row[c])) if row[c] else None for c in columns[1:])] for row in found]
    return "maps, C×H×W", columns, rows


def _adapter_rows(report: Mapping[str, Any]) -> Rows:
    rows = [[row["name"], row["layer"], f"{row['parameters']:,}"] for row in report.get("adapters", ())]
    return "adapters", ("name", "layer", "parameters"), rows


def _term_rows(report: Mapping[str, Any]) -> Rows:
    rows = [
        [name, f"{term['value']:.4g}", f"{term['weight']:g}", f"{term['loss']:.4g}", f"{100 * term['share']:.1f} %"]
        for name, term in report.get("terms", {}).items()
    ]
    return "terms at step 0", ("term", "value", "weight", "in the loss", "of the neck's gradient"), rows


def _teacher_lines(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("teacher")
    if found is None:
        return
    if found["state"] != "ready":
        yield f"[bold]teacher[/]  {found['state']}"
    if "command" in found:
        yield f"         would go to {escape(found['folder'])}, in about {_clock(found['estimate']['seconds']['total'])}:"
        yield f"         {escape(found['command'])}"
    if "source" in found:
        sample, promised = found.get("sample"), found["promised"] if found["here"] is None else found["here"]
        measured = f"AP {sample['AP']:.3f} on {sample['images']} images" if sample else "AP not known"
        said = f"{promised:.3f} promised" if promised is not None else "its file promises nothing"
        yield f"[bold]teacher[/]  {escape(found['source'])}: {measured}, {said}"


def _estimate_lines(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("estimate")
    if found is None:
        return
    seconds = found["seconds"]
    yield (
        f"[bold]time[/]     about {_clock(seconds['total'])}: {found['batches']} batches of "
        f"{found['seconds_per_batch']:.3f} s on each of {found['processes']} {found['device']} at {found['precision']}, and "
        f"{_clock(seconds['evaluation'])} of evaluation"
    )
    yield f"[bold]memory[/]   about {gib(found['bytes'])} of {gib(found['device_bytes'])}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB"
