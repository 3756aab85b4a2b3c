"""A page that shows rows as the model sees them."""

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from olmoe_jax.data.formats import EncodedRow
from olmoe_jax.errors import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = """<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Rows as the model sees them</title>
<style>
body { font: 14px sans-serif; margin: 2em auto; padding: 0 1em; max-width: 60em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: 1em }
.t { background: #c9f0cf } .s { color: #b00020; font-weight: bold }
.c { font-size: 12px; white-space: pre; overflow-x: auto; border: 0; padding: 0 }
</style>
"""
_LEGEND = (
    '<p><span class="t">trains</span>, does not train, <span class="s">special token</span></p>'
)


def page(
    names: Sequence[str],
    examples: Sequence[EncodedRow],
    tokenizer: "PreTrainedTokenizerBase",
    counts: Sequence[str],
    table: Sequence[str],
) -> str:
    """Returns the HTML of coloured rows, with their names.

    Above them stand the counts, a paragraph each, and a table of the sources, if it has lines.
    """
    parts = [_HEAD, *(f"<p>{html.escape(line)}</p>" for line in counts)]
    if table:
        lines = html.escape("\n".join(table))
        parts.append(f'<pre class="c">{lines}</pre>')
    parts.append(_LEGEND)
    for name, example in zip(names, examples, strict=True):
        trains = f"{int(example.in_loss.sum()):,} of {len(example.tokens):,} tokens train"
        text = "".join(_spans(example, tokenizer))
        parts.append(f"<h3>{html.escape(name)}: {trains}</h3>\n<pre>{text}</pre>")
    return "\n".join(parts) + "\n"


def _spans(example: EncodedRow, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Yields the marked text of each part in which tokens are of one kind."""
    special = np.isin(example.tokens, tokenizer.all_special_ids)
    kinds = 2 * special + example.in_loss
    for part in np.split(np.arange(len(kinds)), np.flatnonzero(np.diff(kinds)) + 1):
        names = "s" * bool(special[part].any()) + " t" * bool(example.in_loss[part].any())
        text = html.escape(printable(tokenizer.decode(example.tokens[part].tolist())))
        yield f'<span class="{names.strip()}">{text}</span>'
