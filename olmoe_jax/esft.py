"""Scores a model's experts on a task's data, and selects the experts that ESFT tunes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.data.arguments import add_row_arguments, naming_flags
from olmoe_jax.errors import SEED, ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.files import NEW_DIRECTORY, PATH_OR_ID, user_path
from olmoe_jax.methods.selection import FUNCTIONS, read_scores, select, write_scores

EXAMPLE = """examples:
  python -m olmoe_jax.esft score --model allenai/OLMoE-1B-7B-0125 \\
      --data RoxanneWsyw/ESFT-law:train.jsonl --output law_scores
  python -m olmoe_jax.esft select --scores law_scores/scores.json --function token --top_p 0.2 \\
      --output law_experts.json
  python train.py --config configs/esft_token_law.py --config.method.experts_path=law_experts.json
"""


@naming_flags()
def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = ArgumentParser(prog="python -m olmoe_jax.esft", description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="score the experts on data")
    score.add_argument("--model", required=True, **PATH_OR_ID)
    score.add_argument("--output", **NEW_DIRECTORY)
    score.add_argument("--tokenizer", **PATH_OR_ID, help="default: the model's")
    score.add_argument("--max_tokens", type=whole_number(1), default=300_000, metavar="N")
    score.add_argument(
        "--max_seq_length",
        type=whole_number(1, 2**20),
        metavar="N",
        help="default: 4096, or fewer where the model's positions end",
    )
    score.add_argument(
        "--allow_extrapolation", action="store_true", help="read beyond the model's positions"
    )
    add_row_arguments(score)
    score.add_argument("--compute_dtype", choices=["float32", "bfloat16"], default="float32")
    score.add_argument("--seed", type=SEED, default=0, help="seeds the sample of examples")
    choose = commands.add_parser("select", help="write an expert config")
    choose.add_argument("--scores", required=True, type=user_path, metavar="JSON")
    choose.add_argument("--function", required=True, choices=FUNCTIONS)
    choose.add_argument("--top_p", required=True, type=float, metavar="P")
    choose.add_argument("--output", required=True, type=user_path, metavar="JSON")
    choose.add_argument(
        "--normalization", choices=["within_layer", "across_layers"], default="within_layer"
    )
    choose.add_argument(
        "--non_expert_modules", action="store_true", help="train everything outside the experts too"
    )
    args = parser.parse_args(arguments)
    if args.command == "score":
        with directory.new_directory(args.output) as output:
            said = run_score(args, output)
    else:
        with directory.new_file(args.output) as output:
            said = run_select(args, output)
    print(f"{said}; wrote {args.output}")


def run_score(args: argparse.Namespace, output: Path) -> str:
    """Scores the experts; writes scores.json and scores.png. Returns what to say."""
    import jax.numpy as jnp

    from olmoe_jax import data
    from olmoe_jax.checkpoints.loading import load_parameters
    from olmoe_jax.checkpoints.opening import open_source
    from olmoe_jax.data.arguments import rules_of, sources_of
    from olmoe_jax.methods.scoring import expert_scores
    from olmoe_jax.model.config import ModelSettings
    from olmoe_jax.model.decoder import graph_of
    from olmoe_jax.parallel import sharding

    source = open_source(args.model)
    dtype = jnp.dtype(args.compute_dtype)
    place = args.tokenizer or str(source.files)
    tokenizer = data.load_tokenizer(place)
    positions = source.config.max_position_embeddings
    length = args.max_seq_length or min(4096, positions)
    if length > positions and not args.allow_extrapolation:
        raise UserError(
            f"--max_seq_length {length}: the model has {positions} positions; write at most "
            f"{positions}, or --allow_extrapolation"
        )
    rules = rules_of(args, tokenizer)
    sources = ", ".join(map(str, sources_of(args)))
    dataset = data.tokenize_dataset(sources, tokenizer, length, rules=rules, progress=True)
    vocabulary, instead = source.config.vocab_size, "write the model's as --tokenizer"
    data.check_vocabulary(dataset.tokens.max(), vocabulary, instead, place)
    dataset = dataset.epoch(0, args.seed)
    mesh = sharding.make_mesh()
    scores, tokens = expert_scores(
        graph_of(source.config, ModelSettings(compute_dtype=dtype)),
        load_parameters(source, mesh, lambda name: dtype),
        source.config,
        mesh,
        dataset,
        max_tokens=args.max_tokens,
        seed=args.seed,
        layout={
            "max_seq_length": length,
            "pack": True,
            "rows_per_batch": mesh.size,
            "pad_id": tokenizer.eos_token_id,
            "process_index": 0,
            "process_count": 1,
        },
    )
    write_scores(scores, output)
    share = np.sort(scores["gate"], axis=1)[:, ::-1][:, : source.config.num_experts_per_token]
    return (
        f"scored {tokens:,} tokens; the {share.shape[1]} best of {source.config.num_experts} "
        f"experts hold {share.sum(axis=1).mean():.0%} of a layer's gate score on average"
    )


def run_select(args: argparse.Namespace, output: Path) -> str:
    """Selects experts by their scores; writes the expert config. Returns what to say."""
    # Rounded scores may sum to a little less than 1; 1.1 then still selects every expert. The
    # published scripts are used so.
    if not 0 < args.top_p <= 1.1:
        raise UserError(f"--top_p={args.top_p}: must be above 0 and at most 1; write e.g. 0.2")
    chosen = select(read_scores(args.scores, args.function), args.top_p, args.normalization)
    chosen = ExpertConfig(chosen.experts, args.non_expert_modules)
    directory.write_json(output, chosen.to_json())
    counts = [len(ids) for ids in chosen.experts]
    return f"selected {sum(counts)} experts, {min(counts)} to {max(counts)} a layer"


if __name__ == "__main__":
    run_command(main)
