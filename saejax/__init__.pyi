"""The names of the library: editors and type checkers read them here, and ``__init__.py`` where to load them from."""

from saejax.attribution.graph.graph import Graph as Graph
from saejax.attribution.trace.gradient import trace_gradient as trace_gradient
from saejax.attribution.trace.prompt import trace as trace
from saejax.dictionaries import Dictionary as Dictionary
from saejax.dictionaries import check_dictionary as check_dictionary
from saejax.dictionaries import load_dictionary as load_dictionary
from saejax.dictionaries import load_transcoders as load_transcoders
from saejax.dictionaries import save_dictionary as save_dictionary
from saejax.dictionaries import save_transcoders as save_transcoders
from saejax.library.activations import Activations as Activations
from saejax.library.activations import capture as capture
from saejax.library.causal import Ablation as Ablation
from saejax.library.causal import ablate as ablate
from saejax.library.causal import make_prompts as make_prompts
from saejax.library.causal import patch as patch
from saejax.library.dictionaries import Evaluation as Evaluation
from saejax.library.dictionaries import evaluate as evaluate
from saejax.library.dictionaries import export as export
from saejax.library.dictionaries import train as train
from saejax.models.edits import SiteEdit as SiteEdit
from saejax.models.language_model import LanguageModel as LanguageModel
from saejax.models.language_model import load_model as load_model
from saejax.results import load_results as load_results
from saejax.tasks.behaviours import Prompt as Prompt
