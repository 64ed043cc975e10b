"""The header of a message as a model wrote it, read with the indulgence that sampled text needs.

A header has up to three sections, `role<|channel|>channel<|constrain|>type`, each of them words.
The recipient, `to=...`, may stand in any section. What cannot be read is left out and reported.
"""

import dataclasses
import enum

from gpt_oss.harmony.messages import CHANNELS, ROLES, Role, is_word


class Damage(enum.StrEnum):
    """Ways in which model output departs from the format; the parser reads on after each."""

    TEXT_OUTSIDE_MESSAGE = "text outside a message"
    UNKNOWN_ROLE = "unknown or missing role"
    UNKNOWN_CHANNEL = "unknown or missing channel"
    UNREADABLE_HEADER = "unreadable word in a header"
    MISSING_START = "message without <|start|>"
    MISSING_END = "message without <|end|>"
    UNFINISHED_HEADER = "header without <|message|>"
    STRAY_CONTROL = "control token without meaning here"
    UNKNOWN_ID = "id without meaning"
    TRAILING = "ids after the end of the reply"


@dataclasses.dataclass(frozen=True)
class Header:
    """Who speaks to whom, and where; the fields mean what they mean in Message."""

    role: Role
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


OUTSIDE = Header("assistant", "analysis")
"""The header given to text that stands outside every message: reasoning, so no user sees it."""


class HeaderReader:
    """Collects the sections of one header and reads them.

    Attributes:
      text: the bytes of all sections in their order, without the control tokens.
      length: the number of text tokens.
      damage: what was wrong.

    Args:
      transcript: any role may speak; else only the assistant may, and another role's message counts
        as the assistant's reasoning.
      begun: `<|start|>` was seen, so a role must follow; else the assistant speaks if none does.
      role_written: the role is known to be `assistant`, and the role section goes on after it.
    """

    def __init__(self, *, transcript: bool, begun: bool, role_written: bool):
        self.begun = begun
        self._transcript = transcript
        self._role_written = role_written
        self._sections: dict[str, bytearray] = {"role": bytearray()}
        self._section = self._sections["role"]
        self.text = bytearray()
        self.damage: set[Damage] = set()
        self.length = 0

    @property
    def has_channel(self) -> bool:
        """Whether `<|channel|>` was seen."""
        return "channel" in self._sections

    @property
    def holds_text(self) -> bool:
        """Whether it has words that belong to no header, such as an answer without any."""
        words = self.text.decode("utf-8", "replace").split()
        return any(w not in (*ROLES, *CHANNELS) and not w.startswith("to=") for w in words)

    def add(self, piece: bytes) -> None:
        """Adds the bytes of one text token to the current section."""
        self.length += 1
        self._section += piece
        self.text += piece

    def begin_section(self, name: str) -> None:
        """Begins the section `channel` or `constrain`; the last one of a kind counts."""
        if name in self._sections or "constrain" in self._sections:
            self.damage.add(Damage.UNREADABLE_HEADER)
        self._section = self._sections[name] = bytearray()

    def read(self) -> Header:
        """The header; what was wrong with it is in `damage` afterwards."""
        words = {name: bytes(s).decode("utf-8", "replace") for name, s in self._sections.items()}
        if self._role_written and words["role"][:1].strip():
            self.damage.add(Damage.UNREADABLE_HEADER)
        recipients: list[str] = []
        role, channel, constrain = (
            self._plain_words(words.get(name, ""), recipients)
            for name in ("role", "channel", "constrain")
        )
        types = channel[1:] + constrain
        if len(recipients) > 1 or len(types) > 1:
            self.damage.add(Damage.UNREADABLE_HEADER)
        header = Header(
            "assistant",
            channel[0] if channel else None,
            recipients[-1] if recipients else None,
            types[-1] if types else None,
        )
        return self._with_channel(self._with_role(header, role))

    def _plain_words(self, section: str, recipients: list[str]) -> list[str]:
        """The words that are not a recipient; recipients go to the list."""
        plain = []
        for word in section.split():
            is_recipient = word.startswith("to=")
            value = word.removeprefix("to=") if is_recipient else word
            if not is_word(value):
                self.damage.add(Damage.UNREADABLE_HEADER)
                continue
            (recipients if is_recipient else plain).append(value)
        return plain

    def _with_role(self, header: Header, words: list[str]) -> Header:
        if self._role_written or not (self.begun or words):
            words = ["assistant", *words]
        if len(words) > 1:
            self.damage.add(Damage.UNREADABLE_HEADER)
        author = words[0] if words else ""
        role, colon, name = author.partition(":")
        known = role in ROLES and role != "tool" and (is_word(name) or not colon)
        if self._transcript and author and (known or role not in ROLES):
            if known:
                return dataclasses.replace(header, role=role, name=name or None)
            return dataclasses.replace(header, role="tool", name=author)
        if author != "assistant":
            self.damage.add(Damage.UNKNOWN_ROLE)
            return dataclasses.replace(header, channel="analysis")
        return header

    def _with_channel(self, header: Header) -> Header:
        if header.role != "assistant" or header.channel in CHANNELS:
            return header
        self.damage.add(Damage.UNKNOWN_CHANNEL)
        return dataclasses.replace(header, channel="commentary")
