"""The parser takes every id stream, gives back what was rendered, and never revises its output."""

import dataclasses
import random

import openai_harmony as reference
import pytest
from harmony_chats import chat, control_ids, text
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_oss.harmony import (
    Conversation,
    Damage,
    Message,
    Parser,
    drop_past_reasoning,
    parse_completion,
    parse_transcript,
    render_conversation,
    render_message,
    tool_call,
    tool_result,
)
from gpt_oss.harmony.parser import MAX_HEADER_TOKENS

STREAMS = 30_000
GOOD = (
    "<|channel|>analysis<|message|>hm<|end|>"
    "<|start|>assistant<|channel|>final<|message|>4<|return|>"
)


def reply(rng):
    """A well-formed reply: reasoning, preambles and calls, then an answer or a call."""
    messages = [Message("assistant", text(rng), rng.choice(["analysis", "commentary"]))]
    messages *= rng.randrange(3)
    ending = Message("assistant", text(rng), "final"), tool_call("get_weather", text(rng))
    return [*messages, rng.choice(ending)]


def completion_ids(messages, tokenizer):
    """The ids of a reply as the model samples them after `<|start|>assistant`."""
    ids = [i for message in messages for i in render_message(message, tokenizer)]
    if ids[-1] == tokenizer.control.end:
        ids[-1] = tokenizer.control.return_
    return ids[1 + len(tokenizer.encode("assistant")) :]


def words_of_the_format(tokenizer):
    """Ids that mean something to the parser, and some that mean nothing."""
    control = list(vars(tokenizer.control).values())
    words = ["assistant", "user", "final", "analysis", " to=functions.f", "to=", ":", " ", "é", "x"]
    ids = [i for word in words for i in tokenizer.encode(word)]
    return control * 3 + ids + [tokenizer.vocab_size, 200_000, 201_087, 2**40, -1]


