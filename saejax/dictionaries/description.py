"""What a dictionary is apart from the values of its arrays: its description, and the table of its arrays."""

import dataclasses

from saejax.config import Config, setting
from saejax.settings import KINDS


@dataclasses.dataclass(frozen=True)
class DictionaryConfig(Config):
    """What a dictionary is, apart from its arrays.

    Attributes:
      kind: its sparsity, one of ``settings.KINDS``.
      site: the site it reads, such as "resid_post.15".
      target: the site it predicts: a transcoder reads "mlp_in.15" and predicts "mlp_out.15"; "" for an SAE.
      d_in: width of both.
      n_features: number of features F.
      k: active features per token (topk; mean over tokens for batchtopk and matryoshka; else 0).
      groups: numbers of leading features that reconstruct by themselves, ascending, the last is F (matryoshka).
      skip: whether a linear map of the input is added to what it predicts (skip transcoder).
      centred: whether the decoder's bias is subtracted from the input, as in an SAE.
      fires_above: |f| above which a feature of a linear dictionary counts as firing.
      max_norm: norm of ``x`` above which a position is an attention sink.
      model, revision, fingerprint: the language model whose activations it was trained on.
      origin: what a file in another tool's format that it was loaded from says besides (JSON), to be written back.
    """

    kind: str = setting("topk", "kind", choices=KINDS)
    site: str = setting("", "site")
    target: str = setting("", "site that it predicts")
    d_in: int = setting(1, "width", low=1)
    n_features: int = setting(1, "features", low=1)
    k: int = setting(0, "active features per token", low=0)
    groups: tuple[int, ...] = setting((), "nested numbers of features", low=1)
    skip: bool = setting(False, "linear path from input to output")
    centred: bool = setting(True, "subtract the decoder's bias from the input")
    fires_above: float = setting(0.0, "firing threshold of a linear dictionary", low=0.0)
    max_norm: float = setting(3.4e38, "largest norm of a position that is not a sink", low=0.0)
    model: str = setting("", "language model")
    revision: str = setting("", "its revision")
    fingerprint: str = setting("", "its fingerprint")
    origin: str = setting("", "what the file that it was loaded from says besides")

    @property
    def has_threshold(self) -> bool:
        """Whether a feature is active where its pre-activation exceeds a stored threshold."""
        return self.kind in ("jumprelu", "batchtopk", "matryoshka")


def parameter_table(config: DictionaryConfig) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Every array of a dictionary: its shape, and the mesh axis over which each dimension is split."""
    d, f = config.d_in, config.n_features
    by_feature: tuple[tuple[int, ...], tuple[str | None, ...]] = ((f,), ("model",))
    table: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
        "W_enc_DxF": ((d, f), (None, "model")),
        "b_enc_F": by_feature,
        "W_dec_FxD": ((f, d), ("model", None)),
        "b_dec_D": ((d,), (None,)),
    }
    if config.has_threshold:
        table["threshold_F"] = by_feature
    if config.kind == "gated":
        table |= {"r_mag_F": by_feature, "b_mag_F": by_feature}
    if config.skip:
        table["W_skip_DxD"] = ((d, d), (None, None))
    return table
