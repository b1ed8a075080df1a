"""Messages of held-out chats are told apart by role, with templates as they are published, and scored apart."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest

from saejax.activations.documents import COLUMNS, Documents
from saejax.activations.in_memory import Activations
from saejax.activations.manifest import CapturedModel
from saejax.dictionaries import Dictionary, DictionaryConfig
from saejax.evaluation.loss_recovered import Losses, stand_in_losses
from saejax.evaluation.roles import find_roles, message_openers, roles_of_tokens, score_roles
from saejax.models.tokens import pad

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help<|im_end|>\n{% endif %}" + CHATML
)  # SmolLM2, Qwen 2.5
LLAMA_3 = "<s>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
PHI_3 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|endoftext|>"
GEMMA = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[INST] {{ m.content }}\n\n{% elif m.role == 'user' %}"
    "{% if loop.index0 == 0 or messages[0].role != 'system' or loop.index0 > 1 %}[INST] {% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = dict(chatml=CHATML, with_system=WITH_SYSTEM, llama_3=LLAMA_3, phi_3=PHI_3, gemma=GEMMA, mistral=MISTRAL)
CHAT = (
    ("user", "how many are there"),
    ("assistant", "there are three"),
    ("user", "and user now"),
    ("assistant", "five"),
)


class Tokenizer:
    """Words, special tokens and line ends, numbered as they come."""

    bos_token_id, eos_token_id = 0, None

    def __init__(self, template, words=r"</?[^<>]*>|\[/?INST\]|\n|[^\s<\[]+"):
        self.chat_template, self.words, self.ids = template, words, {"<s>": 0}

    def apply_chat_template(self, messages, tokenize):
        def refuse(message):
            raise jinja2.TemplateError(message)

        return jinja2.Template(self.chat_template).render(messages=messages, raise_exception=refuse)

    def __call__(self, text, add_special_tokens):
        words = re.findall(self.words, text)
        return dict(input_ids=[self.ids.setdefault(word, len(self.ids)) for word in words])

    def encode_chat(self, *messages):
        text = self.apply_chat_template([dict(role=role, content=content) for role, content in messages], False)
        return self(text, False)["input_ids"]


def documents(*pieces, front=0):
    """Pieces of texts, each (source, token ids), those of one source one after the other."""
    table, starts = [], {}
    for source, ids in pieces:
        table.append(dict(split=1, group=0, source=source, start=starts.get(source, 0)))
        starts[source] = starts.get(source, 0) + len(ids) - front
    rows = np.array([[row[name] for name in COLUMNS] for row in table], np.int32)
    ids_T = np.concatenate([ids for _, ids in pieces]).astype(np.int32)
    return Documents.contiguous(ids_T, [len(ids) for _, ids in pieces], rows, ("text",))


def roles_of_words(tokenizer, openers, roles_T, ids_T, words):
    """The role of each of these words in a text, where it stands first."""
    names = [*openers, ""]
    return [names[roles_T[ids_T.index(tokenizer.ids[word])]] for word in words]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_word_of_a_message_has_its_role(name):
    tokenizer = Tokenizer(TEMPLATES[name])
    openers = message_openers(tokenizer)
    assert openers.keys() == {"user", "assistant"} | (set() if name in ("gemma", "mistral") else {"system"})
    ids = tokenizer.encode_chat(*CHAT)
    (roles,) = roles_of_tokens(documents((0, ids)), openers, [])
    words = ["how", "many", "three", "now", "five"]
    expected = ["user", "user", "assistant", "user", "assistant"]
    assert roles_of_words(tokenizer, openers, roles, ids, words) == expected
    if "system" in openers:
        ids = tokenizer.encode_chat(("system", "be terse"), *CHAT)
        (roles,) = roles_of_tokens(documents((0, ids)), openers, [])
        found = roles_of_words(tokenizer, openers, roles, ids, ["be", "terse", *words])
        assert found == ["system", "system", *expected]


def test_a_word_like_a_role_opens_no_message_where_each_begins_with_bos():
    """As of SmolLM2-Instruct, whose BOS token is <|im_start|>."""
    for template in (CHATML, WITH_SYSTEM):
        tokenizer = Tokenizer(template)
        tokenizer.bos_token_id = tokenizer("<|im_start|>", False)["input_ids"][0]
        openers = message_openers(tokenizer)
        ids = tokenizer.encode_chat(("system", "be terse"), ("user", "why"), ("assistant", "system and user failed"))
        (roles,) = roles_of_tokens(documents((0, ids)), openers, ids[:1])
        found = roles_of_words(tokenizer, openers, roles, ids, ["terse", "why", "and", "failed"])
        assert found == ["system", "user", "assistant", "assistant"]


def test_messages_are_found_where_their_ends_merge_with_the_templates_own_signs():
    """As where one token is ">" and the line end."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n\n{% endfor %}"
    tokenizer = Tokenizer(template, r"\w+|[^\w\s]+\n*|\n+")
    chat = (("system", "be terse"), ("user", "\nwhy?"), ("assistant", "so.\n"), ("user", "how"), ("assistant", "thus"))
    ids = tokenizer.encode_chat(*chat)
    openers = message_openers(tokenizer)
    (roles,) = roles_of_tokens(documents((0, ids)), openers, [])
    expected = ["system", "user", "assistant", "user", "assistant"]
    assert roles_of_words(tokenizer, openers, roles, ids, ["terse", "why", "so", "how", "thus"]) == expected


