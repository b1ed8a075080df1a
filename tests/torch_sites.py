"""The values at the sites of a transformers model of any family, read off its modules: what ours are compared with."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Modules:
    """Where a family computes what; paths start at a layer."""

    layers: str  #: path from the model to its layers
    #: attn_out and mlp_out: modules whose output is added to the stream.
    attn_out: str
    mlp: str  #: module that reads ``mlp_in``
    mlp_out: str
    #: module that reads ``resid_mid``; None: there is none, because attention and the MLP are added at once.
    mid: str | None
    down: str | None = "mlp.down_proj"  #: module that reads ``mlp_act``; None: there are several


LLAMA = Modules("model.layers", "self_attn", "mlp", "mlp", "post_attention_layernorm")
GEMMA2 = Modules(
    "model.layers", "post_attention_layernorm", "mlp", "post_feedforward_layernorm", "pre_feedforward_layernorm"
)
OLMO2 = Modules("model.layers", "post_attention_layernorm", "mlp", "post_feedforward_layernorm", "mlp")
NEOX = Modules("gpt_neox.layers", "attention", "mlp", "mlp", "post_attention_layernorm", "mlp.dense_4h_to_h")
MODULES = {
    "gpt2": Modules("transformer.h", "attn", "mlp", "mlp", "ln_2", "mlp.c_proj"),
    "gpt_neox": NEOX,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gemma3": dataclasses.replace(GEMMA2, layers="model.language_model.layers"),
    "phi": dataclasses.replace(LLAMA, mid=None, down="mlp.fc2"),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "gpt_oss": dataclasses.replace(LLAMA, down=None),
    "phi3": LLAMA,
    "smollm3": LLAMA,
    "gpt_neo": Modules("transformer.h", "attn", "mlp", "mlp", "ln_2", "mlp.c_proj"),
    "qwen3_moe": dataclasses.replace(LLAMA, down=None),
}


def run_torch(model, ids_BxT, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the values at all sites; those values that are tensors of torch's graph keep their gradients."""
    model.requires_grad_(False)
    where = MODULES[model.config.model_type]
    if getattr(model.config, "use_parallel_residual", False):
        where = dataclasses.replace(where, mid=None)
    values: dict[str, torch.Tensor] = {}
    handles = []

    def keep(name: str) -> Callable:
        def hook(module, args, kwargs, output=None):
            value = output if output is not None else args[0] if args else kwargs["hidden_states"]
            value = value[0] if isinstance(value, tuple) else value
            if not value.requires_grad:
                value.requires_grad_()
            value.retain_grad()
            values[name] = value

        return hook

    for index, layer in enumerate(model.get_submodule(where.layers)):
        reads = {"resid_pre": "", "mlp_in": where.mlp} | ({"resid_mid": where.mid} if where.mid else {})
        reads |= {"mlp_act": where.down} if where.down else {}
        gives = {"attn_out": where.attn_out, "mlp_out": where.mlp_out, "resid_post": ""}
        for kind, path in reads.items():
            module = layer.get_submodule(path)
            handles.append(module.register_forward_pre_hook(keep(f"{kind}.{index}"), with_kwargs=True))
        for kind, path in gives.items():
            module = layer.get_submodule(path)
            handles.append(module.register_forward_hook(keep(f"{kind}.{index}"), with_kwargs=True))
    logits = model(torch.as_tensor(ids_BxT, dtype=torch.long), **inputs).logits
    for handle in handles:
        handle.remove()
    for index in range(len(model.get_submodule(where.layers))):
        if where.mid is None:
            values[f"resid_mid.{index}"] = values[f"resid_pre.{index}"] + values[f"attn_out.{index}"]
    return logits, values


def relative_error(ours, theirs) -> float:
    """Return the largest difference over the largest number."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
