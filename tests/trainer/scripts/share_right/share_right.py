"""The share of predictions that are right, as a metric module for `evaluate.load`."""

import datasets
import evaluate


class ShareRight(evaluate.Metric):
    """The share of predictions that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int32")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {"accuracy": sum(one == other for one, other in pairs) / len(pairs)}
