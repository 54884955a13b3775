"""Tokenizers: the checkpoint's, or bytes."""

import base64
import dataclasses
import io
import json
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from cmjax.models.moe.generation.batch import check_prompts
from cmjax.models.moe.generation.tokenizer import encode_prompt, open_tokenizer
from cmjax.models.moe.presets import tiny


def _words(folder, post_processor=None, **config):
    words = {"the": 0, "cat": 1, "sat": 2, "?": 3, "<s>": 4, "</s>": 5}
    inner = Tokenizer(WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = Whitespace()  # type: ignore
    inner.add_special_tokens(["<s>", "</s>"])
    if post_processor is not None:
        inner.post_processor = post_processor
    inner.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_without_a_file_every_byte_is_a_token(tmp_path):
    for folder in (None, tmp_path):
        tokenizer = open_tokenizer(folder, 320)
        tokens = tokenizer.encode("naïve 猫")
        assert tokens == list("naïve 猫".encode())
        assert tokenizer.decode(tokens) == "naïve 猫"
        assert tokenizer.decode([72, 300, 105]) == "H<300>i"
        assert tokenizer.decode([0xE7, 0x8C]) == "�"  # a character cut short


def test_a_tokenizer_file_is_used(tmp_path):
    _words(tmp_path)
    tokenizer = open_tokenizer(tmp_path, 4)
    assert tokenizer.encode("the dog sat") == [0, 3, 2]
    assert tokenizer.decode([1, 2]) == "cat sat"


def test_a_tokenizer_with_more_entries_than_the_model_is_opened(tmp_path):
    _words(tmp_path)
    tokens = open_tokenizer(tmp_path, 3).encode("the cat sat")
    config = dataclasses.replace(tiny(), vocab_size=3)
    assert check_prompts(config, [tokens], 4) == 7
    with pytest.raises(ValueError, match=r"prompt 1 holds token 3; the model's are 0\.\.2"):
        check_prompts(config, [open_tokenizer(tmp_path, 3).encode("the dog")], 4)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bytes need a vocabulary of 256; this model has 100"):
        open_tokenizer(None, 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        open_tokenizer(tmp_path, 320)


BOS = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
NAMED = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}


def test_what_begins_a_text_comes_once_or_not_at_all(tmp_path):
    _words(tmp_path, BOS)
    tokenizer = open_tokenizer(tmp_path, 6)
    assert tokenizer.encode("<s> the cat") == [4, 4, 0, 1]  # what the package itself does
    assert encode_prompt(tokenizer, "<s> the cat") == [4, 0, 1]
    assert encode_prompt(tokenizer, "the cat") == [4, 0, 1]
    assert encode_prompt(tokenizer, "the cat", special=False) == [0, 1]
    assert encode_prompt(tokenizer, "<s> the cat", special=False) == [4, 0, 1]
    assert encode_prompt(tokenizer, "<s> <s> the", special=True) == [4, 4, 0]


@pytest.mark.parametrize("post_processor", [None, BOS])
@pytest.mark.parametrize("flag", [None, True, False])
def test_what_is_put_around_a_text_is_what_transformers_puts(tmp_path, post_processor, flag):
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'test')")
    _words(tmp_path, post_processor, **NAMED, **({} if flag is None else {"add_bos_token": flag}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    want = [0, 1] if post_processor is None else [4, 0, 1]
    assert theirs("the cat").input_ids == want
    assert open_tokenizer(tmp_path, 6).encode("the cat") == want


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "qwen.tiktoken", "tekken.json", "spiece.model",
             "tokenizer_config.json", "special_tokens_map.json", "tokenization_own.py"],
)  # fmt: skip
def test_a_tokenizer_of_another_kind_is_refused_and_not_taken_for_bytes(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"has {name}, but none of the tokenizers read here"):
        open_tokenizer(tmp_path, 320)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "must be token numbers"),
        (
            '{"added_tokens_decoder": {"1": 3}}',
            r"key 'added_tokens_decoder\[...\]' must be an object",
        ),
        ('{"add_bos_token": "yes"}', "key 'add_bos_token' must be true or false, got 'yes'"),
        ("{", "not valid JSON"),
    ],
)
def test_a_config_of_another_form_is_refused(tmp_path, text, message):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_tokenizer(tmp_path, 6)


TEXTS = ["hello world", "  two  spaces\n\nand\ttabs ", "naïve 猫 🙂", "I'll pay 12345 €", "", "a"]
MERGES = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b"  ", b"\n\n"]


