"""Decoding: greedy tokens, draws, stop strings, few programs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import message_of
from tiny import make_model, merged_weights, random_adapters, random_weights, tiny_config

from olmoe_jax import generate
from olmoe_jax.generation import decoding as generation
from olmoe_jax.generation.decoding import bucket
from olmoe_jax.generation.likelihood import log_likelihoods
from olmoe_jax.generation.sampling import Numbers, Sampling, sample
from olmoe_jax.generation.stop_strings import cut_at
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import graph_of, parameter_specs
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.parallel.sharding import decoding_mesh

PROMPTS = ["a", "what is 3 + 4?", "the " * 9, "Question: 1 + 1?\nAnswer:", "xyz"]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tiny_config(vocab_size=len(tokenizer)))


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    return generate(model, tokenizer, PROMPTS, max_new_tokens=20)


def test_greedy_is_the_argmax_of_the_full_forward(model, tokenizer, greedy):
    forward = jax.jit(model.__call__)
    for prompt, text in zip(PROMPTS, greedy, strict=True):
        start = tokenizer(prompt).input_ids
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(start)] = start
        for index in range(len(start), len(start) + 20):
            tokens[0, index] = int(jnp.argmax(forward(tokens)[0, index - 1]))
        new = list(tokens[0, len(start) : len(start) + 20])
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert tokenizer.decode(new) == text


@pytest.mark.slow
def test_the_models_positions(model, tokenizer, greedy):
    """A number of tokens must fit beside each prompt; without one a text ends at the positions."""
    lengths = [len(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=max(lengths) + 5)
    short = make_model(config)
    number = lengths.index(max(lengths)) + 1
    assert message_of(lambda: generate(short, tokenizer, PROMPTS, max_new_tokens=6)) == (
        f"prompt {number} has {max(lengths)} tokens: of the model's {max(lengths) + 5} positions 5 "
        "are left for new tokens; write a shorter prompt or a smaller max_new_tokens, or "
        "allow_extrapolation to decode beyond them"
    )
    beyond = {"max_new_tokens": 20, "allow_extrapolation": True}
    assert generate(short, tokenizer, PROMPTS, **beyond) == greedy
    five = {"max_new_tokens": 5}
    assert generate(short, tokenizer, PROMPTS, **five) == generate(
        model, tokenizer, PROMPTS, **five
    )
    for prompt, length, text in zip(
        PROMPTS, lengths, generate(short, tokenizer, PROMPTS), strict=True
    ):
        room = max(lengths) + 5 - length
        assert text == generate(model, tokenizer, [prompt], max_new_tokens=room)[0]
    for over in (5, 6):
        message = message_of(lambda o=over: generate(short, tokenizer, ["y" * (max(lengths) + o)]))
        assert "positions 0 are left" in message


@pytest.mark.slow
def test_a_prompt_does_not_see_its_batch(model, tokenizer, greedy):
    draw = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = generate(model, tokenizer, PROMPTS, **draw)
    assert generate(model, tokenizer, PROMPTS, batch_size=2, **draw) == together
    assert generate(model, tokenizer, PROMPTS, **draw) == together
    assert generate(model, tokenizer, PROMPTS, **(draw | {"seed": 4})) != together
    same = generate(model, tokenizer, [PROMPTS[1]] * 4, **draw)
    assert len(set(same)) == 4  # each has its own draws
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=20, batch_size=2) == greedy


@pytest.mark.slow
def test_stop_strings(model, tokenizer, greedy, monkeypatch):
    stop = [greedy[1][4:6], greedy[2][9:12]]
    expected = [cut_at(text, stop) for text in greedy]
    assert expected != greedy
    long = {"max_new_tokens": 60, "stop": stop}
    cut = generate(model, tokenizer, PROMPTS, **long)
    for short, text in zip(expected, cut, strict=True):
        assert text.startswith(short)
        assert not any(s in text for s in stop)
    # All rows have stopped before: the loop does not go on to the limit.
    counts = []
    original = generation._continue

    def counted(*arguments):
        counts.append(arguments[6])
        return original(*arguments)

    monkeypatch.setattr(generation, "_continue", counted)
    generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=60, stop=stop)
    assert counts == [1 + generation.TOKENS_PER_LOOP]


@pytest.mark.slow
def test_few_programs(model, tokenizer):
    """Calls of many sizes: a program for each pair of buckets, not for each size."""
    programs = generation._prefill.program("cpu"), generation._continue.program("cpu")
    for program in programs:
        program.clear_cache()
    for count, length, new in itertools.product((3, 4), (5, 20, 30), (2, 5)):
        generate(model, tokenizer, ["y" * length] * count, max_new_tokens=new)
    assert [program._cache_size() for program in programs] == [2, 2]


@pytest.mark.slow
def test_weights_lie_in_memory_once():
    """bfloat16 on a CPU, which computes in float32: no program converts all layers' experts."""
    config = tiny_config(num_layers=8, hidden_size=64, intermediate_size=512)
    settings = ModelSettings(compute_dtype=jnp.bfloat16)
    parameters = {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)
        for name, spec in parameter_specs(config, settings).items()
    }
    graph, number = graph_of(config, settings), jax.ShapeDtypeStruct((), jnp.float32)
    numbers = Numbers(number, number, jax.ShapeDtypeStruct((), jnp.int32))
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prefill = generation._prefill.program("cpu").lower(
        *(graph, "greedy", 32, (0,), parameters, tokens, tokens, key),
        *(jax.ShapeDtypeStruct((2,), jnp.uint32), numbers),
    )
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), prefill.out_info)
    decode = generation._continue.program("cpu").lower(
        *(graph, "greedy", (0,), parameters, state, jax.ShapeDtypeStruct((2,), bool)),
        *(jax.ShapeDtypeStruct((), jnp.int32), numbers),
    )
    experts = sum(p.size for name, p in parameters.items() if ".experts." in name)
    for program in (prefill, decode):
        memory = program.compile().memory_analysis()
        assert memory.temp_size_in_bytes < experts  # half of what they take


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13)] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert [bucket(n, 32) for n in (1, 32, 33, 49, 65, 97)] == [32, 32, 48, 64, 96, 128]
    assert all(n <= bucket(n) <= 1.5 * n for n in range(2, 1000))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.0, 0.35)])
