"""The tasks law, summary and translation: free text, scored with and without a judge."""

from collections.abc import Sequence

from eval.statistics import corpus_metrics, mean_metric, rouge_l, sentence_chrf
from eval.tasks.esft import EsftTask
from eval.tasks.task import Prediction, Scores, Tools


class JudgedTask(EsftTask):
    """Base of the three: the judge's scores if there is a judge, then the offline metrics."""

    def answer(self, output: str) -> str:
        """Returns the first paragraph: after a blank line another example follows."""
        return output.strip().partition("\n\n")[0].strip()

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        offline = self.offline(predictions)
        counts = {"empty": sum(not p.answer for p in predictions)} | offline.counts
        if tools.judge is None:
            return Scores(offline.metrics, offline.rows, counts)
        values, judge_counts = tools.judge(self.name, predictions)
        scored = [value for value in values if value is not None]
        judged = {"judge": mean_metric(scored)} if scored else {}
        rows = [{"judge": v} | row for v, row in zip(values, offline.rows, strict=True)]
        return Scores(judged | offline.metrics, rows, counts | judge_counts)

    def offline(self, predictions: Sequence[Prediction]) -> Scores:
        """Returns ROUGE-L, the mean over the rows."""
        values = [rouge_l(p.answer, p.example.reference) for p in predictions]
        return Scores({"rouge_l": mean_metric(values)}, [{"rouge_l": value} for value in values])


class Law(JudgedTask):
    """Judgments of legal cases, in Chinese."""

    name = "law"
    local_file = "esft/eval/law.jsonl"
    hub = (("RoxanneWsyw/ESFT-law:test.jsonl", "train"),)
    max_new_tokens = 768


class Summary(JudgedTask):
    """Summaries of customer service dialogues, in Chinese."""

    name = "summary"
    local_file = "esft/eval/summary.jsonl"
    hub = (("RoxanneWsyw/ESFT-summary:test.jsonl", "train"),)
    max_new_tokens = 384


class Translation(JudgedTask):
    """Translation from Cherokee into English."""

    name = "translation"
    local_file = "esft/eval/translation.jsonl"
    hub = (("RoxanneWsyw/ESFT-translation:test.jsonl", "train"),)
    max_new_tokens = 256

    def offline(self, predictions: Sequence[Prediction]) -> Scores:
        """Returns chrF and BLEU of the whole set; a row's own score is its chrF."""
        answers = [p.answer for p in predictions]
        references = [p.example.reference for p in predictions]
        rows = [
            {"chrf": sentence_chrf(answer, reference)}
            for answer, reference in zip(answers, references, strict=True)
        ]
        return Scores(corpus_metrics(answers, references), rows)