def _ranks(folder, name="tiktoken.model", **config):
    tokens = [bytes([b]) for b in range(256)] + MERGES
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    added = {str(len(tokens)): {"content": "<|end|>", "special": True},
             str(len(tokens) + 1): {"content": "<tool>", "special": False}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added} | config)
    )
    return tokens


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model"])
def test_ranks_are_read_as_the_package_reads_them(tmp_path, name):
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken (extra 'text')")
    tokens = _ranks(tmp_path, name)
    peer = tiktoken.Encoding(
        "peer",
        pat_str=CL100K,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={"<|end|>": 267, "<tool>": 268},
    )
    tokenizer = open_tokenizer(tmp_path, 269)
    for text in TEXTS:
        assert tokenizer.encode(text) == peer.encode(text, allowed_special="all")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("hello<|end|> world<tool>") == [259, 267, 264, 268]
    assert tokenizer.decode([259, 267, 264, 268]) == "hello world<tool>"
    assert tokenizer.decode([999]) == "<999>"
    assert tokenizer.decode([0xE7]) == "\ufffd"


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_ranks_are_read_as_transformers_reads_them(tmp_path):
    pytest.importorskip("tiktoken", reason="needs tiktoken (extra 'text')")
    converter = pytest.importorskip("transformers.convert_slow_tokenizer")
    _ranks(tmp_path)
    peer = converter.TikTokenConverter(vocab_file=str(tmp_path / "tiktoken.model")).converted()
    tokenizer = open_tokenizer(tmp_path, 269)
    for text in TEXTS:
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False).ids


def test_kimi_cuts_text_its_own_way_and_reserves_tokens(tmp_path):
    pytest.importorskip("tiktoken", reason="needs tiktoken (extra 'text')")
    _ranks(tmp_path, tokenizer_class="TikTokenTokenizer")
    tokenizer = open_tokenizer(tmp_path, 523)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|reserved_token_300|>") == [300]
    assert tokenizer.encode("<|end|>") == [267]
    assert tokenizer.decode([300, 259]) == "hello"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"aGU= 0\n!!! 1\n", "line 2 is no token"),
        (b"aGU= 0\n", "a rank comes twice, or a byte has none"),
        (b"aGU= 0\naGU 1\n", "line 2 is no token"),
        (b"\x00\x01\x02", "neither a SentencePiece nor a tiktoken model"),
        (b"", "neither a SentencePiece nor a tiktoken model"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, text, message):
    pytest.importorskip("tiktoken", reason="needs tiktoken (extra 'text')")
    pytest.importorskip("sentencepiece", reason="needs sentencepiece (extra 'text')")
    (tmp_path / "tokenizer.model").write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        open_tokenizer(tmp_path, 320)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "text"), [("tiktoken", b"aGU= 0\n"), ("sentencepiece", b"\x0a\x05")]
)
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package, text):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "tokenizer.model").write_bytes(text)
    with pytest.raises(ValueError, match=f"needs {package}.*: pip install 'cmjax.text.'"):
        open_tokenizer(tmp_path, 320)


CORPUS = ["the cat sat on the mat", "a cat and a dog sat", "hello hello world", "naïve 12 13"] * 20


def sentencepiece_peer(model):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def sentencepiece_model():
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_models_are_read_as_transformers_reads_them(
    tmp_path, sentencepiece_model, legacy
):
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'test')")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    config = {
        "tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True},
            "2": {"content": "</s>", "special": True},
            "300": {"content": "<call>", "special": False},
        },
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    peer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    tokenizer = open_tokenizer(tmp_path, 301)
    chat = ["<s>[INST] the cat [/INST] sat</s>hello", "<s>the cat</s>a dog", "hello<call>world"]
    own = sentencepiece_peer(sentencepiece_model)
    for text in TEXTS:
        assert tokenizer.encode(text, special=False) == own.encode(text)
    # before a space, transformers leaves out the space that SentencePiece puts before every text
    for text in [*(text for text in TEXTS if not text.startswith(" ")), *chat]:
        want = peer(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, special=False) == want, text
        assert encode_prompt(tokenizer, text)[0] == 1
        if text not in chat:
            assert tokenizer.encode(text) == peer(text).input_ids
            assert tokenizer.decode(tokenizer.encode(text)) == peer.decode(
                want, skip_special_tokens=True
            ), text
