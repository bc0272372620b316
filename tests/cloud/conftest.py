"""What the cloud's tests share: quotes, and a machine that is rented in a folder."""

import pytest

from lorasmith.cloud.quote import Offer, Quote
from lorasmith.cloud.task import Bucket, Launch


@pytest.fixture
def make_launch():
    def make(**changes):
        return Launch(
            **{"name": "faq", "bucket": Bucket("s3", "team"), "nodes": 1, "needs_built_in": False} | changes
        )

    return make


@pytest.fixture
def make_quote():
    def make(nodes=1, seconds=(1800.0, 3600.0), **changes):
        offer = {
            "cloud": "aws",
            "region": "us-east-1",
            "gpu": "L4",
            "num_gpus": 1,
            "hourly": 0.8,
            "spot": False,
        }
        return Quote(Offer(**offer | changes), nodes, seconds)

    return make
