"""Two steps of models with many heads in each process; every rank saves what it holds."""

import sys

import torch
from transformers import TrainingArguments

from hf_sophia import SophiaTrainer
from trainer.families import CASES

NAMES = (
    "BertForTokenClassification",
    "BertForSequenceClassification",
    "BertForMaskedLM",
    "ModernBertForSequenceClassification",
    "T5ForConditionalGeneration",
    "MixtralForCausalLM",
    "BertForMultipleChoice",
)


def main(output: str) -> None:
    """Train each kind on the kept graph, with accumulation, and save the Hessians."""
    saved = {}
    for case in CASES:
        if case.model in NAMES:
            model = case.make()
            trainer = SophiaTrainer(
                model,
                TrainingArguments(
                    output,
                    optim="sophia",
                    learning_rate=1e-3,
                    per_device_train_batch_size=3,
                    gradient_accumulation_steps=2,
                    max_steps=2,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    use_cpu=True,
                    disable_tqdm=True,
                    ddp_find_unused_parameters=True,
                ),
                train_dataset=case.rows(24),
            )
            trainer.train()
            state = trainer.optimizer.optimizer.state
            saved[str(case)] = {
                "hessians": [state[p]["hessian"] for p in model.parameters()],
                "count": trainer.state.log_history[0]["sophia/hessian_tokens"],
                "fraction": trainer._plan.fraction,
            }
    torch.save(saved, f"{output}/rank{trainer.args.process_index}.pt")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
