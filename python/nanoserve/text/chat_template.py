"""A checkpoint's chat template: messages to the prompt text the model was trained on.

The string equals transformers' apply_chat_template(tokenize=False) for the same files and messages. It holds its special tokens
as text: encode it with add_special_tokens=False.

Messages come from users. They are copied into plain JSON data with limits before the template sees them, and the template
runs with limits (template_budget.py): whatever either holds, render() ends with a text or a ValueError, soon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2 import nodes

from nanoserve.checkpoint_json import is_text, read_limited, read_object
from nanoserve.checks import shown, truth
from nanoserve.errors import CheckpointError
from nanoserve.text.chat_messages import checked_messages, plain_data
from nanoserve.text.special_tokens import CONFIG_FILE, MAX_CONFIG_BYTES
from nanoserve.text.template_budget import MAX_TEXT_CHARS, Budget, TooExpensive, current
from nanoserve.text.template_rewrite import TemplateRefused
from nanoserve.text.template_sandbox import compile_template

MAX_TEMPLATE_BYTES = 2**20
MAX_OUTPUT_BYTES = MAX_TEXT_CHARS  # of UTF-8
JINJA_FILE = "chat_template.jinja"
JSON_FILE = "chat_template.json"
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


class NamesSpecialTokens(Protocol):
    """The part of a tokenizer a template sees."""

    @property
    def special_tokens(self) -> dict[str, str]: ...


class ChatTemplate:
    """A compiled template. Safe to render from several threads.

    Args:
        source: jinja text.
        special_tokens: variables such as bos_token.
        tool_source: a template of its own for conversations with tools, as some checkpoints have.
        origin: the file it came from, for messages.

    Raises:
        CheckpointError: too large, not valid jinja, or it uses what the sandbox does not have.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        tool_source: str | None = None,
        origin: str = JINJA_FILE,
    ) -> None:
        self.source, self.tool_source = source, tool_source
        self._special_tokens = dict(special_tokens or {})
        self._template, self.takes_parts = _compiled(origin, source)
        self._tool_template, self._tool_takes_parts = self._template, self.takes_parts
        if tool_source is not None:
            self._tool_template, self._tool_takes_parts = _compiled(origin, tool_source)

    @classmethod
    def load(cls, directory: Path, tokenizer: NamesSpecialTokens) -> ChatTemplate | None:
        """The template of a checkpoint directory: chat_template.jinja, else tokenizer_config.json's, else chat_template.json's.

        Returns:
            None when there is none.

        Raises:
            CheckpointError: naming the file.
        """
        directory = Path(directory)
        data = read_limited(directory / JINJA_FILE, MAX_TEMPLATE_BYTES)
        if data is not None:
            try:
                return cls(data.decode("utf-8"), tokenizer.special_tokens)
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{JINJA_FILE}: not UTF-8") from error
        for file in (CONFIG_FILE, JSON_FILE):
            value = read_object(directory / file, MAX_CONFIG_BYTES, optional=True).get("chat_template")
            if value is not None:
                source, tool_source = _choose(file, value)
                return cls(source, tokenizer.special_tokens, tool_source=tool_source, origin=file)
        return None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text.

        Args:
            messages: {"role", "content", ...}; content is text, None, or a list of {"type": "text", "text"} parts. Parts are
                passed on to a template that loops over them and joined with newlines for one that does not.
            add_generation_prompt: end with the header of an assistant message.
            tools: JSON schemas.
            extra: further variables, as enable_thinking.

        Raises:
            ValueError: naming the message and field, or with the template's own words (raise_exception), or a limit.
        """
        truth("add_generation_prompt", add_generation_prompt)
        for name in extra:
            if name in _RESERVED or name.startswith("_"):
                raise ValueError(f"{shown(name)}: not a variable that can be given to a chat template")
        takes_parts = self.takes_parts if tools is None else self._tool_takes_parts
        variables = {
            **self._special_tokens,
            **{name: plain_data(name, value) for name, value in extra.items()},
            "messages": checked_messages(messages, keep_parts=takes_parts),
            "tools": None if tools is None else _checked_tools(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return _rendered(self._template if tools is None else self._tool_template, variables)


def _rendered(template: jinja2.Template, variables: dict[str, Any]) -> str:
    token = current.set(Budget())
    try:
        text = "".join(template.generate(variables))
        size = len(text.encode("utf-8"))
    except TooExpensive as error:
        raise ValueError(f"chat template: {error}") from None
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: {shown_message(error)}") from None
    except UnicodeEncodeError:
        raise ValueError("chat template: made text that is not Unicode (half of a surrogate pair)") from None
    except (Exception, MemoryError) as error:
        # Python's own words may hold internals; the kind of error says enough: a TypeError is mostly a missing content.
        raise ValueError(f"chat template: failed on these messages ({type(error).__name__})") from None
    finally:
        current.reset(token)
    if size > MAX_OUTPUT_BYTES:
        raise ValueError(f"chat template: makes {size} bytes, at most {MAX_OUTPUT_BYTES} are allowed")
    return text


def shown_message(error: jinja2.TemplateError) -> str:
    """The error's own words, cut to a length that fits an answer."""
    message = error.message or type(error).__name__
    return message if len(message) <= 500 else message[:497] + "..."


def _checked_tools(tools: object) -> list[Any]:
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools: {shown(tools)} must be a list of objects")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools[{i}]: {shown(tool)} must be an object")
    plain: list[Any] = plain_data("tools", list(tools))
    return plain


def _choose(file: str, value: object) -> tuple[str, str | None]:
    """(the default template, the one for tools or None) of a `chat_template` field."""
    if isinstance(value, str):
        return value, None
    named: dict[str, str] = {}
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        name, source = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(source, str):
            raise CheckpointError(
                f"{file}: chat_template[{i}]: must be a string, or objects with name and template"
            )
        named[name] = source
    if "default" not in named:
        raise CheckpointError(f"{file}: chat_template: none of {shown(sorted(named))} is named 'default'")
    return named["default"], named.get("tool_use")


def _compiled(origin: str, source: str) -> tuple[jinja2.Template, bool]:
    """(the template, whether it loops over a message's content)."""
    if not is_text(source):
        raise CheckpointError(f"{origin}: chat_template: not Unicode text")
    if len(source.encode("utf-8")) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{origin}: chat_template: larger than the limit of {MAX_TEMPLATE_BYTES} bytes")
    try:
        template = compile_template(source)
        return template, _loops_over_content(template.environment.parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{origin}: chat_template: line {error.lineno}: {shown_message(error)}"
        ) from None
    except TemplateRefused as error:
        raise CheckpointError(f"{origin}: chat_template: {error}") from None
    except (Exception, MemoryError) as error:  # nested too deep for the parser or the compiler
        raise CheckpointError(
            f"{origin}: chat_template: cannot be compiled ({type(error).__name__})"
        ) from None


def _loops_over_content(tree: nodes.Template) -> bool:
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, set()):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
