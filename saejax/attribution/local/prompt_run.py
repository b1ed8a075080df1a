"""A prompt that was run with transcoders or SAEs, as targets and graphs see it, and the tokens of a prompt."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from saejax.attribution.local.active import Active
from saejax.attribution.local.dictionaries import LayerDictionaries
from saejax.errors import UserError
from saejax.models.config import RunRules
from saejax.models.language_model import LanguageModel
from saejax.models.tokens import Tokens


class PromptRun:
    """A model that was run on a prompt with dictionaries.

    Attributes:
      model: the model.
      dictionaries: the transcoders or SAEs whose features are nodes.
      rules: by which gradients go through the model.
      ids_P: int32 token ids.
      active: the active features.
      logits_V: fp32 logits at the last position.
      last_D: fp32 stream leaving the last layer at the prompt's last position.
      stream_LxTxD: fp32 stream entering each layer.
    """

    model: LanguageModel
    dictionaries: LayerDictionaries
    rules: RunRules
    ids_P: np.ndarray
    active: Active
    logits_V: np.ndarray
    last_D: jax.Array
    stream_LxTxD: jax.Array

    def constants(self, chosen_F: np.ndarray) -> np.ndarray:
        """Return what biases of no source add to the pre-activations of some active features, fp32 [F]."""
        return self.active.b_enc_A[chosen_F]


@dataclasses.dataclass(frozen=True)
class LocalRun:
    """Values read from R edited runs of a prompt, fp32.

    Attributes:
      feature_RxJ: pre-activations of the requested features.
      readout_RxK: the readouts, as ``Readouts.value_K`` has them.
      logits_RxV: logits at the last position; None: not requested.
    """

    feature_RxJ: np.ndarray
    readout_RxK: np.ndarray
    logits_RxV: np.ndarray | None = None


def prompt_ids(model: LanguageModel, prompt: str | Sequence[int] | np.ndarray, chat: bool = False) -> np.ndarray:
    """Return the token ids of a prompt, int32 [P].

    Args:
      model: whose tokenizer reads a text.
      prompt: the text, before which the tokenizer's first special token is put if it begins with none; or its token
        ids, which are taken as they are.
      chat: put a text into the tokenizer's chat template.

    Raises:
      UserError: the tokenizer has no chat template, or there are no ids, more than the model reads, or one that it
        does not know.
    """
    if not len(prompt):
        raise UserError("the prompt is empty: expected a text, or token ids")
    if chat and isinstance(prompt, str):
        prompt = _apply_chat_template(model, prompt)
    if not isinstance(prompt, str):
        ids = np.asarray(prompt, np.int32).reshape(-1)
    else:
        ids = model.tokenize([prompt]).ids_BxT[0]
        tokenizer = model.tokenizer
        specials = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
        specials = [token for token in specials if token is not None]
        if specials and not set(ids[:1].tolist()) & set(tokenizer.all_special_ids):
            ids = np.concatenate([specials[:1], ids]).astype(np.int32)
        # Both the tokenizer and the text may have put it there.
        while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text began with it, too
            ids = ids[1:]
    Tokens(ids[None], np.array([len(ids)], np.int32)).check(model.config.vocab, model.config.context)
    return ids


def _apply_chat_template(model: LanguageModel, prompt: str) -> list[int]:
    """Return the ids of a user's turn and the beginning of the answer; the template writes special tokens itself."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise UserError(f"the tokenizer of {model.source.name} has no chat template: leave --graph.chat_template out")
    messages = [dict(role="user", content=prompt)]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]
