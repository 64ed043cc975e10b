"""Training chats in the harmony format: their token ids, the mask for the loss, and rows of them.

A chat has a system message with a date and a reasoning effort, sometimes a developer message, user
messages, and the assistant's answer, which may think in the analysis channel and speaks in the
final channel. Only the last answer counts for the loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from gpt_oss.nano.vocabulary import END_OF_TEXT, encode_text, token_id

CONTEXT = 512
EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Turn:
    """One request and its answer.

    Attributes:
      user: what the user says.
      thought: the text of the analysis channel, or "" for an answer without one.
      answer: the text of the final channel.
      source: whose manner the answer has (a key of `phrases.HOW`), or "" for nano's own.
    """

    user: str
    thought: str
    answer: str
    source: str = ""


@dataclass(frozen=True)
class Chat:
    """A conversation; only the last turn's answer counts for the loss.

    Attributes:
      kind: what sort of request it begins with.
      date: current date of the system message, YYYY-MM-DD.
      effort: reasoning effort, one of `EFFORTS`.
      instructions: text of the developer message, or "" for none.
      turns: the turns, oldest first, at least one.
    """

    kind: str
    date: str
    effort: str
    instructions: str
    turns: tuple[Turn, ...]


def system_text(date: str, effort: str) -> str:
    """The system message's content, which is what a gpt-oss chat without tools begins with."""
    return (
        "You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n"
        f"Current date: {date}\n\n"
        f"Reasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. "
        "Channel must be included for every message."
    )


def scaffold() -> list[str]:
    """Texts that come in every chat but hardly in the corpus; the vocabulary should know them."""
    return [system_text("2025-06-28", effort) for effort in EFFORTS] + ["# Instructions\n\n"]


def segments(chat: Chat) -> Iterator[tuple[str, str, bool]]:
    """(control token or "", text, counts for the loss) in order; past thoughts are dropped.

    A finished answer ends in <|return|> while it is the last one and in <|end|> as history.
    """

    def message(header: str, text: str, end: str, channel: str = "", target: bool = False):
        yield "<|start|>", "", False
        yield "", header, False
        if channel:
            yield "<|channel|>", "", target
            yield "", channel, target
        yield "<|message|>", "", target
        yield "", text, target
        yield end, "", target

    yield from message("system", system_text(chat.date, chat.effort), "<|end|>")
    if chat.instructions:
        yield from message("developer", f"# Instructions\n\n{chat.instructions}", "<|end|>")
    for turn in chat.turns[:-1]:
        yield from message("user", turn.user, "<|end|>")
        yield from message("assistant", turn.answer, "<|end|>", "final")
    last = chat.turns[-1]
    yield from message("user", last.user, "<|end|>")
    if last.thought:
        yield from message("assistant", last.thought, "<|end|>", "analysis", target=True)
        yield "<|start|>", "", True
        yield "", "assistant", True
        final = list(message("assistant", last.answer, "<|return|>", "final", target=True))
        yield from final[2:]
    else:
        yield from message("assistant", last.answer, "<|return|>", "final", target=True)


def text_form(chat: Chat) -> str:
    """The chat as one string, control tokens written out."""
    return "".join(control + text for control, text, _ in segments(chat))


def encode(chat: Chat, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(token ids, mask), equally long; mask 1 marks the tokens that the model must learn to say.

    Text is encoded piece by piece between control tokens, as a renderer does, so that no text can
    stand for a control token.
    """
    ids: list[int] = []
    mask: list[int] = []
    for control, text, target in segments(chat):
        if control:
            new = [token_id(tokenizer, control)]
        else:
            new = encode_text(tokenizer, text)
        ids += new
        mask += [int(target)] * len(new)
    return ids, mask


def pack(
    chats: Sequence[tuple[list[int], list[int]]], tokenizer: Tokenizer, width: int = CONTEXT
) -> dict[str, np.ndarray]:
    """Packs whole chats into rows, first fit over open rows; the rest of a row is <|endoftext|>.

    Returns:
      ids uint16 [rows, width]; mask uint8 [rows, width], 1 where the token at that place is a
      target (predicted from the tokens before it); segment uint8 [rows, width], 1, 2, ... for
      the row's chats and 0 for padding.

    Raises:
      ValueError: a chat is longer than a row.
    """
    rows: list[list[int]] = []
    used: list[int] = []
    open_rows: list[int] = []
    for number, (ids, _) in enumerate(chats):
        if len(ids) > width:
            raise ValueError(f"chat {number} has {len(ids)} tokens, more than a row of {width}")
        row = next((r for r in open_rows if used[r] + len(ids) <= width), None)
        if row is None:
            row = len(rows)
            rows.append([])
            used.append(0)
            open_rows = [*open_rows[-63:], row]
        rows[row].append(number)
        used[row] += len(ids)
    packed = {
        "ids": np.full((len(rows), width), token_id(tokenizer, END_OF_TEXT), np.uint16),
        "mask": np.zeros((len(rows), width), np.uint8),
        "segment": np.zeros((len(rows), width), np.uint8),
    }
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, 1):
            ids, mask = chats[number]
            place = slice(start, start + len(ids))
            packed["ids"][row, place] = ids
            packed["mask"][row, place] = mask
            packed["segment"][row, place] = segment
            start += len(ids)
    return packed
