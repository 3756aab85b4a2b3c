"""Evaluations and runs of a few rows, as eval.run, lm_eval and train.py write them; reports."""

import json
from dataclasses import asdict
from pathlib import Path

from eval.report.__main__ import main
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


def write_harness(path: Path, groups: dict, date: str = "1", limit=None, **tasks) -> Path:
    """Writes lm_eval's files: {task or group: its metric "m", or its rows' scores "acc"}."""
    results, hashes = {}, {}
    for name, scores in tasks.items():
        if isinstance(scores, list):
            mean = sum(scores) / len(scores)
            results[name] = {"alias": name, "acc,none": mean, "acc_stderr,none": 0.1}
        else:
            results[name] = {"m,none": scores, "m_stderr,none": "N/A"}
        if groups.get(name):
            continue
        hashes[name] = f"hash of {name}"
        samples = [
            {
                "doc_id": index,
                "arguments": {
                    "gen_args_0": {"arg_0": f"{index}?", "arg_1": " yes"},
                    "gen_args_1": {"arg_0": f"{index}?", "arg_1": " no"},
                },
                "resps": [[["-2.5", "False"]], [["-1.5", "True"]]],
                "target": "0",
                "filter": "none",
                "metrics": ["acc"],
                "acc": score,
            }
            for index, score in enumerate(scores if isinstance(scores, list) else [None])
        ]
        path.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (path / f"samples_{name}_{date}.jsonl").write_text(lines)
    stored = {
        "results": results,
        "group_subtasks": groups,
        "higher_is_better": {name: {"m": False, "acc": True} for name in tasks},
        "n-shot": {},
        "task_hashes": hashes,
        "lm_eval_version": "0.4.13",
        "config": {"model": "olmoe_jax", "model_args": {"pretrained": path.name}, "limit": limit},
    }
    write_json(path / f"results_{date}.json", stored)
    return path


def report(output: Path, *arguments: str) -> tuple[str, str]:
    """Makes a report. Returns the text of report.md and of report.html."""
    main([*arguments, "--output", str(output)])
    return (output / "report.md").read_text(), (output / "report.html").read_text()
