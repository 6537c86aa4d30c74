"""What the tests of stores share."""

from collections.abc import Iterator

import pytest

from tests.helpers.faulty_proxy import FaultyProxy, faulty_proxy
from tests.helpers.seaweedfs import S3Server


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """Between a client and the server, with the faults that it is given."""
    with faulty_proxy(s3_server.ports["s3.port"]) as running:
        yield running
