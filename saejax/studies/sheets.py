"""The tables of a study's report."""

from saejax.page.tables import MISSING, count, interval, number, percent, significant
from saejax.studies.progress import duration
from saejax.studies.sheet import Sheet, listed, size
from saejax.studies.sheets_found import FOUND

_RAN = (
    Sheet(
        "models",
        "The rows",
        {
            "Row": lambda one: one.row,
            "Model": lambda one: one.model,
            "In": lambda one: one.dtype,
            "Parameters": lambda one: count(one.parameters),
            "Layers": lambda one: count(one.layers),
            "Width": lambda one: count(one.width),
            "Sites": lambda one: listed(one.sites),
            "Dictionaries": lambda one: listed(one.kinds),
            "Benchmarks": lambda one: listed(one.benchmarks),
            "Behaviours": lambda one: listed(one.behaviours),
            "Units done": lambda one: f"{one.done} of {one.units}",
        },
        frozenset({"Model", "In", "Sites", "Dictionaries", "Benchmarks", "Behaviours"}),
    ),
    Sheet(
        "baselines",
        "The models before anything is changed",
        {
            "Row": lambda one: one.row,
            "Task": lambda one: one.task,
            "Measure": lambda one: one.measure,
            "Value": lambda one: (
                interval(one.value, 3) if "nats" in one.measure else f"{interval(one.value, 1, 100)} %"
            ),
            "By guessing": lambda one: percent(one.chance, 1),
            "Items": lambda one: str(one.n),
        },
        frozenset({"Task", "Measure"}),
        "Square brackets: 95 % intervals over items or prompts.",
    ),
    Sheet(
        "dictionaries",
        "The dictionaries",
        {
            "Row": lambda one: one.row,
            "Dictionary": lambda one: one.dictionary,
            "Reads": lambda one: one.site,
            "Features": lambda one: f"{one.features:,}",
            "Loss, epoch 4": lambda one: significant(one.loss_epoch_4, 4),
            "Loss, end": lambda one: significant(one.loss_end, 4),
            "Improvement": lambda one: percent(one.improvement, 1),
            "L0": lambda one: number(one.l0, 1),
            "Dead": lambda one: percent(one.dead, 1),
            "Explained variance": lambda one: number(one.explained_variance, 3),
            "Cross-entropy recovered": lambda one: number(one.ce_recovered, 3),
            "Tokens": lambda one: f"{one.tokens:,}",
            "Seconds": lambda one: number(one.seconds, 0),
        },
        frozenset({"Dictionary", "Reads"}),
        "Losses are means over the recorded steps of an epoch, on training batches; a dash: no more than four "
        "epochs. L0 and what follows it up to the tokens, on held-out text. Tokens: of training, repeats counted. "
        "Seconds: of training all members of a stack together.",
    ),
    Sheet(
        "activations",
        "Activations by model and text",
        {
            "Row": lambda one: one.row,
            "Text": lambda one: one.text,
            "Site": lambda one: one.site,
            "Tokens": lambda one: f"{one.tokens:,}",
            "Median norm": lambda one: significant(one.median_norm),
            "Largest norm": lambda one: significant(one.largest_norm),
            "Sinks beyond position 0": lambda one: percent(one.beyond_sinks, 2),
            "L0": lambda one: number(one.l0, 1),
            "Features that fire": lambda one: percent(one.firing, 1),
            "Explained variance": lambda one: number(one.explained_variance, 3),
        },
        frozenset({"Text", "Site"}),
        "Corpus: what dictionaries are trained on. Benchmarks: test items with their reference answers, sinks left "
        "out; L0, features and explained variance are those of the tested dictionary there.",
    ),
)
_TOOK = (
    Sheet(
        "resources",
        "What it took",
        {
            "Row": lambda one: one.row,
            "Unit": lambda one: one.unit,
            "Time": lambda one: duration(one.seconds),
            "Device-hours": lambda one: significant(one.device_hours, 2),
            "Host memory": lambda one: size(one.peak_host_bytes),
            "Device memory": lambda one: size(one.peak_device_bytes),
            "On disk": lambda one: size(one.disk_bytes),
            "GFLOP/s": lambda one: significant(one.flops_per_second and one.flops_per_second / 1e9, 2),
        },
        frozenset({"Unit"}),
        "Time and memory: of the process that finished the unit. GFLOP/s: matrix products by formula, over all of "
        "its time. A dash: not measured, or none.",
    ),
    Sheet(
        "failures",
        "What is not done",
        {
            "Row": lambda one: one.row,
            "Unit": lambda one: one.unit,
            "State": lambda one: one.state,
            "Why": lambda one: one.reason,
            "Log": lambda one: one.log or MISSING,
        },
        frozenset({"Unit", "State", "Why", "Log"}),
        cards=True,
    ),
)
SHEETS = {sheet.name: sheet for sheet in (*_RAN, *FOUND, *_TOOK)}
