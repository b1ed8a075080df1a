"""The families of models the decoder can run: how each writes its configuration and names its weights.

A family is one entry of ``FAMILIES``, under the ``model_type`` of its ``config.json``. Its reader takes every field
that changes the result; its weight table names the tensor of every parameter.
"""

from collections.abc import Mapping
from typing import Any

from saejax.errors import UserError
from saejax.models.config import DecoderConfig
from saejax.models.families import gemma, gpt2, gpt_neo, gpt_oss, llama, neox, olmo2, phi3, qwen3_moe, smollm3
from saejax.models.families.table import Family, Weight
from saejax.models.fields import Fields

__all__ = ["FAMILIES", "Family", "Weight", "check_family", "has_family", "read_config", "unread_fields"]

_MODULES = (llama, gemma, gpt2, neox, gpt_neo, olmo2, phi3, smollm3, qwen3_moe, gpt_oss)
FAMILIES: dict[str, Family] = {name: family for module in _MODULES for name, family in module.FAMILIES.items()}


def has_family(data: Mapping[str, Any]) -> bool:
    """Return whether the decoder runs models with this ``config.json``."""
    return str(data.get("model_type")) in FAMILIES


def check_family(data: Mapping[str, Any], where: str) -> str:
    """Return the family of a parsed ``config.json``; a ``UserError`` if the decoder does not run it."""
    family = data.get("model_type")
    if not has_family(data):
        raise UserError(
            f"{where}: the JAX decoder does not have the family {family!r}, which preflight, attribution and "
            f"--model.backend=jax need; expected one of {', '.join(FAMILIES)}: use another model"
        )
    return str(family)


def read_config(data: Mapping[str, Any], where: str) -> DecoderConfig:
    """Return the decoder's configuration from a parsed ``config.json``.

    Args:
      data: the parsed file.
      where: its name, for messages.

    Raises:
      UserError: the family is not supported, or a field is missing, contradictory or of an unsupported value.
    """
    return _read(data, where)[0]


def unread_fields(data: Mapping[str, Any], where: str) -> list[str]:
    """Return the names of fields of a ``config.json`` that nothing reads and that are not known to be without effect.

    Args:
      data: the parsed file, of a supported family.
      where: its name, for messages.
    """
    return _read(data, where)[1].unread()


def _read(data: Mapping[str, Any], where: str) -> tuple[DecoderConfig, Fields]:
    """Return the configuration, and the fields with a record of what was read."""
    family = FAMILIES[check_family(data, where)]
    if data.get("quantization_config"):
        raise UserError(f"{where}: the weights are quantised ('quantization_config'): use the unquantised model")
    fields = Fields(data, where, defaults=family.defaults)
    for name, value in _UNSUPPORTED.items():
        fields.expect(name, value)
    config = family.read_config(fields)
    if config.n_heads % config.n_kv_heads:
        raise UserError(
            f"{where}: {config.n_heads} attention heads are not a multiple of {config.n_kv_heads} key-value heads"
        )
    if config.experts_per_token > config.n_experts:
        raise fields.contradiction(
            f"'num_experts_per_tok' ({config.experts_per_token})", f"the number of experts ({config.n_experts})"
        )
    return config, fields


# Fields of every family, with the one value that the decoder supports.
_UNSUPPORTED: dict[str, Any] = dict(
    add_cross_attention=False, is_encoder_decoder=False, pruned_heads={}, per_layer_config={}, transformers_weights=""
)
