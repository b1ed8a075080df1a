"""What sae-lens itself makes of folders; run in an environment that has it, which need not have saejax.

python saelens_judge.py make DIR      DIR/theirs/<name>: folders that it saves, of every architecture and trainer
python saelens_judge.py read DIR      DIR/read/<name>.npz: what it computes with every folder in DIR/ours,
                                      DIR/theirs and DIR/returned on the rows of DIR/x.npy; each is saved again
                                      to DIR/resaved/<name>
python saelens_judge.py temporal DIR  DIR/<name>.npz: what it computes with the temporal SAEs DIR/temporal/<name> on the
                                      texts of DIR/texts.npy
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "transcoder", "jumprelu_transcoder", "skip_transcoder")
ARCHITECTURES += ("jumprelu_skip_transcoder",)
TRAINED = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random parameters; decoder rows are of any length, thresholds above 0."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_((values.abs() if name == "threshold" else values).to(parameter.dtype))


def settings(name: str, d: int, features: int, dtype: str, **more) -> dict:
    facts = dict(model_name="gpt2", hook_name="blocks.1.hook_resid_pre", context_size=64, prepend_bos=True)
    values = dict(d_in=d, d_sae=features, dtype=dtype, device="cpu")
    if name.endswith("transcoder"):
        facts |= dict(hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out")
        values |= dict(d_out=d, apply_b_dec_to_input=False)
    if name.endswith("topk"):
        values |= dict(k=8)
    if name.startswith("matryoshka"):
        values |= dict(matryoshka_widths=[features // 4, features])
    return values | dict(metadata=SAEMetadata(**facts)) | more


def make(folder: Path) -> None:
    """Saves folders of every architecture, some in bfloat16, and what its trainers save at the end."""
    d, features = np.load(folder / "x.npy").shape[1], int((folder / "features").read_text())
    generator = torch.Generator().manual_seed(0)
    variants = [(name, "float32", {}) for name in ARCHITECTURES]
    variants += [(name, "bfloat16", {}) for name in ("standard", "jumprelu_skip_transcoder")]
    variants += [("standard", "float32", dict(apply_b_dec_to_input=False))]
    variants += [("topk", "float32", dict(rescale_acts_by_decoder_norm=True))]
    variants += [(name, "float32", dict(d_out=d + 7)) for name in ("transcoder", "jumprelu_skip_transcoder")]
    for name, dtype, more in variants:
        sae_class, config_class = get_sae_class(name)
        sae = sae_class(config_class(**settings(name, d, features, dtype, **more)))
        randomise(sae, generator)
        sae.save_model(folder / "theirs" / "-".join([name, dtype, *more]))
    for name in TRAINED:
        sae_class, config_class = get_sae_training_class(name)
        sae = sae_class(config_class(**settings(name, d, features, "float32")))
        randomise(sae, generator)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold += 0.4
        sae.save_inference_model(folder / "theirs" / f"trained-{name}")


def read(folder: Path) -> None:
    """Encodes and decodes with every folder, in float32."""
    x = torch.from_numpy(np.load(folder / "x.npy"))
    (folder / "read").mkdir()
    for path in sorted(path for source in ("ours", "theirs", "returned") for path in (folder / source).glob("*")):
        own = np.load(path / "x.npy") if (path / "x.npy").exists() else None
        name = f"{path.parent.name}-{path.name}"
        sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
        with torch.no_grad():
            inputs = x if own is None else torch.from_numpy(own)
            np.savez(folder / "read" / f"{name}.npz", f=sae.encode(inputs).numpy(), y=sae(inputs).numpy())
        SAE.load_from_disk(path, device="cpu").save_model(folder / "resaved" / name)


def temporal(folder: Path) -> None:
    """Encodes whole texts with every temporal SAE in DIR/temporal."""
    x_BxTxD = torch.from_numpy(np.load(folder / "texts.npy"))
    for path in sorted((folder / "temporal").iterdir()):
        sae = SAE.load_from_disk(path, device="cpu", dtype="float32")
        with torch.no_grad():
            novel, predicted = sae.encode_with_predictions(x_BxTxD)
            np.savez(folder / f"{path.name}.npz", novel=novel, predicted=predicted, y=sae(x_BxTxD))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    dict(make=make, read=read, temporal=temporal)[sys.argv[1]](Path(sys.argv[2]))
