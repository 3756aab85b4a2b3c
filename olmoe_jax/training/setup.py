"""Everything a run needs before its first step, checked before anything is written."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from olmoe_jax import data
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.checkpoints.loading import (
    load_parameters,
    load_tuned,
    random_parameters,
    stack_tuned,
)
from olmoe_jax.checkpoints.opening import open_source
from olmoe_jax.checkpoints.peft import read_adapter
from olmoe_jax.checkpoints.source import Source, read_model_config
from olmoe_jax.config import Config
from olmoe_jax.errors import UserError
from olmoe_jax.methods.trained import (
    is_adapter,
    method_trains,
    router_method,
    split_trained,
)
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.parameters import ROUTER, Parameters
from olmoe_jax.ops import attention, grouped_matmul
from olmoe_jax.ops.quantization import Quantized
from olmoe_jax.parallel import sharding
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.placement import state_shardings
from olmoe_jax.training.step import (
    Accumulated,
    DeviceBatch,
    StepMetrics,
    Trainer,
    TrainState,
    initial_state,
    place_batch,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """The base model of a run: where it comes from and how it is laid out."""

    config: ModelConfig
    settings: ModelSettings
    source: Source | None  # None: random weights
    files: Path  # directory with config.json and generation config
    tokenizer_files: Path
    experts: ExpertConfig | None = None  # ESFT: what trains


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Tokenised examples."""

    train: data.TokenizedDataset
    evaluation: data.TokenizedDataset | None
    pad_id: int

    def identity(self) -> dict[str, str | None]:
        """What a continued run must find unchanged."""
        evaluation = self.evaluation and self.evaluation.fingerprint
        return {"training data": self.train.fingerprint, "evaluation data": evaluation}


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The jitted functions of a step and where their results lie; compiled when called.

    Training calls them with arrays, `olmoe_jax.plan` compiles them for shapes.
    """

    trainer: Trainer
    state_shardings: TrainState  # of NamedSharding
    accumulated_shardings: Accumulated  # of NamedSharding; one for all router statistics
    zero_sums: Callable[[], Accumulated]
    accumulate: Callable[..., Accumulated]
    update: Callable[..., Any]
    evaluate: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Program(StepFunctions):
    """The functions of a run's steps and the arrays that they start from."""

    mesh: Mesh
    state: TrainState
    frozen: Parameters

    def step(
        self, state: TrainState, batches: Iterable[DeviceBatch], index: int
    ) -> tuple[TrainState, StepMetrics]:
        """The state (donated) after step `index`, whose micro-batches these are."""
        accumulated = self.zero_sums()
        for number, batch in enumerate(batches):
            position = np.array([index, number], np.uint32)
            accumulated = self.accumulate(
                state.parameters, self.frozen, accumulated, batch, position
            )
        return self.update(state, accumulated)

    def to_devices(self, batch: data.Batch) -> DeviceBatch:
        """This process's rows as part of the global batch."""
        return place_batch(batch, self.mesh)


def open_model(config: Config) -> Model:
    """Opens and checks the base model; no weight is read yet."""
    options = config.model
    if options.init == "pretrained":
        source = open_source(options.path)
        model_config, files = source.config, source.files
    else:
        path = Path(options.config_path)
        if not path.is_dir() and (path.name != "config.json" or not path.exists()):
            raise UserError(
                f"model.config_path={path}: no such directory or config.json; write a directory "
                "that holds a config.json"
            )
        source, files = None, path if path.is_dir() else path.parent
        model_config = read_model_config(files)
    sharding.check_experts(config.mesh.expert, model_config.num_experts)
    tokenizer = config.data.tokenizer_path or options.path
    settings = with_backends(model_settings(config), model_config, jax.default_backend())
    model = Model(model_config, settings, source, files, directory.resolve(tokenizer))
    if config.method.adapter_path:
        _starting_adapter(config.method.adapter_path, model)  # complains before anything is written
    return model


