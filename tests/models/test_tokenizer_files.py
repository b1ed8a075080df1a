"""Tokenizers of folders give the ids of their tokenizer.json, whatever transformers makes of it."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saejax.errors import UserError
from saejax.models import tokenizer_files
from saejax.models.tokenizer_files import read_tokenizer
from saejax.models.tokens import encode

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+|\S"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def save_tokenizer(folder, model_type, splitter, **settings):
    """Bytes, "12" and a double newline; no token for what is unknown."""
    folder.mkdir()
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"12": 256, "ĊĊ": 257, "<end>": 258}
    file = Tokenizer(models.BPE(vocab, [("1", "2"), ("Ċ", "Ċ")]))
    file.pre_tokenizer, file.decoder = splitter, decoders.ByteLevel()
    file.add_special_tokens(["<end>"])
    file.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(dict(model_type=model_type, vocab_size=259)))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", [None, "GPT2Tokenizer", "TokenizersBackend", "Qwen2Tokenizer"])
@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gpt_neox", "gemma2", "mamba"])
def test_ids_are_those_of_the_file(model_type, name, tmp_path):
    settings = {} if name is None else dict(tokenizer_class=name)
    for number, (splitter, newlines) in enumerate([(BYTE_LEVEL, 3), (LLAMA3, 2)]):
        folder = save_tokenizer(tmp_path / str(number), model_type, splitter, **settings)
        tokenizer = read_tokenizer(folder)
        assert encode(tokenizer, "12", "never") == [256] and len(encode(tokenizer, "\n\nb", "never")) == newlines
        assert tokenizer.decode([256]) == "12"


def test_special_tokens_are_kept(tmp_path, caplog):
    folder = save_tokenizer(tmp_path / "model", "qwen2", BYTE_LEVEL, bos_token="<end>", eos_token="<end>")
    tokenizer = read_tokenizer(folder)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 258 and encode(tokenizer, "12", "always") == [258, 256]
    assert "cuts '12' otherwise than tokenizer.json, which is used" in caplog.text


def test_added_tokens_are_those_of_the_file(tmp_path, caplog):
    """Of a class that is built anew, transformers adds the tokens that tokenizer_config.json lists, and no others."""
    described = {"258": dict(content="<end>", special=True, normalized=False)}
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<end>")
    settings = roles | dict(tokenizer_class="GPT2Tokenizer", added_tokens_decoder=described)
    folder = save_tokenizer(tmp_path / "model", "gpt_neox", BYTE_LEVEL, **settings)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_tokens(["<think>"])
    file.save(str(folder / "tokenizer.json"))
    tokenizer = read_tokenizer(folder)
    assert encode(tokenizer, "<think>12<end>", "never") == [259, 256, 258] and tokenizer.eos_token_id == 258
    assert "otherwise than tokenizer.json, which is used" in caplog.text
    # Where both list a token, tokenizer_config.json says what spaces go with it.
    caplog.clear()
    described["259"] = dict(content="<think>", special=False, normalized=False, lstrip=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert encode(read_tokenizer(folder), "  <think>12", "never") == [259, 256] and not caplog.text


def test_ids_that_cannot_be_had_are_refused(tmp_path, monkeypatch):
    folder = save_tokenizer(tmp_path / "model", "qwen2", BYTE_LEVEL)
    wrong = PreTrainedTokenizerFast.from_pretrained(
        save_tokenizer(tmp_path / "other", "llama", pre_tokenizers.Digits())
    )
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *args, **options: wrong)
    monkeypatch.setattr(tokenizer_files, "_tokenizer_class", lambda folder: PreTrainedTokenizerFast)
    with pytest.raises(UserError, match=r"tokenizer.json and transformers cut '.*' into different tokens: save"):
        read_tokenizer(folder)


def test_a_text_that_the_vocabulary_cannot_say_is_named(tmp_path):
    folder = save_tokenizer(tmp_path / "model", "llama", BYTE_LEVEL)
    file = Tokenizer(models.WordLevel({"the": 0, "city": 1}))
    file.pre_tokenizer = pre_tokenizers.Whitespace()
    file.save(str(folder / "tokenizer.json"))
    tokenizer = read_tokenizer(folder)
    assert encode(tokenizer, "the city", "never") == [0, 1]
    with pytest.raises(UserError, match="the model's tokenizer cannot read the text 'the river': "):
        encode(tokenizer, "the river", "never")


def test_a_class_that_cannot_be_built_from_the_file_is_passed_over(tmp_path):
    """T5's wants scores of pieces, which a vocabulary of merges lacks."""
    for number, settings in enumerate([dict(tokenizer_class="T5Tokenizer"), {}]):
        folder = save_tokenizer(tmp_path / str(number), "t5", BYTE_LEVEL, eos_token="<end>", **settings)
        tokenizer = read_tokenizer(folder)
        assert encode(tokenizer, "12", "never") == [256] and tokenizer.eos_token_id == 258
