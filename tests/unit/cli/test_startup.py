"""Imports of torch and Lightning without garbage collection."""

from __future__ import annotations

import gc
import sys

import pytest

from distill.cli.startup import uncollected_imports


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the collector was on, at each call of ``gc.freeze``; the real one would keep the tests' garbage."""
    calls: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    return calls


def test_the_collector_waits_for_the_imports_and_leaves_their_objects_out(
    frozen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with uncollected_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen == [True]


def test_the_collector_is_on_again_after_a_failed_import(frozen: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ImportError), uncollected_imports():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_process_that_has_imported_them_keeps_its_collector(
    enabled: bool, frozen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if enabled:
        monkeypatch.setitem(sys.modules, "torchvision", sys)
    else:
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        gc.disable()
    try:
        with uncollected_imports():
            assert gc.isenabled() == enabled
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert not frozen
