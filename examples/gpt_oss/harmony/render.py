"""Conversation -> ids, ready for the model to continue.

Control tokens come from here alone; every word of a message is encoded as ordinary text.

The format is that of https://github.com/openai/harmony/blob/main/docs/format.md. As written there,
a past tool call puts the recipient after the channel (`assistant<|channel|>commentary
to=functions.f <|constrain|>json`), a tool result before it (`functions.f
to=assistant<|channel|>commentary`).
"""

import itertools
from collections.abc import Iterable, Sequence

from gpt_oss.harmony.messages import Conversation, DeveloperConfig, Message, SystemConfig
from gpt_oss.harmony.schema import render_tools
from gpt_oss.tokenizer import Tokenizer


def render_conversation(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation, up to and including `<|start|>assistant`.

    Reasoning of finished turns is left out, see `drop_past_reasoning`.

    Raises:
      ValueError: a message has raw_ids that are not one whole assistant message.
    """
    with_functions = any(
        isinstance(message.content, DeveloperConfig) and message.content.tools
        for message in conversation
    )
    ids: list[int] = []
    for message in drop_past_reasoning(conversation.messages):
        ids += render_message(message, tokenizer, with_functions=with_functions)
    return [*ids, tokenizer.control.start, *tokenizer.encode("assistant")]


def drop_past_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Without the analysis messages that precede the last `final` message of the assistant.

    A turn without an answer yet (it stands at a tool call, say) keeps its reasoning.
    """
    answers = [i for i, m in enumerate(messages) if m.role == "assistant" and m.channel == "final"]
    last = answers[-1] if answers else -1
    return [m for i, m in enumerate(messages) if m.channel != "analysis" or i > last]


def render_message(
    message: Message, tokenizer: Tokenizer, *, with_functions: bool = False
) -> list[int]:
    """The ids of one message, from `<|start|>` to `<|end|>` (`<|call|>` after a tool call).

    Args:
      message: the message; its raw_ids, if any, are used as they are.
      tokenizer: turns the text into ids.
      with_functions: the conversation has function tools; the system message then says so.

    Raises:
      ValueError: raw_ids are not one whole assistant message.
    """
    if message.raw_ids is not None:
        return _replay(message, message.raw_ids, tokenizer)
    control = tokenizer.control
    end = control.call if _is_call(message) else control.end
    content = tokenizer.encode(_text(message.content, with_functions))
    return [control.start, *_header(message, tokenizer), control.message, *content, end]


def _is_call(message: Message) -> bool:
    return message.role == "assistant" and message.recipient is not None


def _header(message: Message, tokenizer: Tokenizer) -> list[int]:
    author = message.role if message.name is None else f"{message.role}:{message.name}"
    if message.role == "tool":
        author = str(message.name)
    recipient = "" if message.recipient is None else f" to={message.recipient}"
    recipient_in_channel = _is_call(message) and message.channel is not None
    ids = tokenizer.encode(author if recipient_in_channel else author + recipient)
    if message.channel is not None:
        words = message.channel + recipient if recipient_in_channel else message.channel
        ids += [tokenizer.control.channel, *tokenizer.encode(words)]
    if message.content_type is not None:
        constrain = tokenizer.control.constrain
        ids += [*tokenizer.encode(" "), constrain, *tokenizer.encode(message.content_type)]
    return ids


def _text(content: str | SystemConfig | DeveloperConfig, with_functions: bool) -> str:
    if isinstance(content, SystemConfig):
        return _system_text(content, with_functions)
    if isinstance(content, DeveloperConfig):
        return _developer_text(content)
    return content


def _system_text(config: SystemConfig, with_functions: bool) -> str:
    about = {
        "": config.model_identity,
        "Knowledge cutoff: ": config.knowledge_cutoff,
        "Current date: ": config.current_date,
    }
    sections = ["\n".join(label + value for label, value in about.items() if value is not None)]
    if config.reasoning_effort is not None:
        sections.append(f"Reasoning: {config.reasoning_effort}")
    if config.valid_channels:
        channels = f"# Valid channels: {', '.join(config.valid_channels)}."
        channels += " Channel must be included for every message."
        if with_functions:
            channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(channels)
    return "\n\n".join(section for section in sections if section)


def _developer_text(config: DeveloperConfig) -> str:
    sections = []
    if config.instructions is not None:
        sections.append(f"# Instructions\n\n{config.instructions}")
    if config.tools:
        sections.append(f"# Tools\n\n{render_tools(config.tools)}")
    return "\n\n".join(sections)


def _replay(message: Message, raw_ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """The ids that the model wrote, made whole: begun with its role, ended as history ends.

    `<|return|>` stops sampling and does not stand in a history; it becomes `<|end|>`.
    """
    control = tokenizer.control
    ids = list(raw_ids)
    if ids[:1] != [control.start]:
        ids = [control.start, *tokenizer.encode("assistant"), *ids]
    if ids[-1] in control.stop_ids - {control.call}:
        ids[-1] = control.end
    elif ids[-1] not in (control.end, control.call):
        ids.append(control.call if _is_call(message) else control.end)
    _check_replay(ids, tokenizer)
    return ids


def _check_replay(ids: list[int], tokenizer: Tokenizer) -> None:
    """Ids that held a second message would let one message speak for another role."""
    control = tokenizer.control
    inner = ids[1:-1]
    body = inner.index(control.message) if control.message in inner else len(inner)
    header, content = inner[:body], inner[body + 1 :]
    author = itertools.takewhile(tokenizer.is_text, header)
    role, *others = tokenizer.decode(author).split() or [""]
    allowed = (control.channel, control.constrain)
    sound = (
        body < len(inner)
        and role.partition(":")[0] == "assistant"
        and all(word.startswith("to=") for word in others)
        and all(tokenizer.is_text(i) or i in allowed for i in header)
        and all(tokenizer.is_text(i) for i in content)
    )
    if not sound:
        raise ValueError(
            "expected raw_ids of one whole assistant message (header, <|message|>, text, end); "
            "leave raw_ids out to render the message from its text"
        )
