"""Runs llama.cpp's convert_hf_to_gguf.py on a model whose vocabulary is new, as the quickstart's.

    python benchmarks/serving_gguf.py LLAMA_CPP_SOURCE MODEL_DIR --outfile FILE [its other flags]

The converter knows a pre-tokenizer by a hash of token ids, which no new vocabulary has. This script
reads the pre-tokenizer in tokenizer.json instead. It runs in the converter's environment.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def pre_tokenizer(path: Path) -> str:
    """Returns llama.cpp's name of the pre-tokenizer of a tokenizer.json.

    Raises:
      ValueError: it is none of those known here.
    """
    part = json.loads(path.read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    parts = part["pretokenizers"] if part.get("type") == "Sequence" else [part]
    kinds = [p["type"] for p in parts]
    gpt2 = kinds[-1:] == ["ByteLevel"] and parts[-1]["use_regex"]
    if gpt2 and kinds == ["ByteLevel"]:
        return "gpt-2"
    if gpt2 and kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    raise ValueError(f"{path}: llama.cpp's name of this pre-tokenizer is not known: {part}")


def main() -> None:
    source, model = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(source))
    from conversion.base import TextModel

    by_hash = TextModel.get_vocab_base_pre

    def known(self: Any, tokenizer: Any) -> str:
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            return pre_tokenizer(model / "tokenizer.json")

    TextModel.get_vocab_base_pre = known
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
    runpy.run_path(str(source / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
