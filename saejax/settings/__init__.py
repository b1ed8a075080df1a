"""Every setting of every stage: the groups of configuration that become flags.

Read these files to learn what can be changed. A stage says in its ``stage.py`` which of them it reads; ``--help`` of
its binary shows them. A group that one stage alone reads may also stand in that file.
"""

from saejax.settings.attribution import GRAPH_ESTIMATES as GRAPH_ESTIMATES
from saejax.settings.attribution import GraphConfig as GraphConfig
from saejax.settings.causal import BASES as BASES
from saejax.settings.causal import PATCHABLE as PATCHABLE
from saejax.settings.causal import PROBE_LABELS as PROBE_LABELS
from saejax.settings.causal import REPLACEMENTS as REPLACEMENTS
from saejax.settings.causal import AblateConfig as AblateConfig
from saejax.settings.causal import PatchConfig as PatchConfig
from saejax.settings.causal import ProbeConfig as ProbeConfig
from saejax.settings.causal import SteerConfig as SteerConfig
from saejax.settings.causal import StudyConfig as StudyConfig
from saejax.settings.kinds import kind_names as kind_names
from saejax.settings.kinds import unit_names as unit_names
from saejax.settings.run import ExportConfig as ExportConfig
from saejax.settings.run import MeshConfig as MeshConfig
from saejax.settings.run import ModelConfig as ModelConfig
from saejax.settings.run import PreflightConfig as PreflightConfig
from saejax.settings.run import ReportConfig as ReportConfig
from saejax.settings.tasks import BEHAVIOURS as BEHAVIOURS
from saejax.settings.tasks import BENCHMARKS as BENCHMARKS
from saejax.settings.tasks import DEMO_BEHAVIOURS as DEMO_BEHAVIOURS
from saejax.settings.tasks import CaptureConfig as CaptureConfig
from saejax.settings.tasks import CorpusConfig as CorpusConfig
from saejax.settings.tasks import TaskConfig as TaskConfig
from saejax.settings.training import MOST_TOKENS as MOST_TOKENS
from saejax.settings.training import EvaluateConfig as EvaluateConfig
from saejax.settings.training import TrainConfig as TrainConfig
