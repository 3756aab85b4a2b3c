"""The GPU hours of docs/reproduce.md."""

import pytest
from helpers import ROOT

from benchmarks.reproduce_hours import evaluation_hours, main, step_flops, training_hours


def test_the_documentation_has_what_the_script_prints(capsys):
    main([])
    text = (ROOT / "docs/reproduce.md").read_text()
    table = capsys.readouterr().out.splitlines()[1:-1]
    assert len(table) == 11
    for line in table:
        assert line in text


def test_by_hand():
    # 4 epochs of 1,174,978 tokens at 30% of 989 TFLOP/s.
    flops = step_flops("conventional", "gsm").executed
    seconds = 4 * 1_174_978 * flops / (0.3 * 989e12)
    assert training_hours("conventional", "gsm", 0.3) == pytest.approx(seconds / 3600)
    assert training_hours("frozen", "law", 0.6) == training_hours("frozen", "law", 0.3) / 2
    # DenseMixer computes the other 56 experts' terms: 56 / 8 of a sparse forward of the experts.
    dense = step_flops("densemixer", "gsm")
    assert dense.router_gradient == 2 * 16 * 56 * 3 * 2048 * 1024
    # 21 batches of 512 tokens, 13.84 GB of weights at 30% of 3.35 TB/s, and a little to read.
    decoding = 21 * 512 * 13.838e9 / (0.3 * 3.35e12) / 3600
    assert evaluation_hours("gsm", 0.3) == pytest.approx(decoding, rel=0.01)
