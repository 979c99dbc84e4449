"""The model card states what really happened, and nothing else."""

import inspect
import math
import shutil

import numpy
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import IntervalStrategy

from hf_sophia import SophiaSeq2SeqTrainer, SophiaTrainer, SophiaTrainerMixin, TrainingCorpus
from trainer.runs import arguments, dataset


def run(folder, model, train: bool = True, cls=SophiaTrainer, **options) -> SophiaTrainer:
    args = arguments(folder, **{"max_steps": 4, "save_strategy": "no", **options})
    data = dataset(16)
    trainer = cls(model, args, train_dataset=data, eval_dataset=data[:4])
    if train:
        trainer.train()
    return trainer


def card_of(trainer: SophiaTrainer, **given) -> ModelCard:
    trainer.create_model_card(**given)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def row(card: ModelCard, name: str) -> str | None:
    """The value beside a name in one of the card's tables."""
    for line in card.text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and cells[0] == name:
            return cells[1]
    return None


def test_the_signature_is_the_stock_trainers() -> None:
    for cls in (SophiaTrainer, SophiaSeq2SeqTrainer):
        assert inspect.signature(cls.create_model_card) == inspect.signature(
            Trainer.create_model_card
        )


def test_sophias_options_are_those_that_ran(tmp_path, tiny_gpt2) -> None:
    # Asked for: k=3. A group of its own was changed by hand, as a script might.
    trainer = run(tmp_path, tiny_gpt2(), optim_args="rho=auto,k=3", train=False)
    trainer.create_optimizer()
    trainer.optimizer.param_groups[1]["eps"] = 1e-9
    trainer.train()
    card = card_of(trainer)
    assert "Sophia-G (Gauss-Newton-Bartlett)" in card.text
    assert row(card, "k") == "3"
    assert row(card, "rho") == "auto"
    assert row(card, "eps") == "by group: [1e-12, 1e-09]"
    assert row(card, "weight_decay") == "by group: [0.1, 0.0]"
    assert row(card, "B, predictions of the last refresh") == f"{trainer._hessian_tokens:,}"
    assert trainer._hessian_tokens == 4 * 11  # rows of twelve tokens, the first is not predicted
    assert row(card, "Hessian") == "gnb on the kept graph of the training pass"
    assert row(card, "hessian_weight") is row(card, "refreshed_step") is None


def test_hutchinsons_estimator_is_named(tmp_path, tiny_gpt2) -> None:
    options = "rho=0.5,hessian_computation_type=hutchinson,hessian_batch_fraction=1.0"
    card = card_of(run(tmp_path, tiny_gpt2(), optim_args=options))
    assert "Sophia-H (Hutchinson)" in card.text
    assert row(card, "rho") == "0.5"
    assert row(card, "target_clip_fraction") is None
    assert row(card, "Hessian") == "hutchinson in a pass of its own on 1 of the batch"


@pytest.mark.parametrize(
    ("optim", "name", "betas"),
    [
        ("adamw_torch", "torch.AdamW", "(0.9, 0.95)"),
        ("radam", "RAdam of hf_sophia", "(0.9, 0.95)"),
        ("adam", "Adam of hf_sophia", "(0.9, 0.95)"),
    ],
)
def test_another_optimizer_is_named_as_what_it_is(tmp_path, tiny_gpt2, optim, name, betas) -> None:
    card = card_of(run(tmp_path, tiny_gpt2(), optim=optim, optim_args=None, adam_beta2=0.95))
    assert f"\n{name}.\n" in card.text
    assert row(card, "betas") == betas
    assert "sophia" not in card.data.tags
    assert row(card, "Hessian") is None


def test_a_scripts_own_optimizer_is_named(tmp_path, tiny_gpt2) -> None:
    # The argument says sophia; what is passed counts.
    model = tiny_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    args = arguments(tmp_path, max_steps=2)
    trainer = SophiaTrainer(model, args, train_dataset=dataset(8), optimizers=(optimizer, None))
    trainer.train()
    card = card_of(trainer)
    assert "\ntorch.SGD.\n" in card.text
    assert row(card, "momentum") == "0.5"
    assert "sophia" not in card.data.tags


