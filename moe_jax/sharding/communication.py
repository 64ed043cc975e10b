"""The choice between two ways in which rows meet the experts of other devices.

    psum         every device has all rows and applies its own experts to them; the results are
                 summed over devices. One collective: best for few tokens.
    all_to_all   rows are split over devices. A row is sent once to each device that has some of its
                 experts, and the sum of what they make of it comes back. Each device sends and
                 gets a fixed number of rows; where that is not enough, there are further rounds.
                 Moves less the more devices there are: best for many tokens.

Both compute every pair of a token and an expert.
"""

from typing import Literal

type Communication = Literal["psum", "all_to_all"]
type CommunicationChoice = Literal["auto", "psum", "all_to_all"]

COMMUNICATIONS: tuple[Communication, ...] = ("psum", "all_to_all")

_ROOM = 1.25  # rows that a device may send to another, as a multiple of the mean
_MULTIPLE = 8
_SUM_WIDTH = 2  # sums travel in float32, bfloat16 rows take half of that
_START_ROWS = 16_000
"""What starting the exchange costs, in rows that could be sent meanwhile.

On two H200 connected by NVLink, a layer of gpt-oss-20b takes less time with `psum` for 8,192 tokens
and with `all_to_all` for 32,768, so that it costs between 8,192 and 32,768 rows
(`benchmarks/sharded.py`; results/sharded_h200x2.json). Not measured on four.
"""


def choose_communication(
    num_tokens: int, num_devices: int, experts_per_token: int
) -> Communication:
    """The way that takes less time by what a device sends, in rows of bfloat16.

    With `psum` these are 2 (n - 1) / n for each token of all n devices, as in a ring, in float32.
    With `all_to_all` they are the capacity for each other device, there and back.

    Args:
        num_tokens: on all devices that share the experts, that is, in one part of the data axis.
        num_devices: over how many the experts are spread.
        experts_per_token: how many experts a token is sent to.
    """
    if num_devices == 1:
        return "psum"
    each = -(-num_tokens // num_devices)
    others = num_devices - 1
    summed = _SUM_WIDTH * 2 * others * num_tokens / num_devices
    exchanged = 2 * others * capacity(each, num_devices, experts_per_token) + _START_ROWS
    return "all_to_all" if exchanged < summed else "psum"


def capacity(num_tokens: int, num_devices: int, experts_per_token: int) -> int:
    """How many of a device's tokens go to each device in one round.

    1.25 times the mean for experts chosen evenly, rounded up to a multiple of 8. All tokens are
    the most: a token is sent to a device once, however many of its experts are there.
    """
    share = 1 - (1 - 1 / num_devices) ** experts_per_token
    mean = -(-int(_ROOM * share * num_tokens + 1) // _MULTIPLE) * _MULTIPLE
    return min(num_tokens, mean)
