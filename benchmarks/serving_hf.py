"""Decodes with transformers and PEFT for benchmarks.serving, in an environment that has them.

Reads the job on standard input and prints one line of JSON, the last one.
"""

import functools
import json
import sys
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    versions = f"transformers {transformers.__version__}, PEFT {peft.__version__}"
    cases = [decode(case, job["new_tokens"]) for case in job["cases"]]
    print(json.dumps({"version": versions, "cases": cases}))


def decode(case: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Returns {"answers": [{"prompt": ids, "tokens": ids}, …]}, greedy."""
    model = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    if case["adapter"]:
        if case["router"]:
            model.load_state_dict(load_file(case["router"]), strict=False)
        model = peft.PeftModel.from_pretrained(model, case["adapter"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(case["tokenizer"])
    generate = functools.partial(model.generate, do_sample=False, max_new_tokens=new_tokens)
    if case["ends"]:
        generate = functools.partial(generate, eos_token_id=case["ends"])
    answers = []
    render = functools.partial(
        tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False
    )
    for prompt in case["prompts"]:
        text = render(prompt) if case["chat"] else prompt
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not case["chat"]).input_ids
        with torch.inference_mode():
            (out,) = generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        answers.append({"prompt": ids[0].tolist(), "tokens": out[ids.shape[1] :].tolist()})
    return {"answers": answers}


if __name__ == "__main__":
    main()
