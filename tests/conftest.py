"""Shared fixtures. Shape annotations and types of the whole package are checked while the tests run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests import checker

checker.install("mergekit_bert")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from mergekit_bert.data.task import Task, get_task  # noqa: E402
from mergekit_bert.encoder.load import Encoder, load_encoder  # noqa: E402
from tests.tiny import ARCHITECTURES, DISTINCT, write_tiny  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny random model of every architecture."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def encoders(tiny_folders: dict[str, Path]) -> dict[str, Encoder]:
    """The tiny encoders, loaded."""
    return {name: load_encoder(folder) for name, folder in tiny_folders.items()}


@pytest.fixture(scope="session")
def bert(encoders: dict[str, Encoder]) -> Encoder:
    """The tiny BERT."""
    return encoders["bert"]


@pytest.fixture(params=DISTINCT)
def encoder(request: pytest.FixtureRequest, encoders: dict[str, Encoder]) -> Encoder:
    """Every architecture in turn, but for those that run another one's code."""
    return encoders[request.param]


@pytest.fixture
def sst() -> Task:
    return get_task("sst")


@pytest.fixture
def sts() -> Task:
    return get_task("sts")


@pytest.fixture
def para() -> Task:
    return get_task("para")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text named by MBERT_DATA; tests that need it are skipped where there is none."""
    folder = os.environ.get("MBERT_DATA")
    if not folder:
        pytest.skip("MBERT_DATA does not name a folder of real text")
    return Path(folder)
