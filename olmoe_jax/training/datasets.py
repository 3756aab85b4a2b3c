"""The examples of a run: tokenised, and laid out as rows and steps."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from olmoe_jax import data
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.turn_ends import read_turn_ends, write_turn_ends
from olmoe_jax.config import Config, first_difference, to_dict
from olmoe_jax.data.chat_template import write_template
from olmoe_jax.errors import UserError
from olmoe_jax.parallel import distributed
from olmoe_jax.training.base_model import BaseModel


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Tokenised examples."""

    train: data.TokenizedDataset
    evaluation: data.TokenizedDataset | None
    pad_id: int  # the token id of padding
    rules: data.RowRules  # how rows became text
    ends: list[int]  # the token ids that end a turn

    def identity(self) -> dict[str, Any]:
        """Returns what a continued run must find unchanged."""
        evaluation = self.evaluation and self.evaluation.identity()
        return {"training data": self.train.identity(), "evaluation data": evaluation}


def load_datasets(config: Config, model: BaseModel) -> Datasets:
    """Tokenises the training and evaluation examples, or finds them in the cache.

    Raises:
      UserError: a file is missing or wrong, or the tokenizer is another model's.
    """
    read_turn_ends(model.files)  # refuses what `write_format` could not change in a copy
    options = config.data
    tokenizer = data.load_tokenizer(str(model.tokenizer_files))
    rules = data.row_rules(
        tokenizer, options.chat_template, options.train_on, options.ignore_fields
    )
    tokenize = functools.partial(
        data.tokenize_dataset,
        tokenizer=tokenizer,
        max_seq_length=options.max_seq_length,
        rules=rules,
        config=options.hub_config,
        progress=distributed.is_writer(),
    )
    train, evaluation = tokenize(options.train_path, split=options.split), None
    if options.chat_template not in (None, "auto") and not train.counts.templated:
        raise UserError(
            f"data.chat_template={options.chat_template}: no row of {options.train_path} is a "
            "conversation; write auto, or rows of messages"
        )
    if options.eval_path:
        evaluation = tokenize(options.eval_path, split="test")
    elif options.eval_fraction:
        train, evaluation = data.held_out_split(train, options.eval_fraction, config.train.seed)
    for dataset in filter(None, (train, evaluation)):
        data.check_vocabulary(
            dataset.tokens.max(),
            model.config.vocab_size,
            "set data.tokenizer_path to the model's",
            model.tokenizer_files,
        )
    pad_id = tokenizer.pad_token_id
    pad_id = tokenizer.eos_token_id if pad_id is None else pad_id
    return Datasets(train, evaluation, pad_id, rules, rules.ends(tokenizer.eos_token_id))


def check_same_everywhere(config: Config, datasets: Datasets) -> None:
    """Checks that all processes of the run have one configuration and the same data.

    Raises:
      UserError: this process has others than process 0.
    """
    theirs = json.loads(distributed.from_writer("config", json.dumps(to_dict(config))))
    if difference := first_difference(theirs, to_dict(config)):
        raise UserError(
            f"process {jax.process_index()} was started with another config than process 0: "
            f"{difference}; start all processes with the same command"
        )
    own = datasets.identity()
    theirs = json.loads(distributed.from_writer("data", json.dumps(own)))
    for which, fingerprint in own.items():
        if theirs[which] != fingerprint:
            raise UserError(
                f"process {jax.process_index()} has other {which} than process 0 (the content of "
                "the file or the tokenizer); give all processes the same files"
            )


def write_model_files(config: Config, model: BaseModel, datasets: Datasets, target: Path) -> None:
    """Writes all files of an export but its weights: the base's, with this run's chat format."""
    names = (*directory.MODEL_FILES, directory.CARD, *directory.LICENSE_FILES)
    directory.copy_files(model.files, target, names)
    directory.copy_files(model.tokenizer_files, target, directory.TOKENIZER_FILES)
    # With auto, the template is in the files already.
    if config.data.chat_template != "auto":
        write_template(target, datasets.rules.template)
    write_turn_ends(target, datasets.ends)


def training_data(config: Config, datasets: Datasets, mesh: Mesh) -> data.TrainingData:
    """Returns the run's steps, of which this process reads its share."""
    return data.TrainingData(
        datasets.train,
        batch_size=config.train.batch_size,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        loss_normalization=config.train.loss_normalization,
        microbatch_examples=config.train.microbatch_examples,
        **row_layout(config, datasets, mesh),
    )


def row_layout(config: Config, datasets: Datasets, mesh: Mesh) -> dict[str, Any]:
    """Returns how examples become rows and rows become micro-batches, as keyword arguments."""
    return {
        "max_seq_length": config.data.max_seq_length,
        "pack": config.data.pack,
        "rows_per_batch": config.train.rows_per_device * mesh.size,
        "pad_id": datasets.pad_id,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
