"""Decodes on one device and on meshes of all; prints whether the texts are the same.

python generation_mesh_worker.py MODEL: in one process, or as one of several, each of which decodes
on one of its own devices and then with the others.
"""

import json

import jax

from olmoe_jax import from_pretrained, generate
from olmoe_jax.data import load_tokenizer
from olmoe_jax.errors import run_command
from olmoe_jax.generation.likelihood import log_likelihoods
from olmoe_jax.model import moe
from olmoe_jax.parallel import distributed
from olmoe_jax.parallel.sharding import make_mesh

PROMPTS = ["a", "what is 3 + 4?", "the " * 5, "Question: 1 + 1?", "xyz"]
DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "stop": ["b"]}


def texts(path: str, mesh, **arguments) -> list[str]:
    model = from_pretrained(path, mesh)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(path)
        return generate(model, tokenizer, PROMPTS, max_new_tokens=20, **arguments)


def main(arguments) -> None:
    with distributed.joined(arguments) as (path,):
        one = make_mesh(devices=jax.local_devices()[:1])
        if jax.process_count() > 1:
            # What decodes greedily with several processes is a run, tests/training.
            alone = texts(path, one, **DRAWN)
            print(json.dumps({"drawn": [texts(path, make_mesh(data=2), **DRAWN) == alone]}))
            return
        meshes = [make_mesh(), make_mesh(data=2), make_mesh(data=2, fsdp=2, expert=2)]
        result = {}
        for name, draws in (("greedy", {}), ("drawn", DRAWN)):
            alone = texts(path, one, **draws)
            result[name] = [texts(path, mesh, **draws) == alone for mesh in meshes]
        alone, result["as accelerators"] = texts(path, one), []
        for backend in ("gather", None):
            moe.decoding_backend = lambda *_, backend=backend: backend
            result["as accelerators"].append(texts(path, meshes[-1]) == alone)
        model, pairs = from_pretrained(path, one), [([3, 4], [5, 6, 7]), ([1], [2])]
        expected, _ = zip(*log_likelihoods(model, pairs), strict=True)
        model = from_pretrained(path, meshes[-1])
        with jax.set_mesh(meshes[-1]):
            found, _ = zip(*log_likelihoods(model, pairs), strict=True)
        result["log_likelihoods"] = [
            abs(a - b) < 1e-4 for a, b in zip(expected, found, strict=True)
        ]
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
