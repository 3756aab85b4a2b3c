"""The backend vllm, which must be installed."""

from collections.abc import Sequence

from eval.backends import Prompts, Sampling
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.source import read_model_config


class VllmBackend(Prompts):
    """A Hugging Face directory that vLLM loads."""

    def __init__(
        self,
        model: str,
        compute_dtype: str,
        tokenizer: str | None = None,
        chat_template: str = "none",
    ):
        import vllm

        path = directory.resolve(model)
        super().__init__(path, tokenizer=tokenizer, chat_template=chat_template)
        self._model = vllm.LLM(model=str(path), dtype=compute_dtype)
        self._parameters = vllm.SamplingParams
        self.context = read_model_config(path).max_position_embeddings

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Returns the continuations."""
        # The other backends keep special tokens too, all but the one that ends the text.
        parameters = [
            self._parameters(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_new_tokens,
                # vLLM seeds each request by itself: samples of one prompt must not draw alike.
                seed=sampling.seed * 10_007 + place,
                stop=list(sampling.stop),
                stop_token_ids=self.ends,
                skip_special_tokens=False,
            )
            for place in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": self.encode(prompt)} for prompt in prompts]
        outputs = self._model.generate(requests, parameters, use_tqdm=False)
        return [self.decode(output.outputs[0].token_ids) for output in outputs]
