"""The first five minutes: makes a small data set, trains a small OLMoE on it, and asks the model.

The data are word problems in GSM8K's format whose answers a model of a million parameters can
learn: a name, a thing, two numbers, added or subtracted. No question of the test file is in the
training file.
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import olmoe_jax
from olmoe_jax.checkpoints import directory
from olmoe_jax.config import validate
from olmoe_jax.config.load import load_config
from olmoe_jax.errors import ArgumentParser, run_command
from olmoe_jax.files import write_json_lines
from olmoe_jax.generation.answers import exact_match
from olmoe_jax.parallel.compilation import keep_programs
from olmoe_jax.root import ROOT

if TYPE_CHECKING:
    from olmoe_jax.model.decoder import Olmoe

CONFIG = ROOT / "configs" / "quickstart.py"
EOS, PAD = "<|endoftext|>", "<|padding|>"

NAMES = "Ada Ben Chen Dana Eli Fay Gus Hana Ivan Jo Kim Leo Mia Noor Otto Pia"
THINGS = "apples books coins eggs flags keys maps pens shells stamps"
TEMPLATES = (
    ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?", "+"),
    ("{name} had {a} {things} and lost {b} of them. How many {things} are left?", "-"),
)

MODEL = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""The model's config.json, but for the vocabulary that `train_tokenizer` makes."""


def examples(count: int, seed: int) -> list[dict[str, str]]:
    """Returns `count` distinct word problems, each a prompt and a completion."""
    draw, found = random.Random(seed), {}
    choices = TEMPLATES, NAMES.split(), THINGS.split()
    while len(found) < count:
        (text, sign), name, things = map(draw.choice, choices)
        a, b = draw.randint(1, 12), draw.randint(1, 12)
        if sign == "-":
            a = a + b
        result = a + b if sign == "+" else a - b
        question = text.format(name=name, things=things, a=a, b=b)
        working = f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result} {things}."
        found[question] = {
            "prompt": f"Question: {question}\nAnswer:",
            "completion": f"{working}\n#### {result}",
        }
    return list(found.values())


def write_inputs(path: Path, train: int = 6000, test: int = 256, seed: int = 0) -> Path:
    """Writes train.jsonl, test.jsonl, a tokenizer and config.json to `path`, unless it exists."""
    if path.exists():
        return path
    rows = examples(train + test, seed)
    with directory.new_directory(path) as partial:
        for name, part in (("train", rows[test:]), ("test", rows[:test])):
            write_json_lines(partial / f"{name}.jsonl", part)
        texts = [row["prompt"] + " " + row["completion"] for row in rows[test:]]
        vocabulary = train_tokenizer(texts, 512, partial)
        directory.write_json(partial / "config.json", MODEL | vocabulary)
    return path


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> dict[str, int]:
    """Writes a byte-level BPE to `path` whose tokens split numbers into digits.

    Returns the vocabulary's fields of the model's config.json.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    directory.write_json(
        path / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD},
    )
    ids = {"eos_token_id": tokenizer.token_to_id(EOS), "pad_token_id": tokenizer.token_to_id(PAD)}
    return {"vocab_size": tokenizer.get_vocab_size(), **ids}


def ask(model: "Olmoe", inputs: Path) -> tuple[float, list[str]]:
    """Asks the test questions; returns the share of right answers, and each question's text."""
    from olmoe_jax.data import load_tokenizer
    from olmoe_jax.data.reading import read_rows

    rows = [row for _, row in read_rows(str(inputs / "test.jsonl"))]
    prompts = [row["prompt"] for row in rows]
    outputs = olmoe_jax.generate(
        model, load_tokenizer(str(inputs)), prompts, max_new_tokens=48, batch_size=128
    )
    right = [
        exact_match("gsm", output, row["completion"])
        for output, row in zip(outputs, rows, strict=True)
    ]
    return sum(right) / len(rows), [p + o for p, o in zip(prompts, outputs, strict=True)]


def untrained_model(inputs: Path) -> "Olmoe":
    """Returns a model with random weights."""
    import jax
    from flax import nnx

    from olmoe_jax.checkpoints.loading import ModelSettings
    from olmoe_jax.checkpoints.source import read_model_config
    from olmoe_jax.model.decoder import Olmoe

    config = read_model_config(inputs)
    return Olmoe(config, ModelSettings(), rngs=nnx.Rngs(params=jax.random.key(0)))


def main(arguments: Sequence[str]) -> None:
    """Trains, exports, reads the export back, and compares it with an untrained model."""
    ArgumentParser(prog="python -m olmoe_jax.quickstart", description=__doc__).parse_args(arguments)
    keep_programs()
    config = validate(load_config(CONFIG))
    inputs = Path(config.model.config_path)
    run = olmoe_jax.train(config)
    if not run.finished:
        return
    output = run.output_dir
    before, _ = ask(untrained_model(inputs), inputs)
    after, texts = ask(olmoe_jax.from_pretrained(output / "hf"), inputs)
    print("\nanswers of the exported model to questions that it has not seen:")
    for text in texts[:3]:
        print("\n" + text.replace("\n", "\n  "))
    print(f"""
exact match on {len(texts)} held-out questions: {before:.1%} untrained, {after:.1%} trained

model for transformers: {output}/hf
losses, plot:           {output}/metrics.jsonl, {output}/loss.png
everything else:        tensorboard --logdir {output}/tensorboard
the same with OLMoE:    python train.py --config configs/densemixer_gsm.py""")


if __name__ == "__main__":
    run_command(main)
