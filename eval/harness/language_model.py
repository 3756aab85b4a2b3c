"""Our model as one of lm_eval's."""

from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from eval.harness.answers import Answers


class LanguageModel(TemplateLM):
    """What lm_eval asks of a model, passed on to `Answers` as tokens.

    As with the tasks of this project, nothing is put in front of a text; only a text without a
    context follows the tokenizer's bos token, or eos where it has none.
    """

    def __init__(self, answers: Answers):
        super().__init__()
        self._answers, self.tokenizer = answers, answers.prompts.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self._answers.prompts.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_) -> list[tuple[float, bool]]:
        return self._answers.log_likelihoods([(context, text) for _, context, text in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        return self._answers.rolling_log_likelihoods(texts, self.prefix_token_id)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answers.texts([request.args for request in requests])
