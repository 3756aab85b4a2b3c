"""Logits of an adapter: ours and PEFT's."""

import numpy as np
from helpers import load_safetensors
from tiny import BYTES, base_weights, make_model, tiny_config

from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.checkpoints.merging import with_router
from olmoe_jax.checkpoints.peft import ROUTER_FILE, read_adapter

CONFIG = tiny_config(**BYTES)
TOKENS = np.random.default_rng(0).integers(2, 258, (2, 12)).astype(np.int32)


def our_logits(base, adapter):
    source = HFCheckpoint(base)
    lora, parameters = with_router(*read_adapter(adapter, source.config), source)
    return np.asarray(make_model(source.config, base_weights(base) | parameters, lora=lora)(TOKENS))


def torch_base(base):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def with_peft(base, adapter):
    from peft import PeftModel

    model = PeftModel.from_pretrained(torch_base(base), adapter)
    if (adapter / ROUTER_FILE).exists():
        import torch

        routers = {
            name: torch.from_numpy(value.copy())
            for name, value in load_safetensors(adapter / ROUTER_FILE).items()
        }
        unused = model.base_model.model.load_state_dict(routers, strict=False).unexpected_keys
        assert not unused
    return model.eval()
