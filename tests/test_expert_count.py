"""The bytes of weights that one token reads, asked of the kernel, not of XLA's estimates."""

import argparse
import sys

import pytest
from expert_count import measure


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages were touched")
def test_one_token_reads_the_bytes_of_its_experts_and_no_others(tmp_path):
    options = argparse.Namespace(
        experts=[8, 64], hidden=512, intermediate=768, experts_per_token=4, runs=1
    )
    few, many = measure(options, tmp_path)
    # each expert's part of each file is a whole number of pages
    assert few["bytes_read"] == few["bytes_held"] * 4 // 8
    assert many["bytes_read"] == many["bytes_held"] * 4 // 64 == few["bytes_read"]