def test_the_rate_and_the_schedule_are_those_that_ran(tmp_path, tiny_gpt2) -> None:
    model = tiny_gpt2()
    halves = [list(model.parameters())[::2], list(model.parameters())[1::2]]
    groups = [{"params": halves[0], "lr": 0.5}, {"params": halves[1], "lr": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    args = arguments(tmp_path, max_steps=2, lr_scheduler_type="cosine", warmup_steps=1)
    trainer = SophiaTrainer(model, args, train_dataset=dataset(8), optimizers=(optimizer, schedule))
    trainer.train()
    card = card_of(trainer)
    assert row(card, "learning_rate (largest)") == "by group: [0.5, 0.25]"
    assert row(card, "lr_scheduler_type") == "ExponentialLR, the script's own"
    assert row(card, "lr_scheduler_warmup_steps") is None

    stock = run(tmp_path / "stock", tiny_gpt2(), learning_rate=3e-3, lr_scheduler_type="cosine")
    card = card_of(stock)
    assert row(card, "learning_rate (largest)") == "0.003"
    assert row(card, "lr_scheduler_type") == "cosine"
    assert row(card, "max_grad_norm") == "1.0"


def test_a_card_has_the_citations_the_versions_and_the_evaluations(tmp_path, tiny_gpt2) -> None:
    card = card_of(run(tmp_path, tiny_gpt2(), eval_strategy="steps", eval_steps=2))
    assert "arXiv:2305.14342" in card.text
    assert "@software{hf_sophia," in card.text
    assert row(card, "torch") == torch.__version__
    assert row(card, "rho at the end (geometric mean)") is None  # a number was asked for
    logged = [line for line in card.text.splitlines() if line.startswith(("| 2 |", "| 4 |"))]
    assert len(logged) == 2
    auto = card_of(run(tmp_path / "auto", tiny_gpt2(), optim_args="rho=auto"))
    assert float(row(auto, "rho at the end (geometric mean)")) > 0


def test_a_second_training_counts_on(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2())
    trainer.train()
    text = card_of(trainer).text
    assert "It took 4 optimizer steps. Before these it had taken 4 in another training." in text


def test_the_best_counts_only_where_it_was_loaded(tmp_path, tiny_gpt2) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the first is the worst, which is the best here
    }
    trainer = run(tmp_path, tiny_gpt2(), train=False, **options)

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                shutil.rmtree(tmp_path / "checkpoint-2")

    trainer.add_callback(Gone())
    trainer.train()
    by_step = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    card = card_of(trainer)
    assert "after 4 steps" in card.text
    assert card.data.eval_results[0].metric_value == by_step[4]


def test_what_json_has_no_number_for_is_not_in_the_index(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2())
    metrics = {"eval_loss": math.nan, "eval_a|b": numpy.float32(0.5), "eval_tiny": 1e-5}
    trainer.log(metrics | {"eval_name": "text"})
    card = card_of(trainer)
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "a|b": 0.5,
        "tiny": 1e-5,
    }
    assert row(card, "loss") == "nan"
    assert row(card, "tiny") == "1e-05"
    assert "evaluation a\\|b" in card_of(with_history(trainer)).text


def with_history(trainer: SophiaTrainer) -> SophiaTrainer:
    trainer.args.eval_strategy = IntervalStrategy.STEPS
    return trainer


def test_a_builders_name_is_no_data_set_of_the_hub(tmp_path, tiny_gpt2) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{k: v.tolist() for k, v in row.items()} for row in dataset(8)]
    data = datasets.Dataset.from_generator(lambda: iter(rows), cache_dir=str(tmp_path / "cache"))
    args = arguments(tmp_path, max_steps=1)
    trainer = SophiaTrainer(tiny_gpt2(), args, train_dataset=data.with_format("torch"))
    trainer.train()
    assert card_of(trainer).data.datasets is None


def test_subclasses_and_adapters_have_the_task_of_what_they_are_of(tmp_path, tiny_gpt2) -> None:
    class Mine(GPT2LMHeadModel):
        pass

    trainer = run(tmp_path, Mine(tiny_gpt2().config), eval_strategy="steps", eval_steps=4)
    card = card_of(trainer)
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results[0].metric_type == "loss"
    assert "A Mine, trained from scratch" in card.text


def test_a_process_that_has_not_trained_does_not_guess(tmp_path, tiny_gpt2) -> None:
    card = card_of(run(tmp_path, tiny_gpt2(), train=False))
    assert "not known: this process has not trained the model" in card.text
    assert "sophia" not in card.data.tags
    assert "It was not evaluated." in card.text
    assert card.data.eval_results is None


def test_where_the_model_comes_from(tmp_path, tiny_gpt2) -> None:
    fresh = card_of(run(tmp_path / "fresh", tiny_gpt2()))
    assert "trained from scratch" in fresh.text

    tiny_gpt2(seed=3).save_pretrained(tmp_path / "base")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    further = card_of(run(tmp_path / "further", loaded))
    assert "trained further from local weights" in further.text
    assert str(tmp_path) not in further.content

    # Its configuration bears the name of weights that it does not have.
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config._name_or_path = "gpt2"
    named = card_of(run(tmp_path / "named", AutoModelForCausalLM.from_config(config)))
    assert "trained from scratch" in named.text
    assert named.data.base_model is None

    loaded.config._name_or_path = "user/base"
    card = card_of(run(tmp_path / "hub", loaded), license="mit")
    assert "[user/base](https://huggingface.co/user/base), trained further" in card.text
    assert (card.data.base_model, card.data.license) == ("user/base", "mit")


