"""The dictionaries that are compared, and their rows: what features are matched by that needs no text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from saejax.dictionaries import Dictionary, load_dictionary, rescale, stacks
from saejax.dictionaries.formats import load_all
from saejax.dictionaries.labels import labels_of
from saejax.errors import UserError
from saejax.models.sites import Site
from saejax.runner.stage import is_folder
from saejax.transfer.results import ComparedDictionary
from saejax.transfer.stability import unit


@dataclasses.dataclass(frozen=True)
class Compared:
    """A dictionary with its name.

    Attributes:
      name: such as "topk/k32", or its folder.
      folder: that it was loaded from.
      dictionary: itself.
    """

    name: str
    folder: Path
    dictionary: Dictionary

    @property
    def fingerprint(self) -> str:
        """Of the model whose activations it was trained on; "" where its files do not say."""
        return self.dictionary.config.fingerprint

    @property
    def target(self) -> str:
        """The site that its features write to."""
        return self.dictionary.config.target or self.dictionary.config.site

    @property
    def layer(self) -> int:
        """Of the target."""
        return Site.parse(self.target).layer

    def labels(self, workdir: Path) -> dict[int, str]:
        """What its features are called, where it was interpreted: in its own workdir, or else in another."""
        places = self.folder.absolute().parts
        own = "train" in places
        root = Path(*places[: places.index("train")]) if own else workdir
        name = "/".join(places[places.index("train") + 1 :]) if own else self.name
        return {feature: label.label for feature, label in labels_of(root, name).items()}

    def with_sink_norms(self, sink_norm: Callable[[str], float]) -> "Compared":
        """Return the same with the sink rule of its sites; see ``Dictionary.with_sink_norms``."""
        return dataclasses.replace(self, dictionary=self.dictionary.with_sink_norms(sink_norm))

    def described(self) -> ComparedDictionary:
        """What the results say of it."""
        config = self.dictionary.config
        return ComparedDictionary(self.name, config.model, config.site, self.target, config.n_features)


def load_compared(names: Sequence[str], units: Mapping[str, Path], flag: str) -> list[Compared]:
    """Loads the dictionaries that a flag names, in its order; of a stack all members.

    Args:
      names: kinds, members or folders.
      units: folders of the train units, such as that of "train/topk".
      flag: that names them, for messages.

    Raises:
      UserError: one cannot be loaded or is named twice.
    """
    found: list[Compared] = []
    for name in names:
        if is_folder(name):
            found += [Compared(folder, Path(folder), one) for folder, one in load_all(name).items()]
            continue
        kind, member = stacks.kind_and_member(name)
        unit = units[f"train/{kind}"]
        known = [entry.name for entry in stacks.members(unit)]
        if member:
            stacks.check_member(name, known, flag)
        chosen = [member] if member else known
        found += [Compared(stacks.full_name(kind, one), unit / one, load_dictionary(unit / one)) for one in chosen]
    folders = [one.folder.resolve() for one in found]
    for one, folder in zip(found, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{flag}={','.join(names)} names {one.name} twice: name each dictionary once")
        if not np.isfinite(np.asarray(one.dictionary.W_dec_FxD[...])).all():
            raise UserError(f"{one.folder} holds NaN or infinite decoder rows: train it again")
    return found


def applies(measure: str, first: Compared, second: Compared) -> bool:
    """Whether the rows of two dictionaries can be compared by a measure of ``rows``: they have one width."""
    folds = measure != "folded" or (first.dictionary.kind.jumprelu and second.dictionary.kind.jumprelu)
    return folds and first.dictionary.config.d_in == second.dictionary.config.d_in


def measures_of(wanted: Sequence[str], first: Compared, second: Compared) -> list[str]:
    """The measures by which two dictionaries can be compared."""
    return [measure for measure in wanted if measure == "activity" or applies(measure, first, second)]


def rows(measure: str, dictionary: Dictionary) -> np.ndarray:
    """What the features of a dictionary are matched by, fp32 [F, D].

    Args:
      measure: "decoder" or "encoder": unit rows, 0 where a feature has none; their products are cosines. "folded":
        decoder rows times the features' thresholds, which makes all thresholds 1 (SAE Match; Balagansky et al., 2024,
        arXiv 2410.07656), over the length of the longest; the assignment with the largest sum of products is the
        permutation with the least squared error.
      dictionary: whose they are.
    """
    if measure == "encoder":
        return unit(np.asarray(dictionary.W_enc_DxF[...]).T)
    W_dec_FxD = np.asarray(dictionary.W_dec_FxD[...], np.float32)
    if measure == "decoder":
        return unit(W_dec_FxD)
    threshold_F = np.asarray(rescale.as_jumprelu(dictionary).arrays["threshold_F"])
    folded_FxD = W_dec_FxD * threshold_F[:, None]
    return folded_FxD / max(float(np.linalg.norm(folded_FxD, axis=1).max()), 1e-12)


def chance(rows_FxD: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """As many random directions with the mean and covariance of some rows, each as long as its row.

    Independent of any other dictionary, but in the same few dimensions: directions that are uniform on the sphere would
    be too far from everything, and make any two dictionaries seem to share something.
    """
    mean_D = rows_FxD.mean(axis=0)
    off_FxD = (rows_FxD - mean_D[None]).astype(np.float64)
    rng = np.random.default_rng(seed)
    value_D, vector_DxD = np.linalg.eigh(off_FxD.T @ off_FxD / len(off_FxD))
    root_DxD = (vector_DxD * np.sqrt(np.maximum(value_D, 0))[None]).astype(np.float32)
    drawn_FxD = rng.standard_normal(rows_FxD.shape, np.float32) @ root_DxD.T + mean_D[None]
    return unit(drawn_FxD) * np.linalg.norm(rows_FxD, axis=1, keepdims=True)


def rotated(dictionary: Dictionary, seed: Sequence[int]) -> Dictionary:
    """A dictionary whose features are turned together by a random rotation about the decoder's bias.

    It is as good a dictionary of the turned activations as it was of the straight ones, and fires as sparsely; what it
    explains of the straight ones is chance.
    """
    about = rescale.centred(dictionary)
    width = dictionary.config.d_in
    draw_DxD = np.random.default_rng(seed).standard_normal((width, width))
    q_DxD, r_DxD = np.linalg.qr(draw_DxD)
    turn_DxD = (q_DxD * np.sign(np.diag(r_DxD))[None]).astype(np.float32)  # uniform over rotations
    arrays = about.arrays
    turned = dict(W_enc_DxF=turn_DxD @ arrays["W_enc_DxF"], W_dec_FxD=arrays["W_dec_FxD"] @ turn_DxD.T)
    return Dictionary(about.config, about.matmul_dtype, **arrays | turned)
