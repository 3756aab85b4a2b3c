import json

import pytest

from benchmarks import checkpointing


@pytest.mark.slow
def test_what_a_checkpoint_costs(capsys):
    flags = "--shape tiny --method conventional --saves 1 --steps 1"
    checkpointing.main([*flags.split(), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["blocked_seconds"] < result["complete_seconds"]
    assert result["blocked_seconds"] < result["waited_seconds"]
    # A weight and two moments in float32.
    assert result["state_gib"] * 2**30 == pytest.approx(12 * 165_000, rel=0.01)
    assert 0 < result["checksum_seconds"] < result["waited_seconds"]
    assert "of the synchronous save" in checkpointing.report(result)
