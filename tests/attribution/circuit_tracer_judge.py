"""circuit-tracer's graph of a prompt, for an interpreter that has it: MODEL SET OUT.npz ID,ID,...

It knows models by TransformerLens' names; here any folder is one. What newer transformers write is copied to where
older ones look for it.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from transformer_lens import loading_from_pretrained
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PLAIN = dict(device=torch.device("cpu"), dtype=torch.float32, lazy_encoder=False, lazy_decoder=False)


def model_of(folder: Path, transcoders) -> TransformerLensReplacementModel:
    """The model with its MLPs replaced."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    config.setdefault("n_ctx", config.get("n_positions"))  # of GPT-2
    file.write_text(json.dumps(config))
    loading_from_pretrained.get_official_model_name = lambda name: name
    return TransformerLensReplacementModel.from_pretrained_and_transcoders(
        str(folder),
        transcoders,
        hf_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<end>"),
        device="cpu",
        dtype=torch.float32,
    )


def set_of(folder: Path):
    """A transcoder for each layer, or a cross-layer one."""
    described = yaml.safe_load((folder / "config.yaml").read_text())
    hooks = {name: described[name] for name in ("feature_input_hook", "feature_output_hook")}
    if described["model_kind"] == "cross_layer_transcoder":
        return load_clt(str(folder), **hooks, **PLAIN)
    files = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(len(list(folder.glob("layer_*"))))}
    return load_transcoder_set(files, "made", **hooks, **PLAIN)


def main(model: str, transcoders: str, out: str, ids: str) -> None:
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(model, copy, dirs_exist_ok=True)
        replaced = model_of(Path(copy), set_of(Path(transcoders)))
        ids_P = torch.tensor([int(token) for token in ids.split(",")])
        graph = attribute(ids_P, replaced, max_n_logits=3, desired_logit_prob=1.0, batch_size=64)
    arrays = dict(
        ids=ids_P,
        active_features=graph.active_features,
        activation_values=graph.activation_values,
        logit_ids=graph.logit_token_ids,
        logit_p=graph.logit_probabilities,
        adjacency=graph.adjacency_matrix,
    )
    np.savez(out, **{name: array.detach().cpu().numpy() for name, array in arrays.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
