"""Computes our loss, logits and gradients of a batch, to hold against PyTorch's."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax.checkpoints import directory, names, safetensors_file
from olmoe_jax.checkpoints.loading import load_parameters
from olmoe_jax.checkpoints.merging import with_router
from olmoe_jax.checkpoints.opening import open_source
from olmoe_jax.checkpoints.peft import read_adapter, to_peft
from olmoe_jax.config import MethodOptions
from olmoe_jax.config.methods import METHODS
from olmoe_jax.errors import ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.files import PATH_OR_ID, user_path
from olmoe_jax.methods import Base, implementation
from olmoe_jax.methods.expert_tuning import ExpertTuning
from olmoe_jax.methods.lora import Lora
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.parameters import Parameters, merge, split_trained
from olmoe_jax.model.tuned import hold_tuned
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer, initial_state

FULL = [name for name, declared in METHODS.items() if declared.has_adapters]
"""The methods of full fine-tuning, which say how the router learns."""
NO_DROPOUT = np.zeros(2, np.uint32)
IGNORED = -100  # the label of a position without loss, as in PyTorch

EXAMPLE = """example:
  python -m convert.parity --model DIR --batch batch.safetensors --method densemixer \\
      --output ours.safetensors

The batch file holds input_ids, attention_mask and labels, int64 [rows, positions], padded on the
right; with --optimizer_steps [update, micro-batch, row, position]. Everything is float32, unless
--compute_dtype says another type of activations and matmuls. Written:
loss, logits, router_logits.LAYER, grad.NAME (Hugging Face names); with --optimizer_steps loss,
grad_norm, lr [updates] and param.NAME after the last update.
"""


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = ArgumentParser(prog="python -m convert.parity", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--model", required=True, **PATH_OR_ID)
    parser.add_argument("--batch", required=True, type=user_path, metavar="FILE")
    parser.add_argument("--method", required=True, choices=FULL)
    parser.add_argument("--output", required=True, type=user_path, metavar="FILE")
    parser.add_argument(
        "--adapter", type=user_path, metavar="PEFT_DIR", help="train this LoRA adapter"
    )
    parser.add_argument(
        "--router",
        choices=["frozen", "trained"],
        help="with --adapter; default: as --method says",
    )
    parser.add_argument(
        "--experts",
        type=user_path,
        metavar="JSON",
        help="ESFT: train what this expert config names",
    )
    parser.add_argument(
        "--optimizer_steps", type=whole_number(1), metavar="N", help="train N updates instead"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--warmup_steps", type=whole_number(0), default=0)
    parser.add_argument(
        "--allow_extrapolation", action="store_true", help="read beyond the model's positions"
    )
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(arguments)
    _check_read(args, parser)
    with directory.new_file(args.output) as partial, jax.default_matmul_precision("highest"):
        safetensors_file.save(partial, compute(args))


def _check_read(args: argparse.Namespace, parser: ArgumentParser) -> None:
    """Raises a `UserError` if a flag is given that the others leave unread."""
    if args.adapter and args.experts:
        raise UserError(f"--experts {args.experts}: an --adapter trains alone; leave one out")
    if args.router and not args.adapter:
        raise UserError(f"--router {args.router}: only read with --adapter; write --method instead")
    for flag in ("learning_rate", "weight_decay", "warmup_steps"):
        value = getattr(args, flag)
        if args.optimizer_steps is None and value != parser.get_default(flag):
            raise UserError(f"--{flag} {value}: only read with --optimizer_steps; add that")


def compute(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Everything that the command writes, by name."""
    source = open_source(args.model)
    config = source.config
    dimensions = 2 if args.optimizer_steps is None else 4
    arrays = _read_batch(args.batch, dimensions, config.vocab_size)
    length, positions = arrays["attention_mask"].sum(axis=-1).max(), config.max_position_embeddings
    if length > positions and not args.allow_extrapolation:
        raise UserError(
            f"{args.batch}: a row has {length} tokens, and the model {positions} positions; write "
            "shorter rows, or --allow_extrapolation"
        )
    parameters = load_parameters(source, make_mesh(devices=jax.devices()[:1]))
    method = implementation(args.method)(MethodOptions(name=args.method), config)
    if args.adapter:
        lora, adapter = with_router(*read_adapter(args.adapter, config), source)
        parameters |= adapter
        method = Lora(method, lora, None if args.router is None else args.router == "trained")
    elif args.experts:
        dense = method.dense_router_gradient
        options = MethodOptions(name=args.method, experts_path=str(args.experts))
        method = ExpertTuning(options, config)
        method.trains_head, method.dense_router_gradient = True, dense
        parameters |= method.added_parameters(Base(None, parameters, lambda wanted: {}))
    compute = ModelSettings(compute_dtype=jnp.dtype(args.compute_dtype))
    settings = method.model_settings(compute)
    trained, frozen = split_trained(method.trains, parameters)
    total = args.optimizer_steps or 1
    trainer = Trainer(
        config=config,
        settings=settings,
        optimizer=adamw(0.9, 0.999, 1e-8, args.weight_decay),
        schedule=schedule("linear", args.learning_rate, args.warmup_steps, total),
        max_grad_norm=1.0,
    )
    if args.optimizer_steps is None:
        return _gradients(trainer, trained, frozen, arrays)
    if args.optimizer_steps > len(arrays["input_ids"]):
        raise UserError(
            f"--optimizer_steps {args.optimizer_steps}: {args.batch} holds only "
            f"{len(arrays['input_ids'])} updates"
        )
    return _trajectory(trainer, trained, frozen, arrays, args.optimizer_steps)


