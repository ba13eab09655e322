"""Fixtures that tests share."""

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process a core: more threads would only wait for one another
_DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device there is."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: trained networks and pictures."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the trained networks and pictures are not there: no folder {folder}")
    return folder


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Layers that a test makes without a generator of its own are the same in every run."""
    torch.default_generator.manual_seed(0)
