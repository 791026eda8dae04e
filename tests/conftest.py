"""Fixtures of all tests: the implementations, and torch's global state, which every test restores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # With one process per core, more threads would only compete for cores. Set it before torch reads it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.implementations import IMPLEMENTATIONS, Implementation, must_exist


# Without a GPU a third of the tests would only be skipped.
@pytest.fixture(params=[row.name for row in IMPLEMENTATIONS.values() if row.device == "cpu" or not row.missing()])
def impl(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """Run the test once for each implementation."""
    with use(request.param) as row:
        yield row


@pytest.fixture(params=["cpp", "chunked"])
def cpu_impl(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """Run the test once for each CPU implementation, for properties that only these have."""
    with use(request.param) as row:
        yield row


class use:
    """Make one implementation serve its device; skip if it is missing, or fail if CI requires it."""

    def __init__(self, name: str) -> None:
        self.row = IMPLEMENTATIONS[name]

    def __enter__(self) -> Implementation:
        reason = self.row.missing()
        if reason is not None and must_exist(self.row.name):
            pytest.fail(f"{self.row.name} is missing, and CI requires it: {reason}")
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


@pytest.fixture
def one_thread() -> None:
    """Use one thread. In many small steps, idle threads spin and cost minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register a tiny model in open_clip and return its name: one narrow layer per tower, 32 x 32 pixels, 16 words.

    Also register two variants that drl_fast does not serve: ``<name>-unpooled`` and ``<name>-wide``.
    """
    open_clip = pytest.importorskip("open_clip")
    name = "drl-fast-tiny"
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    relatives = {
        name: config,
        f"{name}-unpooled": {**config, "custom_text": True, "text_cfg": {**text, "pool_type": "none"}},
        f"{name}-wide": {**config, "vision_cfg": {**vision, "image_size": [32, 48]}},
    }
    folder = tmp_path_factory.mktemp("open_clip_configs")
    for key, value in relatives.items():
        (folder / f"{key}.json").write_text(json.dumps(value))
    open_clip.add_model_config(folder)
    return name


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set the hub offline with an empty cache, so that downloads fail without retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
