"""The real tokenizer, built once a session, and the harmony oracle."""

import o200k
import pytest

from gpt_oss.tokenizer import CONTROL_NAMES, Tokenizer


@pytest.fixture(scope="session")
def o200k_folder(tmp_path_factory):
    """A folder with gpt-oss's tokenizer.json."""
    folder = tmp_path_factory.mktemp("o200k")
    o200k.write(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(o200k_folder):
    """gpt-oss's tokenizer."""
    return Tokenizer(o200k_folder)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A folder with the tokenizer.json of `small_tokenizer`."""
    folder = tmp_path_factory.mktemp("small")
    o200k.write_small(folder, list(CONTROL_NAMES.values()))
    return folder


@pytest.fixture(scope="session")
def small_tokenizer(small_folder):
    """A tokenizer of 256 byte tokens whose control tokens have ids 0 to 8."""
    return Tokenizer(small_folder)


@pytest.fixture(scope="session")
def harmony_oracle():
    """The reference implementation of the harmony format."""
    import openai_harmony

    return openai_harmony.load_harmony_encoding("HarmonyGptOss")
