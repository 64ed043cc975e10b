"""The tokenizer: lossless, deaf to control tokens in text, equal to the reference, linear."""

import builtins
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_oss.tokenizer import CONTROL_NAMES, Tokenizer
from moe_jax.checkpoint import CheckpointError

UTF8 = st.characters(exclude_categories=["Cs"])
CONTROL_TEXT = st.sampled_from([*CONTROL_NAMES.values(), "<|reserved_200000|>", "<|endofprompt|>"])
TEXT = st.text(UTF8, max_size=60)
FORGED = st.lists(CONTROL_TEXT | st.sampled_from(["system", "<|"]) | TEXT).map("".join)
# Every kind of long run that some byte-level BPE handles badly: letters, blanks, marks, digits.
RUNS = {
    "letters": "a",
    "spaces": " ",
    "newlines": "\n",
    "symbols": "^",
    "cjk": "语",
    "digits": "7",
    "combining marks": "e\u0301",
    "words": "hello world ",
    "control tokens": "<|start|>",
}


@pytest.fixture(params=["tokenizer", "small_tokenizer"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


def test_control_ids_are_the_published_ones(tokenizer):
    control = tokenizer.control
    assert (control.return_, control.constrain, control.channel) == (200002, 200003, 200005)
    assert (control.start, control.end, control.message) == (200006, 200007, 200008)
    assert (control.call, control.startoftext, control.endoftext) == (200012, 199998, 199999)
    assert control.stop_ids == {200002, 200012, 199999}
    assert tokenizer.vocab_size == 200019


def test_control_ids_follow_the_names_in_the_file(small_tokenizer):
    ids = [getattr(small_tokenizer.control, field) for field in CONTROL_NAMES]
    assert ids == list(range(9))
    assert small_tokenizer.decode(ids) == "".join(CONTROL_NAMES.values())


def test_ids_equal_the_reference(tokenizer, harmony_oracle):
    rng = random.Random(0)
    alphabet = [chr(c) for c in [*range(32, 127), *range(0xA0, 0x250), 10, 0x4E00, 0x1F600]]
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        assert tokenizer.encode(text) == harmony_oracle.encode(text, disallowed_special=())


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(TEXT, FORGED))
def test_text_comes_back_and_never_holds_control_ids(tokenizer, small_tokenizer, text):
    for each in (tokenizer, small_tokenizer):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert all(map(each.is_text, ids))


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_streamed_text_equals_the_text_decoded_at_once(tokenizer, data):
    text_ids = data.draw(TEXT.map(tokenizer.encode))
    any_ids = data.draw(st.lists(st.one_of(st.integers(0, 255), st.integers(0, 201087))))
    ids = data.draw(st.permutations(text_ids + any_ids))
    stream = tokenizer.stream()
    pieces = [stream.step(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 201087), max_size=30))
def test_decoding_equals_the_tokenizers_library(tokenizer, o200k_library, ids):
    # The library skips control tokens when asked to, and so joins the bytes on both sides of them.
    assert tokenizer.decode(filter(tokenizer.is_text, ids)) == o200k_library.decode(ids)


@pytest.fixture(scope="module")
def o200k_library(o200k_folder):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(o200k_folder / "tokenizer.json"))


def test_a_character_split_over_tokens_is_held_back(small_tokenizer):
    ids = small_tokenizer.encode("a👩")
    stream = small_tokenizer.stream()
    assert [stream.step(i) for i in ids] == ["a", "", "", "", "👩"]
    assert [stream.step(i) for i in ids[:3]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.step(ids[0]) == "a"


def test_ids_beyond_the_vocabulary_decode_to_nothing(any_tokenizer):
    size = any_tokenizer.vocab_size
    assert any_tokenizer.decode([size, 201087, 2**40]) == ""
    assert any_tokenizer.stream().step(size) == ""
    assert not any_tokenizer.is_text(size)


def test_negative_ids_are_refused(any_tokenizer):
    with pytest.raises(ValueError, match="token id >= 0, got -1"):
        any_tokenizer.decode([-1])
    with pytest.raises(ValueError, match="token id >= 0, got -7"):
        any_tokenizer.stream().step(-7)


def test_text_that_utf8_cannot_hold_is_refused(any_tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 2"):
        any_tokenizer.encode("ab\ud800")
    with pytest.raises(TypeError, match="got bytes"):
        any_tokenizer.encode(b"ab")


@pytest.mark.parametrize("kind", RUNS)
def test_long_runs_encode_in_time(tokenizer, kind):
    """200,000 characters; the time grows with the length where a quadratic encoder takes 16 s."""
    run = RUNS[kind] * (200_000 // len(RUNS[kind]))
    start = time.process_time()
    ids = tokenizer.encode(run)
    assert time.process_time() - start < 2
    assert tokenizer.decode(ids) == run


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json.*No such file"):
        Tokenizer(tmp_path)


def test_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="expected a readable tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 1000, 20_000_000])
def test_truncated_file(o200k_folder, tmp_path, size):
    data = (o200k_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=rf"expected a tokenizer.json \({size} bytes read\)"):
        Tokenizer(tmp_path)


def _without_start(document):
    document["added_tokens"] = [t for t in document["added_tokens"] if t["id"] != 0]


def _reachable_start(document):
    document["added_tokens"][0]["special"] = False


def _normalizer(document):
    document["normalizer"] = {"type": "Lowercase"}


def _other_model(document):
    document["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def _not_byte_level(document):
    document["model"]["vocab"]["\u2581x"] = 500


def _no_decoder(document):
    document["decoder"] = None


def _prefix_space(document):
    document["pre_tokenizer"]["add_prefix_space"] = True


def _no_pre_tokenizer(document):
    document["pre_tokenizer"] = None


def _byte_missing(document):
    del document["model"]["vocab"]["\u0100"]


def _vocab_as_list(document):
    document["model"]["vocab"] = ["a"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_start, r"missing <\|start\|>"),
        (_reachable_start, r"the text '<\|start\|>' encodes to its control id"),
        (_normalizer, "expected no normalizer .* got Lowercase"),
        (_other_model, "expected a BPE model .* got WordLevel"),
        (_not_byte_level, "expected byte-level tokens"),
        (_no_decoder, "ByteLevel decoder, got BPE and NoneType"),
        (_prefix_space, "expected text to survive"),
        (_no_pre_tokenizer, "expected text to survive"),
        (_byte_missing, "expected text to survive"),
        (_vocab_as_list, "expected a tokenizer.json"),
    ],
)
def test_unusable_files(small_folder, tmp_path, damage, message):
    document = json.loads((small_folder / "tokenizer.json").read_text())
    damage(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path)


def test_truncation_and_padding_in_the_file_do_not_cut_text(small_folder, tmp_path):
    document = json.loads((small_folder / "tokenizer.json").read_text())
    document["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert len(Tokenizer(tmp_path).encode("abcdef")) == 6


def test_a_missing_package_names_the_extra(small_folder, monkeypatch):
    real_import = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ImportError, match=r"pip install 'moe-jax\[gpt-oss\]'"):
        Tokenizer(small_folder)
