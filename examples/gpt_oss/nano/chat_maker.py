"""Draws the training chats: requests in many words, answered with real passages of the corpus.

Answers come from the corpus so that a very small model learns to stay with a subject, to keep a
manner, and to end; only what it says of itself is written for it (see `phrases`).
"""

import datetime
import random
from collections.abc import Sequence

from tokenizers import Tokenizer

from gpt_oss.nano import phrases
from gpt_oss.nano.chats import CONTEXT, EFFORTS, Chat, Turn, encode
from gpt_oss.nano.corpus import Document
from gpt_oss.nano.passages import Passage, common_nouns, index_topics, make_passages

_EFFORT_WEIGHTS = (25, 55, 20)
_THINKS = {"low": 0.3, "medium": 0.85, "high": 1.0}
_FIRST_DAY = datetime.date(2024, 7, 1)
_DAYS = 5 * 365


class ChatMaker:
    """Draws chats about the passages of a set of documents.

    Args:
      documents: training documents.
      tokenizer: counts tokens.
      rng: source of every choice.

    Raises:
      ValueError: the documents give no topic with enough passages.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, rng: random.Random):
        self.rng = rng
        self.tokenizer = tokenizer
        self.passages = make_passages(documents, tokenizer, rng)
        self.topics = index_topics(self.passages, [*common_nouns(documents), *phrases.NAMES])
        if not self.topics:
            raise ValueError("expected documents with passages about common topics, found none")
        self.topic_names = list(self.topics)
        self.by_source: dict[str, list[Passage]] = {}
        for passage in self.passages:
            self.by_source.setdefault(passage.source, []).append(passage)
        self.kinds = {
            "about": (36, self._about),
            "question": (12, self._question),
            "styled": (14, self._styled),
            "continue": (12, self._continue),
            "fragment": (12, self._fragment),
            "persona": (9, self._persona),
            "incapable": (5, self._incapable),
        }

    def chat(self) -> Chat:
        """One chat of at most `CONTEXT` tokens."""
        while True:
            chat = self._draw()
            if len(encode(chat, self.tokenizer)[0]) <= CONTEXT:
                return chat

    def _draw(self) -> Chat:
        rng = self.rng
        effort = rng.choices(EFFORTS, _EFFORT_WEIGHTS)[0]
        kind = rng.choices(list(self.kinds), [weight for weight, _ in self.kinds.values()])[0]
        turns = [self.kinds[kind][1](effort)]
        if rng.random() < 0.12:
            turns.append(self._next_turn(turns[0], effort))
        instructions = ""
        if rng.random() < 0.15:
            manner = turns[-1].source if rng.random() < 0.6 else ""
            instructions = rng.choice(phrases.INSTRUCTIONS[manner])
        date = (_FIRST_DAY + datetime.timedelta(rng.randrange(_DAYS))).isoformat()
        return Chat(kind, date, effort, instructions, tuple(turns))

    def _think(self, effort: str, *choices: Sequence[str], **words: str) -> str:
        """A thought from the templates of `choices`, longer at high effort, or "" for none."""
        if self.rng.random() >= _THINKS[effort]:
            return ""
        parts = [self.rng.choice(templates).format(**words) for templates in choices]
        if effort == "high":
            parts.append(self.rng.choice(phrases.THINK_MORE))
        return " ".join(parts)

    def _topic(self) -> tuple[str, str, Passage]:
        """(topic, topic as a user would write it, a passage about it)."""
        rng = self.rng
        topic = rng.choice(self.topic_names)
        written = topic
        if topic.islower() and rng.random() < 0.5:
            written = f"the {topic}"
        return topic, written, self.passages[rng.choice(self.topics[topic])]

    def _ask(self, templates: Sequence[str], **words: str) -> str:
        text = self.rng.choice(templates).format(**words)
        if text[0].islower() and self.rng.random() < 0.5:
            text = text[0].upper() + text[1:]
        return text

    def _about(self, effort: str) -> Turn:
        topic, written, passage = self._topic()
        thought = self._think(effort, phrases.THINK_TOPIC, topic=topic)
        return Turn(self._ask(phrases.ABOUT, topic=written), thought, passage.text, passage.source)

    def _question(self, effort: str) -> Turn:
        topic, written, passage = self._topic()
        thought = self._think(effort, phrases.THINK_TOPIC, topic=topic)
        return Turn(
            self._ask(phrases.QUESTION, topic=written), thought, passage.text, passage.source
        )

    def _styled(self, effort: str) -> Turn:
        source = self.rng.choice(sorted(self.by_source))
        how = self.rng.choice(phrases.HOW[source])
        who = phrases.WHO[source]
        for _ in range(20 if self.rng.random() < 0.75 else 0):
            topic, written, passage = self._topic()
            if passage.source == source:
                if self.rng.random() < 0.4:
                    form = self.rng.choice(phrases.FORMS[source])
                    user = self._ask(phrases.FORMED, form=form, topic=written)
                else:
                    user = self._ask(phrases.STYLED, how=how, topic=written)
                thinks = (phrases.THINK_TOPIC, phrases.THINK_STYLE)
                thought = self._think(effort, *thinks, topic=topic, who=who)
                return Turn(user, thought, passage.text, source)
        user = self._ask(phrases.STYLED_WITHOUT_TOPIC, how=how)
        thought = self._think(effort, phrases.THINK_STYLE, who=who)
        return Turn(user, thought, self.rng.choice(self.by_source[source]).text, source)

    def _any_passage(self, followed: bool = False) -> Passage:
        """A passage of a source drawn evenly, so that the speeches do not crowd out the rest."""
        while True:
            passage = self.rng.choice(self.by_source[self.rng.choice(sorted(self.by_source))])
            if passage.following or not followed:
                return passage

    def _continue(self, effort: str) -> Turn:
        passage = self._any_passage(followed=True)
        user = self.rng.choice(phrases.CONTINUE).format(text=passage.text)
        thought = self._think(effort, phrases.THINK_CONTINUE)
        return Turn(user, thought, passage.following, passage.source)

    def _fragment(self, effort: str) -> Turn:
        passage = self._any_passage()
        line = passage.text.split("\n")[0].split(" ")
        first = " ".join(line[: self.rng.randint(2, 9)])
        user = self.rng.choice(phrases.FRAGMENT).format(text=first)
        return Turn(user, self._think(effort, phrases.THINK_FRAGMENT), passage.text, passage.source)

    def _persona(self, effort: str) -> Turn:
        users, answers = self.rng.choices(
            (
                (phrases.GREETINGS, phrases.GREETING_REPLIES),
                (phrases.PERSONA, phrases.PERSONA_REPLIES),
                (phrases.THANKS, phrases.THANKS_REPLIES),
            ),
            (3, 5, 1),
        )[0]
        thought = self._think(effort, phrases.THINK_PERSONA)
        return Turn(self.rng.choice(users), thought, self.rng.choice(answers))

    def _incapable(self, effort: str) -> Turn:
        a, b = self.rng.randint(2, 99), self.rng.randint(2, 99)
        user = self.rng.choice(phrases.INCAPABLE).format(a=a, b=b)
        thought = self._think(effort, phrases.THINK_INCAPABLE)
        return Turn(user, thought, self.rng.choice(phrases.INCAPABLE_REPLIES))

    def _next_turn(self, before: Turn, effort: str) -> Turn:
        """A second turn: more of the same text where there is more, thanks, or a new subject."""
        following = next((p.following for p in self.passages if p.text == before.answer), "")
        if following and self.rng.random() < 0.5:
            thought = self._think(effort, phrases.THINK_CONTINUE)
            return Turn(self.rng.choice(phrases.MORE), thought, following, before.source)
        if self.rng.random() < 0.2:
            thought = self._think(effort, phrases.THINK_PERSONA)
            answer = self.rng.choice(phrases.THANKS_REPLIES)
            return Turn(self.rng.choice(phrases.THANKS), thought, answer)
        return self._about(effort)


def make_chats(
    documents: Sequence[Document], tokenizer: Tokenizer, count: int, seed: int
) -> list[Chat]:
    """`count` chats over `documents`; the same arguments give the same chats."""
    maker = ChatMaker(documents, tokenizer, random.Random(seed))
    return [maker.chat() for _ in range(count)]
