"""What a run would cost: hours from ``lorasmith estimate``, prices from SkyPilot's catalog, multiplied and sorted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SECONDS_AROUND = 600  # assumed, for each start of a machine: booting, installing, uploading the result

# SkyPilot's name of a GPU, where it is not that of model/gpus.py.
_IN_CATALOG = {
    "V100-16GB": "V100",
    "A100-40GB": "A100",
    "RTX-A6000": "RTXA6000",
    "RTX-6000-Ada": "RTX6000-Ada",
}
_IN_TABLE = {catalog: table for table, catalog in _IN_CATALOG.items()}


def name_in_catalog(gpu: str) -> str:
    """Return SkyPilot's name of a GPU of model/gpus.py."""
    return _IN_CATALOG.get(gpu, gpu)


def name_in_table(words: str) -> str:
    """Return ``NAME[:N]`` as model/gpus.py names it: SkyPilot's A100 is our A100-40GB."""
    name, colon, number = words.partition(":")
    return _IN_TABLE.get(name.upper(), name) + colon + number


@dataclass(frozen=True, slots=True)
class Offer:
    """A kind of machine that can be rented in one place."""

    cloud: str
    region: str
    gpu: str  # as SkyPilot names it
    num_gpus: int  # in one machine
    hourly: float  # US dollars for one machine, from SkyPilot's catalog; 0 on Kubernetes
    spot: bool

    @property
    def infra(self) -> str:
        """The place as SkyPilot writes it: aws/us-east-1, k8s/my-context."""
        return f"{self.cloud}/{self.region}"

    @property
    def machine(self) -> str:
        return f"{self.gpu}:{self.num_gpus}"


@dataclass(frozen=True, slots=True)
class Quote:
    """What the run would take on an offer: ``seconds`` of training, at least and at most."""

    offer: Offer
    nodes: int
    seconds: tuple[float, float]

    @property
    def hourly(self) -> float:
        """US dollars an hour for all machines."""
        return self.offer.hourly * self.nodes

    @property
    def cost(self) -> tuple[float, float]:
        """US dollars for the whole run, started once."""
        least, most = (self.hourly * (seconds + SECONDS_AROUND) / 3600 for seconds in self.seconds)
        return least, most


def cheapest(
    offers: Iterable[Offer], seconds: Mapping[str, tuple[float, float]], nodes: int, limit: int = 3
) -> list[Quote]:
    """Return the ``limit`` offers that do the run for the least money; ``seconds`` are of a machine such as L4:1.

    Where two cost the same (on Kubernetes all cost nothing), the faster comes first.
    """
    quotes = [Quote(offer, nodes, seconds[offer.machine]) for offer in offers if offer.machine in seconds]
    return sorted(quotes, key=lambda quote: (quote.cost[1], quote.seconds[1], quote.offer.infra))[:limit]


def budget_seconds(max_cost: float, quotes: Iterable[Quote]) -> float | None:
    """Return how long the dearest of the quoted machines may be rented for ``max_cost``; None if they are free."""
    hourly = max(quote.hourly for quote in quotes)
    return 3600 * max_cost / hourly if hourly else None
