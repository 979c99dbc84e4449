"""A Trainer of the script's own, in a module beside it."""

from transformers import Trainer


class QuestionAnsweringTrainer(Trainer):
    """Adds what it saw to its metrics."""

    def __init__(self, *args, greeting=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.greeting = greeting
        self.losses = 0

    def compute_loss(self, *args, **kwargs):
        """Count the losses and leave the rest to the base."""
        self.losses += 1
        return super().compute_loss(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Evaluate, with what was counted."""
        metrics = super().evaluate(*args, **kwargs)
        metrics["eval_losses"] = self.losses
        metrics["eval_greeting"] = self.greeting
        return metrics
