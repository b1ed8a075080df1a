"""The file of a Jacobian lens, as Neuronpedia hosts them: a PyTorch file (.pt) of a dictionary.

J               layer -> float16 [d_model, d_model], output by input, for layers 0 to the last but one
n_prompts       over which each is the mean
source_layers   the layers of J, in order
d_model         width of the stream

Files are read with ``weights_only``: nothing in them is run.
"""

from pathlib import Path

import numpy as np

from saejax.errors import UserError
from saejax.files import whole_file
from saejax.models.lens import JacobianLens


def save_lens(path: str | Path, lens: JacobianLens) -> None:
    """Writes a lens, whole or not at all; a file that is there is replaced."""
    import torch

    layers = range(len(lens.maps_LxDxD))
    maps = {layer: torch.tensor(np.asarray(lens.maps_LxDxD[layer], np.float16)) for layer in layers}
    width = lens.maps_LxDxD.shape[-1]
    with whole_file(Path(path)) as beside:
        torch.save(dict(J=maps, n_prompts=lens.n_prompts, source_layers=list(layers), d_model=width), beside)


def load_lens(path: str | Path) -> JacobianLens:
    """Reads a lens, such as ``fit_lens`` writes or Neuronpedia hosts.

    Raises:
      UserError: the file is missing, is no lens, lacks a layer, or holds numbers that are not finite.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the .pt file of a Jacobian lens") from None
    except Exception:  # torch raises whatever its unpickler meets
        raise UserError(f"{path} is no file of a Jacobian lens: expected a .pt file with J and n_prompts") from None
    maps = found.get("J") if isinstance(found, dict) else None
    if not isinstance(maps, dict) or not maps or "n_prompts" not in found:
        raise UserError(f"{path} is no file of a Jacobian lens: expected J, n_prompts, source_layers and d_model")
    if sorted(maps) != list(range(len(maps))) or len({tuple(one.shape) for one in maps.values()}) > 1:
        raise UserError(f"{path} has maps of the layers {sorted(maps)}: expected all from 0 on, of one shape")
    maps_LxDxD = np.stack([maps[layer].float().numpy() for layer in range(len(maps))])
    if maps_LxDxD.ndim != 3 or maps_LxDxD.shape[1] != maps_LxDxD.shape[2] or not np.isfinite(maps_LxDxD).all():
        raise UserError(f"{path} is damaged: expected square, finite maps, got {maps_LxDxD.shape}")
    return JacobianLens(maps_LxDxD, int(found["n_prompts"]))
