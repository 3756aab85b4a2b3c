"""The backend jax: this project's decoder."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import olmoe_jax
from eval.backends import Prompts, Sampling
from olmoe_jax.checkpoints.opening import open_source
from olmoe_jax.generation.likelihood import TokenPair, log_likelihoods
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.parallel.sharding import decoding_mesh


class JaxBackend(Prompts):
    """A checkpoint that `olmoe_jax.from_pretrained` opens, on all devices."""

    def __init__(
        self,
        model: str,
        compute_dtype: str,
        adapter: str | None = None,
        base: str | None = None,
        tokenizer: str | None = None,
        chat_template: str = "none",
    ):
        source = open_source(model)
        super().__init__(source.files, adapter, tokenizer, chat_template)
        self.context = source.config.max_position_embeddings
        settings = ModelSettings(compute_dtype=jnp.dtype(compute_dtype))
        self._mesh = decoding_mesh(source.config.num_experts)
        self._model = olmoe_jax.from_pretrained(
            model, self._mesh, settings=settings, adapter=adapter, base=base
        )

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Returns the continuations."""
        with jax.set_mesh(self._mesh):
            return olmoe_jax.generate(
                self._model,
                self.tokenizer,
                [self.text(prompt) for prompt in prompts],
                **dataclasses.asdict(sampling),
                batch_size=len(prompts),
                ends=self.ends,
                # The callers keep to `context`, each in its way.
                allow_extrapolation=True,
            )

    def log_likelihoods(self, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
        """Returns (log p, greedy) of each pair, see `olmoe_jax.generation.likelihood`."""
        with jax.set_mesh(self._mesh):
            return log_likelihoods(self._model, pairs)
