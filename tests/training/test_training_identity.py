"""Every part of the identity that may differ has words that a refusal shows."""

from olmoe_jax.data import tokenize_dataset
from olmoe_jax.training.checkpoint import _other


def test_every_part_of_the_data_has_words(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    identity = tokenize_dataset(f"{tmp_path}/a.jsonl weight=2", tokenizer, 20).identity()
    assert {"chat template", "weights"} < identity.keys()
    for part in identity:
        words = _other("training data", identity, identity | {part: "x"})
        assert words.startswith("is of other training data ("), part
