"""What a run reads before it trains: its corpora, its validation sets and the published model it begins with.

Opened and held against the settings and each other before any process group or device is touched; a sweep does so for all
of its points before the first one starts.
"""

from train.config import RunSettings
from train.data.manifest import CorpusManifest
from train.data.stream import open_corpora
from train.evaluation import open_sets
from train.hf.start import check_published
from train.schema.data import CorpusWeight


def open_inputs(settings: RunSettings) -> list[tuple[CorpusWeight, CorpusManifest]]:
    """Open everything that a run reads.

    Args:
        settings: checked settings.

    Returns:
        Its corpora, as `open_corpora` does. The run opens its validation sets and the published model again.

    Raises:
        CoppiceError: naming what is missing, too short, or does not belong together, with the remedy.
    """
    corpora = open_corpora(settings.data)
    open_sets(settings.evaluation, settings.data, corpora)
    check_published(settings, corpora)
    return corpora
