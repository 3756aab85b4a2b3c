import json

import pytest

from olmoe_jax.checkpoints.turn_ends import keep_turn_ends, read_turn_ends, write_turn_ends
from olmoe_jax.errors import UserError


def test_ids_are_read_and_written(tmp_path):
    assert read_turn_ends(tmp_path) == set()
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text('{"eos_token_id":  5, "x": "é"}')
    write_turn_ends(tmp_path, [5])
    assert config.read_text() == '{"eos_token_id":  5, "x": "é"}'  # not even its spaces
    generation.write_text('{"eos_token_id": null}')
    assert read_turn_ends(tmp_path) == {5}
    write_turn_ends(tmp_path, [7, 3])
    for file, other in ((config, {"x": "é"}), (generation, {})):
        assert json.loads(file.read_text()) == {"eos_token_id": [3, 7], **other}
    assert read_turn_ends(tmp_path) == {3, 7}
    write_turn_ends(tmp_path, {3})
    assert json.loads(generation.read_text()) == {"eos_token_id": 3}


def test_no_token(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": [-1, 5]}')
    assert read_turn_ends(tmp_path) == {5}


def test_an_adapter_keeps_them_alone(tmp_path):
    keep_turn_ends(tmp_path, {7, 3})
    assert read_turn_ends(tmp_path) == {3, 7}


@pytest.mark.parametrize("value", ["2", True, 1.5, {}, {"a": 1}, [None], [[1]], 2**31, [-2]])
def test_what_is_no_id_is_refused(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"config\.json: eos_token_id"):
        read_turn_ends(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: eos_token_id"):
        write_turn_ends(tmp_path, [5])
