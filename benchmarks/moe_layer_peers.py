"""The peers of `moe_layer.py`, wherever they run: their names, and how they are sampled."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from moe_layer_jax import Naive, RaggedDot, Unfit
from moe_layer_problem import Shape
from peer_process import PeerError, PeerProcess
from timing import Sampler, reason, sampler

IN_JAX = ("ragged_dot", "naive")
IN_TORCH = ("triton_kernels", "grouped_mm")
NAMES = IN_TORCH + IN_JAX

_SCRIPT = Path(__file__).with_name("moe_layer_torch.py")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a peer; a peer's time is that of its fastest.

    Attributes:
        peer: the peer it belongs to.
        sampler: takes samples of one layer.
        output: the rows after the first layer, float32, where the variant is a whole layer on the
            problem's numbers.
    """

    peer: str
    sampler: Sampler
    output: np.ndarray | None = None


class TorchPeers:
    """Peers in one process with torch.

    Args:
        names: which of `IN_TORCH`.
        python: the interpreter of the process.
        path: its PYTHONPATH; None for that of this process.
    """

    def __init__(self, names: Sequence[str], python: str, path: str | None) -> None:
        self._names = list(names)
        self._process: PeerProcess | None = None
        self._suffix = ""
        self.absent: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        try:
            self._process = PeerProcess(_SCRIPT, python, path)
        except PeerError as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """The process is of no use any more."""
        self.absent |= {self._label(name): str(error) for name in self._names}
        if self._process is not None:
            self._process.close()
            self._process = None

    def send(self, request: str, **arguments: object) -> None:
        if self._process is not None:
            self._process.send(request, **arguments)

    def _label(self, name: str) -> str:
        return name + self._suffix if name.startswith("triton_kernels") else name

    def started(self, number: int | None) -> None:
        """Takes the answer to `start`.

        Args:
            number: which process this is, where there are several: the names of what runs on
                Triton then end in its version, or in this number where there is no version.
        """
        if self._process is None:
            return
        try:
            answer = self._process.receive()
        except PeerError as error:
            self._lose(error)
            return
        self.versions = answer["versions"]
        if number is not None:
            self._suffix = f" (triton {self.versions.get('triton', f'of process {number}')})"
        self.absent |= {self._label(name): why for name, why in answer["absent"].items()}

    def ceilings(self, num_bytes: int, size: int, device: str) -> dict[str, float] | None:
        """The device's ceilings as torch reaches them, if it runs."""
        if self._process is None:
            return None
        try:
            return self._process.ask("ceilings", num_bytes=num_bytes, size=size, device=device)
        except PeerError as error:
            print(f"no ceilings by torch: {error}")
            return None

    def prepared(self, sample: float) -> tuple[dict[str, Variant], dict[str, str]]:
        """Takes the answer to `prepare`, and warms up: variants and reasons by name."""
        process = self._process
        if process is None:
            return {}, dict(self.absent)
        absent = dict(self.absent)
        found: dict[str, Variant] = {}
        try:
            answer = process.receive()
            absent |= {self._label(name): why for name, why in answer["absent"].items()}
            for name, variant in answer["variants"].items():
                try:
                    found[self._label(name)] = self._variant(process, name, variant, sample)
                except PeerError as error:
                    absent[self._label(name)] = str(error)
        except PeerError as error:
            self._lose(error)
            absent |= self.absent
        return found, absent

    def _variant(self, process: PeerProcess, name: str, about: dict, sample: float) -> Variant:
        output = None
        if about["contender"] == "triton_kernels":
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "output.npy"
                process.ask("output", name=name, path=str(path))
                output = np.load(path)
        process.ask("warm", name=name, per_call=about["per_call"], sample=sample)
        return Variant(
            self._label(about["contender"]),
            lambda samples: process.ask("sample", name=name, samples=samples),
            output,
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.close()


class JaxPeers:
    """Peers in this process.

    Args:
        names: which of `IN_JAX`.
        shape: the sizes.
        experts: weight sets for the naive way.
    """

    def __init__(self, names: Sequence[str], shape: Shape, experts: Sequence) -> None:
        makers = {
            "ragged_dot": lambda: RaggedDot(shape),
            "naive": lambda: Naive(shape, experts),
        }
        self._made = {name: makers[name]() for name in names}

    def prepared(
        self, tokens: int, routing: str, sample: float
    ) -> tuple[dict[str, Variant], dict[str, str]]:
        """Compiles and warms up: variants and reasons by name."""
        found, absent = {}, {}
        for name, peer in self._made.items():
            try:
                repeated = peer.prepare(tokens, routing)
                results = repeated.call()
                output = np.asarray(results[0], np.float32) if name == "naive" else None
                take = sampler(repeated.run, len(results), sample=sample)
                found[name] = Variant(name, take, output)
            except Unfit as why:
                absent[name] = str(why)
            except Exception as error:
                absent[name] = reason(error)
        return found, absent
