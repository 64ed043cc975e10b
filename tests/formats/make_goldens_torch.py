"""Writes `goldens_torch.npz`: what PyTorch and transformers compute for tiny MoE layers.

Run by hand; tests only read the result. The stored file was made with Python 3.11, torch 2.13.0
(CPU), transformers 5.23.0, numpy 2.4.6:

    python3.11 -m venv goldens && goldens/bin/pip install torch==2.13.0 transformers==5.23.0
    goldens/bin/python tests/formats/make_goldens_torch.py

Everything is float32, with 5 experts, 2 a token, hidden size 8, intermediate size 12. Keys:

    LAYER/state/NAME         the module's state dict, LAYER being dropless, gpt_oss, mixtral
    LAYER/x                  [tokens, 8]
    dropless/y, ids, weights the layer's output [tokens, 8] and its routing [tokens, 2]
    dropless/LOSS            aux and z: the value
    dropless/LOSS/x, router.weight    and its gradients
    dropless/y/NAME          gradients of sum(y * x) with respect to x and the state
    LAYER/y/IMPLEMENTATION   [tokens, 8] of transformers, IMPLEMENTATION being eager, grouped_mm,
                             batched_mm
    gpt_oss/ids, weights     [tokens, 2], the router's
    gpt_oss/minus_one/IMPLEMENTATION  the experts given `weights` and `ids` with ids[1, 1] = -1;
                             eager refuses that, and is given the weight 0 there instead
    gelu/x, none, tanh       [points], torch.nn.GELU of both kinds
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

EXPERTS, EXPERTS_PER_TOKEN, HIDDEN, INTERMEDIATE = 5, 2, 8, 12
TOKENS = 7
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
SIZES: Mapping[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
}


class Dropless(torch.nn.Module):
    """Softmax over all experts, top-k, divided by the sum; tokens sorted by expert; gelu MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = torch.nn.Parameter(torch.empty(EXPERTS, HIDDEN, INTERMEDIATE))
        self.b1 = torch.nn.Parameter(torch.empty(EXPERTS, INTERMEDIATE))
        self.w2 = torch.nn.Parameter(torch.empty(EXPERTS, INTERMEDIATE, HIDDEN))
        self.b2 = torch.nn.Parameter(torch.empty(EXPERTS, HIDDEN))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, ids and weights."""
        logits = self.router(x)
        weights, ids = torch.softmax(logits, -1).topk(EXPERTS_PER_TOKEN, -1)
        return logits, ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, ids, weights = self.route(x)
        order = ids.flatten().argsort(stable=True)
        expert, token = ids.flatten()[order], order // EXPERTS_PER_TOKEN
        ends = torch.bincount(expert, minlength=EXPERTS).cumsum(0).to(torch.int32)
        hidden = F.gelu(F.grouped_mm(x[token], self.w1, offs=ends) + self.b1[expert])
        rows = F.grouped_mm(hidden, self.w2, offs=ends) + self.b2[expert]
        rows = rows * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, rows)

    def losses(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The load balance loss and the router's z-loss."""
        logits, ids, _ = self.route(x)
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
        share = counts / counts.sum()
        aux = EXPERTS * (share * torch.softmax(logits, -1).mean(0)).sum()
        return {"aux": aux, "z": torch.logsumexp(logits, -1).square().mean()}


def initialise(module: Any) -> Any:
    """Normal weights of variance 1 / 2, which makes activations of about 1."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def state_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {f"state/{name}": tensor.numpy() for name, tensor in module.state_dict().items()}


def gradients(module: Dropless, loss: torch.Tensor, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Gradients with respect to x and to those parameters that the loss depends on."""
    named = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: gradient.numpy()
        for name, gradient in zip(named, found, strict=True)
        if gradient is not None
    }


def dropless() -> dict[str, np.ndarray]:
    module = initialise(Dropless())
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    _, ids, weights = module.route(x)
    y = module(x)
    out = {
        **state_of(module),
        "x": x.detach().numpy(),
        "y": y.detach().numpy(),
        "ids": ids.numpy(),
        "weights": weights.detach().numpy(),
    }
    for name, loss in {"y": (y * x.detach()).sum(), **module.losses(x)}.items():
        out.setdefault(name, loss.detach().numpy())
        found = gradients(module, loss, x)
        out.update({f"{name}/{key}": gradient for key, gradient in found.items()})
    return out


@torch.no_grad()
def gpt_oss() -> dict[str, np.ndarray]:
    config = GptOssConfig(**SIZES)
    module, x = initialise(GptOssMLP(config)), 3 * torch.randn(TOKENS, HIDDEN)
    _, weights, ids = module.router(x)
    wrong, none = ids.clone(), weights.clone()
    wrong[1, 1], none[1, 1] = -1, 0
    out = {
        **state_of(module),
        "x": x.numpy(),
        "ids": ids.numpy(),
        "weights": weights.numpy(),
    }
    for name in IMPLEMENTATIONS:
        config._experts_implementation = name
        out[f"y/{name}"] = module(x[None])[0][0].numpy()
        given = (ids, none) if name == "eager" else (wrong, weights)
        out[f"minus_one/{name}"] = module.experts(x, *given).numpy()
    return out


@torch.no_grad()
def mixtral() -> dict[str, np.ndarray]:
    config = MixtralConfig(**SIZES)
    module, x = initialise(MixtralSparseMoeBlock(config)), torch.randn(TOKENS, HIDDEN)
    out = {**state_of(module), "x": x.numpy()}
    for name in IMPLEMENTATIONS:
        config._experts_implementation = name
        out[f"y/{name}"] = module(x[None].clone())[0].numpy()
    return out


def gelu() -> dict[str, np.ndarray]:
    x = torch.linspace(-6, 6, 121)
    kinds = {name: torch.nn.GELU(name)(x).numpy() for name in ("none", "tanh")}
    return {"x": x.numpy(), **kinds}


def main() -> None:
    """Writes the file next to this script."""
    torch.manual_seed(0)
    arrays = {
        f"{part.__name__}/{key}": array
        for part in (dropless, gpt_oss, mixtral, gelu)
        for key, array in part().items()
    }
    path = Path(__file__).with_name("goldens_torch.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
