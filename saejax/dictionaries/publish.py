"""Publication on the Hugging Face hub: folders in SAELens' layout, and a model card that says how to load them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from saejax.arguments import check_classes
from saejax.dictionaries.description import DictionaryConfig
from saejax.dictionaries.formats import saelens
from saejax.dictionaries.modules import Dictionary
from saejax.models.hub import push_folder, require_token

CARD = "README.md"

Figures = Mapping[str, float | None]  #: by name, such as "explained variance"; None: not known


@check_classes
def push(dictionary: Dictionary, name: str, *, figures: Figures | None = None, private: bool = False) -> str:
    """Publish a dictionary on the Hugging Face hub, in SAELens' layout with a model card.

    All files come in one commit, in a folder with the name of the site. Other folders of the repository stay; its card
    becomes that of this dictionary.

    Args:
      dictionary: the dictionary; no crosscoder.
      name: the repository, "org/name", which is made if there is none.
      figures: what the card says of the dictionary, such as {"explained variance": 0.85, "L0": 32.0}.
      private: whether a new repository can be seen by its owners alone.

    Returns:
      The address of the commit.

    Raises:
      UserError: there is no token, the hub refuses or cannot be reached, or SAELens has nothing like this dictionary.
    """
    require_token()
    folder = dictionary.site
    with tempfile.TemporaryDirectory(prefix="saejax-push-") as temporary:
        saelens.save(Path(temporary) / folder, dictionary)
        write_card(Path(temporary), name, {folder: dictionary.config}, {folder: figures or {}})
        return push_folder(Path(temporary), name, f"Dictionary of {dictionary.site}", private)


def write_card(root: Path, name: str, configs: Mapping[str, DictionaryConfig], figures: Mapping[str, Figures]) -> None:
    """Write the model card of a repository.

    Args:
      root: the folder whose folders hold the dictionaries.
      name: the repository, "org/name".
      configs: the dictionaries by their folders, at least one.
      figures: what is known of each, by its folder.
    """
    first, config = next(iter(configs.items()))
    measured = list(dict.fromkeys(measure for of_folder in figures.values() for measure in of_folder))
    rows = [["folder", "kind", "reads", "predicts", "features", *measured], ["---"] * (5 + len(measured))]
    for folder, described in configs.items():
        values = [figures.get(folder, {}).get(measure) for measure in measured]
        shown = ["" if value is None else f"{value:.4g}" for value in values]
        k = f" (k {described.k})" if described.k else ""
        target = described.target or described.site
        rows.append([folder, described.kind + k, described.site, target, f"{described.n_features:,}", *shown])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    base = f"base_model: {config.model}\n" if config.model.count("/") == 1 and config.model[0] not in "./~" else ""
    of_model = f" of `{config.model}`" if config.model else ""
    revision = f", revision `{config.revision}`" if config.revision else ""
    text = f"""---
library_name: saelens
tags:
- sparse-autoencoder
- mechanistic-interpretability
{base}---

# {name}

Sparse dictionaries of the activations{of_model}{revision}, made with saejax. Activations are those of the model as it
is published. Figures are of held-out text.

{table}

In [SAELens](https://github.com/decoderesearch/SAELens):

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{name}", "{first}")
```

In saejax:

```python
import saejax

dictionary = saejax.load_dictionary("hf://{name}/{first}")
```
"""
    (root / CARD).write_text(text, "utf-8")
