"""A small chat model in a minute or two: makes conversations, trains on them, and asks the model.

    python -m examples.chat
    python -m olmoe_jax.generate --model runs/chat/hf --chat --system "Be brief."

The chat template is in OLMoE's format. For a chat model to use, name allenai/OLMoE-1B-7B-0125-SFT
as model.path, which has a template, and rows of messages as data.train_path.
"""

import json
import random
from pathlib import Path

import olmoe_jax
from olmoe_jax import config as options
from olmoe_jax.generation.command import main as generate
from olmoe_jax.quickstart import MODEL, train_tokenizer

CAPITALS = {"Norway": "Oslo", "Spain": "Madrid", "Peru": "Lima", "Cuba": "Havana"}
TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{{ eos_token if message.role == 'assistant' }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """Returns a conversation whose system turn, if it has one, says how to answer."""
    brief = draw.random() < 0.5
    messages = [{"role": "system", "content": "Be brief."}] if brief else []
    for turn in range(draw.randint(1, 3)):
        country, capital = draw.choice([*CAPITALS.items()])
        asked = f"And of {country}?" if turn else f"What is the capital of {country}?"
        answer = f"{capital}." if brief else f"The capital of {country} is {capital}."
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages


def train(inputs: Path, output: Path) -> Path:
    """Writes rows, a tokenizer with the template and a model's shape, trains, and exports."""
    inputs.mkdir(parents=True, exist_ok=True)
    draw, path = random.Random(0), str(inputs)
    rows = [json.dumps({"messages": conversation(draw)}) for _ in range(2400)]
    (inputs / "rows.jsonl").write_text("\n".join(rows))
    # Heads of 32: vLLM's attention on CPUs has no smaller ones.
    shape = MODEL | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    shape |= train_tokenizer(rows, 384, inputs)
    (inputs / "config.json").write_text(json.dumps(shape))
    (inputs / "chat_template.jinja").write_text(TEMPLATE)
    config = options.Config(
        model=options.ModelOptions(path, init="random", config_path=path, compute_dtype="float32"),
        data=options.DataOptions(f"{path}/rows.jsonl", eval_fraction=0, max_seq_length=128),
        optimizer=options.OptimizerOptions(learning_rate=5e-3),
        train=options.TrainOptions(str(output), batch_size=16, epochs=2, rows_per_device=8),
    )
    return olmoe_jax.train(config).output_dir / "hf"


if __name__ == "__main__":
    model = train(Path("runs/chat_inputs"), Path("runs/chat"))
    generate(["--model", str(model), "--chat", "--prompt", "What is the capital of Norway?"])
