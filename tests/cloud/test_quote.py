"""Prices times hours."""

import pytest

from lorasmith.cloud.quote import (
    SECONDS_AROUND,
    Offer,
    budget_seconds,
    cheapest,
    name_in_catalog,
    name_in_table,
)
from lorasmith.model.gpus import find_gpu

HOUR = 3600.0


def offer(hourly, gpu="L4", cloud="aws", region="us-east-1", num_gpus=1):
    return Offer(cloud, region, gpu, num_gpus, hourly, spot=False)


def test_the_whole_run_counts_and_not_the_hour():
    slow, fast = offer(0.8), offer(2.9, "H100")
    seconds = {"L4:1": (4 * HOUR, 5 * HOUR), "H100:1": (0.5 * HOUR, 0.75 * HOUR)}
    first, second = cheapest([slow, fast], seconds, nodes=1)
    assert (first.offer, second.offer) == (fast, slow)
    around = SECONDS_AROUND / HOUR
    assert first.cost == pytest.approx((2.9 * (0.5 + around), 2.9 * (0.75 + around)))
    assert second.cost == pytest.approx((0.8 * (4 + around), 0.8 * (5 + around)))


def test_three_are_kept_and_what_does_not_fit_is_left_out():
    offers = [offer(price, region=f"r{price}") for price in (5, 1, 4, 2, 3)]
    offers.append(offer(0.1, gpu="T4"))
    quotes = cheapest(offers, {"L4:1": (HOUR, HOUR)}, nodes=1)
    assert [quote.hourly for quote in quotes] == [1, 2, 3]


def test_every_machine_is_paid():
    (quote,) = cheapest([offer(4.0, num_gpus=8)], {"L4:8": (HOUR, HOUR)}, nodes=2)
    assert quote.hourly == 8
    assert budget_seconds(16, [quote]) == 2 * HOUR


def test_machines_of_ones_own_cost_nothing_and_the_faster_comes_first():
    offers = [
        offer(0, cloud="kubernetes", region="team"),
        offer(0, "H100", cloud="kubernetes", region="team"),
    ]
    quotes = cheapest(offers, {"L4:1": (HOUR, HOUR), "H100:1": (60.0, 60.0)}, nodes=1)
    assert [quote.offer.gpu for quote in quotes] == ["H100", "L4"]
    assert quotes[0].offer.infra == "kubernetes/team"
    assert budget_seconds(5, quotes) is None


def test_the_budget_is_counted_at_the_dearest_price():
    quotes = cheapest([offer(1.0), offer(2.0, region="eu")], {"L4:1": (HOUR, HOUR)}, nodes=1)
    assert budget_seconds(5, quotes) == 2.5 * HOUR


@pytest.mark.parametrize(("said", "found"), [("A100", "A100-40GB"), ("a100", "A100-40GB"), ("L4:2", "L4")])
def test_gpus_are_named_as_in_the_catalog(said, found):
    kind, _ = find_gpu(name_in_table(said))
    assert kind.name == found
    assert name_in_catalog(kind.name) == said.upper().partition(":")[0]
