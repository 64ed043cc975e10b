"""What a harmony conversation is made of: plain frozen data, checked when it is made.

A message has a header (role, name, recipient, channel, content type) and a content. Header words go
into the prompt next to control tokens, so they may hold neither spaces nor anything that could read
as another role.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

Role = Literal["system", "developer", "user", "assistant", "tool"]
ReasoningEffort = Literal["low", "medium", "high"]

ROLES: tuple[str, ...] = get_args(Role)
CHANNELS = ("analysis", "commentary", "final")
"""analysis: reasoning, not for users; commentary: tool calls and preambles; final: the answer."""

_WORD = re.compile(r"[^\s\x00-\x1f\x7f]{1,256}")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that the model may call; callers address it as `functions.<name>`."""

    name: str
    """Letters, digits, `_`, `.` and `-`, at most 128."""
    description: str = ""
    """What it does, for the model."""
    parameters: Mapping[str, Any] | None = None
    """JSON schema of its one argument; None: it takes none."""

    def __post_init__(self):
        if not _TOOL_NAME.fullmatch(self.name):
            raise ValueError(
                "expected a tool name of 1 to 128 letters, digits, '_', '.' and '-', "
                f"got {self.name!r}"
            )
        if self.parameters is not None and not isinstance(self.parameters, Mapping):
            raise ValueError(
                f"tool {self.name!r}: expected parameters as a JSON schema object or None, "
                f"got {type(self.parameters).__name__}"
            )


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Content of the system message. A field that is None or empty leaves its line out."""

    model_identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    """The first line; the released models were trained with this one."""
    knowledge_cutoff: str | None = "2024-06"
    """The month after which the model knows nothing."""
    current_date: str | None = None
    """Today, as YYYY-MM-DD."""
    reasoning_effort: ReasoningEffort | None = "medium"
    """How long the model thinks."""
    valid_channels: tuple[str, ...] = CHANNELS
    """The channels that the model may write to."""

    def __post_init__(self):
        if self.reasoning_effort not in (None, *get_args(ReasoningEffort)):
            raise ValueError(
                "expected reasoning_effort low, medium, high or None, "
                f"got {self.reasoning_effort!r}"
            )


@dataclasses.dataclass(frozen=True)
class DeveloperConfig:
    """Content of the developer message: what others call the system prompt, and the tools."""

    instructions: str | None = None
    """Free text; None leaves the section out."""
    tools: tuple[Tool, ...] = ()
    """The functions on offer."""

    def __post_init__(self):
        names = [tool.name for tool in self.tools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected distinct tool names, got {twice} more than once")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message.

    Raises:
      ValueError: a field that its role does not allow, or a header word with spaces in it.
    """

    role: Role
    """Who speaks."""
    content: str | SystemConfig | DeveloperConfig
    """Text; the configs belong to the system and the developer message only."""
    channel: str | None = None
    """Where an assistant message goes, see CHANNELS."""
    recipient: str | None = None
    """Whom it addresses: `functions.<name>` in a tool call, `assistant` in a tool result."""
    content_type: str | None = None
    """Of a tool call: `json`, or `code`."""
    name: str | None = None
    """Of a tool message: the tool, as the call addressed it. Optional for the others."""
    raw_ids: tuple[int, ...] | None = None
    """The ids as the model wrote them, from the header to the last id, rendered instead of its
    text, which turned into ids again may give others. Only for assistant messages."""

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"expected a role of {', '.join(ROLES)}, got {self.role!r}")
        for field in ("channel", "recipient", "content_type", "name"):
            _check_word(field, getattr(self, field))
        self._check_content()
        if self.role == "tool":
            _check_tool_name(self.name)
        if self.raw_ids is not None and self.role != "assistant":
            raise ValueError(f"expected raw_ids on assistant messages only, got one of {self.role}")

    def _check_content(self) -> None:
        allowed: dict[str, type] = {"system": SystemConfig, "developer": DeveloperConfig}
        if isinstance(self.content, str | allowed.get(self.role, str)):
            return
        raise ValueError(
            f"expected text{' or ' + allowed[self.role].__name__ if self.role in allowed else ''} "
            f"as the content of a {self.role} message, got {type(self.content).__name__}"
        )


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages from the oldest to the newest."""

    messages: tuple[Message, ...] = ()
    """All of them; usually the system message comes first, then the developer message."""

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)

    def with_messages(self, *messages: Message) -> "Conversation":
        """This conversation with more messages at its end."""
        return Conversation((*self.messages, *messages))


def tool_call(name: str, arguments: str) -> Message:
    """The assistant's call of the function `name` with `arguments`, a JSON text."""
    return Message("assistant", arguments, "commentary", f"functions.{name}", "json")


def tool_result(name: str, output: str) -> Message:
    """What the function `name` gave back."""
    return Message("tool", output, "commentary", "assistant", name=f"functions.{name}")


def is_word(text: str) -> bool:
    """Whether `text` can stand in a header: 1 to 256 characters, neither space nor control."""
    return _WORD.fullmatch(text) is not None


def _check_word(field: str, word: str | None) -> None:
    if word is not None and not (isinstance(word, str) and is_word(word)):
        raise ValueError(
            f"expected {field} as one word of at most 256 characters without spaces, got {word!r}"
        )


def _check_tool_name(name: str | None) -> None:
    """A tool's name stands where the role stands, so it must not read as a role."""
    if name is None:
        raise ValueError("expected a tool message to have a name, such as functions.get_weather")
    if name.split(":")[0] in ROLES or name.startswith("to="):
        raise ValueError(f"a tool named {name!r} would read as a message header; rename it")
