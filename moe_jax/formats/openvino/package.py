"""The package `openvino`, imported without its usage report.

`import openvino` sends a usage event over the network by `openvino_telemetry`, which is installed
with it. Where that is hidden during the import, OpenVINO takes its own stand-in, which sends
nothing. A program that has imported `openvino` already has chosen for itself.
"""

import sys
from typing import Any, cast

_REPORTER = "openvino_telemetry"


def load_openvino() -> Any:
    """The module `openvino`.

    Raises:
        ImportError: it is not installed.
    """
    if "openvino" not in sys.modules:
        before = sys.modules.get(_REPORTER)
        sys.modules[_REPORTER] = cast(Any, None)
        try:
            _import()
        finally:
            del sys.modules[_REPORTER]
            if before is not None:
                sys.modules[_REPORTER] = before
    return _import()


def _import() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            "graphs of OpenVINO need the package openvino: pip install moe-jax[openvino]"
        ) from error
    return openvino
