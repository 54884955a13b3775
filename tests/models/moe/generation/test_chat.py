"""Chat templates: the text transformers writes, and templates that fail or reach out."""

import json
import sys

import pytest

from cmjax.models.moe.generation.chat import ChatTemplate, read_chat_template

pytest.importorskip("jinja2", reason="needs jinja2 (extra 'text')")

CHATML = """{%- if tools %}
<tools>{{ tools | tojson }}</tools>
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' and not loop.first %}
        {{ raise_exception('System message must be at the beginning.') }}
    {% endif %}
    {% if message.role == 'nobody' %}{% continue %}{% endif %}
<|im_start|>{{ message['role'] }}
    {% generation %}{{ message.content }}{% endgeneration %}<|im_end|>
{% endfor %}
{% set ns = namespace(count=0) %}
{% for m in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}
{{ bos_token }}{{ ns.count }}
{% if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Grüß <b>dich</b> & 猫 \"so\" 'so'"},
    {"role": "nobody", "content": "unseen"},
    {"role": "assistant", "content": "Hi", "tool_calls": None},
]
TOOLS = [{"type": "function", "function": {"name": "<f>", "description": "é"}}]


def _folder(path, template=CHATML, **config):
    raw = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template} | config
    (path / "tokenizer_config.json").write_text(json.dumps(raw), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"enable_thinking": False},
        {"tools": TOOLS},
    ],
)
def test_a_chat_is_the_text_that_transformers_writes(tmp_path, options):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    given = {"add_generation_prompt": True} | options
    want = utils.render_jinja_template(
        [[{k: v for k, v in m.items() if v is not None} for m in MESSAGES]],
        chat_template=CHATML,
        bos_token="<s>",
        eos_token="</s>",
        **given,
    )[0][0]
    got = read_chat_template(_folder(tmp_path)).render(MESSAGES, **options)
    assert got == want
    assert "<s>4" in got
    assert "unseen" not in got


def test_messages_that_a_template_refuses_are_refused_in_its_words(tmp_path):
    template = read_chat_template(_folder(tmp_path))
    with pytest.raises(ValueError, match=r"_config\.json: .*System message must be at the begin"):
        template.render(MESSAGES[1:2] + MESSAGES[:1])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_a=1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ unknown.attribute }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_reaches_out_or_fails_is_one_line(tmp_path, source):
    template = read_chat_template(_folder(tmp_path, source))
    with pytest.raises(ValueError, match="the chat template fails on these messages") as error:
        template.render(MESSAGES)
    assert "\n" not in str(error.value)


def test_a_template_that_is_no_program_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not a chat template"):
        read_chat_template(_folder(tmp_path, "{% for %}")).render(MESSAGES)


def test_the_caller_s_messages_stay_as_they_are(tmp_path):
    messages = [dict(message) for message in MESSAGES]
    read_chat_template(_folder(tmp_path)).render(messages)
    assert messages == MESSAGES


def test_a_file_of_its_own_wins_and_others_have_names(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    _folder(tmp_path, named)
    assert read_chat_template(tmp_path).render(MESSAGES) == "a"
    assert read_chat_template(tmp_path, "rag").render(MESSAGES) == "b"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "c"}')
    assert read_chat_template(tmp_path).render(MESSAGES) == "c"
    (tmp_path / "chat_template.jinja").write_text("d{{ eos_token }}")
    assert read_chat_template(tmp_path).render(MESSAGES) == "d</s>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("e")
    assert read_chat_template(tmp_path, "tool_use").render(MESSAGES) == "e"
    with pytest.raises(ValueError, match=r"no chat template 'x' .*; it has default, rag"):
        read_chat_template(tmp_path, "x")


def test_a_folder_without_a_template_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no chat template in chat_template\.jinja or"):
        read_chat_template(tmp_path)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"need jinja2: pip install 'cmjax\[text\]'"):
        ChatTemplate("a", tmp_path / "chat_template.jinja").render(MESSAGES)