def damaged(rng, ids, alphabet):
    """One to four ids inserted, dropped, changed, doubled or moved."""
    ids = list(ids)
    for _ in range(rng.randrange(1, 5)):
        i = rng.randrange(len(ids) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            ids.insert(i, rng.choice(alphabet))
        elif kind == 1:
            del ids[i : i + rng.choice((1, 1, 4))]
        elif kind == 2:
            ids[i : i + 1] = [rng.choice(alphabet)]
        elif kind == 3:
            ids[i:i] = ids[i : i + 6]
        else:
            ids = ids[i:] + ids[:i]
    return ids


def check_account(parser, deltas, ids):
    """The deltas add up to the messages, and each message begins and ends once."""
    assert parser.ids == ids
    parts = [[] for _ in parser.messages]
    for delta in deltas:
        parts[delta.index].append(delta)
    for parsed, pieces in zip(parser.messages, parts, strict=True):
        assert "".join(piece.text for piece in pieces) == parsed.message.content
        assert [piece.is_first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("name", ["tokenizer", "small_tokenizer"])
def test_no_id_stream_is_refused(request, name):
    """30,000 streams over the two vocabularies: half random ids, half damaged replies."""
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(5)
    alphabet = words_of_the_format(tokenizer)
    replies = [completion_ids(reply(rng), tokenizer)[:60] for _ in range(500)]
    harmed = replayed = 0
    for n in range(STREAMS // 2):
        if n % 2:
            ids = rng.choices(alphabet, k=rng.randrange(40))
        else:
            ids = damaged(rng, rng.choice(replies), alphabet)
        parser = Parser(tokenizer, transcript=n % 8 == 7)
        deltas = parser.feed(ids)
        last = parser.finish()
        check_account(parser, deltas if last is None else [*deltas, last], ids)
        harmed += bool(parser.damage)
        for parsed in parser.messages:
            if parsed.message.raw_ids is not None:
                render_message(parsed.message, tokenizer)
                replayed += 1
    assert harmed > STREAMS / 4
    assert replayed > STREAMS / 20


def test_replies_equal_the_reference_parser(tokenizer, harmony_oracle):
    rng = random.Random(6)
    for _ in range(1000):
        ids = completion_ids(reply(rng), tokenizer)
        expected = harmony_oracle.parse_messages_from_completion_tokens(
            ids, reference.Role.ASSISTANT
        )
        parser = Parser(tokenizer)
        parser.feed(ids)
        assert parser.stop_id == ids[-1]
        assert not parser.damage
        assert [
            (p.message.content, p.message.channel, p.message.recipient) for p in parser.messages
        ] == [("".join(c.text for c in m.content), m.channel, m.recipient) for m in expected]
        for parsed, message in zip(parser.messages, expected, strict=True):
            content_type = (message.content_type or "").removeprefix("<|constrain|>")
            assert (parsed.message.content_type or "") == content_type


def in_channel(message):
    """As the parser sees it: an assistant message without a channel counts as commentary."""
    if message.role == "assistant" and message.channel is None:
        return dataclasses.replace(message, channel="commentary")
    return message


@pytest.mark.parametrize("name", ["tokenizer", "small_tokenizer"])
def test_rendered_conversations_come_back(request, name):
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(7)
    for _ in range(500):
        messages = [m for m in chat(rng) if isinstance(m.content, str)]
        messages += [tool_call("f", text(rng)), tool_result("f", text(rng))]
        conversation = Conversation(tuple(messages))
        ids = render_conversation(conversation, tokenizer)
        parsed = parse_transcript(ids, tokenizer)
        fields = ("role", "content", "channel", "recipient", "content_type", "name")
        assert [[getattr(p.message, f) for f in fields] for p in parsed] == [
            [getattr(in_channel(m), f) for f in fields] for m in drop_past_reasoning(messages)
        ]
        prompt = 1 + len(tokenizer.encode("assistant"))
        assert [i for p in parsed for i in p.ids] == ids[:-prompt]


@pytest.mark.parametrize("transcript", [False, True])
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_output_is_never_revised_nor_changed_by_chunks(small_tokenizer, transcript, data):
    alphabet = words_of_the_format(small_tokenizer)
    good = st.sampled_from([control_ids(small_tokenizer, GOOD), []])
    noise = st.lists(st.sampled_from(alphabet), max_size=40)
    ids = data.draw(good) + data.draw(noise)
    whole = Parser(small_tokenizer, transcript=transcript)
    deltas = whole.feed(ids)
    cut = data.draw(st.integers(0, len(ids)))
    parts = Parser(small_tokenizer, transcript=transcript)
    early = parts.feed(ids[:cut])
    assert early == deltas[: len(early)]
    assert parts.messages == whole.messages[: len(parts.messages)]
    assert early + parts.feed(ids[cut:]) == deltas
    assert parts.finish() == whole.finish()
    assert (parts.messages, parts.damage) == (whole.messages, whole.damage)


SPEECHES = {
    "well formed": (GOOD, [("analysis", "hm"), ("final", "4")], set()),
    "no header": ("Hello<|return|>", [("analysis", "Hello")], {Damage.TEXT_OUTSIDE_MESSAGE}),
    "no header, cut off": ("Hello", [("analysis", "Hello")], {Damage.TEXT_OUTSIDE_MESSAGE}),
    "no <|message|>": (
        "<|channel|>final Hi<|return|>",
        [("analysis", "final Hi")],
        {Damage.TEXT_OUTSIDE_MESSAGE},
    ),
    "header cut off": ("<|channel|>fin", [], {Damage.UNFINISHED_HEADER}),
    "header given up": (
        "<|channel|>analysis<|start|>assistant<|channel|>final<|message|>4<|return|>",
        [("final", "4")],
        {Damage.UNFINISHED_HEADER},
    ),
    "no channel": ("<|message|>hi<|return|>", [("commentary", "hi")], {Damage.UNKNOWN_CHANNEL}),
    "unknown channel": (
        "<|channel|>thoughts<|message|>hi<|return|>",
        [("commentary", "hi")],
        {Damage.UNKNOWN_CHANNEL},
    ),
    "no <|end|><|start|>": (
        "<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>",
        [("analysis", "a"), ("final", "b")],
        {Damage.MISSING_END},
    ),
    "no <|end|>": (
        "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b<|return|>",
        [("analysis", "a"), ("final", "b")],
        {Damage.MISSING_END},
    ),
    "no <|start|>": (
        "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b<|return|>",
        [("analysis", "a"), ("final", "b")],
        {Damage.MISSING_START},
    ),
    "role repeated": (
        "<|start|>assistant<|channel|>final<|message|>b<|return|>",
        [("final", "b")],
        set(),
    ),
    "another role": (
        "<|channel|>final<|message|>b<|end|><|start|>user<|channel|>final<|message|>c<|return|>",
        [("final", "b"), ("analysis", "c")],
        {Damage.UNKNOWN_ROLE},
    ),
    "no role": (
        "<|channel|>final<|message|>b<|end|><|start|><|channel|>final<|message|>c<|return|>",
        [("final", "b"), ("analysis", "c")],
        {Damage.UNKNOWN_ROLE},
    ),
    "second stop": (GOOD + "<|return|>", [("analysis", "hm"), ("final", "4")], {Damage.TRAILING}),
    "text after the stop": (GOOD + "x", [("analysis", "hm"), ("final", "4")], {Damage.TRAILING}),
    "stray control": (
        "<|channel|>final<|message|>a<|message|>b<|constrain|>c<|startoftext|>d<|return|>",
        [("final", "abcd")],
        {Damage.STRAY_CONTROL},
    ),
    "end of text": ("<|channel|>final<|message|>a<|endoftext|>", [("final", "a")], set()),
    "cut off": ("<|channel|>final<|message|>a", [("final", "a")], set()),
    "nothing": ("", [], set()),
    "only a stop": ("<|return|>", [], {Damage.STRAY_CONTROL}),
    "two channels": (
        "<|channel|>analysis<|channel|>final<|message|>a<|return|>",
        [("final", "a")],
        {Damage.UNREADABLE_HEADER},
    ),
    "endless header": (
        "<|channel|>final" + " word" * MAX_HEADER_TOKENS + "<|end|>",
        [("analysis", "final" + " word" * MAX_HEADER_TOKENS)],
        {Damage.TEXT_OUTSIDE_MESSAGE},
    ),
}


@pytest.mark.parametrize("case", SPEECHES)
def test_what_becomes_of_odd_replies(tokenizer, case):
    written, messages, damage = SPEECHES[case]
    parser = Parser(tokenizer)
    parser.feed(control_ids(tokenizer, written))
    parser.finish()
    assert [(p.message.channel, p.message.content) for p in parser.messages] == messages
    assert set(parser.damage) == damage
    assert all(p.message.role == "assistant" for p in parser.messages)


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        "<|channel|>commentary to=functions.f json",
        " to=functions.f<|channel|>commentary <|constrain|>json",
        " to=functions.f<|channel|>commentary json",
    ],
)
def test_tool_calls_in_every_spelling(tokenizer, header):
    parser = Parser(tokenizer)
    parser.feed(control_ids(tokenizer, header + '<|message|>{"a": 1}<|call|>'))
    (parsed,) = parser.messages
    message = parsed.message
    assert (message.channel, message.recipient) == ("commentary", "functions.f")
    assert (message.content_type, message.content) == ("json", '{"a": 1}')
    assert not parsed.damage
    assert parser.stop_id == parsed.end == tokenizer.control.call


def test_deltas_carry_the_header_before_the_text(small_tokenizer):
    parser = Parser(small_tokenizer)
    deltas = parser.feed(control_ids(small_tokenizer, "<|channel|>final<|message|>a👩"))
    assert [(d.text, d.is_first, d.is_last) for d in deltas] == [
        ("", True, False),
        ("a", False, False),
        ("👩", False, False),
    ]
    assert {d.header.channel for d in deltas} == {"final"}
    assert parser.current == deltas[0].header
    last = parser.finish()
    assert (last.text, last.is_last, parser.current) == ("", True, None)
    assert parser.finish() is None


def test_a_character_cut_off_is_marked(small_tokenizer):
    ids = control_ids(small_tokenizer, "<|channel|>final<|message|>a👩")[:-1]
    (parsed,) = parse_completion(ids, small_tokenizer)
    assert parsed.message.content == "a\ufffd"
    assert parsed.ids == tuple(ids)


def test_ids_without_meaning_are_reported_and_kept(tokenizer):
    ids = control_ids(tokenizer, "<|channel|>final<|message|>ab<|return|>")
    ids[-2:-2] = [201_000, 200_000]
    parser = Parser(tokenizer)
    parser.feed(ids)
    assert parser.messages[0].message.content == "ab"
    assert parser.messages[0].message.raw_ids is None
    assert parser.messages[0].ids == tuple(ids)
    assert parser.damage == {Damage.UNKNOWN_ID: 1, Damage.STRAY_CONTROL: 1}


def test_names_in_transcripts(tokenizer):
    written = (
        "<|start|>user:bob<|message|>a<|end|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>b<|end|>"
        "<|start|>functions.g<|channel|>commentary to=assistant<|message|>c<|end|>"
        "<|start|>tool<|message|>d<|end|>"
    )
    parsed = parse_transcript(control_ids(tokenizer, written), tokenizer)
    seen = [(p.message.role, p.message.name, p.message.recipient) for p in parsed]
    assert seen == [
        ("user", "bob", None),
        ("tool", "functions.f", "assistant"),
        ("tool", "functions.g", "assistant"),
        ("assistant", None, None),
    ]
    assert [set(p.damage) for p in parsed] == [set(), set(), set(), {Damage.UNKNOWN_ROLE}]
