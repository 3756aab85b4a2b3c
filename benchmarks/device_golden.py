"""The golden cases of `benchmarks.device`: convert.parity's numbers on a small random model."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.shapes import Shape
from olmoe_jax.errors import UserError

LIMITS = {"float32": 1e-4, "bfloat16": 2.0}
"""The largest error of a right device: in float32 that itself, in bfloat16 times the CPU's."""
SHAPE = Shape(2, 256, 128, 2, 16, 4, vocab=512, rows=2, length=128)
CASES = {
    "densemixer": ("--method=densemixer",),
    "lora": ("--method=densemixer", "--adapter={}/adapter", "--router=trained"),
    "esft": ("--method=conventional", "--experts={}/experts.json"),
}


def write_inputs(output: Path) -> None:
    """Writes a model, a batch with padding, an adapter and an expert config.

    Needs no package but those of `device_parts.PACKAGES`.
    """
    import numpy as np

    from benchmarks.random_model import hf_config
    from olmoe_jax.checkpoints import directory, names, peft, safetensors_file
    from olmoe_jax.checkpoints.expert_config import ExpertConfig
    from olmoe_jax.model.config import LoraSettings, ModelSettings, model_config_from_hf
    from olmoe_jax.model.decoder import parameter_specs
    from olmoe_jax.model.parameters import ROUTER, ParameterSpec

    for name in ("model", "adapter"):
        (output / name).mkdir()
    values, lora, random = hf_config(SHAPE), LoraSettings(16, 32.0), np.random.default_rng(1)
    config = model_config_from_hf(values)

    def draw(spec: ParameterSpec) -> np.ndarray:
        # Large weights, so that the router prefers some experts clearly.
        return 0.1 * random.standard_normal(spec.shape, np.float32)

    weights = {
        name: np.ones(spec.shape, np.float32) if name.endswith("norm") else draw(spec)
        for name, spec in parameter_specs(config).items()
    }
    adapter = {
        name: draw(spec)
        for name, spec in parameter_specs(config, ModelSettings(lora=lora)).items()
        if ".lora." in name or name == ROUTER
    }
    directory.write_json(output / "model" / "config.json", values)
    tensors = {n: np.ascontiguousarray(v) for n, v in names.all_to_hf(weights, config)}
    safetensors_file.save(output / "model" / "model.safetensors", tensors)
    size = (SHAPE.rows, SHAPE.length)
    tokens = random.integers(0, SHAPE.vocab, size)
    mask = (np.arange(size[1]) < np.array([[size[1]], [size[1] * 3 // 4]])).astype(np.int64)
    labels = np.where(mask == 1, tokens, -100)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    safetensors_file.save(output / "batch.safetensors", batch)
    peft.write_adapter(output / "adapter", adapter, lora, "model")
    experts = ExpertConfig(tuple((0, 3, 7) for _ in range(SHAPE.layers)))
    (output / "experts.json").write_text(json.dumps(experts.to_json()))


def numbers(directory: Path, where: str) -> Iterator[tuple[str, str, Path]]:
    """Yields case, dtype and the file with the numbers that convert.parity writes here."""
    from convert import parity

    for dtype in LIMITS:
        for case, flags in CASES.items():
            output = directory / f"{where}-{case}-{dtype}"
            parity.main(
                [
                    *(f"--model={directory / 'model'}", f"--compute_dtype={dtype}"),
                    *(f"--batch={directory / 'batch.safetensors'}", f"--output={output}"),
                    *(flag.format(directory) for flag in flags),
                ]
            )
            yield case, dtype, output


def worst(actual: Path, expected: Path) -> tuple[float, str]:
    """Returns the largest error of a kind of tensor, |a - e| / |e|, and the kind.

    A kind is the tensors of all layers and experts: in bfloat16 some tokens choose another expert,
    which a single expert's gradient feels.
    """
    import numpy as np

    from olmoe_jax.checkpoints import safetensors_file

    found, wanted = safetensors_file.load(actual), safetensors_file.load(expected)
    if found.keys() != wanted.keys():
        raise UserError(f"{actual}: holds other tensors than {expected}")
    squares: dict[str, list[float]] = {}
    for name, value in wanted.items():
        a, e = (np.asarray(x, np.float64) for x in (found[name], value))
        sums = squares.setdefault(re.sub(r"\d+", "N", name), [0.0, 0.0])
        sums[0] += float(np.sum((a - e) ** 2))
        sums[1] += float(np.sum(e**2))
    errors = {kind: math.sqrt(off / (whole or 1.0)) for kind, (off, whole) in squares.items()}
    worst = max(errors, key=lambda kind: (math.isnan(errors[kind]), errors[kind]))
    return errors[worst], worst
