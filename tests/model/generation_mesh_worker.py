"""Decodes on one device and on meshes of eight; prints whether the texts are the same."""

import json
import sys

import jax

from olmoe_jax import from_pretrained, generate
from olmoe_jax.data import load_tokenizer
from olmoe_jax.sharding import make_mesh

PROMPTS = ["a", "what is 3 + 4?", "the " * 5, "Question: 1 + 1?", "xyz"]


def texts(mesh, **arguments) -> list[str]:
    model = from_pretrained(sys.argv[1], mesh)
    with jax.set_mesh(mesh):
        tokenizer = load_tokenizer(sys.argv[1])
        return generate(model, tokenizer, PROMPTS, max_new_tokens=20, **arguments)


result = {}
for name, arguments in {
    "greedy": {},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "seed": 5, "stop": ["b"]},
}.items():
    alone = texts(make_mesh(devices=jax.devices()[:1]), **arguments)
    meshes = [make_mesh(), make_mesh(data=2)]
    result[name] = [texts(mesh, **arguments) == alone for mesh in meshes]
print(json.dumps(result))
