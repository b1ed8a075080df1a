"""circuit-tracer's graph of a prompt, for an interpreter that has it: MODEL SET OUT.npz ID,ID,...

With ``time MODEL SET ID,ID,... ROWS DEVICE`` it prints the median seconds of a graph of ROWS features on a device.

It knows models by TransformerLens' names; here any folder is one. What newer transformers write is copied to where
older ones look for it.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from transformer_lens import loading_from_pretrained, utils
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PLAIN = dict(dtype=torch.float32, lazy_encoder=False, lazy_decoder=False)


def model_of(folder: Path, transcoders, device: str = "cpu", end: str = "<end>") -> TransformerLensReplacementModel:
    """The model with its MLPs replaced."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.setdefault("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    config.setdefault("n_ctx", config.get("n_positions"))  # of GPT-2
    file.write_text(json.dumps(config))
    loading_from_pretrained.get_official_model_name = lambda name: name
    utils.get_tokenizer_with_bos = lambda tokenizer: tokenizer  # prompts are token ids here
    return TransformerLensReplacementModel.from_pretrained_and_transcoders(
        str(folder),
        transcoders,
        hf_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=end),
        device=device,
        dtype=torch.float32,
    )


def set_of(folder: Path, device: str = "cpu"):
    """A transcoder for each layer, or a cross-layer one."""
    described = yaml.safe_load((folder / "config.yaml").read_text())
    hooks = {name: described[name] for name in ("feature_input_hook", "feature_output_hook")}
    if described["model_kind"] == "cross_layer_transcoder":
        return load_clt(str(folder), **hooks, **PLAIN, device=torch.device(device))
    files = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(len(list(folder.glob("layer_*"))))}
    return load_transcoder_set(files, "made", **hooks, **PLAIN, device=torch.device(device))


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


def measure(model: str, transcoders: str, ids: str, rows: str, device: str) -> None:
    """Print the median seconds of a graph, of which the first does not count."""
    replaced = model_of(Path(model), set_of(Path(transcoders), device), device, "<|im_end|>")
    ids_P, seconds = torch.tensor([int(token) for token in ids.split(",")]), []
    for _ in range(4):
        start = time.perf_counter()
        settings = dict(max_n_logits=3, desired_logit_prob=1.0, batch_size=256, max_feature_nodes=int(rows))
        attribute(ids_P, replaced, **settings)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(dict(seconds=float(np.median(seconds[1:])))))


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1] == "time" else main(*sys.argv[1:])
