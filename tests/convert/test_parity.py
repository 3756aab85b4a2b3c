"""convert.parity against torch: gradients of a batch, and a few AdamW updates."""

import numpy as np
import pytest
from helpers import message_of, relative_error
from tiny import tiny_config, write_hf_checkpoint

from convert import parity
from olmoe_jax.checkpoints import names, safetensors_file

# Every option of the architecture at once.
CONFIG = tiny_config(
    num_kv_heads=2,
    norm_topk_prob=True,
    clip_qkv=0.9,
    tie_word_embeddings=True,
    pad_token_id=1,
    rope_theta=500.0,
    rms_norm_eps=1e-3,
)
UPDATES, MICRO, ROWS, LENGTH = 3, 2, 2, 9


def make_batch(shape, seed=0):
    """Right-padded rows whose prompt (and padding) has no label."""
    random = np.random.default_rng(seed)
    tokens = random.integers(2, 61, (*shape, LENGTH))
    lengths = random.integers(4, LENGTH + 1, shape)[..., None]
    positions = np.arange(LENGTH)
    mask = (positions < lengths).astype(np.int64)
    tokens = np.where(mask, tokens, 1)
    tokens[..., 0, 2] = 1  # the padding id as a real token
    labels = np.where(mask.astype(bool) & (positions >= 2), tokens, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def run(tmp_path, batch, *extra):
    safetensors_file.save(tmp_path / "batch.safetensors", batch)
    arguments = [f"--model={tmp_path / 'model'}", f"--batch={tmp_path / 'batch.safetensors'}"]
    output = tmp_path / "out.safetensors"
    parity.main([*arguments, "--method=conventional", f"--output={output}", *extra])
    return safetensors_file.load(output)


@pytest.mark.slow
def test_rows_beyond_the_positions(tmp_path):
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    batch = {name: np.tile(array, 8) for name, array in make_batch((2,)).items()}
    batch["attention_mask"] = np.ones((2, 72), int)
    message = message_of(run, tmp_path, batch)
    assert "a row has 72 tokens, and the model 64 positions; write shorter rows" in message
    batch["attention_mask"][:, 64:] = 0
    assert np.isfinite(run(tmp_path, batch)["loss"])


def load_torch_model(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import OlmoeForCausalLM

    return OlmoeForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )


def torch_loss(model, batch, index=()):
    """Mean over the labelled targets of one micro-batch, and the model's output."""
    import torch

    tokens, mask, labels = (
        torch.tensor(batch[name][index]) for name in ("input_ids", "attention_mask", "labels")
    )
    out = model(tokens, attention_mask=mask, output_router_logits=True)
    logits = out.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()), out


def per_expert(named):
    """torch's tensors under the names of checkpoints: fused experts taken apart."""
    out = {}
    for name, value in named:
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for part, half in zip(("gate", "up"), np.split(value, 2, axis=1), strict=True):
                out |= {f"{prefix}.{e}.{part}_proj.weight": v for e, v in enumerate(half)}
        elif last == "down_proj":
            out |= {f"{prefix}.{e}.down_proj.weight": v for e, v in enumerate(value)}
        else:
            out[name] = value
    return out


def hf_names():
    weights = {weight.name: np.zeros((2, 8)) for weight in names.weights(CONFIG)}
    return {name for name, _ in names.all_to_hf(weights, CONFIG)}


@pytest.mark.slow
def test_gradients(tmp_path):
    """Loss, logits, router logits and every gradient of transformers' OlmoeForCausalLM."""
    pytest.importorskip("torch")
    write_hf_checkpoint(tmp_path / "model", CONFIG)
    batch = make_batch((ROWS,))
    ours = run(tmp_path, batch)
    model = load_torch_model(tmp_path)
    loss, out = torch_loss(model, batch)
    loss.backward()
    real = batch["attention_mask"].astype(bool)
    assert abs(ours["loss"] / loss.item() - 1) < 1e-5
    assert relative_error(ours["logits"][real], out.logits.detach().numpy()[real]) < 2e-5
    for layer, logits in enumerate(out.router_logits):
        flat = real.reshape(-1)
        actual, expected = ours[f"router_logits.{layer}"], logits.detach().numpy()
        assert relative_error(actual[flat], expected[flat]) < 2e-5
    expected = per_expert((n, p.grad.numpy()) for n, p in model.named_parameters())
    assert {n.removeprefix("grad.") for n in ours if n.startswith("grad.")} == expected.keys()
    assert expected.keys() == hf_names()
    for name, value in expected.items():
        assert relative_error(ours[f"grad.{name}"], value) < 1e-4, name
    assert np.any(ours["grad.model.embed_tokens.weight"][1]), "the tied head learns its row"


@pytest.mark.slow
def test_optimizer_steps(tmp_path):
    """AdamW with warmup, linear decay, clipping and weight decay, two micro-batches an update."""
    torch = pytest.importorskip("torch")
    from transformers import get_linear_schedule_with_warmup

    write_hf_checkpoint(tmp_path / "model", CONFIG)
    batch = make_batch((UPDATES, MICRO, ROWS), seed=1)
    extra = ("--learning_rate=0.01", "--weight_decay=0.1", "--warmup_steps=1")
    ours = run(tmp_path, batch, f"--optimizer_steps={UPDATES}", *extra)

    model = load_torch_model(tmp_path)
    before = per_expert((n, p.detach().numpy().copy()) for n, p in model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-8, weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, UPDATES)
    losses, norms, rates = [], [], []
    for update in range(UPDATES):
        total = 0.0
        for micro in range(MICRO):
            loss, _ = torch_loss(model, batch, (update, micro))
            (loss / MICRO).backward()
            total += loss.item() / MICRO
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        rates.append(schedule.get_last_lr()[0])
        losses.append(total)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert rates[0] == 0
    assert min(norms) > 1, "or clipping is not tested"
    assert relative_error(ours["loss"], losses) < 1e-5
    assert relative_error(ours["grad_norm"], norms) < 1e-4
    assert relative_error(ours["lr"], rates) < 1e-6
    after = per_expert((n, p.detach().numpy()) for n, p in model.named_parameters())
    assert {n.removeprefix("param.") for n in ours if n.startswith("param.")} == after.keys()
    for name, value in after.items():
        # Of what an update of 0.01 moved: Adam divides by tiny second moments.
        moved = np.abs(value - before[name]).max()
        assert moved > 1e-3, name
        error = np.abs(ours[f"param.{name}"] - value).max()
        assert error < 2e-2 * moved, name
        assert np.median(np.abs(ours[f"param.{name}"] - value)) < 1e-4 * moved, name
