"""What every test shares: the implementations as a fixture, and a torch that is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.implementations import IMPLEMENTATIONS, Implementation, must_exist


@pytest.fixture(params=list(IMPLEMENTATIONS))
def impl(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """Run the test once for each implementation."""
    with use(request.param) as row:
        yield row


@pytest.fixture(params=["cpp", "chunked"])
def cpu_impl(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """For what is promised, or can be measured, on the CPU alone."""
    with use(request.param) as row:
        yield row


class use:
    """Put one implementation in charge of its device; skip where it is absent, fail where it must not be."""

    def __init__(self, name: str) -> None:
        self.row = IMPLEMENTATIONS[name]

    def __enter__(self) -> Implementation:
        reason = self.row.missing()
        if reason is not None and must_exist(self.row.name):
            pytest.fail(f"{self.row.name} is missing where CI is set: {reason}")
        if reason is not None:
            pytest.skip(reason)
        self.scope = self.row.install()
        self.scope.__enter__()
        return self.row

    def __exit__(self, *error: object) -> None:
        self.scope.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def _leave_torch_alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
