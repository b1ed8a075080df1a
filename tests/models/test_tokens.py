"""Special tokens, and answers that continue a text."""

import pytest
from tiny_models import save_tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saejax.activations.chunker import Chunker
from saejax.errors import UserError
from saejax.models.generation import StopCondition
from saejax.models.tokens import bos_tokens, continuation_ids, encode, text_of, token_text, tokenize, tokenize_in_pieces
from saejax.tasks.corpora import Document
from saejax.tasks.settings import CorpusConfig

WORDS = ["the", "city", "of", "Paris", "is", "large", "river"]


def word_tokenizer(template="<s> $A", bos="<s>", marker=False):
    """Words and marked words ("▁Paris"); special tokens as the template says. The BOS token has the id 0."""
    special = ["<s>", "</s>", "<unk>"]
    vocab = {word: index for index, word in enumerate([*special, "▁", *WORDS, "▁a", "a", "\n", "▁\n"])}
    vocab |= {f"▁{word}": len(vocab) + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if marker else spaces
    # A piece is a marker with the letters after it, letters alone, or a line's end.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Za-z]+|▁?\\n|▁"), "isolated")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.add_special_tokens(special)
    ids = [(token, tokenizer.token_to_id(token)) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("marker", [False, True])
def test_a_text_that_begins_with_bos_gets_no_second_one(marker):
    tokenizer = word_tokenizer(marker=marker)
    assert tokenizer("<s>the city")["input_ids"][:2] == [0, 0]  # what happens without care
    for bos, count in (("auto", 1), ("always", 1), ("never", 0)):
        assert encode(tokenizer, "the city", bos).count(0) == count
        assert encode(tokenizer, "<s>the city", bos).count(0) == 1
    assert encode(tokenizer, "the city")[0] == 0 and bos_tokens(tokenizer) == [0]


def test_special_tokens_of_other_templates():
    """Without BOS, and with an EOS that is appended: a context does not end in one."""
    tokenizer = word_tokenizer(template="$A")
    assert bos_tokens(tokenizer) == [] and 0 not in encode(tokenizer, "the city")
    assert encode(tokenizer, "the city", "always") == [0, *encode(tokenizer, "the city")]
    assert encode(tokenizer, "</s>the city", "always")[0] == 1  # as in circuit-tracer: it begins with a special token
    without = word_tokenizer(template="$A", bos=None)
    assert bos_tokens(without, "always") == [1]
    without.eos_token = None
    with pytest.raises(UserError, match="has no BOS token: expected bos='auto' or 'never'"):
        encode(without, "the city", "always")
    tokenizer = word_tokenizer(template="<s> $A </s>")
    assert tokenizer("the city")["input_ids"][-1] == 1
    tokens = tokenize(tokenizer, ["the city of", "the"], 10)
    assert tokens.lengths_B.tolist() == [4, 2] and 1 not in tokens.ids_BxT[tokens.mask_BxT]
    assert encode(tokenizer, "the city</s>")[-1] == 1  # the text's own


@pytest.mark.parametrize("model", ["WordLevel", "BPE"])
def test_special_tokens_of_a_vocabulary_without_letters(model):
    """And without an unknown token: a letter cannot be read (WordLevel) or is left out (BPE)."""
    vocab = {digit: index for index, digit in enumerate("0123456789+=")}
    made = Tokenizer(models.WordLevel(vocab) if model == "WordLevel" else models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 12), ("</s>", 13)]
    for template, front in {"$A": [], "$A </s>": [], "<s> $A </s>": [12]}.items():
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
        assert bos_tokens(tokenizer) == front and encode(tokenizer, "1+2=") == [*front, 1, 10, 2, 11]
        assert encode(tokenizer, "1", "always") == [12, 1] and continuation_ids(tokenizer, "3") == [3]
    if model == "WordLevel":
        documents = [Document("1+2=", "a", 0), Document("1-2=", "b", 1)]
        with pytest.raises(UserError, match="the model's tokenizer cannot read the text '1-2=': "):
            list(Chunker(CorpusConfig(context=8), tokenizer, 8).pieces(documents, lambda document: False))


@pytest.mark.parametrize("template", ["$A", "<s> $A"])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_pieces_of_texts_and_documents_begin_as_texts_do(bos, template):
    tokenizer = word_tokenizer(template)
    texts = ["the city of Paris is large", "</s>the city of Paris is large", "<s>the city", "<s></s>the", "</s>", "<s>"]
    pieces, source_N = tokenize_in_pieces(tokenizer, texts, 4, bos)
    chunker = Chunker(CorpusConfig(context=4), tokenizer, 4, bos=bos)
    documents = [Document(text, str(number), number) for number, text in enumerate(texts)]
    cut = [(piece.source, piece.ids_T.tolist()) for piece in chunker.pieces(documents, lambda document: False)]
    rows = zip(source_N.tolist(), pieces.ids_BxT, pieces.lengths_B, strict=True)
    ours = [(source, ids[:length].tolist()) for source, ids, length in rows]
    assert [each for each in ours if each[1] != [0]] == [each for each in cut if each[1] != [0]]
    front = bos_tokens(tokenizer, bos)
    for number, text in enumerate(texts):
        (first, *others), whole = [ids for source, ids in ours if source == number], encode(tokenizer, text, bos)
        assert first == whole[: len(first)] and all(ids[: len(front)] == front for ids in others)
        assert [token for ids in (first, *(ids[len(front) :] for ids in others)) for token in ids] == whole


@pytest.mark.parametrize("marker", [False, True])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_an_answer_is_the_token_that_the_text_goes_on_with(marker, template):
    tokenizer = word_tokenizer(template, marker=marker)
    whole = tokenizer("the city of Paris", add_special_tokens=False)["input_ids"]
    before = tokenizer("the city of", add_special_tokens=False)["input_ids"]
    wanted = whole[len(before) :]
    assert tokenizer.convert_ids_to_tokens(wanted) == ["▁Paris"]
    assert continuation_ids(tokenizer, " Paris", "the city of") == continuation_ids(tokenizer, " Paris") == wanted
    assert tokenizer.convert_ids_to_tokens(continuation_ids(tokenizer, "Paris")) == ["Paris"]
    assert continuation_ids(tokenizer, " Paris is", "the city of")[0] == wanted[0]
    with pytest.raises(UserError, match="the answer '' has no tokens"):
        continuation_ids(tokenizer, "", "the city of")
    with pytest.raises(UserError, match="this model has no tokenizer: give token ids"):
        tokenize(None, ["the city"], 10)
    with pytest.raises(UserError, match="this model has no tokenizer"):
        continuation_ids(None, " Paris")
    with pytest.raises(UserError, match="this model has no tokenizer, so that its tokens have no texts"):
        token_text(None)


def test_ids_that_the_tokenizer_lacks_are_told_apart(lm):
    lacking = len(lm.tokenizer)
    assert lacking + 1 < lm.config.vocab
    assert [token_text(lm.tokenizer)(token) for token in (lacking, lacking + 1)] == [
        f"<token {lacking}>", f"<token {lacking + 1}>",
    ]  # fmt: skip


def test_texts_keep_their_spaces(tmp_path):
    """Some tokenizers are told to write no space before punctuation."""
    save_tiny_tokenizer(tmp_path, 300)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, clean_up_tokenization_spaces=True)
    text = "It is , I say , not 's ."
    assert text_of(tokenizer, encode(tokenizer, text, "never")) == text


