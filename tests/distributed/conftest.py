"""Two processes for the whole session: importing torch takes longer than any of these tests."""

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def ranks():
    pool = Pool()
    yield pool
    pool.stop()
