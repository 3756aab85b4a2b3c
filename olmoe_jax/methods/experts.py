"""Which experts an ESFT run trains: given, chosen by this run before, or scored and selected."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.expert_config import ExpertConfig, read_expert_config
from olmoe_jax.checkpoints.loading import load_parameters, random_parameters
from olmoe_jax.checkpoints.opening import EXPERTS
from olmoe_jax.config import Config
from olmoe_jax.methods.scoring import expert_scores
from olmoe_jax.methods.selection import scores_to_json, select
from olmoe_jax.model.config import ModelConfig
from olmoe_jax.model.decoder import graph_of
from olmoe_jax.parallel import distributed
from olmoe_jax.plots import heat_maps
from olmoe_jax.training.setup import Datasets, Model, row_layout

DEFAULT_TOP_P = {"esft_gate": 0.1, "esft_token": 0.2}


def given_experts(config: Config, model_config: ModelConfig) -> ExpertConfig | None:
    """The expert config that the command names, checked; None where it names none."""
    path = config.method.experts_path
    return read_expert_config(Path(path), model_config) if path else None


def settle_experts(
    config: Config,
    model: Model,
    datasets: Datasets,
    mesh: Mesh,
    output: Path,
    given: ExpertConfig | None,
) -> Model:
    """The model with the experts that this run trains, which OUTPUT_DIR/experts.json keeps."""
    file = output / EXPERTS
    chosen_before = file.exists()
    distributed.barrier("look for experts.json")
    if not chosen_before:
        experts = given or _score_and_select(config, model, datasets, mesh, output)
        if distributed.is_writer():
            directory.write_json(file, experts.to_json())
    distributed.barrier("experts.json")
    # From the file in any case: its order (by id) is that of the pack in every checkpoint.
    experts = read_expert_config(file, model.config)
    settings = dataclasses.replace(model.settings, tuned_experts=experts.experts)
    return dataclasses.replace(model, settings=settings, experts=experts)


def _score_and_select(
    config: Config, model: Model, datasets: Datasets, mesh: Mesh, output: Path
) -> ExpertConfig:
    method, dtype = config.method, model.settings.compute_dtype
    if model.source:
        parameters = load_parameters(model.source, mesh, lambda name: dtype)
    else:
        drawn = random_parameters(
            model.config, model.settings, config.train.seed, mesh, lambda name: True
        )
        parameters = jax.tree.map(lambda value: jnp.asarray(value, dtype), drawn)
    layout = row_layout(config, datasets, mesh)
    scores, tokens = expert_scores(
        graph_of(model.config, model.settings),
        parameters,
        model.config,
        mesh,
        datasets.train,
        max_tokens=method.esft_score_tokens,
        max_seq_length=layout["max_seq_length"],
        pack=layout["pack"],
        rows_per_device=config.train.rows_per_device,
        pad_id=datasets.pad_id,
        seed=config.train.seed,
    )
    top_p = method.esft_top_p or DEFAULT_TOP_P[method.name]
    experts = select(scores[method.name.removeprefix("esft_")], top_p)
    if not distributed.is_writer():
        return experts
    directory.write_json(output / "scores.json", scores_to_json(scores))
    heat_maps({f"{name} score": score for name, score in scores.items()}, output / "scores.png")
    chosen = sum(map(len, experts.experts))
    print(
        f"ESFT: scored {tokens:,} tokens, selected {chosen} of "
        f"{model.config.num_layers * model.config.num_experts} experts; see {output}/{EXPERTS}"
    )
    return experts
