"""Bytes per device of what comes and goes in the causal stages."""

from saejax.causal.patching.pairs import GROUP_BYTES, STEP
from saejax.causal.split import PROMPTS
from saejax.dictionaries import DictionaryConfig
from saejax.models.sites import Site
from saejax.preflight.pass_bytes import WIDTH, Axes, feature_bytes, generated_bytes, layer_bytes
from saejax.preflight.work import Work


def causal_bytes(work: Work, axes: Axes) -> dict[str, int]:
    """Of ablate, and of patch, probe and study where they are asked for."""
    found = dict(ablate=_edited(work, axes, work.tested, work.features, work.rows))
    if work.patched:  # of all features at once, those of the prompts and those of the counterparts
        found["patch"] = _edited(work, axes, work.patched, 2 * work.patched.n_features, work.patch_rows)
    if work.pairs:
        found["patch"] = max(found.get("patch", 0), _patched_sites(work, axes))
    if work.probed:
        found["probe"] = _clean(work, axes, work.probed)
    if work.studied:
        found["study"] = _studied(work, axes, work.studied)
    return found


def _clean(work: Work, axes: Axes, used: DictionaryConfig) -> int:
    """Stream and value of the prompts, and the features of some."""
    kept = work.prompts * work.prompt * 4 * 2 * used.d_in
    head = layer_bytes(work, axes, PROMPTS, work.prompt, work.dtype)
    return kept + head + feature_bytes(used.n_features, PROMPTS, work.prompt)


def _edited(work: Work, axes: Axes, used: DictionaryConfig, gathered: int, rows: int) -> int:
    """Prompts without an edit, with their keys, values and gathered features; the head, or a batch of edited rows."""
    above = work.model.n_layers - Site.parse(used.site).layer - 1
    past = 2 * WIDTH[work.dtype] * above * work.model.n_kv_heads * work.model.d_head
    bank = work.prompts * work.prompt * (4 * (gathered + 2 * used.d_in) + past)
    head = layer_bytes(work, axes, PROMPTS, work.prompt, work.dtype)
    head += feature_bytes(used.n_features, PROMPTS, work.prompt)
    return bank + max(head, layer_bytes(work, axes, rows, work.prompt, work.dtype, kept=4))


def _patched_sites(work: Work, axes: Axes) -> int:
    """Two recorded runs of a group of pairs, and a batch of patched rows."""
    model = work.model
    token = ((2 * model.n_layers + 1) * model.d_model + 2 * model.n_layers * model.n_kv_heads * model.d_head) * WIDTH[
        work.dtype
    ]
    pairs = -(-work.pairs // STEP) * STEP
    recorded = min(pairs * work.prompt * token, max(GROUP_BYTES, STEP * work.prompt * token))
    return 2 * recorded + layer_bytes(work, axes, work.patch_rows, work.prompt, work.dtype, kept=4)


def _studied(work: Work, axes: Axes, used: DictionaryConfig) -> int:
    """Slopes: a layer forwards and backwards, what enters every layer above, all features; or generated answers."""
    rows, length = work.references
    above = work.model.n_layers - Site.parse(used.site).layer - 1
    slopes = 2 * layer_bytes(work, axes, rows, length, work.dtype, kept=above)
    slopes += feature_bytes(used.n_features, rows, length)
    return max(slopes, generated_bytes(work, axes, *work.generated) if work.generated else 0)
