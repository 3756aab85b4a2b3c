"""Decodes on one device and on meshes of all; prints whether the texts are the same.

python generation_mesh_worker.py MODEL: in one process, or as one of several, each of which decodes
on one of its own devices and then with the others.
"""

import json

import jax

from olmoe_jax import distributed, from_pretrained, generate
from olmoe_jax.data import load_tokenizer
from olmoe_jax.errors import run_command
from olmoe_jax.sharding import make_mesh

PROMPTS = ["a", "what is 3 + 4?", "the " * 5, "Question: 1 + 1?", "xyz"]
GREEDY = {"greedy": {}}
DRAWN = {"drawn": {"temperature": 1.0, "top_p": 0.9, "seed": 5, "stop": ["b"]}}


def texts(path: str, mesh, **arguments) -> list[str]:
    model = from_pretrained(path, mesh)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(path)
        return generate(model, tokenizer, PROMPTS, max_new_tokens=20, **arguments)


def main(arguments) -> None:
    with distributed.joined(arguments) as (path,):
        # What decodes greedily with several processes is a run, tests/training.
        several = jax.process_count() > 1
        meshes = [make_mesh(data=2)] if several else [make_mesh(), make_mesh(data=2)]
        result = {}
        for name, draws in (DRAWN if several else GREEDY | DRAWN).items():
            alone = texts(path, make_mesh(devices=jax.local_devices()[:1]), **draws)
            result[name] = [texts(path, mesh, **draws) == alone for mesh in meshes]
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
