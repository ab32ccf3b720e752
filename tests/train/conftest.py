"""What tests of published models share: transformers is imported once for all of them, in a process of its own."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.model.published import make


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random model of every case; `published.CASES` has their names."""
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="session")
def noise(published: Path) -> dict[str, float]:
    """The models on disk; case -> what rounding does to its logits."""
    return run_distributed(make, 1, str(published), init=False)[0]
