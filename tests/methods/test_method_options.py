"""Options of methods that do not go together: one line, nothing written."""

import json

import pytest
from helpers import assert_user_error, run_command_line
from tiny import short_run
from training.interruptions import training_error


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"method__experts_path": "e.json"},
            "method.experts_path=e.json: only for method.name=esft_gate",
        ),
        (
            {"method__esft_top_p": 0.5},
            "method.esft_top_p=0.5: only for method.name=esft_gate",
        ),
        (
            {"method__esft_densemixer": True},
            "method.esft_densemixer=true: only for method.name=esft_gate",
        ),
        (
            {"method__esft_train_head": False},
            "method.esft_train_head=false: only for method.name=esft_gate",
        ),
        (
            {"method__name": "esft_gate", "method__lora_rank": 4},
            "method.lora_rank=4: only for method.name=frozen, conventional",
        ),
        (
            {"method__name": "esft_gate", "method__router_gradient_experts": 4},
            "method.router_gradient_experts=4: with esft_gate, only read "
            "with method.esft_densemixer=true",
        ),
        (
            {
                "method__name": "esft_gate",
                "method__experts_path": "e.json",
                "method__esft_top_p": 0.3,
            },
            "method.esft_top_p=0.3: not read with method.experts_path, which says what trains",
        ),
        ({"method__adapter_path": "a"}, "method.adapter_path=a: only read with method.lora_rank"),
        ({"method__lora_targets": "q"}, "method.lora_targets=q: only read with method.lora_rank"),
        (
            {"method__lora_rank": 4, "method__lora_targets": "q,router"},
            "method.lora_targets=q,router: must be some of q,k,v,o,gate,up,down, separated by",
        ),
        (
            {"method__lora_rank": 4, "method__lora_targets": ""},
            "method.lora_targets=: must be some of q,k,v,o,gate,up,down",
        ),
        ({"method__lora_rank": 0}, "method.lora_rank=0: must be from 1 to 65536"),
        ({"method__lora_rank": 4, "method__lora_dropout": 1.0}, "method.lora_dropout=1.0: must be"),
        ({"method__name": "esft_gate", "method__esft_top_p": 1.1}, "method.esft_top_p=1.1: must"),
        ({"method__name": "esft_token", "method__esft_top_p": 0.0}, "method.esft_top_p=0.0: must"),
    ],
)
def test_options_that_do_not_go_together(run_files, base, tmp_path, changes, expected):
    output = tmp_path / "out"
    assert training_error(short_run(run_files, base, output, **changes)).startswith(expected)
    assert not output.exists()


@pytest.mark.slow
def test_training_mistake_in_a_process(run_files, tmp_path):
    """The command refuses experts_path of another model: exit code 2, one line, nothing written."""
    experts = tmp_path / "experts.json"
    experts.write_text(json.dumps({"experts": {"1": [0], "2": [99]}}))
    changes = {"method__name": "esft_gate", "method__experts_path": str(experts)}
    result = run_command_line("train.py", *run_files.arguments(tmp_path / "out", **changes))
    assert_user_error(result, experts, "layer 2 has [99]; write different ids from 0 to 7")
    assert [path.name for path in tmp_path.iterdir()] == ["experts.json"]
