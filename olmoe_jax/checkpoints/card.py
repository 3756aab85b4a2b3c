"""Model cards: the README.md of an export, with the metadata that the hub reads.

huggingface_hub writes and parses the metadata.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olmoe_jax import hub, sources
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.opening import METRICS, RunCheckpoint
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json, read_json_lines, read_text

_TAG = "olmoe_jax"
_SHOWN = {
    "train": ("batch_size", "epochs", "max_steps", "seed"),
    "data": ("train_path", "hub_config", "split", "max_seq_length", "pack"),
    "model": ("compute_dtype", "base_quantization"),
}
"""The fields of these sections that a card shows; of method and optimizer it shows all."""
_USE, _TRAINING = "## Use\n", "\n## Training\n"
_USE_MODEL = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
    tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")

or `vllm serve DIRECTORY`."""
_USE_ADAPTER = """\
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "DIRECTORY")

or `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=DIRECTORY`."""
_USE_ROUTER = """

The router trained too. Its weights are in router.safetensors, which PEFT and vLLM do not read:
merge it with `python -m convert.merge_lora --model {base} --adapter DIRECTORY --output MERGED`."""
_USE_EXPERTS = """\
Only the tensors that trained are here. Put them into the base, then load the result:

    python -m convert.merge_lora --model {base} --adapter DIRECTORY --output MERGED"""


def write_card(output: Path, source: Source, adapter: Path | None = None) -> None:
    """Writes the card of an export, and copies the base's license.

    Args:
      output: the export's directory, which holds everything else.
      source: what is exported. A run's card says how it trained.
      adapter: where the source has an adapter merged, the directory that has the card.
    """
    from huggingface_hub import ModelCardData

    directory.copy_files(source.files, output, directory.LICENSE_FILES)
    if not isinstance(source, RunCheckpoint):
        own = adapter if adapter and _is_ours(adapter) else source.files
        directory.copy_files(own, output, (directory.CARD,))
        if own == adapter:
            _describe_merged(output)
        return
    old, config = _metadata(source.files), source.run_config
    has_base = config["model"].get("init") != "random"
    base_id = source.base if has_base and hub.is_hub_id(source.base) else old.get("base_model")
    is_adapter = (output / "adapter_config.json").exists()
    names = [s.path.partition(":")[0] for s in sources.parse(config["data"]["train_path"])]
    hub_ids = list(dict.fromkeys(filter(hub.is_hub_id, names)))
    method, rank = config["method"]["name"], config["method"].get("lora_rank")
    metadata = ModelCardData(
        base_model=base_id,
        license=old.get("license"),
        datasets=hub_ids or None,
        language=old.get("language"),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[_TAG, "moe", method, *(["lora"] if rank else [])],
    )
    lines = [
        f"# {Path(config['train']['output_dir']).name}\n",
        f"{base_id or 'A base of one’s own'}, fine-tuned by `{method}`"
        f"{f' with LoRA of rank {rank}' if rank else ''}: step {source.step}.\n",
        _USE,
        _use(output, base_id or "BASE", rank),
        _TRAINING,
        *_table(_facts(source)),
    ]
    content = f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
    (output / directory.CARD).write_text(content, encoding="utf-8")


def add_results(path: Path, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Adds scores to the card of an export of this project, as the hub's model-index.

    Args:
      path: the export's directory.
      results: {task: {metric: score}}; the other tasks of the card stay.

    Returns:
      Whether the directory has such a card.
    """
    from huggingface_hub import EvalResult, ModelCard

    if not _is_ours(path):
        return False
    card = ModelCard(read_text(path / directory.CARD))
    kept = [old for old in card.data.eval_results or [] if old.dataset_name not in results]
    new = [
        EvalResult("text-generation", task, task, metric, round(value, 2))
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if math.isfinite(value)
    ]
    card.data.eval_results, card.data.model_name = kept + new, path.absolute().name
    with directory.new_file(path / directory.CARD) as partial:
        card.save(partial)
    return True


def _is_ours(path: Path) -> bool:
    return _TAG in (_metadata(path).get("tags") or [])


def _describe_merged(output: Path) -> None:
    """Turns the card of an adapter into that of the merged model."""
    from huggingface_hub import ModelCard

    card = ModelCard(read_text(output / directory.CARD))
    card.data.library_name = "transformers"
    before, _, rest = card.text.partition(_USE)
    card.text = f"{before}{_USE}\n{_USE_MODEL}\n{_TRAINING}{rest.partition(_TRAINING)[2]}"
    card.save(output / directory.CARD)


def _metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata of a directory's card; {} if it has none that can be read."""
    import yaml
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        text = read_text(path / directory.CARD)
        if not REGEX_YAML_BLOCK.search(text):
            return {}  # the library would print a warning
        card = ModelCard(text, ignore_metadata_errors=True)
    # Someone else's text, or none: the card does without.
    except (OSError, UserError, ValueError, yaml.YAMLError):
        return {}
    return card.data.to_dict()


def _use(output: Path, base: str, rank: int | None) -> str:
    if (output / "expert_config.json").exists():
        return _USE_EXPERTS.format(base=base)
    if not (output / "adapter_config.json").exists():
        return _USE_MODEL
    text = _USE_ADAPTER + (_USE_ROUTER if (output / "router.safetensors").exists() else "")
    return text.format(base=base, rank=rank)


def _facts(run: RunCheckpoint) -> Iterator[tuple[str, object]]:
    """Yields what a reader of the card may want to know about the run: (name, value)."""
    config, metrics = run.run_config, run.path / METRICS
    shown = {name: tuple(config[name]) for name in ("method", "optimizer")} | _SHOWN
    for section, names in shown.items():
        for name in names:
            value = config[section].get(name)
            # A directory of this machine means nothing elsewhere.
            if name == "train_path":
                value = sources.short(value)
            elif isinstance(value, str) and value.startswith("/"):
                value = Path(value).name
            yield f"{section}.{name}", value
    identity = run.checkpoint / "identity" / "metadata"
    if identity.exists():
        data = read_json(dict[str, Any], identity).get("training data") or {}
        yield "fingerprint of the data", data.get("content")
    found: dict[str, float] = {}
    lines = read_json_lines(dict[str, Any], metrics, torn=True) if metrics.exists() else []
    for line in lines:
        if line["step"] <= run.step:
            found |= {name: line[name] for name in _SCORES if line.get(name) is not None}
    yield from ((_SCORES[name], found[name]) for name in _SCORES if name in found)


_SCORES = {
    "loss": "training loss at the end",
    "eval_loss": "evaluation loss at the end",
    "exact_match": "exact match at the end",
}


def _table(facts: Iterator[tuple[str, object]]) -> Iterator[str]:
    yield "| | |"
    yield "| --- | --- |"
    for name, value in facts:
        if value is not None:
            yield f"| {name} | {str(value).replace('|', chr(92) + '|')} |"
