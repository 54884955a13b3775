"""Chats as prompts, by the template that a checkpoint brings along.

A template is a Jinja program by a stranger. It runs as in transformers' `apply_chat_template`: in
Jinja's sandbox for immutable values, on plain copies of the messages.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmjax.inputs import read_text
from cmjax.models.moe.checkpoint.json_file import read_object
from cmjax.models.moe.generation.tokenizer_config import FILE, read_tokenizer_config

Message = Mapping[str, Any]
_OLDEST_JINJA = (3, 1, 6)  # older sandboxes have known ways out


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a chat is written as one text.

    Fields:
      source: the template. path: where it is from, for messages. special_tokens: by role, as the
        template names them (`bos_token`).
    """

    source: str
    path: Path
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The text of a chat; its special tokens are in it, so encode it with `special=False`.

            >>> chat = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}"
            ...                     "{% endfor %}", Path("chat_template.jinja"))
            >>> chat.render([{"role": "user", "content": "Hi"}])
            '<user>Hi'

        Args:
          messages: each with `role` and `content`, and what else the template knows.
          add_generation_prompt: whether the text goes on with what begins an answer.
          options: what else the template knows: `tools`, `enable_thinking`.
        Raises: ValueError: a template that is wrong or refuses these messages; or Jinja is not
          installed.
        """
        template = self._compiled()
        given = {"tools": None, "documents": None} | dict(self.special_tokens) | options
        try:
            # copies of plain values: templates see no objects of the caller
            plain = json.loads(json.dumps([_without_none(m) for m in messages]))
            return template.render(
                messages=plain,
                add_generation_prompt=add_generation_prompt,
                **json.loads(json.dumps(given)),
            )
        except Exception as error:  # a template can fail in any way
            reason = " ".join(str(error).split()) or "no reason given"
            raise ValueError(
                f"{self.path}: the chat template fails on these messages: {reason} "
                f"({type(error).__name__})"
            ) from None

    def _compiled(self) -> Any:
        environment = _environment(self.path)
        try:
            return environment.from_string(self.source)
        except Exception as error:  # a syntax error, or a RecursionError
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path}: not a chat template ({reason})") from None


def read_chat_template(folder: str | Path, name: str = "default") -> ChatTemplate:
    """The chat template of a checkpoint folder: its chat_template.jinja, else its
    chat_template.json, else that of its tokenizer_config.json.

    Args:
      name: which, where it has several.
    Raises: ValueError: it has none, or none of that name.
    """
    folder = Path(folder)
    config = read_tokenizer_config(folder)
    path = folder / FILE
    templates = dict(config.templates)
    if (file := folder / "chat_template.json").exists():
        found = read_object(file).get("chat_template")
        if not isinstance(found, str):
            raise ValueError(f"{file}: key 'chat_template' must be a string, got {found!r}")
        path, templates["default"] = file, found
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (file := files.get(name)) is not None and file.exists():
        path, templates[name] = file, read_text(file)
    if name not in templates:
        others = f"; it has {', '.join(sorted(templates))}" if templates else ""
        raise ValueError(
            f"{folder}: no chat template{'' if name == 'default' else f' {name!r}'} in "
            f"chat_template.jinja or {FILE}{others}; give prompts as they are"
        )
    return ChatTemplate(templates[name], path, config.special_tokens)


def _without_none(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _environment(path: Path) -> Any:
    """Jinja's sandbox with what transformers gives a template."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(f"{path}: chat templates need jinja2: pip install 'cmjax[text]'") from None
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < _OLDEST_JINJA:
        raise ValueError(
            f"{path}: chat templates need jinja2 3.1.6 or later, got {jinja2.__version__}: "
            "pip install 'cmjax[text]'"
        )

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the model said, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's, without names that Python keeps for itself."""

        def __init__(*args, **kwargs):
            self, *rest = args
            given = dict(*rest, **kwargs)
            for name in given:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name, value):
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
    }
    return environment
