"""Text to ids and back, for any byte-level BPE checkpoint with the harmony control tokens.

All text is ordinary text: a user who types `<|start|>system` gets the ids of those characters,
never the control id. Control ids are looked up by name, so that the released vocabulary and a small
one work alike. Decoding joins the bytes of the tokens and reads them as UTF-8 (damaged sequences
become U+FFFD), which makes streaming decoding equal to decoding at once by construction.

Sources: the `tokenizer.json` format of the Hugging Face tokenizers library; Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners", section 2.2 (byte-level BPE).
"""

import codecs
import dataclasses
import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_jax.checkpoint import CheckpointError


@dataclasses.dataclass(frozen=True)
class ControlTokens:
    """The ids of the control tokens; the field `start` is the id of `<|start|>`, and so on."""

    start: int
    """Begins a message."""
    end: int
    """Ends a message."""
    message: int
    """Separates a message's header from its content."""
    channel: int
    """Precedes the channel in a header."""
    constrain: int
    """Precedes the content type in a header."""
    return_: int
    """Ends the last message of a reply (`<|return|>`)."""
    call: int
    """Ends a tool call."""
    startoftext: int
    """Begins a document (pretraining)."""
    endoftext: int
    """Ends a document; also used as padding."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids after which sampling stops: `<|return|>`, `<|call|>`, `<|endoftext|>`."""
        return frozenset((self.return_, self.call, self.endoftext))


CONTROL_NAMES = {f.name: f"<|{f.name.rstrip('_')}|>" for f in dataclasses.fields(ControlTokens)}
"""Field of ControlTokens -> the token's text in tokenizer.json."""


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
      folder: the checkpoint folder; its `tokenizer.json` is read.

    Attributes:
      control: the ids of the control tokens.
      vocab_size: one more than the largest id that stands for something. A model may have more ids.

    Raises:
      CheckpointError: the file is missing, damaged, not byte-level, or lacks a control token.
      ImportError: the `tokenizers` package is not installed.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / "tokenizer.json"
        self._tokenizer = _load(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._pieces: dict[int, bytes] = {}
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.control = self._find_control_tokens(path)
        self._check_control_unreachable(path)
        self._check_lossless(path)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, read as ordinary text: control ids never come out.

        Raises:
          TypeError: `text` is not a str.
          ValueError: `text` has a lone surrogate and thus no UTF-8 form.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected text as str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate {text[error.start]!r} at character {error.start}; "
                "expected text that UTF-8 can hold"
            ) from None
        # The batch call skips the offsets of the tokens in the text and takes half the time.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens appear by name, ids without a meaning as "".

        Raises:
          ValueError: an id is negative.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for (a part of a UTF-8 character, perhaps).

        Raises:
          ValueError: the id is negative.
        """
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._read_piece(operator.index(token_id))
        return piece

    def is_text(self, token_id: int) -> bool:
        """Whether the id stands for ordinary text: neither an added token nor out of range."""
        return 0 <= token_id < self.vocab_size and token_id not in self._added

    def stream(self) -> "TextStream":
        """A decoder that takes one id at a time."""
        return TextStream(self)

    def _read_piece(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"expected a token id >= 0, got {token_id}")
        if token_id >= self.vocab_size:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else bytes(_CHAR_TO_BYTE[char] for char in token)

    def _find_control_tokens(self, path: Path) -> ControlTokens:
        ids = {text: i for i, text in self._added.items()}
        missing = [name for name in CONTROL_NAMES.values() if name not in ids]
        if missing:
            raise CheckpointError(
                f"{path}: expected the control tokens of the harmony format among added_tokens, "
                f"missing {', '.join(missing)}"
            )
        return ControlTokens(**{field: ids[name] for field, name in CONTROL_NAMES.items()})

    def _check_control_unreachable(self, path: Path) -> None:
        """A file may mark a control token so that plain text still produces it; refuse that."""
        for field, name in CONTROL_NAMES.items():
            if getattr(self.control, field) in self.encode(name):
                raise CheckpointError(
                    f"{path}: the text {name!r} encodes to its control id; expected the token to "
                    "be special and absent from model.vocab, or user text could forge messages"
                )

    def _check_lossless(self, path: Path) -> None:
        """A pre-tokenizer that adds a space, or a vocabulary that lacks a byte, alters text."""
        # All one- and two-byte characters and every first byte of the longer ones.
        longer = [*range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x2000)]
        probe = "".join(map(chr, [*range(0x800), *longer]))
        if self.decode(self.encode(probe)) != probe:
            raise CheckpointError(
                f"{path}: expected text to survive encoding and decoding, but it changes; "
                "the vocabulary lacks a byte, or the pre_tokenizer is not a plain ByteLevel"
            )


class TextStream:
    """Decodes ids one by one; the pieces joined, with the flush, equal `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is still open.

        Raises:
          ValueError: the id is negative.
        """
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Ends the stream: "\\ufffd" for a character left open, else ""."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _load(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "the tokenizer needs the tokenizers package: pip install 'moe-jax[gpt-oss]'"
        ) from None
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{path}: expected a readable tokenizer.json, got: {reason}"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:
        # The library raises plain Exception for every kind of damage.
        raise CheckpointError(
            f"{path}: expected a tokenizer.json ({len(data)} bytes read), got: {error}"
        ) from None
    _check_kind(path, tokenizer)
    return tokenizer


def _check_kind(path: Path, tokenizer: Any) -> None:
    """Only a byte-level BPE without normalizer gives back the text that went in."""
    if type(tokenizer.model).__name__ != "BPE" or type(tokenizer.decoder).__name__ != "ByteLevel":
        raise CheckpointError(
            f"{path}: expected a BPE model with a ByteLevel decoder, got "
            f"{type(tokenizer.model).__name__} and {type(tokenizer.decoder).__name__}"
        )
    if tokenizer.normalizer is not None:
        kind = type(tokenizer.normalizer).__name__
        raise CheckpointError(f"{path}: expected no normalizer (it would alter text), got {kind}")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokenizer.get_vocab(with_added_tokens=True):
        if token not in added and not _CHAR_TO_BYTE.keys() >= set(token):
            raise CheckpointError(
                f"{path}: expected byte-level tokens in model.vocab, got {json.dumps(token)}"
            )


def _char_to_byte() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_CHAR_TO_BYTE = _char_to_byte()
