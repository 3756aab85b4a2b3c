"""The command `python -m olmoe_jax.plan`."""

import json
from collections.abc import Sequence

from olmoe_jax.config.load import parse_config
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.plan.devices import parse_topology, prepare_environment

_EPILOG = """\
--config and --config.FIELD.SUBFIELD=VALUE are those of train.py (python train.py --help).

The devices need not exist, but their compiler must be installed:
  h100  make install ACCELERATOR=cuda13, or pip install "jax[cuda13]"
  v5e, v6e, v5p  make install ACCELERATOR=tpu, or pip install "jax[tpu]"

example:
  python -m olmoe_jax.plan --config configs/densemixer_gsm.py --topology h100:8
"""


def main(arguments: Sequence[str]) -> None:
    """Prints the plan that the arguments ask for. Raises `UserError` for mistakes in them."""
    options, config_flags = _parser().parse_known_args(arguments)
    topology = parse_topology(options.topology)
    config = parse_config(config_flags)
    prepare_environment(topology)
    # These import jax, which reads the environment once.
    from olmoe_jax.plan.planning import plan
    from olmoe_jax.plan.report import facts, to_text

    planned = plan(
        config,
        options.topology,
        rows_per_step=options.rows_per_step,
        tuned_experts=options.tuned_experts,
    )
    result = facts(planned)
    print(json.dumps(result) if options.json else to_text(result))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m olmoe_jax.plan",
        description="Compiles the training step of a configuration for devices that need not "
        "exist;\nsays whether it fits, what it communicates and how fast it can be at most.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:COUNT",
        help="h100:8, v5e:2x4, v6e:8, v5p:2x2x1, cpu:8, …",
    )
    parser.add_argument(
        "--rows_per_step",
        type=whole_number(1),
        metavar="N",
        help="rows of data.max_seq_length tokens in a step (default: one micro-batch)",
    )
    parser.add_argument(
        "--tuned_experts",
        type=whole_number(1),
        metavar="N",
        help="tuned experts in each layer, where the run's data decide which they are (default: 4)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    run_command(main)
