"""The families of models the decoder can run: how each writes its configuration and names its weights.

A family is one entry of ``FAMILIES``, under the ``model_type`` of its ``config.json``. Its reader takes every field
that changes the result and refuses what it does not know; its weight table says where every parameter is found.
"""

from collections.abc import Mapping
from typing import Any

from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.families import gemma, gpt2, llama, neox
from saejax.models.families.table import Family, Modules, Weight
from saejax.models.fields import Fields

__all__ = ["FAMILIES", "Family", "Modules", "Weight", "check_family", "read_config"]

FAMILIES: dict[str, Family] = llama.FAMILIES | gemma.FAMILIES | gpt2.FAMILIES | neox.FAMILIES


def check_family(data: Mapping[str, Any], where: str) -> str:
    """The family of a parsed ``config.json``; a ``UserError`` if the decoder does not run it."""
    family = data.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{where}: models of the family {family!r} are not supported, expected one of {', '.join(FAMILIES)}: "
            "use another model"
        )
    return family


def read_config(data: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder's configuration from a parsed ``config.json``.

    Args:
      data: the parsed file.
      where: its name, for messages.

    Raises:
      UserError: the family is not supported, or a field is unknown, missing, contradictory or of an unsupported value.
    """
    family = FAMILIES[check_family(data, where)]
    if data.get("quantization_config"):
        raise UserError(f"{where}: the weights are quantised ('quantization_config'): use the unquantised model")
    fields = Fields({**family.defaults, **data}, where)
    for name in ("add_cross_attention", "is_encoder_decoder"):
        fields.expect(name, False)
    config = family.read_config(fields)
    fields.done()
    if config.n_heads % config.n_kv_heads:
        raise UserError(
            f"{where}: {config.n_heads} attention heads are not a multiple of {config.n_kv_heads} key-value heads"
        )
    return config
