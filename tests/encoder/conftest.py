"""Here every architecture counts, also those that run another one's code."""

import pytest

from mergekit_bert.encoder.load import Encoder
from tests.tiny import ARCHITECTURES


@pytest.fixture(params=ARCHITECTURES)
def encoder(request: pytest.FixtureRequest, encoders: dict[str, Encoder]) -> Encoder:
    """Every architecture in turn."""
    return encoders[request.param]