def test_draws_have_their_probabilities(temperature, top_p):
    logits = np.random.default_rng(0).normal(size=11).astype(np.float32) * 1.5
    expected = np.exp(logits / temperature)
    expected /= expected.sum()
    order = np.argsort(-expected)
    nucleus = order[: 1 + np.searchsorted(np.cumsum(expected[order]), top_p)]
    kept = np.isin(np.arange(11), nucleus)
    expected = np.where(kept, expected, 0) / expected[kept].sum()
    count = 20_000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(count))
    rows, sampling = jnp.broadcast_to(logits, (count, 11)), Sampling(temperature, top_p)
    drawn = sample(sampling.kind, rows, keys, jnp.int32(5), sampling.numbers)
    observed = np.bincount(drawn, minlength=11) / count
    assert not observed[~kept].any()
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(observed - expected) <= 4.5 * deviation).all()


def test_decoding_copies_no_experts(model):
    """Most of the memory: what passes through a program would be held twice."""
    parameters = dict(generation.split(model)[1])
    with jax.set_mesh(decoding_mesh(model.config.num_experts)):
        replicated = generation._replicated(parameters)
    assert replicated.keys() == parameters.keys()
    assert all(replicated[name] is parameters[name] for name in parameters if ".experts." in name)


@pytest.mark.slow
def test_adapters_decode_unmerged(tokenizer):
    """The cache with adapters everywhere: greedy as by the full forward of the same model."""
    config, lora = tiny_config(vocab_size=len(tokenizer)), LoraSettings(2, 3.0)
    weights, adapters = random_weights(config), random_adapters(config, lora)
    adapted = make_model(config, weights | adapters, lora=lora)
    merged = make_model(config, merged_weights(weights, adapters, lora.scale))
    texts = generate(adapted, tokenizer, PROMPTS, max_new_tokens=12)
    assert texts == generate(merged, tokenizer, PROMPTS, max_new_tokens=12)


def test_mistakes(model, tokenizer):
    for culprit, prompts, arguments in [
        ("a prompt is empty", ["a", ""], {}),
        ("max_new_tokens=0", ["a"], {"max_new_tokens": 0}),
        ("batch_size=0", ["a"], {"batch_size": 0}),
        ("temperature=-1", ["a"], {"temperature": -1}),
        ("top_p=0", ["a"], {"top_p": 0}),
        ("a stop string is empty", ["a"], {"stop": [""]}),
        ("prompts is one text; write a list", "ab", {}),
        ("stop is one text; write a list", ["a"], {"stop": "ab"}),
    ]:
        assert culprit in message_of(
            lambda p, a: generate(model, tokenizer, p, **a), prompts, arguments
        )


def test_weights_that_are_not_finite(tokenizer):
    """Decoding and log-likelihoods refuse NaN, which argmax takes for the most probable token."""
    config = tiny_config(vocab_size=len(tokenizer))
    weights = random_weights(config)
    weights["lm_head"][0, -1] = np.nan
    broken = make_model(config, weights)
    message = message_of(lambda: generate(broken, tokenizer, ["ab"], max_new_tokens=4))
    assert message == message_of(log_likelihoods, broken, [([1], [2])])
    assert log_likelihoods(broken, []) == []
    assert message.startswith("the model gives NaN or infinite logits: its weights hold such")
