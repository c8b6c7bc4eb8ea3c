"""A suite's metric as an `evaluate.Metric`: local, so it works offline. Importing this module imports `evaluate`."""

from typing import TYPE_CHECKING, Any

import datasets
import evaluate

if TYPE_CHECKING:
    from agentlab.tasks.items import Item
    from agentlab.tasks.suite import Suite


class SuiteScore(evaluate.Metric):  # type: ignore[misc]
    """`compute(predictions=texts, references=item ids)` gives {"score": mean, "scores": one in [0, 1] per item}."""

    def __init__(self, suite: "Suite", items: list["Item"], **options: Any) -> None:
        self.suite = suite
        self.items = {item.id: item for item in items}
        super().__init__(config_name="default", keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"{self.suite.metric} on suite {self.suite.name}: mean score between 0 and 1",
            citation="",
            inputs_description="predictions: answers of a model; references: ids of the items they answer",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        scores = [self.suite.check(self.items[id], text) for id, text in zip(references, predictions, strict=True)]
        return {"score": sum(scores) / len(scores), "scores": scores}


def score_texts(suite: "Suite", items: list["Item"], texts: list[str]) -> list[float]:
    """One score per item, in order. Half surrogate pairs, which Arrow cannot hold, are replaced by "?"."""
    if not items:
        return []
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    result = SuiteScore(suite, items).compute(predictions=clean, references=[item.id for item in items])
    return [float(score) for score in result["scores"]]
