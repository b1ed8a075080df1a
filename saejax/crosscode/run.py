"""The stage ``crosscode``: which features of crosscoders their parts share, and what is one's own."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.activations.joined import with_joined
from saejax.activations.store import Store
from saejax.crosscode.causal import remove_private, rule_of
from saejax.crosscode.results import CrosscodedDictionary, CrosscodeResults
from saejax.crosscode.shares import Limits, Shares, feature_shares, one_space
from saejax.dictionaries import Dictionary
from saejax.errors import UserError
from saejax.evaluation.evaluate import load_other
from saejax.evaluation.parts import parts_by_model
from saejax.files import whole_file
from saejax.interventions.feature_statistics import FeatureStatistics
from saejax.models.loading import load_configured_model
from saejax.models.sites import is_joined, site_parts
from saejax.parallel.mesh import make_mesh
from saejax.runner.parts import Measured, OnProgress, each_part, part_file
from saejax.runner.stage import folder_name
from saejax.runner.workspace import Run
from saejax.settings import MeshConfig, ModelConfig
from saejax.stages.crosscode import CrosscodeConfig, tests_behaviours
from saejax.tasks.gate import read_tested
from saejax.transfer.compared import Compared, load_compared

_FLAG = "--crosscode.dictionaries"
_BLOCKS = 20  # of documents, which the bootstrap draws
_LISTED = 50  # features in the results; all are in the parquet file
_BINS = 20


def rule(config: CrosscodeConfig) -> str:
    """When a feature counts as private, and when removing some costs a behaviour, in words."""
    return (
        f"A feature is one part's own if its relative norm there is above {config.private:g} and latent scaling finds "
        f"less than {config.nu_error:g} of it in the error of every other part, and less than "
        f"{config.nu_reconstruction:g} in its reconstruction, upper ends of 95 % intervals over blocks of documents. "
        f"Removing the top {config.top} of them from their model costs a behaviour if of {config.draws} sets, drawn "
        "from matched shared features and themselves, so few cost as much logit difference, and as much accuracy, that "
        f"both p-values are at most {rule_of(config).level:g} after Holm's correction over the behaviours, the "
        "interval of the drop minus those sets' mean drop lies above zero, and accuracy falls by more than "
        f"{100 * config.min_accuracy_drop:g} points"
    )


def run_crosscode(run: Run) -> CrosscodeResults:
    """Looks at the crosscoders of ``--crosscode.dictionaries``, those left from an earlier run excepted.

    Writes ``<part>-features.parquet`` for each: all features with norms, relative norms and firing rates.

    Raises:
      UserError: one is no crosscoder, or the store lacks its parts.
      Interrupted: asked to stop.
    """
    compared = load_compared(run.configs[CrosscodeConfig].dictionaries, run.inputs, _FLAG)
    for one in compared:
        if not is_joined(one.dictionary.config.site):
            raise UserError(
                f"{_FLAG}: {one.name} reads the one site {one.dictionary.config.site}: expected a crosscoder, trained "
                "on a joined site such as resid_post.5+resid_post.15"
            )
    parts = [f"{place:03d}-{folder_name(one.name)}" for place, one in enumerate(compared)]

    def measure(part: str, on_progress: OnProgress) -> Measured:
        return _measure(run, compared[parts.index(part)], part)

    found = each_part(run, parts, lambda: measure, CrosscodedDictionary, "crosscoders")
    return CrosscodeResults(rule(run.configs[CrosscodeConfig]), tuple(found[part] for part in parts))


def _measure(run: Run, one: Compared, part: str) -> Measured:
    config = run.configs[CrosscodeConfig]
    dictionary, site = one.dictionary, one.dictionary.config.site
    captured = Store.open(run.inputs["capture"])
    missing = [name for name in site_parts(site) if name not in captured.sites]
    if missing:
        raise UserError(f"{_FLAG}: {one.name} reads {', '.join(missing)}, which the store lacks: capture them too")
    dictionary = dictionary.with_sink_norms(captured.max_norm)
    store = with_joined(captured, [site], {site: dictionary.config.scales})
    rows_R = store.rows("held_out", site)
    rows_R = rows_R[: config.tokens or None]
    document_R = store.tokens(rows_R)[0]
    if len(np.unique(document_R)) < _BLOCKS:
        raise UserError(f"{len(np.unique(document_R))} held-out documents are too few: expected {_BLOCKS} at least")
    block_R = np.unique(document_R, return_inverse=True)[1] % _BLOCKS

    def blocks() -> Iterator[list[np.ndarray]]:
        for block in range(_BLOCKS):
            own = rows_R[block_R == block]
            yield [store.read(site, own[i : i + config.batch_tokens]) for i in range(0, len(own), config.batch_tokens)]

    limits = Limits(
        config.private, config.nu_error, config.nu_reconstruction, config.most, config.resamples, config.seed
    )
    statistics = _statistics(dictionary, blocks())
    shares = feature_shares(dictionary, statistics, blocks, _BLOCKS, limits)
    _write(run, part, shares, statistics)
    behaviours, left_out = _behaviours(run, dictionary, captured, shares)
    alive_F = statistics.fires_at_all_F
    counts, _ = np.histogram(shares.relative_PxF[0][alive_F], _BINS, (0, 1))
    result = CrosscodedDictionary(
        name=one.name,
        site=site,
        parts=site_parts(site),
        features=dictionary.config.n_features,
        alive=int(alive_F.sum()),
        tokens=len(rows_R),
        same_space=one_space(dictionary),
        shared=int(shares.shared_F.sum()),
        histogram=tuple(counts.tolist()),
        own=shares.own,
        control=shares.control,
        listed=tuple(shares.measured[:_LISTED]),
        behaviours=behaviours,
        left_out=left_out,
    )
    told = ", ".join(f"{name} {own.private} of {own.by_norms}" for name, own in shares.own.items())
    return Measured(result, f"{one.name}: private {told} (by norms); {result.shared} of {result.alive} shared")


def _behaviours(run: Run, dictionary: Dictionary, store: Store, shares: Shares) -> tuple[dict, dict]:
    """The causal test, where there are two models and behaviours."""
    if not tests_behaviours(run.configs):
        return {}, {}
    mesh, model = make_mesh(run.configs[MeshConfig]), run.configs[ModelConfig]
    lm = load_configured_model(model, mesh)
    store.check_model(lm.source)
    models = parts_by_model(dictionary.config.site, lm, load_other(model, store, mesh))
    if [len(parts.sites) for parts in models] != [1, 1]:
        return {}, {"behaviours": "only of crosscoders with one part of each of two models"}
    tested = read_tested(run.inputs["baseline"])
    order = [next(iter(parts.sites)) for parts in models]
    found, left_out = remove_private(
        dictionary, models, shares.ordered(order), tested.prompts, run.configs[CrosscodeConfig]
    )
    return found, dict(tested.left_out) | left_out


def _statistics(dictionary: Dictionary, blocks: Iterator[list[np.ndarray]]) -> FeatureStatistics:
    parts = (
        (len(x_BxD), *jax.device_get(_fires(dictionary, jnp.asarray(x_BxD)))) for block in blocks for x_BxD in block
    )
    return FeatureStatistics.total(parts)


@jax.jit
def _fires(dictionary: Dictionary, x_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    f_BxF = dictionary.encode(x_BxD)
    return dictionary.fires(f_BxF).sum(0), jnp.abs(f_BxF).sum(0)


def _write(run: Run, part: str, shares: Shares, statistics: FeatureStatistics) -> None:
    """All features with what is known of them without latent scaling."""
    columns = {"feature": np.arange(len(statistics.fires_F)), "firing_rate": statistics.firing_rate_F}
    for name, norm_F, relative_F in zip(shares.own, shares.norm_PxF, shares.relative_PxF, strict=True):
        columns |= {f"norm {name}": norm_F, f"relative norm {name}": relative_F}
    with whole_file(part_file(run, part, "-features.parquet")) as beside:
        pq.write_table(pa.table(columns), beside)
