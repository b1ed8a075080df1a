"""The SAEs of a gradient graph: one at each of some layers, in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saejax.attribution.local.dictionaries import LayerDictionaries, check_dictionary
from saejax.dictionaries import Dictionary
from saejax.dictionaries.formats import load_all
from saejax.errors import UserError
from saejax.models.language_model import LanguageModel
from saejax.models.sites import Site


class LayerSaes(LayerDictionaries):
    """SAEs of a model's sites; ``load`` and ``rows`` take the number of the layer.

    Args:
      saes: where each comes from, and the SAE.

    Attributes:
      sites: of the SAEs, in the order of layers.

    Raises:
      UserError: there are none, one is a transcoder, or two are of one layer.
    """

    def __init__(self, saes: Sequence[tuple[str, Dictionary]]):
        if not saes:
            raise UserError("there is no SAE to trace a graph with: name one at least")
        by_layer: dict[int, tuple[str, Dictionary]] = {}
        for name, sae in saes:
            if sae.config.target:
                raise UserError(
                    f"{name} is a transcoder, from {sae.site} to {sae.config.target}: expected SAEs; transcoders "
                    "are named with --graph.transcoders, of all layers"
                )
            other, _ = by_layer.setdefault(Site.parse(sae.site).layer, (name, sae))
            if by_layer[Site.parse(sae.site).layer][1] is not sae:
                raise UserError(f"{other} and {name} are SAEs of one layer ({sae.site}): expected one of each layer")
        kept = [by_layer[layer] for layer in sorted(by_layer)]
        self.sites = tuple(Site.parse(sae.site) for _, sae in kept)
        name = ",".join(dict.fromkeys(name for name, _ in kept))
        super().__init__(name, [sae.config for _, sae in kept], lambda layer: by_layer[layer][1])

    @classmethod
    def of(cls, saes: "LayerSaes | Dictionary | str | Path | Sequence[Dictionary | str | Path]") -> "LayerSaes":
        """Return a set of SAEs from memory or folders; a folder of several SAEs, such as a stack, stands for all."""
        if isinstance(saes, LayerSaes):
            return saes
        named_saes: list[tuple[str, Dictionary]] = []
        for each in [saes] if isinstance(saes, Dictionary | str | Path) else saes:
            named_saes += [("a dictionary in memory", each)] if isinstance(each, Dictionary) else load_all(each).items()
        return cls(named_saes)

    def check(self, model: LanguageModel) -> "LayerSaes":
        """Return the set, if it belongs to a model.

        Raises:
          UserError: a site does not exist there, or an SAE has another width or was trained on another model.
        """
        for site, config in zip(self.sites, self.configs, strict=True):
            site.check(model.config)
            check_dictionary(config, model, f"{self.name}: the SAE of {site}")
        self.resolve_sinks(model)
        return self

    def describe(self) -> dict[str, Any]:
        """Return what a graph says of the set."""
        first = self.configs[0]
        return dict(
            name=self.name, revision=self.revision, sites=list(map(str, self.sites)), layers=len(self.sites),
            kind=first.kind, n_features=first.n_features, skip=False, model=first.model,
        )  # fmt: skip
