"""One step of a tiny GPT-2 in each process; every rank saves what it holds."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_sophia import SophiaTrainer


def tiny_model() -> GPT2LMHeadModel:
    """Make the model, the same one in every process."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=37,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def rows() -> list[dict[str, torch.Tensor]]:
    """Sixteen sequences; every second batch of four has fewer labels."""
    ids = (torch.arange(16)[:, None] + 3 * torch.arange(12)) % 37
    labels = ids.clone()
    labels[(torch.arange(16) // 4) % 2 == 1, :7] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def main(output: str, optim_args: str, static_graph: str) -> None:
    """Train one step and save the Hessians, the parameters and what was counted."""
    trainer = SophiaTrainer(
        tiny_model(),
        TrainingArguments(
            output,
            optim="sophia",
            optim_args=optim_args,
            learning_rate=5e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1 if static_graph == "true" else 2,
            max_steps=1,
            logging_steps=1,
            seed=5,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            ddp_static_graph=True if static_graph == "true" else None,
        ),
        train_dataset=rows(),
    )
    trainer.train()
    state = trainer.optimizer.optimizer.state
    torch.save(
        {
            "wrapper": type(trainer.model_wrapped).__name__,
            "fraction": trainer._plan.fraction,
            "hessians": [state[p]["hessian"] for p in trainer.model.parameters()],
            "params": [p.detach() for p in trainer.model.parameters()],
            "log": trainer.state.log_history[0],
        },
        f"{output}/rank{trainer.args.process_index}.pt",
    )
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
