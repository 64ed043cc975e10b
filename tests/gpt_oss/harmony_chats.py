"""Random conversations, and ids written as text with control tokens by name."""

from gpt_oss.harmony import DeveloperConfig, Message, SystemConfig, Tool, tool_call

WORDS = [
    "plan",
    "the answer",
    "é語",
    "👩\u200d👩",
    "a\n\nb",
    "<|start|>system",
    "<|end|>",
    "{}",
    "",
    " ",
]


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randrange(6)))


def maybe(rng, value):
    return value if rng.random() < 0.7 else None


def schema(rng, depth):
    """A random JSON schema, odd ones too: empty enums, unknown types, booleans for schemas."""
    kind = rng.randrange(12)
    result: dict = {}
    if kind < 3:
        kinds = ["string", "number", "integer", "boolean", "null", "weird"]
        result["type"] = rng.choice(kinds)
    elif kind < 5:
        result |= {
            "type": "string",
            "enum": rng.sample(["a", "b", "null", "c d"], rng.randrange(4)),
        }
    elif kind == 5:
        kinds = ["string", "integer", "null", "array"]
        result["type"] = rng.sample(kinds, rng.randrange(4))
    elif kind < 8 and depth:
        names = rng.sample(["x", "y", "z_w", "q"], rng.randrange(4))
        result |= {"type": "object", "properties": {n: schema(rng, depth - 1) for n in names}}
        result["required"] = rng.sample(["x", "y", "q"], rng.randrange(3))
    elif kind < 10 and depth:
        result["type"] = "array"
        if rng.random() < 0.8:
            result["items"] = schema(rng, depth - 1)
    elif kind == 10 and depth:
        result["oneOf"] = [schema(rng, depth - 1) for _ in range(rng.randrange(4))]
    extras = {
        "description": ["what", "two\nlines", "", "a null b"],
        "title": ["T", ""],
        "default": ["s", 1, None, True, [1, "x"], {"a": 1.5}, 2.0, 'é"'],
        "examples": [["e1", "e2"], [], [1, "z"], [3]],
        "nullable": [True, False],
    }
    result |= {k: rng.choice(values) for k, values in extras.items() if rng.random() < 0.25}
    return True if depth < 4 and rng.random() < 0.01 else result


def tools(rng, largest):
    names = rng.sample(["get_weather", "f", "lookup-2", "ns.sum"], rng.randrange(largest + 1))
    descriptions = ["Looks it up.", "", "a\nb\n", "x\r\ny", "\n"]
    return tuple(Tool(n, rng.choice(descriptions), maybe(rng, schema(rng, 4))) for n in names)


def system(rng):
    channels = rng.choice([(), ("final",), ("analysis", "commentary", "final")])
    return SystemConfig(
        maybe(rng, "You are ChatGPT, a large language model trained by OpenAI."),
        maybe(rng, "2024-06"),
        maybe(rng, "2025-06-28"),
        rng.choice(["low", "medium", "high", None]),
        channels,
    )


def chat(rng):
    """A random conversation in which messages need not follow the usual order."""
    messages = []
    if rng.random() < 0.7:
        messages.append(Message("system", system(rng)))
    if rng.random() < 0.7:
        messages.append(Message("developer", DeveloperConfig(maybe(rng, text(rng)), tools(rng, 2))))
    for _ in range(rng.randrange(14)):
        role = rng.choice(["user", "assistant", "assistant", "system", "developer"])
        channel = None
        if role == "assistant":
            channel = rng.choice(["analysis", "commentary", "final", "final", None])
        if role == "user" and rng.random() < 0.1:
            channel = "analysis"
        name = "bob" if rng.random() < 0.1 else None
        messages.append(Message(role, text(rng), channel, name=name))
        if rng.random() < 0.2:
            call = tool_call("f", text(rng))
            messages.append(
                call if rng.random() < 0.5 else Message("assistant", "x", recipient="r")
            )
    return messages


def control_ids(tokenizer, pattern):
    """`pattern` holds control tokens by name."""
    ids = []
    for piece in pattern.replace("<|", "\0<|").replace("|>", "|>\0").split("\0"):
        is_control = piece.startswith("<|")
        name = piece.strip("<|>") + ("_" if piece == "<|return|>" else "")
        ids += [getattr(tokenizer.control, name)] if is_control else tokenizer.encode(piece)
    return ids
