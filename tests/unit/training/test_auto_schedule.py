"""Schedules that are chosen from the number of training images."""

from __future__ import annotations

import pytest

from distill.training.auto_schedule import LEAST_STEPS, choose_schedule


@pytest.mark.parametrize(("images", "batch"), [(1, 8), (7, 8), (60, 8), (292, 8), (292, 2), (1500, 4)])
def test_few_images_are_seen_often(images: int, batch: int) -> None:
    """60 images at batch 2 and 12 epochs were 360 steps, all inside a warm-up of 500."""
    steps = max(1, images // batch)
    epochs = choose_schedule(images, batch).epochs
    assert epochs * steps >= LEAST_STEPS
    assert epochs == 12 or (epochs - 1) * steps < LEAST_STEPS


def test_many_images_are_seen_twelve_times() -> None:
    assert choose_schedule(20_000, 4).epochs == 12


def test_trained_weights_get_a_lower_rate() -> None:
    fresh, trained = choose_schedule(100, 4), choose_schedule(100, 4, trained=True)
    assert trained.rate < fresh.rate
    assert trained.epochs == fresh.epochs


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (12, 1), (24, 2), (143, 12)])
def test_about_twelve_evaluations_of_a_given_length(epochs: int, every: int) -> None:
    choice = choose_schedule(60, 8, epochs=epochs)
    assert (choice.epochs, choice.evaluate_every) == (epochs, every)
