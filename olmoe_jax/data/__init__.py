"""Rows of a data set -> token sequences -> packed batches. Nothing here imports JAX."""

from olmoe_jax.data.formats import RowRules, row_rules
from olmoe_jax.data.packing import Batch
from olmoe_jax.data.pipeline import Step, TrainingData, evaluation_batches
from olmoe_jax.data.tokenized import TokenizedDataset, held_out_split, tokenize_dataset
from olmoe_jax.data.tokenizer import check_vocabulary, load_tokenizer

__all__ = [
    "Batch",
    "RowRules",
    "Step",
    "TokenizedDataset",
    "TrainingData",
    "check_vocabulary",
    "evaluation_batches",
    "held_out_split",
    "load_tokenizer",
    "row_rules",
    "tokenize_dataset",
]
