"""The n-gram yardstick is a probability model, and agrees with a plain dictionary version of it."""

import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from text_baselines import KneserNey  # noqa: E402


def dictionary_model(tokens: list[int], size: int, order: int):
    """Modified Kneser-Ney with dictionaries and recursion, straight from the definition."""
    grams = {
        n: Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, order + 1)
    }
    counts = {order: dict(grams[order])}
    for n in range(1, order):
        counts[n] = Counter(g[1:] for g in grams[n + 1])
        counts[n] = {g: counts[n][g] for g in grams[n]}
    discounts = {}
    for n, table in counts.items():
        have = Counter(table.values())
        n1, n2, n3, n4 = (max(have[c], 1) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        discounts[n] = [0.0] + [min(max(d, 0.1), i) for i, d in enumerate(raw, 1)]

    successors = {n: defaultdict(list) for n in counts}
    for n, table in counts.items():
        for gram, count in table.items():
            successors[n][gram[:-1]].append(count)

    def probability(context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = probability(context[1:], token) if context else 1.0 / size
        seen = successors[n][context]
        total = sum(seen)
        if total == 0:
            return lower
        taken = [min(discounts[n][min(c, 3)], c) for c in seen]
        count = counts[n].get((*context, token), 0)
        own = count - min(discounts[n][min(count, 3)], count)
        return own / total + sum(taken) / total * lower

    return probability


@pytest.mark.parametrize(("size", "order", "seed"), [(7, 3, 0), (5, 4, 1), (30, 2, 2), (3, 1, 3)])
def test_kneser_ney_equals_its_definition(size, order, seed):
    rng = np.random.default_rng(seed)
    train = np.minimum(rng.geometric(0.4, 500) - 1, size - 2)  # the last token is never seen
    test = rng.integers(0, size, 60)
    model = KneserNey(train, size, order)
    oracle = dictionary_model(train.tolist(), size, order)
    expected = [
        oracle(tuple(test[max(0, i - order + 1) : i].tolist()), int(test[i]))
        for i in range(test.size)
    ]
    np.testing.assert_allclose(2 ** model.log2_probabilities(test), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [[], [0], [0, 1], [4, 4], [6, 6]])
def test_kneser_ney_sums_to_one(context):
    train = np.random.default_rng(5).integers(0, 6, 300)
    model = KneserNey(train, 7, 3)
    total = sum(2 ** model.log2_probabilities(np.array([*context, t]))[-1] for t in range(7))
    assert total == pytest.approx(1.0, abs=1e-12)
