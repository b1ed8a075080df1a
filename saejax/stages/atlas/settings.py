"""Settings of the pages that describe features."""

import dataclasses

from saejax.config import Config, setting


@dataclasses.dataclass(frozen=True)
class AtlasConfig(Config):
    """Pages that describe features."""

    labels: str = setting(
        "",
        "a .csv file with labels of your own: columns feature, label, note, reviewer, and where there are several "
        "dictionaries dictionary (such as topk/k32); or a folder of such files, such as a filled copy of the atlas's "
        "review/; they replace automatic labels. Explanations of a published dictionary as Neuronpedia exports them "
        "(.jsonl or .jsonl.gz) are shown, too",
        changes_results=False,  # what is in it counts, not its place
    )
