"""Processes that were given different things refuse to start, all of them; and none waits for ever for another."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill.cli.config import compose, instantiate
from distill.cli.runs.assembly import shared_values
from distill.cli.runs.preflight import shared_config
from distill.data.datamodule import DetectionData
from distill.data.packed_bytes import PackedBytes
from distill.data.shapes import Shapes
from distill.training.callbacks.consistency import (
    ConsistencyCheck,
    exchange_timeout,
    is_lost_process,
    require_equal_values,
)
from distill.types import DistillError
from helpers.two_processes import start_two_processes

CASES: dict[str, list[dict[str, str]]] = {  # what each of two processes was given
    "equal": [{"seed": "0", "model.backbone.depth": "10"}, {"model.backbone.depth": "10", "seed": "0"}],
    "seed": [{"seed": "0", "model.backbone.depth": "10"}, {"seed": "1", "model.backbone.depth": "10"}],
    "a key": [{"seed": "0"}, {"seed": "0", "guard.limit": "3"}],
    "many": [{f"k{number}": "0" for number in range(9)}, {f"k{number}": "1" for number in range(9)}],
}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    impatient = dist.new_group(timeout=exchange_timeout(0.05), backend="gloo")
    found: dict[str, Any] = {}
    for case, spec in CASES.items():
        try:
            require_equal_values(spec[rank])
            found[case] = None
        except DistillError as error:
            found[case] = str(error)
    if rank == 0:  # the other one does not come
        start = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=impatient)
        except RuntimeError as error:
            found["lost"], found["waited"] = is_lost_process(error), time.monotonic() - start
    torch.save(found, f"{folder}/{rank}.pt")
    while not Path(f"{folder}/0.pt").is_file():
        time.sleep(0.1)
    os._exit(0)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    start_two_processes(one_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_difference_is_named_on_all_processes(case: str, both: list[dict[str, Any]]) -> None:
    first, second = (found[case] for found in both)
    assert first == second
    if case == "equal":
        assert first is None
        return
    expected = {
        "seed": "  seed: 0 on rank 0, 1 on rank 1\n",
        "a key": "  guard.limit: missing on rank 0, 3 on rank 1\n",
        "many": "  k4: 0 on rank 0, 1 on rank 1\n  … and 4 more\n",
    }
    assert expected[case] in first
    assert "model.backbone.depth" not in first


def test_a_process_that_does_not_answer_is_not_waited_for_for_ever(both: list[dict[str, Any]]) -> None:
    assert both[0]["lost"] is True
    assert 2 < both[0]["waited"] < 60  # three seconds were allowed


def data(**options: Any) -> DetectionData:
    return DetectionData(Shapes(train=4, val=2, test=0, size=64, **options), workers=0, min_size=64, max_size=64)


def spec(*lines: str, run: str = "a", source: DetectionData | None = None) -> dict[str, str]:
    fixed = [f"paths.run={run}", "name=n"]
    return shared_values(shared_config(compose.compose_config([*lines, *fixed])), source or data())


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("seed=3", "seed"),
        ("model.backbone.depth=18", "model.backbone.depth"),
        ("distill.losses.dsig.nodes.foreground=1", "distill.losses.dsig.nodes.foreground"),
        ("trainer.precision=16-mixed", "trainer.precision"),
        ("guard.limit=0", "guard.limit"),
    ],
)
def test_what_decides_a_run_is_among_the_facts(line: str, key: str) -> None:
    before, after = spec(), spec(line)
    assert key in {name for name in after if before.get(name) != after[name]}


def test_paths_and_times_are_not_among_the_facts() -> None:
    assert spec(run="outputs/x/2026-01-01") == spec(run="outputs/x/2026-01-02", source=data())


def test_other_data_is_another_fact() -> None:
    def different(other: DetectionData) -> set[str]:
        before, after = spec(), spec(source=other)
        return {name.rpartition(".")[0] for name in after if before[name] != after[name]}

    assert different(data(seed=5)) == {"data seen.train", "data seen.val"}
    nudged = data()
    nudged.records("train")[1].boxes[0, 0] += 1e-9
    assert different(nudged) == {"data seen.train"}
    relabeled = data()
    relabeled.records("val")[0].labels[0] = 1 + relabeled.records("val")[0].labels[0] % 6
    assert different(relabeled) == {"data seen.val"}


def test_what_was_measured_holds_for_the_same_files_boxes_and_sizes_alone() -> None:
    whole, moved, nudged = data(), data(), data()
    assert whole.fingerprint("val") == moved.fingerprint("val") != whole.fingerprint("train")
    names = moved.records("val").files.texts()
    moved.records("val").files = PackedBytes.pack_texts([names[0], names[1] + "x", *names[2:]])
    nudged.records("val")[1].boxes[0, 0] += 1e-9
    larger = DetectionData(Shapes(train=4, val=2, test=0, size=64), workers=0, min_size=64, max_size=96)
    found = {each.fingerprint("val") for each in (whole, moved, nudged, larger)}
    assert len(found) == 4
    assert moved.state_dict() == whole.state_dict()  # the checkpoint's: where files lie is nothing to it


def test_one_process_has_nobody_to_agree_with() -> None:
    class Alone:
        world_size = 1

    ConsistencyCheck(lambda: pytest.fail("asked")).setup(Alone(), None, "fit")  # type: ignore[arg-type]


def test_patience_is_a_time_above_zero() -> None:
    assert exchange_timeout(2) == timedelta(seconds=120)
    with pytest.raises(DistillError, match="above 0"):
        exchange_timeout(0)


@pytest.mark.parametrize("option", ["ddp", "ddp_cpu"])
def test_the_strategies_have_a_timeout(option: str) -> None:
    node = compose.compose_config(
        [f"trainer={option}", "trainer.strategy.timeout.minutes=2", "paths.run=x"]
    ).trainer.strategy
    assert instantiate.build_node(node)._timeout == timedelta(minutes=2)


def test_other_errors_are_not_taken_for_a_lost_process() -> None:
    assert not is_lost_process(RuntimeError("CUDA out of memory"))
    assert not is_lost_process(ValueError("Timed out"))
    assert is_lost_process(RuntimeError("[gloo/transport/tcp] Connection closed by peer [127.0.0.1]:1234"))


def test_folder_names_are_no_data(tmp_path: Path) -> None:
    one, two = data(), data()
    files = [str(tmp_path / record.file) for record in two.records("train")]
    two.records("train").files = PackedBytes.pack_texts(files)
    assert one.state_dict() == two.state_dict()
