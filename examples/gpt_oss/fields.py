"""Reading JSON objects whose values must be what they are expected to be.

Every error names the key, says what was expected and shows what came.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.checkpoint import ConfigError

MAX_SIZE = 2**31 - 1
"""Largest size or count that is believed."""


def error(key: str, expected: str, got: Any) -> ConfigError:
    """The error for a key that holds something else than expected."""
    shown = repr(got)
    return ConfigError(f"{key}: expected {expected}, got {shown[:200]}")


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file. Raises ConfigError where there is none."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: give the folder that holds the checkpoint"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as reason:
        raise ConfigError(f"{path} cannot be read as JSON: {reason}") from reason
    if not isinstance(contents, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(contents).__name__}")
    return contents


def required(config: Mapping[str, Any], key: str, expected: str) -> Any:
    """The value of a key that must be there."""
    if key not in config:
        raise ConfigError(f"{key} is missing: expected {expected}")
    return config[key]


def integer(config: Mapping[str, Any], key: str) -> int:
    """A size or count: an integer of at least 1."""
    expected = f"an integer between 1 and {MAX_SIZE}"
    value = required(config, key, expected)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
        raise error(key, expected, value)
    return value


def number(
    config: Mapping[str, Any],
    key: str,
    default: float | None = None,
    *,
    minimum: float | None = None,
) -> float:
    """A finite number above 0, or of at least `minimum`; `default` where the key is absent."""
    expected = "a number above 0" if minimum is None else f"a number of at least {minimum}"
    value = required(config, key, expected) if default is None else config.get(key, default)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (value > 0 if minimum is None else value >= minimum):
        raise error(key, expected, value)
    return float(value)


def boolean(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false, `default` where the key is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise error(key, "true or false", value)
    return value


def optional_id(config: Mapping[str, Any], key: str) -> int | None:
    """A token id, or None where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise error(key, "a token id or null", value)
    return value
