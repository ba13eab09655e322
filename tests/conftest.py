"""Fixtures that tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.zoo import build

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process a core: more threads would only wait for one another
_DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a run of the suite may be asked for beside tests."""
    parser.addoption("--rewrite-tables", action="store_true", help="tests that hold a table to their findings write it")


def pytest_configure(config: pytest.Config) -> None:
    """Rows are written one after the other."""
    if config.getoption("--rewrite-tables", default=False) and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            "--rewrite-tables asked for in several processes, which would write over one another; add -n0"
        )


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


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with `model.pt` and labelled pictures `val.npz`, made the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.save(build("residual").state_dict(), "model.pt")
    rng = np.random.default_rng(0)
    np.savez("val.npz", x=rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8), y=rng.integers(0, 10, 20))
    return tmp_path


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Layers that a test makes without a generator of its own are the same in every run."""
    torch.default_generator.manual_seed(0)
