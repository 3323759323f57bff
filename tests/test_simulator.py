"""Virtual time: hand-counted schedules, laws of queues, and the rules' ages."""

import math
import statistics

import pytest

from autodropout.search.core import Search
from autodropout.search.random_search import RandomSearcher
from autodropout.search.simulator import DriverTime
from autodropout.search.simulator import simulate
from autodropout.search.simulator import trial_seconds
from autodropout.search.testing import contract_spaces

SPACE = contract_spaces()[1]


def search(batch_size=1):
    searcher = RandomSearcher(SPACE, 0)
    searcher.batch_size = batch_size
    return Search(searcher)


def run(batch_size=1, **arguments):
    return simulate(search(batch_size), lambda trial: 0.5, **arguments)


def test_a_schedule_by_hand():
    """Two workers, trainings of 10 s, driver 1 s to ask, 2 s to tell, 4 s for each update, an update every two.

    Worker A trains 1-11, worker B 2-12. The driver takes A's result in at 11-13 and asks at 13-14: A trains 14-24.
    B's result waits until 14, is taken in at 14-16, the update lasts to 20, the ask to 21: B trains 21-31. A's second
    result is taken in at 24-26, when all four trials are asked: the end.
    """
    times = DriverTime(ask=1, tell=2, update=4)
    result = run(2, workers=2, trials=4, mean_seconds=10, spread=1, driver=times)
    assert result.seconds == 26
    assert result.busy == pytest.approx((10 + 10 + 10 + 5) / (2 * 26), abs=1e-15)
    assert result.trials_per_hour == pytest.approx(3 * 3600 / 26, abs=1e-9)
    assert result.ages == (0, 0)
    assert times.per_trial(2) == 5


def test_a_synchronous_schedule_by_hand():
    """As above. A trains 1-11, B 2-12; results 11-13 and 13-15, update 15-19; the next generation as long again."""
    times = DriverTime(ask=1, tell=2, update=4)
    result = run(2, workers=2, trials=4, mean_seconds=10, spread=1, driver=times, synchronous=True)
    assert result.seconds == 38
    assert result.busy == pytest.approx(40 / (2 * 38), abs=1e-15)
    assert result.ages == (0, 0, 0, 0)


def test_trial_times():
    """Between mean*ln(10)/9 and ten times that; mean within 5 standard errors; logarithm uniform."""
    seconds = [trial_seconds(number, 600, 10, 3) for number in range(4000)]
    shortest = 600 * math.log(10) / 9
    assert shortest <= min(seconds)
    assert max(seconds) <= 10 * shortest
    variance = shortest**2 * 99 / (2 * math.log(10)) - 600**2
    assert abs(statistics.mean(seconds) - 600) < 5 * math.sqrt(variance / 4000)
    tenths = [math.log10(second / shortest) for second in seconds]
    assert abs(statistics.mean(tenths) - 0.5) < 5 / math.sqrt(12 * 4000)
    assert seconds[:3] == [trial_seconds(number, 600, 10, 3) for number in range(3)]
    assert seconds[0] != trial_seconds(0, 600, 10, 4)


def test_without_a_driver_nobody_waits():
    assert run(workers=32, trials=320, mean_seconds=600).busy == pytest.approx(1, abs=1e-12)


def test_synchronous_workers_wait_for_the_slowest():
    """Without a driver: the mean over the longest of each generation."""
    workers, generations = 16, 12
    result = run(workers=workers, trials=workers * generations, mean_seconds=60, synchronous=True, seed=2)
    seconds = [trial_seconds(number, 60, 10, 2) for number in range(workers * generations)]
    longest = [max(seconds[g * workers : (g + 1) * workers]) for g in range(generations)]
    assert result.seconds == pytest.approx(sum(longest), rel=1e-12)
    assert result.busy == pytest.approx(sum(seconds) / (workers * sum(longest)), rel=1e-12)


def test_an_overloaded_driver_sets_the_pace():
    """64 workers could send 6.4 results a second, the driver takes 1: throughput 1 a second, workers busy 1/6.4."""
    result = run(workers=64, trials=4000, mean_seconds=10, driver=DriverTime(ask=0.5, tell=0.5))
    assert result.trials_per_hour == pytest.approx(3600, rel=0.02)  # the beginning: 64 asks without a tell
    assert result.busy == pytest.approx(1 / 6.4, rel=0.02)


def test_ages():
    """Equal times, a sample each update: between proposal and result lie those of all other workers."""
    result = run(workers=8, trials=80, mean_seconds=60, spread=1)
    assert result.ages[:8] == tuple(range(8))
    assert set(result.ages[8:]) == {7}
    # A generation is proposed by one state; with a batch of a generation all are fresh, with less they age in it.
    assert set(run(8, workers=8, trials=80, mean_seconds=60, synchronous=True).ages) == {0}
    assert set(run(4, workers=8, trials=80, mean_seconds=60, synchronous=True).ages) == {0, 1}


def test_deterministic():
    arguments = {"workers": 50, "trials": 500, "mean_seconds": 600, "driver": DriverTime(0.01, 0.01, 0.1)}
    assert run(16, **arguments) == run(16, **arguments)
    assert run(16, **arguments) != run(16, **arguments, seed=1)


def test_what_is_told_is_what_was_asked():
    asked = []
    core = search()
    simulate(core, lambda trial: asked.append(trial) or float(trial.number), workers=5, trials=40, mean_seconds=60)
    assert len(asked) == core.updates == 36
    assert core.asked == 40
    assert sorted([trial.number for trial in asked] + list(core.unfinished)) == list(range(40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"trials": 3}, "trials must be at least 4"),
        ({"trials": 10, "synchronous": True}, "trials must be a multiple of 4"),
        ({"mean_seconds": 0.0}, "mean_seconds must be in"),
        ({"spread": 0.5}, "spread must be in"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**{"workers": 4, "trials": 8, "mean_seconds": 1.0, **arguments})


def test_refuses_a_search_that_has_begun_and_negative_times():
    core = search()
    core.ask()
    with pytest.raises(ValueError, match="search must be fresh"):
        simulate(core, lambda trial: 0.5, workers=1, trials=1, mean_seconds=1.0)
    with pytest.raises(ValueError, match="tell must be in"):
        DriverTime(tell=-1.0)


def test_512_workers_stay_busy():
    """The published case: a mean training of ten minutes, 60 ms of driver a trial (the bound of bench/search_scale.py).

    The synchronous rule keeps them at the mean over the longest: ln(10) * 10 / 9 times less, but for one generation's
    longest being a little below the bound.
    """
    times = DriverTime(ask=0.02, tell=0.02, update=16 * 0.02)
    result = run(16, workers=512, trials=4096, mean_seconds=600, driver=times)
    assert result.busy >= 0.97
    bound = 9 / (10 * math.log(10))
    synchronous = run(16, workers=512, trials=4096, mean_seconds=600, driver=times, synchronous=True)
    assert synchronous.busy == pytest.approx(bound, rel=0.05)
