"""The backend hf: transformers' `generate`, which needs torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.backends import Prompts, Sampling
from olmoe_jax.checkpoints import directory, safetensors_file
from olmoe_jax.checkpoints.peft import adapter_directory, router_file
from olmoe_jax.errors import UserError, first_line
from olmoe_jax.generation.stop_strings import cut_at

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class HfBackend(Prompts):
    """A causal language model that transformers loads."""

    def __init__(
        self,
        model: str,
        compute_dtype: str,
        adapter: str | None = None,
        tokenizer: str | None = None,
        chat_template: str = "none",
    ):
        import torch
        from transformers import AutoModelForCausalLM

        path = directory.resolve(model)
        super().__init__(path, adapter, tokenizer, chat_template)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, compute_dtype))
        except Exception as error:  # transformers raises many unrelated types
            raise UserError(f"--model {model}: transformers: {first_line(error)}") from error
        if adapter:
            loaded = _adapted(loaded, adapter)
        self._model = loaded.to(self._device).eval()
        self.context = loaded.config.max_position_embeddings

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Returns the continuations."""
        import torch
        from transformers import GenerationConfig

        encoded = [self.encode(prompt) for prompt in prompts]
        length, pad = max(map(len, encoded)), self.ends[0]
        padded = [[pad] * (length - len(tokens)) + tokens for tokens in encoded]
        mask = [[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in encoded]
        draws = {"do_sample": False}
        if sampling.temperature > 0:
            draws = {"do_sample": True, "temperature": sampling.temperature}
            draws |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            # Not the checkpoint's configuration, which may sample.
            out = self._model.generate(
                torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=self.ends,
                    pad_token_id=pad,
                    **draws,
                ),
            )
        return [cut_at(self.decode(row[length:].tolist()), sampling.stop) for row in out]


def _adapted(model: "PreTrainedModel", adapter: str) -> "PeftModel":
    """Returns the model with the adapter, and with the router that trained beside the adapter."""
    import torch
    from peft import PeftModel

    path = adapter_directory(adapter)
    if router := router_file(path):
        stored = safetensors_file.read_header(router)
        routers = {
            name: torch.from_numpy(tensor.read().astype("float32"))
            for name, tensor in stored.items()
        }
        model.load_state_dict(routers, strict=False)
    try:
        return PeftModel.from_pretrained(model, path)
    except Exception as error:  # peft raises many unrelated types
        raise UserError(f"--adapter {adapter}: peft: {first_line(error)}") from error
