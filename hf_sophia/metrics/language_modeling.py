"""Loss, perplexity, bits per byte and token accuracy of a language model, for `evaluate.load`."""

import math

import datasets
import evaluate

_DESCRIPTION = """\
Quality of a language model on held-out text, from sums per example instead of logits, which would
take gigabytes for a few megabytes of text.
"""

_INPUTS = """
Args:
    nll: Summed negative log-likelihood of each example's counted tokens, in nats.
    correct: Counted tokens of each example that the model ranks first.
    tokens: Counted tokens of each example.
    bytes: UTF-8 bytes that those tokens stand for; zeros where that is not known.

Returns:
    loss: Nats per token.
    perplexity: exp(loss).
    accuracy: Share of tokens ranked first, in [0, 1].
    bits_per_byte: Bits per byte of text, comparable between tokenizers; only with known bytes.
"""


class LanguageModeling(evaluate.Metric):
    """Pools sums over all examples, so that each token weighs the same."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "nll": datasets.Value("float64"),
                    "correct": datasets.Value("int64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, nll: list[float], correct: list[int], tokens: list[int], bytes: list[int]
    ) -> dict[str, float]:
        counted = sum(tokens)
        if counted == 0:
            raise ValueError("no token counts: the evaluated text is empty or all labels are -100")
        loss = math.fsum(nll) / counted
        result = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700.0 else math.inf,
            "accuracy": sum(correct) / counted,
        }
        if any(bytes):
            result["bits_per_byte"] = math.fsum(nll) / math.log(2.0) / sum(bytes)
        return result
