"""Texts of a run's page."""

from __future__ import annotations

from distill.analysis.run_page import to_do_text


def test_the_number_of_images_is_not_that_of_the_first_ones() -> None:
    (text,) = to_do_text({"to_do": [{}] * 100, "to_do_images": 250})
    assert "to_do.csv lists all 250" in text
    assert to_do_text({"to_do": [], "to_do_images": 0}) == []
