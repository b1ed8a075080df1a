"""A language model that answers on this machine's devices."""

from collections.abc import Sequence

from jax.sharding import Mesh

from saejax.errors import UserError
from saejax.explain.endpoint import Answer, Keep
from saejax.explain.questions import Question
from saejax.models.loading import load_model
from saejax.models.tokens import pad


class LocalJudge:
    """A model that answers greedily, in its chat template.

    Args:
      path: as of ``load_model``.
      at_once: questions of a batch.

    Raises:
      UserError: as ``load_model``, or its tokenizer has no chat template.
    """

    def __init__(self, path: str, mesh: Mesh, at_once: int):
        self._lm, self._at_once = load_model(path, mesh=mesh), at_once
        if not getattr(self._lm.tokenizer, "chat_template", None):
            raise UserError(
                f"--explain.model={path} has no chat template (base models have none): name one that answers"
            )

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Asks questions; ``keep`` is called with every answer. One too long for the model's context has none."""
        ids = [self._ids(question) for question in questions]
        room = self._lm.config.context
        for number, (question, own) in enumerate(zip(questions, ids, strict=True)):
            if len(own) + question.most > room:
                keep(number, Answer(None, (0, 0)))
        fits = [n for n in range(len(ids)) if len(ids[n]) + questions[n].most <= room]
        order = sorted(fits, key=lambda n: (questions[n].most, len(ids[n])))  # alike ones are run together
        for start in range(0, len(order), self._at_once):
            batch = order[start : start + self._at_once]
            most = min(max(questions[n].most for n in batch), room - max(len(ids[n]) for n in batch))
            for n, made in zip(batch, self._lm.generate(pad([ids[n] for n in batch]), most), strict=True):
                keep(n, Answer(None if made.finished == "length" else made.text, (len(ids[n]), len(made.ids))))

    def _ids(self, question: Question) -> list[int]:
        tokenizer = self._lm.tokenizer
        text = tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