def model_settings(config: Config) -> ModelSettings:
    """How the configuration asks the model to compute."""
    return ModelSettings(
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        router_method=router_method(config.method),
        router_gradient_experts=config.method.router_gradient_experts,
        router_gradient_dtype=config.method.router_gradient_dtype,
        remat=config.model.remat,
        grouped_matmul=config.model.grouped_matmul,
        attention=config.model.attention,
        lora=LoraSettings.of_method(vars(config.method)),
    )


def with_backends(settings: ModelSettings, model: ModelConfig, platform: str) -> ModelSettings:
    """The settings with every choice made that is left to the platform ("cpu", "gpu", "tpu").

    Raises:
      UserError: a backend that was chosen, or is the platform's, cannot run there.
    """
    return dataclasses.replace(
        settings,
        grouped_matmul=grouped_matmul.check_backend(settings.grouped_matmul, platform),
        attention=attention.check_backend(
            settings.attention, platform, model.head_dim, settings.compute_dtype
        ),
    )


def load_datasets(config: Config, model: Model) -> Datasets:
    """Tokenises (or finds in the cache) the training and evaluation examples."""
    options = config.data
    tokenizer = data.load_tokenizer(str(model.tokenizer_files))
    tokenize = functools.partial(
        data.tokenize_dataset,
        tokenizer=tokenizer,
        max_seq_length=options.max_seq_length,
    )
    train, evaluation = tokenize(options.train_path), None
    if options.eval_path:
        evaluation = tokenize(options.eval_path, split="test")
    elif options.eval_fraction:
        train, evaluation = data.held_out_split(train, options.eval_fraction, config.train.seed)
    for dataset in filter(None, (train, evaluation)):
        largest = int(dataset.tokens.max())
        if largest >= model.config.vocab_size:
            raise UserError(
                f"the tokenizer of {model.tokenizer_files} gives token {largest}, but the model's "
                f"vocabulary has {model.config.vocab_size}; set data.tokenizer_path to the model's"
            )
    pad_id = tokenizer.pad_token_id
    return Datasets(train, evaluation, pad_id if pad_id is not None else tokenizer.eos_token_id)


def training_data(config: Config, datasets: Datasets, mesh: Mesh) -> data.TrainingData:
    """The run's steps, this process's share of them."""
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
    """How examples become rows and rows become micro-batches, for training and evaluation."""
    return {
        "max_seq_length": config.data.max_seq_length,
        "pack": config.data.pack,
        "rows_per_batch": config.train.rows_per_device * mesh.size,
        "pad_id": datasets.pad_id,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def build_program(config: Config, model: Model, mesh: Mesh, total_steps: int) -> Program:
    """Loads or draws the parameters and prepares the functions of a step (compiled when called)."""
    trained, frozen = initial_parameters(config, model, mesh)
    functions = step_functions(config, model.config, model.settings, trained, mesh, total_steps)
    make = functools.partial(initial_state, optimizer=functions.trainer.optimizer)
    state = jax.jit(make, out_shardings=functions.state_shardings, donate_argnums=0)(trained)
    return Program(**vars(functions), mesh=mesh, state=state, frozen=frozen)


def step_functions(
    config: Config,
    model_config: ModelConfig,
    settings: ModelSettings,
    trained: Parameters,
    mesh: Mesh,
    total_steps: int,
) -> StepFunctions:
    """The functions of a step for these parameters (arrays, or their shapes and dtypes)."""
    options = config.optimizer
    trainer = Trainer(
        config=model_config,
        settings=settings,
        optimizer=adamw(
            options.beta1,
            options.beta2,
            options.epsilon,
            options.weight_decay,
            jnp.dtype(options.moments_dtype),
            jnp.dtype(options.master_dtype),
        ),
        schedule=schedule(
            options.schedule,
            options.learning_rate,
            int(total_steps * options.warmup_ratio),
            total_steps,
        ),
        max_grad_norm=options.max_grad_norm,
        aux_loss_coefficient=config.method.router_aux_loss_coefficient,
        seed=config.train.seed,
    )
    replicated = NamedSharding(mesh, P())
    by_name = sharding.parameter_shardings(parameter_specs(model_config, settings), mesh)
    gradients = {name: by_name[name] for name in trained}
    accumulated_shardings = Accumulated(gradients, replicated, replicated)
    places = state_shardings(trainer, trained, by_name, mesh)
    # Not the arrays: what a function closes over stays alive.
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in trained.items()}
    return StepFunctions(
        trainer,
        places,
        accumulated_shardings,
        zero_sums=jax.jit(
            functools.partial(trainer.zero_sums, shapes), out_shardings=accumulated_shardings
        ),
        accumulate=jax.jit(
            trainer.accumulate, donate_argnums=2, out_shardings=accumulated_shardings
        ),
        update=jax.jit(trainer.update, donate_argnums=0, out_shardings=(places, replicated)),
        evaluate=jax.jit(trainer.evaluate),
    )


