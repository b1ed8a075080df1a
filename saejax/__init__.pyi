"""The names of the library: editors and type checkers read them here, and ``__init__.py`` where to load them from."""

from saejax.activations.in_memory import Activations as Activations
from saejax.activations.in_memory import capture as capture
from saejax.activations.reader import open_store as open_store
from saejax.attribution.graph.graph import Graph as Graph
from saejax.attribution.local.dictionaries import open_saes as open_saes
from saejax.attribution.local.edits import Change as Change
from saejax.attribution.local.model import LocalModel as LocalModel
from saejax.attribution.local.model import intervene as intervene
from saejax.attribution.local.readouts import Direction as Direction
from saejax.attribution.local.transcoders import open_transcoders as open_transcoders
from saejax.attribution.trace.prompt import trace as trace
from saejax.dictionaries import SAE as SAE
from saejax.dictionaries import Dictionary as Dictionary
from saejax.dictionaries import check_dictionary as check_dictionary
from saejax.dictionaries import load_dictionary as load_dictionary
from saejax.dictionaries import load_transcoders as load_transcoders
from saejax.dictionaries import save_dictionary as save_dictionary
from saejax.dictionaries import save_transcoders as save_transcoders
from saejax.errors import UserError as UserError
from saejax.interventions.answers import CausalVerdict as CausalVerdict
from saejax.interventions.answers import VerdictConfig as VerdictConfig
from saejax.interventions.engine import effects as effects
from saejax.interventions.falsify import Falsification as Falsification
from saejax.interventions.falsify import falsify as falsify
from saejax.interventions.in_memory import Ablation as Ablation
from saejax.interventions.in_memory import ablate as ablate
from saejax.interventions.in_memory import make_prompts as make_prompts
from saejax.interventions.in_memory import patch as patch
from saejax.interventions.in_memory import probe as probe
from saejax.interventions.in_memory import steer as steer
from saejax.interventions.slopes import slopes as slopes
from saejax.interventions.table import EffectsTable as EffectsTable
from saejax.interventions.table import load_effects as load_effects
from saejax.interventions.verdict import verdict as verdict
from saejax.models.edits import SiteEdit as SiteEdit
from saejax.models.language_model import LanguageModel as LanguageModel
from saejax.models.loading import load_model as load_model
from saejax.runner.results import load_results as load_results
from saejax.tasks.behaviours import Prompt as Prompt
from saejax.training.in_memory import Evaluation as Evaluation
from saejax.training.in_memory import evaluate as evaluate
from saejax.training.in_memory import export as export
from saejax.training.in_memory import train as train

__version__: str
