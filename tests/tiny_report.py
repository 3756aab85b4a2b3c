"""Evaluations and runs of a few rows, as eval.run and train.py write them."""

import json
from dataclasses import asdict
from pathlib import Path

from eval.statistics import mean_metric
from olmoe_jax.config import Config, MethodOptions, to_dict


def write_json(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_result(path: Path, task: str, metric: str, scores, data="d", output="It is 4.") -> None:
    """Writes a task's files as eval.run does."""
    rows = [
        {"id": str(i), "prompt": f"{i}?", "output": output, "answer": "4", "reference": "5"}
        | {metric: score}
        for i, score in enumerate(scores)
    ]
    (path / task).mkdir(parents=True)
    (path / task / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": task, "data": data, "limit": None, "max_new_tokens": 512}
    known = {metric: asdict(mean_metric([score for score in scores if score is not None]))}
    write_json(path / task / "settings.json", settings)
    write_json(path / task / "result.json", {"settings": settings, "metrics": known})


def write_evaluation(path: Path, model: str = "m", adapter: str | None = None, **tasks) -> Path:
    named = {"model": model, "adapter": adapter, "backend": "jax", "compute_dtype": "float32"}
    write_json(path / "model.json", named)
    for task, scores in tasks.items():
        write_result(path, task, "judge" if task == "law" else "exact_match", scores)
    return path


def write_run(path: Path, method: str, data: str = "RoxanneWsyw/gsm:train.jsonl") -> Path:
    config = to_dict(Config(method=MethodOptions(method.removesuffix("_lora"))))
    config["method"]["lora_rank"] = 8 if method.endswith("_lora") else None
    config["data"]["train_path"] = data
    write_json(path / "config.json", config)
    lines = [{"step": step, "loss": 3 / step, "grad_norm": 1.0} for step in range(1, 400)]
    lines += [{"step": 200, "eval_loss": 0.5}, {"step": 200, "exact_match": 0.25}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
