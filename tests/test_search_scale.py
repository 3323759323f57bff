"""The measurement of a search's scale, on a search of few trials: that it measures what it says."""

import pytest
import search_scale
from search_scale import Scale
from search_scale import busy
from search_scale import measure
from search_scale import shortest_training
from search_scale import table

from autodropout.search.simulator import DriverTime


def test_measures_a_search_and_its_resuming(tmp_path):
    scale = measure(tmp_path, 20)
    assert (scale.trials, scale.tokens) == (20, 200)
    assert 0 < scale.propose + scale.update + scale.disk < scale.driver
    assert scale.journal == (tmp_path / "run" / "journal.jsonl").stat().st_size
    assert scale.disk > 0
    assert scale.resume > 0


def test_time_is_charged_whole():
    scale = Scale(160, 200, 16, 1.6, 0.8, 0.4, 4.0, 5.0, 1000, 1.0, 1.0, 0.5)
    driver = scale.driver_time()
    assert driver.per_trial(16) == pytest.approx(4.0 / 160)
    assert driver.update == pytest.approx(0.08)
    assert driver.ask - driver.tell == pytest.approx(0.01)


def test_shortest_training(monkeypatch):
    """A driver of 100 ms a trial feeds 16 workers of 1.6 s: below that they wait in a queue."""
    monkeypatch.setattr(search_scale, "WORKERS", 16)
    driver = DriverTime(0.05, 0.05)
    seconds = shortest_training(driver, 16)
    assert seconds > 1.6
    assert busy(driver, 16, seconds).busy >= 0.97 > busy(driver, 16, seconds / 1.05).busy


def test_table_fits_the_page(monkeypatch):
    monkeypatch.setattr(search_scale, "WORKERS", 16)
    lines = table(Scale(160, 200, 16, 1.6, 0.8, 0.4, 4.0, 5.0, 1000, 1.0, 1.0, 0.5))
    assert max(map(len, lines)) <= 80
    assert "25.00 ms a trial   below 60" in lines[5]