def _read_batch(file: Path, dimensions: int, vocab_size: int) -> dict[str, np.ndarray]:
    arrays = safetensors_file.load(file)
    for name in ("input_ids", "attention_mask", "labels"):
        if name not in arrays or arrays[name].ndim != dimensions:
            raise UserError(f"{file}: needs {name} with {dimensions} dimensions; see --help")
        if not arrays[name].size or arrays[name].dtype.kind != "i":
            raise UserError(
                f"{file}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}; it must be "
                "whole numbers, and at least one"
            )
        if arrays[name].shape != arrays["input_ids"].shape:
            raise UserError(
                f"{file}: {name} has shape {list(arrays[name].shape)}, but input_ids "
                f"{list(arrays['input_ids'].shape)}; they must be equal"
            )
    for name in ("input_ids", "labels"):
        ids = arrays[name][arrays[name] != IGNORED] if name == "labels" else arrays[name]
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if wrong.size:
            raise UserError(f"{file}: {name} holds {wrong[0]}, but the model has {vocab_size} ids")
    if not np.isin(arrays["attention_mask"], (0, 1)).all():
        raise UserError(f"{file}: attention_mask holds other numbers than 0 and 1")
    return arrays


def padded_batch(input_ids, attention_mask, labels, micro_batches: int = 1) -> DeviceBatch:
    """A right-padded micro-batch [B, S] as ours: the loss is the mean of micro-batches' means."""
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORED)], axis=1)
    counted = targets != IGNORED
    weights = counted / (max(1, counted.sum()) * micro_batches)
    positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    arrays = (input_ids, np.where(counted, targets, 0), attention_mask, positions)
    return DeviceBatch(
        *(jnp.asarray(a, jnp.int32) for a in arrays), jnp.asarray(weights, jnp.float32)
    )


def _to_hf(prefix: str, parameters: Parameters, trainer: Trainer) -> dict[str, np.ndarray]:
    host, settings = jax.device_get(parameters), trainer.settings
    tensors = dict(names.all_to_hf(host, trainer.config))
    if settings.lora:
        tensors |= dict(to_peft(host, settings.lora))
    if settings.tuned_experts:
        tensors |= dict(names.tuned_to_hf(host, settings.tuned_experts))
    return {prefix + name: value for name, value in tensors.items()}


def _gradients(trainer: Trainer, trained, frozen, arrays) -> dict[str, np.ndarray]:
    batch = padded_batch(arrays["input_ids"], arrays["attention_mask"], arrays["labels"])
    result = jax.jit(trainer.accumulate)(
        trained, frozen, trainer.zero_sums(trained), batch, NO_DROPOUT
    )

    @jax.jit
    def forward(parameters):
        model = merge(trainer.graph, parameters)
        hidden, statistics = model.hidden(
            batch.tokens, batch.segment_ids, batch.positions, with_router_logits=True
        )
        return model.logits(hidden), statistics.logits

    logits, router_logits = jax.device_get(forward(trained | frozen))
    out = {"loss": np.asarray(result.loss), "logits": logits}
    for layer, value in enumerate(router_logits):
        out[f"router_logits.{layer}"] = value.reshape(-1, value.shape[-1])
    return out | _to_hf("grad.", result.gradients, trainer)


def _trajectory(trainer: Trainer, trained, frozen, arrays, updates: int) -> dict[str, np.ndarray]:
    accumulate, update = jax.jit(trainer.accumulate), jax.jit(trainer.update)
    hold = jax.jit(hold_tuned, static_argnums=2)
    state, history = initial_state(trained, trainer.optimizer), []
    for index in range(updates):
        step = [arrays[name][index] for name in ("input_ids", "attention_mask", "labels")]
        accumulated = trainer.zero_sums(trained)
        for micro in zip(*step, strict=True):
            batch = padded_batch(*micro, micro_batches=len(step[0]))
            accumulated = accumulate(state.parameters, frozen, accumulated, batch, NO_DROPOUT)
        state, metrics = update(state, accumulated)
        if trainer.settings.tuned_experts:
            frozen = frozen | hold(frozen, state.parameters, trainer.settings.tuned_experts)
        history.append(metrics)
    out = {
        "loss": np.stack([jax.device_get(m.loss) for m in history]),
        "grad_norm": np.stack([jax.device_get(m.grad_norm) for m in history]),
        "lr": np.stack([jax.device_get(m.learning_rate) for m in history]),
    }
    return out | _to_hf("param.", state.parameters | frozen, trainer)


if __name__ == "__main__":
    run_command(main)