def test_a_base_models_licence_that_can_not_be_asked_for_is_left_out(
    tmp_path, tiny_gpt2, caplog
) -> None:
    card = card_of(run(tmp_path, tiny_gpt2()), finetuned_from="user/base")
    assert card.data.license is None
    assert "the licence of user/base is not known: OfflineModeIsEnabled" in caplog.text


def test_the_corpus_is_described(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2())
    assert "did not say what the data are" in card_of(trainer).text
    trainer.corpus = TrainingCorpus("a|b", content="sha256 00ff", licence="MIT", hub_id="user/ab")
    card = card_of(trainer)
    assert "[a\\|b](https://huggingface.co/datasets/user/ab)" in card.text
    assert row(card, "content") == "sha256 00ff"
    assert row(card, "licence") == "MIT"
    assert card.data.datasets == ["user/ab"]


def test_metrics_are_those_of_the_weights_in_the_model(tmp_path, tiny_gpt2) -> None:
    trainer = run(
        tmp_path,
        tiny_gpt2(),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first is the worst, which is the best here
    )
    by_step = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert by_step[2] > by_step[4]
    card = card_of(trainer)
    assert "after 2 steps" in card.text
    assert card.data.eval_results[0].metric_value == by_step[2]
    assert card.data.eval_results[0].task_type == "text-generation"
    # An evaluation after the training saw what was loaded.
    again = trainer.evaluate()
    assert again["eval_loss"] == pytest.approx(by_step[2])
    assert card_of(trainer).data.eval_results[0].metric_value == again["eval_loss"]


def test_each_of_several_evaluation_sets_is_there(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2(), train=False, eval_strategy="steps", eval_steps=4)
    data = dataset(16)
    trainer.eval_dataset = {"near": data[:4], "far": data[4:]}
    trainer.train()
    results = {r.metric_type: r.metric_value for r in card_of(trainer).data.eval_results}
    logged = {k: v for e in trainer.state.log_history for k, v in e.items() if "_loss" in k}
    assert results["near_loss"] == logged["eval_near_loss"]
    assert results["far_loss"] == logged["eval_far_loss"]


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2(), train=False)
    trainer.state.global_step, trainer.state.max_steps, trainer.is_in_train = 3, 1000, True
    assert "It has taken 3 of 1,000 planned optimizer steps." in card_of(trainer).text


def test_tags_that_were_there_or_are_given_stay(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2())
    (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\n\n# Mine\n")
    card = card_of(trainer, tags="given", model_name="Name", language="en")
    assert {"mine", "given", "sophia", "hf_sophia"} <= set(card.data.tags)
    assert card.text.startswith("# Name") or "\n# Name" in card.text
    assert card.data.language == "en"


def test_an_adapters_card_stays_one(tmp_path, tiny_gpt2) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    trainer = run(tmp_path, peft.get_peft_model(model, config))
    trainer.save_model()  # PEFT writes a card of its own
    card = card_of(trainer)
    assert card.data.library_name == "peft"
    assert {"sophia", "lora"} <= set(card.data.tags)
    assert "Sophia-G (Gauss-Newton-Bartlett)" in card.text
    assert "trained further from local weights" in card.text
    assert str(tmp_path) not in card.content


class CardWriter(Trainer):
    """A library's Trainer that writes a card of its own, with arguments of its own."""

    def create_model_card(self, model_name=None, dataset_name=None) -> None:
        card = ModelCard(f"---\ntags:\n- theirs\n---\n\n# {model_name} on {dataset_name}\n")
        card.save(f"{self.args.output_dir}/README.md")


class CardWriterWithMixin(SophiaTrainerMixin, CardWriter):
    pass


def test_another_trainers_card_is_added_to(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2(), cls=CardWriterWithMixin)
    card = card_of(trainer, model_name="theirs", dataset_name="data")
    assert "# theirs on data" in card.text
    assert "Sophia-G (Gauss-Newton-Bartlett)" in card.text
    assert {"theirs", "sophia", "hf_sophia"} <= set(card.data.tags)


def test_the_picture_is_shown_where_there_is_one(tmp_path, tiny_gpt2) -> None:
    trainer = run(tmp_path, tiny_gpt2())
    assert "![What was logged, over optimizer steps](loss.png)" in card_of(trainer).text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    bare = run(tmp_path / "bare", tiny_gpt2(), train=False)
    assert "loss.png" not in card_of(bare).text