def kept_dtype(
    trains: Callable[[str], bool], settings: ModelSettings, trained: DTypeLike = jnp.float32
) -> Callable[[str], jnp.dtype]:
    """The dtype of a parameter by name: `trained` when it trains, else the compute dtype.

    Gradients add up in their parameter's dtype. float32 in any case are a router, and of what
    trains the norms, which are small, and the embedding, in whose gradient a frequent token's
    many positions add up.
    """

    def dtype(name: str) -> jnp.dtype:
        if name == ROUTER:
            return jnp.dtype(jnp.float32)
        if not trains(name):
            return jnp.dtype(settings.compute_dtype)
        return jnp.dtype(jnp.float32 if name == "embed" or name.endswith("norm") else trained)

    return dtype


def initial_parameters(config: Config, model: Model, mesh: Mesh) -> tuple[Parameters, Parameters]:
    """What trains and what does not, each in its `kept_dtype`."""
    trains = method_trains(config.method, model.config, model.experts)
    seed, chosen = config.train.seed, model.settings.tuned_experts
    shardings = sharding.parameter_shardings(parameter_specs(model.config, model.settings), mesh)
    dtype = kept_dtype(trains, model.settings, config.optimizer.gradients_dtype)

    def random(wanted):
        return random_parameters(model.config, model.settings, seed, mesh, wanted)

    if model.source:
        quantization = config.model.base_quantization
        parameters = load_parameters(model.source, mesh, dtype, quantization)
        pack = load_tuned(model.source, chosen) if chosen else {}
    else:
        drawn = random(lambda name: not is_adapter(name) and not name.startswith("tuned."))
        pack = stack_tuned(drawn, chosen) if chosen else {}
        parameters = drawn
    if config.method.adapter_path:
        pack = _starting_adapter(config.method.adapter_path, model)
    elif model.settings.lora:
        parameters |= random(is_adapter)
    parameters |= jax.device_put(pack, {name: shardings[name] for name in pack})
    parameters = {
        name: value if isinstance(value, Quantized) else value.astype(dtype(name))
        for name, value in parameters.items()
    }
    return split_trained(trains, parameters)


def _starting_adapter(path: str, model: Model) -> dict[str, np.ndarray]:
    """Returns the parameters of the adapter that the run starts from.

    Raises:
      UserError: the adapter cannot be read, or does not agree with the run's LoRA options.
    """
    lora, parameters = read_adapter(path, model.config)
    wanted = model.settings.lora
    same_size = (set(lora.targets), lora.rank) == (set(wanted.targets), wanted.rank)
    if not same_size or not math.isclose(lora.scale, wanted.scale):
        raise UserError(
            f"method.adapter_path={path}: has rank {lora.rank}, alpha "
            f"{lora.scale * lora.rank:g}, targets {','.join(lora.targets)}; set method.lora_rank, "
            "lora_alpha and lora_targets to these"
        )
    if ROUTER in parameters and model.settings.router_method == "frozen":
        raise UserError(
            f"method.adapter_path={path}: holds a trained router, but method.name=frozen keeps "
            "the base's; write conventional or densemixer, or start from convert.merge_lora's "
            "output"
        )
    return parameters