def test_tokens_of_spaces_keep_them_all():
    """Llama's decoder drops the first space of what it decodes, also of a token of several spaces."""
    pieces = ["<s>", "a", *("▁" * count for count in range(1, 5)), "▁a"]
    merges = [("▁", "▁"), ("▁▁", "▁"), ("▁▁", "▁▁"), ("▁", "a")]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    assert list(map(token_text(tokenizer), range(2, 7))) == [" ", "  ", "   ", "    ", " a"]
    for text in ("a    a", "a  a   a", "    a", "a "):
        assert "".join(map(token_text(tokenizer), encode(tokenizer, text))) == f" {text}"
    # What is generated goes on from a prompt: its first space is one.
    ending = StopCondition(tokenizer, [0], [" a a"])
    assert [ending.decode(encode(tokenizer, text)) for text in ("a a", "   a")] == [" a a", "    a"]
    assert ending.cut(encode(tokenizer, "a a a"), 0).text == ""


def test_stop_strings_with_special_tokens_end_texts():
    """Also where the tokenizer gives the token no role, as Llama 3's gives <|eot_id|> none: texts are without it."""
    pieces = ["<s>", "<end>", "<turn>", "a", "b", "▁a", "▁b", ".", "\n"]
    made = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<s>"))
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<end>")
    assert "<turn>" not in tokenizer.all_special_tokens
    ids = [3, 5, 7, 2, 8, 6, 4]  # a a.<turn>\n bb
    for stop, text, count in (
        (["<turn>"], "a a.", 3),
        ([".<turn>"], "a a", 4),
        (["<turn>\n"], "a a.", 5),
        (["\n b", "<turn>\n b"], "a a.", 6),
        (["b<turn>", "bb"], "a a.\n ", 7),
    ):
        done = StopCondition(tokenizer, [1], stop).cut(ids, 0)
        assert (done.text, len(done.ids), done.finished) == (text, count, "stop"), stop
    assert StopCondition(tokenizer, [1], ["a<turn>"]).cut(ids, 0) is None
    assert StopCondition(tokenizer, [1], ["a<turn>"]).cut([*ids, 1], 0).finished == "eos"
