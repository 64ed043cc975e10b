"""The harmony chat format of gpt-oss: messages, rendering to ids, a parser that never raises.

Specification: https://github.com/openai/harmony/blob/main/docs/format.md
"""

from gpt_oss.harmony.header import Damage, Header
from gpt_oss.harmony.messages import (
    Conversation,
    DeveloperConfig,
    Message,
    SystemConfig,
    Tool,
    tool_call,
    tool_result,
)
from gpt_oss.harmony.parser import (
    Delta,
    ParsedMessage,
    Parser,
    parse_completion,
    parse_transcript,
)
from gpt_oss.harmony.render import drop_past_reasoning, render_conversation, render_message

__all__ = [
    "Conversation",
    "Damage",
    "Delta",
    "DeveloperConfig",
    "Header",
    "Message",
    "ParsedMessage",
    "Parser",
    "SystemConfig",
    "Tool",
    "drop_past_reasoning",
    "parse_completion",
    "parse_transcript",
    "render_conversation",
    "render_message",
    "tool_call",
    "tool_result",
]
