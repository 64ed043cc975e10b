"""Bits per byte of classical compressors and n-gram models on gpt-oss-nano's held-out text.

    python benchmarks/text_baselines.py --data DIR [--json FILE]

DIR is what `python -m gpt_oss.nano.prepare` wrote. The yardsticks are xz with its largest preset,
alone and with the training text before the held-out text, and interpolated modified Kneser-Ney
models (Chen and Goodman 1998) over bytes and over the checkpoint's own tokens. All of them pay for
the same held-out bytes; the n-gram models also pay for the ends of documents, not for their starts.
"""

import argparse
import json
import lzma
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Level:
    """Counts of one order of an n-gram model, for n-grams that occur in training.

    Attributes:
      keys: int64 [ngrams], sorted: id of the prefix (n - 1)-gram times vocabulary, plus last token.
      discounted: float64 [ngrams], discounted count over the total of the prefix.
      backoff: float64 [prefixes], the probability mass that a prefix leaves to the lower order.
    """

    keys: np.ndarray
    discounted: np.ndarray
    backoff: np.ndarray


class KneserNey:
    """Interpolated modified Kneser-Ney model of tokens 0 <= t < vocabulary_size.

    Args:
      tokens: int64 [tokens], the training stream.
      vocabulary_size: number of distinct tokens possible.
      order: longest n-gram; n - 1 tokens of context.
    """

    def __init__(self, tokens: np.ndarray, vocabulary_size: int, order: int):
        self.vocabulary_size = vocabulary_size
        self.order = order
        keys, prefixes, counts, suffixes = [], [], [], []
        ids = np.zeros(tokens.size + 1, np.int64)  # the empty prefix, before every token
        for n in range(1, order + 1):
            joined = ids[: tokens.size - n + 1] * vocabulary_size + tokens[n - 1 :]
            unique, first, new_ids, count = np.unique(
                joined, return_index=True, return_inverse=True, return_counts=True
            )
            keys.append(unique)
            prefixes.append(unique // vocabulary_size)
            counts.append(count)
            # An n-gram's suffix is the (n - 1)-gram that starts one token later.
            suffixes.append(ids[first + 1])
            ids = new_ids
        self.levels = []
        for n in range(order):
            if n + 1 < order:
                # Lower orders count in how many contexts an n-gram occurs, not how often.
                count = np.bincount(suffixes[n + 1], minlength=keys[n].size)
            else:
                count = counts[n]
            num_prefixes = keys[n - 1].size if n else 1
            self.levels.append(_level(keys[n], prefixes[n], count, num_prefixes))

    def log2_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """log2 p(token | up to order - 1 tokens before it), float64 [tokens]."""
        probability = np.full(tokens.size, 1.0 / self.vocabulary_size)
        ids = np.zeros(tokens.size + 1, np.int64)
        for n, level in enumerate(self.levels, 1):
            prefix = ids[: tokens.size - n + 1]
            found = _find(level.keys, prefix * self.vocabulary_size + tokens[n - 1 :])
            found = np.where(prefix >= 0, found, -1)
            known = prefix >= 0
            last = probability[n - 1 :]
            own = np.where(found >= 0, level.discounted[found], 0.0)
            probability[n - 1 :] = np.where(known, own + level.backoff[prefix] * last, last)
            ids = found
        return np.log2(probability)


def _level(keys: np.ndarray, prefixes: np.ndarray, count: np.ndarray, num_prefixes: int) -> Level:
    """Discounts one order's counts by Chen and Goodman's estimate."""
    ones, twos, threes, fours = (max(int((count == c).sum()), 1) for c in (1, 2, 3, 4))
    y = ones / (ones + 2 * twos)
    discounts = np.array(
        [0.0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes]
    )
    # Short alphabets have hardly any rare unigrams to estimate from; some mass must still be left.
    discounts = np.clip(discounts, [0.0, 0.1, 0.1, 0.1], [0.0, 1.0, 2.0, 3.0])
    taken = np.minimum(discounts[np.minimum(count, 3)], count)
    total = np.bincount(prefixes, count, num_prefixes)
    left = np.bincount(prefixes, taken, num_prefixes)
    # A prefix seen only at the very end of the stream has no successor: all goes to lower orders.
    backoff = np.divide(left, total, out=np.ones(num_prefixes), where=total > 0)
    safe = np.where(total > 0, total, 1.0)
    return Level(keys, (count - taken) / safe[prefixes], backoff)


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places of `wanted` in the sorted `keys`, -1 where absent."""
    place = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[place] == wanted, place, -1)


def ngram_bits_per_byte(
    train: np.ndarray,
    heldout: np.ndarray,
    vocabulary_size: int,
    order: int,
    num_bytes: int,
    free_token: int,
) -> float:
    """Bits per held-out byte; `free_token`, which starts documents, is not paid for."""
    model = KneserNey(train.astype(np.int64), vocabulary_size, order)
    heldout = heldout.astype(np.int64)
    bits = -model.log2_probabilities(heldout)
    return float(bits[heldout != free_token].sum() / num_bytes)


def xz_size(text: bytes) -> int:
    """Bytes of `xz -9e`, whose 64 MiB window holds the whole corpus."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def _start_token(tokenizer: Tokenizer) -> int:
    start = tokenizer.token_to_id("<|startoftext|>")
    if start is None:
        raise ValueError("expected a tokenizer with <|startoftext|>: prepare the data again")
    return start


def byte_stream(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """int64 [bytes + 2 * documents]: the documents' bytes, 256 before and 257 after each."""
    documents = np.split(tokens, np.flatnonzero(tokens == _start_token(tokenizer))[1:])
    parts = []
    for document in documents:
        text = np.frombuffer(tokenizer.decode(document.tolist()).encode(), np.uint8).astype(
            np.int64
        )
        parts += [np.array([256]), text, np.array([257])]
    return np.concatenate(parts)


def measure(data: Path, token_order: int, byte_orders: list[int]) -> dict[str, float]:
    """Bits per byte of every yardstick on the files in `data`."""
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    train, heldout = np.load(data / "train.npy"), np.load(data / "heldout.npy")
    heldout_text = (data / "heldout.txt").read_bytes()
    train_bytes, heldout_bytes = byte_stream(train, tokenizer), byte_stream(heldout, tokenizer)
    if heldout_bytes[heldout_bytes < 256].astype(np.uint8).tobytes() != heldout_text:
        raise ValueError(f"heldout.npy and heldout.txt in {data} differ: prepare the data again")
    size = len(heldout_text)
    results = {}
    start = _start_token(tokenizer)
    results[f"{token_order}-gram of tokens"] = ngram_bits_per_byte(
        train, heldout, tokenizer.get_vocab_size(), token_order, size, start
    )
    for order in byte_orders:
        results[f"{order}-gram of bytes"] = ngram_bits_per_byte(
            train_bytes, heldout_bytes, 258, order, size, 256
        )
    train_text = train_bytes[train_bytes < 256].astype(np.uint8).tobytes()
    results["xz -9e, held-out text alone"] = xz_size(heldout_text) * 8 / size
    with_train = xz_size(train_text + heldout_text) - xz_size(train_text)
    results["xz -9e, after the training text"] = with_train * 8 / size
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared data")
    parser.add_argument("--token-order", type=int, default=5, help="order of the token model")
    parser.add_argument("--byte-orders", type=int, nargs="*", default=[5, 8], help="byte models")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    start = time.perf_counter()
    results = measure(args.data, args.token_order, args.byte_orders)
    for name, bits in sorted(results.items(), key=lambda item: item[1]):
        print(f"{bits:8.4f} bits per byte  {name}")
    report = {"bits_per_byte": results, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
