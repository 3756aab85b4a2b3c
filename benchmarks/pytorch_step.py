"""Times forward and backward of transformers' OLMoE on random tokens, for compare_pytorch.

The script needs only torch and transformers, densemixer with --method=densemixer, and peft with
--lora_rank. It runs in the virtual environments that compare_pytorch makes, and prints one line of
JSON, the last one.
"""

import argparse
import json
import os
import time
from typing import Any

import numpy as np

from benchmarks.memory import peak_resident_gib, settled_resident_gib
from benchmarks.shapes import Shape, add_shape_flags, shape_of

# densemixer reads this variable when it is imported, and then patches transformers.
ENABLE = "DENSEMIXER_ENABLED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_flags(parser)
    parser.add_argument("--method", choices=("conventional", "densemixer"), default="conventional")
    parser.add_argument("--experts_implementation", help="transformers 5: eager or grouped_mm")
    parser.add_argument("--lora_rank", type=int, help="adapters of this rank; default: none")
    parser.add_argument("--tuned_experts", type=int, help="of a layer; default: everything trains")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ[ENABLE] = str(int(args.method == "densemixer"))
    print(json.dumps(measure(args)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the model, runs a step to warm up, then times steps."""
    import torch

    if args.method == "densemixer":
        import densemixer  # noqa: F401

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = shape_of(args)
    model = make_model(shape, args.experts_implementation)
    if args.lora_rank:
        model = with_adapters(model, args.lora_rank)
    elif args.tuned_experts:
        freeze_all_but(model, args.tuned_experts)
    made = peak_resident_gib()
    with_model = settled_resident_gib()
    tokens = torch.from_numpy(
        np.random.default_rng(0).integers(0, shape.vocab, (shape.rows, shape.length))
    )
    timed_step(model, tokens)
    warm = peak_resident_gib()
    settled_resident_gib()
    results = [timed_step(model, tokens) for _ in range(args.steps)]
    peak = peak_resident_gib()
    # densemixer does not patch transformers 5, and a frozen router has no gradient.
    unknown = args.experts_implementation or args.tuned_experts
    return {
        "loss": results[-1][2],
        "step_seconds": [wall for wall, _, _ in results],
        "step_cpu_seconds": [cpu for _, cpu, _ in results],
        "peak_resident_gib": max(made, warm, peak),
        "peak_over_model_gib": peak - with_model,
        "router_spread": None if unknown else router_spread(model),
    }


def make_model(shape: Shape, experts_implementation: str | None) -> Any:
    """Returns OLMoE with random float32 weights, in training mode, with fused attention."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    settings = {"attn_implementation": "sdpa"}
    if experts_implementation:
        settings["experts_implementation"] = experts_implementation
    config = OlmoeConfig(**shape.hf_config(), use_cache=False)
    return OlmoeForCausalLM._from_config(config, **settings).train()


def with_adapters(model: Any, rank: int) -> Any:
    """Returns the model with PEFT's adapters on the matrices that ours adapt, all else frozen."""
    from peft import LoraConfig, get_peft_model

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=rank, target_modules=attention, target_parameters=experts)
    return get_peft_model(model, config)


def freeze_all_but(model: Any, experts: int) -> None:
    """Leaves only the first `experts` experts of each layer trainable, as the reference's ESFT."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.experts[:experts].requires_grad_(True)


def timed_step(model: Any, tokens: Any) -> tuple[float, float, float]:
    """Runs forward (the logits and loss of all positions) and backward.

    Returns:
      Wall seconds, CPU seconds and the loss.
    """
    model.zero_grad(set_to_none=True)
    cpu, start = time.process_time(), time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return time.perf_counter() - start, time.process_time() - cpu, loss.item()


def router_spread(model: Any) -> float:
    """Returns how much the gradients of the unselected experts' probabilities differ.

    The spread is 0 unless DenseMixer is in effect. For one token,
    dL/dlogit_j = p_j (dL/dp_j - sum_i p_i dL/dp_i). If only selected experts have a dL/dp_j, then
    dL/dlogit_j / p_j is the same number for all others. The spread is the standard deviation of
    these numbers over the largest.
    """
    import torch

    block = model.model.layers[0].mlp
    x = torch.randn(1, 1, model.config.hidden_size)
    y, logits = block(x)
    logits.retain_grad()
    (y * torch.randn_like(y)).sum().backward()
    probabilities = torch.softmax(logits.detach(), -1)
    unselected = probabilities.argsort()[0, : -block.top_k]
    ratios = (logits.grad / probabilities)[0, unselected]
    return (ratios.std() / ratios.abs().max()).item()


if __name__ == "__main__":
    main()
