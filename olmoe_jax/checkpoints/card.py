"""Model cards: the README.md of an export, with the metadata that the hub reads.

huggingface_hub writes and parses the metadata.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmoe_jax import hub, sources
from olmoe_jax.checkpoints import directory, overrides, peft
from olmoe_jax.checkpoints.metrics import read_metrics
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.checkpoints.source import Source
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_json, read_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_TAG = "olmoe_jax"
_SHOWN = {
    "train": ("batch_size", "epochs", "max_steps", "seed"),
    "data": ("train_path", "hub_config", "split", "max_seq_length", "pack"),
    "model": ("compute_dtype", "base_quantization"),
}
"""The fields of these sections that a card shows; of method and optimizer it shows all."""
_SCORES = {
    "loss": "training loss at the end",
    "eval_loss": "evaluation loss at the end",
    "exact_match": "exact match at the end",
}
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
        own = _own_card(adapter) if adapter else None
        directory.copy_files(adapter if own else source.files, output, (directory.CARD,))
        if own:
            _describe_merged(own, output)
        return
    old, config = _metadata(source.files), source.run_config
    has_base = config["model"].get("init") != "random"
    base = source.base if has_base and hub.is_hub_id(source.base) else old.get("base_model")
    base_id = base if isinstance(base, str) and hub.is_hub_id(base) else None
    is_adapter = (output / peft.CONFIG_FILE).exists()
    method, rank = config["method"]["name"], config["method"].get("lora_rank")
    metadata = ModelCardData(
        base_model=base,
        license=old.get("license"),
        datasets=_hub_ids(config["data"]["train_path"]) or None,
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
        "| | |",
        "| --- | --- |",
        *(
            f"| {name} | {str(value).replace('|', chr(92) + '|')} |"
            for name, value in _facts(source)
            if value is not None
        ),
    ]
    content = f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
    # A directory's name may hold bytes that are not UTF-8.
    card = output / directory.CARD
    card.write_text(content, encoding="utf-8", errors="backslashreplace")


def add_results(path: Path, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Adds scores to the card of an export of this project, as the hub's model-index.

    Args:
      path: the export's directory.
      results: {task: {metric: score}}; the other tasks of the card stay.

    Returns:
      Whether the directory has such a card.
    """
    from huggingface_hub import EvalResult

    if not (card := _own_card(path)):
        return False
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


def _read_card(path: Path) -> "ModelCard | None":
    """Returns a directory's card; None if it has none that can be read."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        text = read_text(path / directory.CARD)
        # The library would print a warning where there is no metadata.
        if not REGEX_YAML_BLOCK.search(text):
            return None
        card = ModelCard(text, ignore_metadata_errors=True)
        str(card)  # it can be written again
        return card
    # Someone else's text, for which YAML and the library raise errors of many unrelated types.
    except Exception:
        return None


def _own_card(path: Path) -> "ModelCard | None":
    """Returns the card of an export of this project; None if the directory has no such card."""
    return _read_card(path) if _TAG in [*_metadata(path).get("tags", [])] else None


def _metadata(path: Path) -> dict[str, str | list[str]]:
    """Returns the fields of a card's metadata that are a text or a list of texts."""
    card = _read_card(path)
    return {
        field: value
        for field, value in (vars(card.data) if card else {}).items()
        if isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(part, str) for part in value))
    }


def _describe_merged(card: "ModelCard", output: Path) -> None:
    """Writes the card of an adapter as that of the merged model."""
    card.data.library_name = "transformers"
    before, _, rest = card.text.partition(_USE)
    card.text = f"{before}{_USE}\n{_USE_MODEL}\n{_TRAINING}{rest.partition(_TRAINING)[2]}"
    card.save(output / directory.CARD)


def _hub_ids(train_path: str) -> list[str]:
    """Returns the ids of a run's data sets on the hub."""
    try:
        found = [s.path.partition(":")[0] for s in sources.parse(train_path) if not s.is_local]
    except UserError:  # the path of a file that lies here no more
        return []
    return list(dict.fromkeys(filter(hub.is_hub_id, found)))


def _short(train_path: str) -> str:
    """Returns a run's sources without directories."""
    try:
        return sources.short(train_path)
    except UserError:  # as above
        return Path(train_path).name


def _use(output: Path, base: str, rank: int | None) -> str:
    if (output / overrides.CONFIG_FILE).exists():
        return _USE_EXPERTS.format(base=base)
    if not (output / peft.CONFIG_FILE).exists():
        return _USE_MODEL
    text = _USE_ADAPTER + (_USE_ROUTER if (output / peft.ROUTER_FILE).exists() else "")
    return text.format(base=base, rank=rank)


def _facts(run: RunCheckpoint) -> Iterator[tuple[str, object]]:
    """Yields what a reader of the card may want to know about the run: (name, value)."""
    config = run.run_config
    shown = {name: tuple(config[name]) for name in ("method", "optimizer")} | _SHOWN
    for section, names in shown.items():
        for name in names:
            value = config[section].get(name)
            # A directory of this machine means nothing elsewhere.
            if name == "train_path":
                value = _short(value)
            elif isinstance(value, str) and value.startswith("/"):
                value = Path(value).name
            yield f"{section}.{name}", value
    identity = run.checkpoint / "identity" / "metadata"
    if identity.exists():
        data = read_json(dict[str, Any], identity).get("training data") or {}
        yield "fingerprint of the data", data.get("content")
    try:
        lines = [vars(line) for line in read_metrics(run.path) if line.step <= run.step]
    except UserError as error:
        print(f"note: the model card has no losses: {error}")
        return
    for name, words in _SCORES.items():
        if values := [line[name] for line in lines if line[name] is not None]:
            yield words, values[-1]
