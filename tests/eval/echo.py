"""A backend without a model, and an evaluation with it; imports no jax, to start quickly."""

from pathlib import Path

from eval.evaluation import MODEL, PREDICTIONS, SETTINGS, Decoding, evaluate, settings_of
from eval.outputs import open_output
from eval.predictions import begun
from eval.tasks import TASKS
from eval.tasks.task import Tools, read_examples

GSM = TASKS["gsm"]


class Echo:
    """A backend that answers with the prompt's last words and can be killed."""

    context = 10_000

    def __init__(self, batches_to_live: int = 10_000):
        self.calls, self.left = [], batches_to_live

    def encode(self, prompt):
        return list(prompt)

    def generate(self, prompts, sampling):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.calls.append((list(prompts), sampling))
        return [f" {prompt[-20:]} 4,2 Question: 7" for prompt in prompts]


FIVES = Decoding(batch_size=5)


def evaluate_gsm(output: Path, data: Path, backend, decoding=FIVES, limit=None):
    examples = read_examples(GSM, str(data))[:limit]
    settings = settings_of(GSM, examples, decoding, limit)
    started = begun(output / GSM.name / PREDICTIONS)
    open_output(output, MODEL, {"model": "m", "fingerprint": "f"}, begun=started)
    open_output(output / GSM.name, SETTINGS, settings, begun=started)
    return evaluate(GSM, examples, settings, output, lambda: backend, Tools())
