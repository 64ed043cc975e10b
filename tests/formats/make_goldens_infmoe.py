"""Writes `goldens_infmoe.npz`: what PyTorch and transformers compute for a layer of InfMoE.

Run by hand; tests only read the result. The stored file was made with Python 3.11, torch 2.13.0
(CPU), transformers 5.23.0, numpy 2.4.6:

    python3.11 -m venv goldens && goldens/bin/pip install torch==2.13.0 transformers==5.23.0
    goldens/bin/python tests/formats/make_goldens_infmoe.py

The experts of `rms` are `T5LayerFF` of transformers with a gated gelu; those of `layer` and
`layer_bias` are its modules with the layer norm of PyTorch. Routing restates what fairseq's
BaseLayer does when it does not train, and the two other variants of InfMoE. All is float32. Keys:

    versions                                  str
    x                                         [B, S, D]
    centroids, router_norm_weight             [E, D], [D]
    n/layer_norm_weight, n/layer_norm_bias, n/wi_0_weight, n/wi_1_weight, n/wo_weight
                                              as in a weight file, n = 0 ... E - 1
    experts/NORM                              [E, B, S, D], each expert on all of x
    VARIANT/NORM/ids, VARIANT/NORM/y          [B, S], [B, S, D]; VARIANT is default, base_layer or
                                              cpm_2
    gate, up, geglu, geglu_tanh               [E, B, S, D], gated activations of float32 numbers
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerFF, T5LayerNorm

EXPERTS, BATCH, LENGTH, HIDDEN, WIDE = 5, 2, 7, 6, 9
EPS = 1e-6
KEYS = ("layer_norm_weight", "layer_norm_bias", "wi_0_weight", "wi_1_weight", "wo_weight")


def draw(shape: tuple[int, ...], scale: float, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(shape) * scale + shift


def make_experts() -> tuple[list[T5LayerFF], list[torch.Tensor]]:
    """Experts with random weights, and a bias for each norm."""
    config = T5Config(
        d_model=HIDDEN, d_ff=WIDE, feed_forward_proj="gated-gelu", layer_norm_epsilon=EPS
    )
    experts = [T5LayerFF(config).eval() for _ in range(EXPERTS)]
    for expert in experts:
        for name, parameter in expert.named_parameters():
            is_norm = "layer_norm" in name
            parameter.data = draw(parameter.shape, 0.4 if is_norm else 0.6, float(is_norm))
    return experts, [draw((HIDDEN,), 0.3) for _ in experts]


def with_layer_norm(expert: T5LayerFF, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The same expert with the mean subtracted in its norm."""
    weight = expert.layer_norm.weight
    normed = torch.nn.functional.layer_norm(x, (HIDDEN,), weight, bias, EPS)
    return x + expert.DenseReluDense(normed)


def affinities(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return x.matmul(centroids.transpose(0, 1))


def mixed(variant: str, x: torch.Tensor, y: torch.Tensor, aff: torch.Tensor) -> torch.Tensor:
    """The layer's output, given its experts' on their rows and affinities to their centroids."""
    if variant != "base_layer":
        return y
    alpha = torch.sigmoid(aff).unsqueeze(-1)
    return alpha * y + (1 - alpha) * x


def layer_goldens(x: torch.Tensor, centroids: torch.Tensor, norms: dict[str, Any], y: Any) -> Any:
    """Ids and outputs of each variant and norm, token by token."""
    found = {}
    for norm, outputs in y.items():
        for variant in ("default", "base_layer", "cpm_2"):
            seen = norms[norm](x) if variant == "cpm_2" else x
            aff, ids = affinities(seen, centroids).max(-1)
            b, s = torch.meshgrid(torch.arange(BATCH), torch.arange(LENGTH), indexing="ij")
            found[f"{variant}/{norm}/ids"] = ids
            found[f"{variant}/{norm}/y"] = mixed(variant, x, outputs[ids, b, s], aff)
    return found


def main() -> None:
    torch.manual_seed(5)
    experts, biases = make_experts()
    x = draw((BATCH, LENGTH, HIDDEN), 1.0, 0.5)
    centroids, router_weight = draw((EXPERTS, HIDDEN), 0.7), draw((HIDDEN,), 0.5, 1.0)
    rms = T5LayerNorm(HIDDEN, eps=EPS)
    rms.weight.data = router_weight

    def layer_norm(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(rows, (HIDDEN,), router_weight, None, EPS)

    with torch.no_grad():
        outputs = {
            "rms": torch.stack([expert(x) for expert in experts]),
            "layer": torch.stack([with_layer_norm(expert, None, x) for expert in experts]),
            "layer_bias": torch.stack(
                [with_layer_norm(e, b, x) for e, b in zip(experts, biases, strict=True)]
            ),
        }
        norms = {"rms": rms, "layer": layer_norm, "layer_bias": layer_norm}
        found = layer_goldens(x, centroids, norms, outputs)
        gate, up = draw(outputs["rms"].shape, 3.0), draw(outputs["rms"].shape, 1.0)
        found["geglu"] = torch.nn.functional.gelu(gate) * up
        found["geglu_tanh"] = torch.nn.functional.gelu(gate, approximate="tanh") * up
    found |= {"x": x, "centroids": centroids, "router_norm_weight": router_weight}
    found |= {"gate": gate, "up": up}
    found |= {f"experts/{norm}": y for norm, y in outputs.items()}
    for n, (expert, bias) in enumerate(zip(experts, biases, strict=True)):
        dense = expert.DenseReluDense
        values = (
            expert.layer_norm.weight, bias, dense.wi_0.weight, dense.wi_1.weight, dense.wo.weight,
        )  # fmt: skip
        found |= {f"{n}/{key}": value for key, value in zip(KEYS, values, strict=True)}
    arrays = {name: value.detach().numpy() for name, value in found.items()}
    arrays["versions"] = np.array(
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    np.savez_compressed(Path(__file__).with_name("goldens_infmoe.npz"), **arrays)


if __name__ == "__main__":
    main()