def test_what_stands_before_the_first_message_has_no_role():
    tokenizer = Tokenizer("a talk\n" + CHATML)
    openers = message_openers(tokenizer)
    for first in ("system", "user"):
        ids = tokenizer.encode_chat((first, "be terse"), ("user", "why"), ("assistant", "so"))
        (roles,) = roles_of_tokens(documents((0, ids)), openers, [])
        assert roles_of_words(tokenizer, openers, roles, ids, ["talk", "be", "why", "so"]) == [
            "",
            first,
            "user",
            "assistant",
        ]


def test_a_system_message_that_is_written_as_another_roles_is_that_roles():
    template = "{% for m in messages %}{{ 'Human' if m.role == 'user' else 'Bot' }}:\n{{ m.content }}\n\n{% endfor %}"
    assert message_openers(Tokenizer(template)).keys() == {"user", "assistant"}


def test_templates_that_tell_no_roles_apart_have_none():
    assert message_openers(SimpleNamespace()) == message_openers(Tokenizer("")) == {}
    assert message_openers(Tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")) == {}
    assert message_openers(Tokenizer("{{ raise_exception('no') }}")) == {}


def test_a_message_goes_on_in_the_next_piece_of_its_text():
    tokenizer = Tokenizer(CHATML)
    openers, ids = message_openers(tokenizer), tokenizer.encode_chat(*CHAT)
    (whole,) = roles_of_tokens(documents((0, ids)), openers, [])
    cut = next(i for i, role in enumerate(whole) if role == 1) + 5  # in the first answer
    pieces = [(3, [0, *ids[:cut]]), (4, [0, 90, 91]), (3, [0, *ids[cut:]])]
    first, other, second = roles_of_tokens(documents(*pieces, front=1), openers, [0])
    assert [first[0], second[0], *other] == [-1] * 5
    np.testing.assert_array_equal([*first[1:], *second[1:]], whole)
    # Also where the cut falls between the tokens that open a message.
    cut = next(i for i, role in enumerate(whole) if role == 1) + 1
    pieces = [(3, [0, *ids[:cut]]), (3, [0, *ids[cut:]])]
    first, second = roles_of_tokens(documents(*pieces, front=1), openers, [0])
    np.testing.assert_array_equal([*first[1:], *second[1:]], whole)
    # Without the piece before it, the rest of the message has no role.
    (alone,) = roles_of_tokens(documents(*pieces, front=1).select(np.array([1])), openers, [0])
    assert alone[1] == -1 and alone[-1] == 1


def test_a_token_that_the_tokenizer_does_not_put_in_front_itself_is_in_front_of_pieces(tmp_path, one_device):
    """As --capture.bos=always has it, whatever the model's own texts begin with."""
    tokenizer, d = Tokenizer(CHATML), 8
    ids = tokenizer.encode_chat(*CHAT)
    (whole,) = roles_of_tokens(documents((0, ids)), message_openers(tokenizer), [])
    texts = [np.array([0, *part], np.int32) for part in (ids, ids[:12], ids[12:])]
    count = sum(map(len, texts))
    values = {"resid_post.0": np.random.default_rng(0).normal(size=(count, d)).astype(np.float32)}
    index_Nx3, model = np.zeros((count, 3), np.int32), CapturedModel("tiny", "", "", "float32")
    acts = Activations(values, index_Nx3, texts, 10.0, model, True, np.array([0, 1, 1]))
    store = acts.save(tmp_path, held_out=1)
    lm = SimpleNamespace(tokenizer=tokenizer, bos="auto", mesh=one_device)
    groups = find_roles(lm, store, ("resid_post.0",)).groups
    assert sorted(group_T[0] for group_T in groups) == [0, 0]
    np.testing.assert_array_equal(np.concatenate([group_T[1:] for group_T in groups]), whole + 1)


def losses(tokens, mean_ablated):
    ce = dict(clean=1.0, mean_ablated=mean_ablated, zero_ablated=9.0, reconstructed=2.5)
    return Losses(tokens, ce, dict.fromkeys(ce, 0.0))


def test_losses_of_a_role_are_of_the_tokens_that_it_writes(lm):
    """Against logits of the whole model, with an edit in place of the split one."""
    config = DictionaryConfig(kind="standard", site="resid_post.1", d_in=64, n_features=96)
    dictionary = Dictionary.initial(config, jax.random.key(1)).with_sink_norms(lm.sink_norm)
    texts = [lm.encode(f"The {word} near the dogs runs. The dogs near the cat run.") for word in ("cat", "war of 1732")]
    rng = np.random.default_rng(2)
    groups = [rng.integers(0, 3, len(text)) for text in texts]
    documents = [np.array(text, np.int32) for text in texts]
    (found,) = stand_in_losses(lm, [dictionary], documents, np.zeros(64, np.float32), 64, groups=groups)
    ce_of_token, group_of_token = [], []
    for text, group_T in zip(texts, groups, strict=True):
        logp_TxV = jax.nn.log_softmax(lm(pad([text])).logits_BxTxV[0], axis=-1)
        ce_of_token += [-float(logp_TxV[place, token]) for place, token in enumerate(text[1:])]
        group_of_token += group_T[1:].tolist()
    ce_N, group_N = np.array(ce_of_token), np.array(group_of_token)
    for group, of_group in enumerate(found.groups, 1):
        assert of_group.tokens == (group_N == group).sum() > 3
        assert of_group.ce["clean"] == pytest.approx(ce_N[group_N == group].mean(), rel=1e-4)
    (whole,) = stand_in_losses(lm, [dictionary], documents, np.zeros(64, np.float32), 64)
    assert (found.ce, found.kl, found.tokens) == (whole.ce, whole.kl, whole.tokens) and not whole.groups
    everything = [np.ones(len(text), np.int32) for text in texts]
    (same,) = stand_in_losses(lm, [dictionary], documents, np.zeros(64, np.float32), 64, groups=everything)
    assert same.groups[0].ce == pytest.approx(whole.ce) and same.groups[0].kl == pytest.approx(whole.kl, abs=1e-6)


def test_scores_are_of_the_tokens_of_a_role(tmp_path, one_device):
    tokenizer, d = Tokenizer(CHATML), 8
    texts = [np.array(tokenizer.encode_chat(*CHAT[: 2 + 2 * (i % 2)]), np.int32) for i in range(6)]
    count = sum(map(len, texts))
    values_NxD = np.random.default_rng(0).normal(size=(count, d)).astype(np.float32)
    model = CapturedModel("tiny", "", "", "float32")
    index_Nx3 = np.zeros((count, 3), np.int32)
    store = Activations({"resid_post.0": values_NxD}, index_Nx3, texts, 10.0, model, False).save(tmp_path, held_out=4)
    config = DictionaryConfig(kind="standard", site="resid_post.0", d_in=d, n_features=16, max_norm=100.0)
    dictionary = Dictionary.initial(config, jax.random.key(0))
    lm = SimpleNamespace(tokenizer=tokenizer, bos="never", mesh=one_device)
    roles = find_roles(lm, store, ("resid_post.0",))
    of_groups = (losses(30, 4.0), losses(0, 0.0))
    given = [dataclasses.replace(losses(30, 4.0), groups=of_groups[:count]) for count in (2, 1)]
    rest = store, ("resid_post.0",), one_device, 16
    (found,), (of_one_group,) = (score_roles(roles, [dictionary], [each], *rest) for each in given)
    # The answers are of documents without losses, and a group that is last may be missing.
    assert found["user"].ce.clean == 1.0 and found["user"].ce_recovered_mean == 0.5 and found["user"].ce.tokens == 30
    assert found["assistant"].ce is None and found == of_one_group
    openers, first = message_openers(tokenizer), sum(map(len, texts[:2]))
    roles_N = np.concatenate(roles_of_tokens(documents(*enumerate(texts)), openers, []))
    assert [*found] == ["user", "assistant"]
    for role, scores in found.items():
        x_NxD = values_NxD[first:][roles_N[first:] == [*openers].index(role)]
        f_NxF = np.asarray(dictionary.encode(jnp.asarray(x_NxD)))
        error = np.square(x_NxD - np.asarray(dictionary(jnp.asarray(x_NxD)))).sum()
        assert scores.tokens == len(x_NxD) > 20
        assert scores.l0 == pytest.approx((f_NxF > 0).sum(1).mean())
        expected = 1 - error / np.square(x_NxD - x_NxD.mean(0)).sum()
        assert scores.explained_variance == pytest.approx(expected, rel=1e-4)
    counted = [np.bincount(group_T, minlength=3) for group_T in roles.groups]
    assert sum(counted)[1:].tolist() == [scores.tokens for scores in found.values()]
    plain = SimpleNamespace(tokenizer=SimpleNamespace(), bos="never", mesh=one_device)
    assert find_roles(plain, store, ("resid_post.0",)) is None
