"""The tables of a study's report."""

from saejax.page.tables import MISSING, count, interval, number, percent, significant
from saejax.studies.progress import duration
from saejax.studies.result_sheets import RESULT_SHEETS
from saejax.studies.sheet import Sheet, listed, size

_SETUP_SHEETS = (
    Sheet(
        "models",
        "The rows",
        {
            "Row": lambda model: model.row,
            "Model": lambda model: model.model,
            "In": lambda model: model.dtype,
            "Parameters": lambda model: count(model.parameters),
            "Layers": lambda model: count(model.layers),
            "Width": lambda model: count(model.width),
            "Sites": lambda model: listed(model.sites),
            "Dictionaries": lambda model: listed(model.kinds),
            "Benchmarks": lambda model: listed(model.benchmarks),
            "Behaviours": lambda model: listed(model.behaviours),
            "Units done": lambda model: f"{model.done} of {model.units}",
        },
        frozenset({"Model", "In", "Sites", "Dictionaries", "Benchmarks", "Behaviours"}),
    ),
    Sheet(
        "baselines",
        "The models before anything is changed",
        {
            "Row": lambda baseline: baseline.row,
            "Task": lambda baseline: baseline.task,
            "Measure": lambda baseline: baseline.measure,
            "Value": lambda baseline: (
                interval(baseline.value, 3) if "nats" in baseline.measure else f"{interval(baseline.value, 1, 100)} %"
            ),
            "By guessing": lambda baseline: percent(baseline.chance, 1),
            "Items": lambda baseline: str(baseline.n),
        },
        frozenset({"Task", "Measure"}),
        "Square brackets: 95 % intervals over items or prompts.",
    ),
    Sheet(
        "dictionaries",
        "The dictionaries",
        {
            "Row": lambda dictionary: dictionary.row,
            "Dictionary": lambda dictionary: dictionary.dictionary,
            "Reads": lambda dictionary: dictionary.site,
            "Features": lambda dictionary: f"{dictionary.features:,}",
            "Loss, epoch 4": lambda dictionary: significant(dictionary.loss_epoch_4, 4),
            "Loss, end": lambda dictionary: significant(dictionary.loss_end, 4),
            "Improvement": lambda dictionary: percent(dictionary.improvement, 1),
            "L0": lambda dictionary: number(dictionary.l0, 1),
            "Dead": lambda dictionary: percent(dictionary.dead, 1),
            "Explained variance": lambda dictionary: number(dictionary.explained_variance, 3),
            "Cross-entropy recovered": lambda dictionary: number(dictionary.ce_recovered, 3),
            "Tokens": lambda dictionary: f"{dictionary.tokens:,}",
            "Seconds": lambda dictionary: number(dictionary.seconds, 0),
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
            "Row": lambda statistics: statistics.row,
            "Text": lambda statistics: statistics.text,
            "Site": lambda statistics: statistics.site,
            "Tokens": lambda statistics: f"{statistics.tokens:,}",
            "Median norm": lambda statistics: significant(statistics.median_norm),
            "Largest norm": lambda statistics: significant(statistics.largest_norm),
            "Sinks beyond position 0": lambda statistics: percent(statistics.beyond_sinks, 2),
            "L0": lambda statistics: number(statistics.l0, 1),
            "Features that fire": lambda statistics: percent(statistics.firing, 1),
            "Explained variance": lambda statistics: number(statistics.explained_variance, 3),
        },
        frozenset({"Text", "Site"}),
        "Corpus: what dictionaries are trained on. Benchmarks: test items with their reference answers, sinks left "
        "out; L0, features and explained variance are those of the tested dictionary there.",
    ),
)
_RESOURCE_SHEETS = (
    Sheet(
        "resources",
        "What it took",
        {
            "Row": lambda usage: usage.row,
            "Unit": lambda usage: usage.unit,
            "Time": lambda usage: duration(usage.seconds),
            "Device-hours": lambda usage: significant(usage.device_hours, 2),
            "Host memory": lambda usage: size(usage.peak_host_bytes),
            "Device memory": lambda usage: size(usage.peak_device_bytes),
            "On disk": lambda usage: size(usage.disk_bytes),
            "GFLOP/s": lambda usage: significant(usage.flops_per_second and usage.flops_per_second / 1e9, 2),
        },
        frozenset({"Unit"}),
        "Time and memory: of the process that finished the unit. GFLOP/s: matrix products by formula, over all of "
        "its time. A dash: not measured, or none.",
    ),
    Sheet(
        "failures",
        "What is not done",
        {
            "Row": lambda failure: failure.row,
            "Unit": lambda failure: failure.unit,
            "State": lambda failure: failure.state,
            "Why": lambda failure: failure.reason,
            "Log": lambda failure: failure.log or MISSING,
        },
        frozenset({"Unit", "State", "Why", "Log"}),
        cards=True,
    ),
)
SHEETS = {sheet.name: sheet for sheet in (*_SETUP_SHEETS, *RESULT_SHEETS, *_RESOURCE_SHEETS)}
