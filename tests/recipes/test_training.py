"""Stage 1 and stage 2 on tiny models: what changes, what is saved, what a killed run goes on with."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTTrainer

import pretrain_projector
import sft_full
import tiny
from _arguments import recipe_parser
from _parts import find_part, part_of, train_only
from _projector import load_projector
from _start_report import mark_trained
from _trainer import IDLE_FLAGS, LlavaSFTConfig, LlavaTrainer, load_weights
from collators import LlavaDataCollator, chat_template_path, load_rows
from runs import BEST_IS_EARLY, ON_CPU, changed_parts, command, kill_after_two_saves, losses, trainable_names

RECIPES = {"pretrain_projector": pretrain_projector, "sft_full": sft_full}


# What trains, and what is left on disk


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(
    ("recipe", "parts"),
    [("pretrain_projector", {"multi_modal_projector"}), ("sft_full", {"multi_modal_projector", "language_model"})],
)
def test_exactly_the_claimed_parameters_change(recipe, parts, kind, base, data, tmp_path):
    RECIPES[recipe].main(command(recipe, base(kind), data, tmp_path, "--max_steps", "2", "--learning_rate", "1e-2"))
    changed = changed_parts(base(kind), tmp_path)
    expected = trainable_names(base(kind), parts)
    # Keys have no bias in Llama; a row of the embedding that no text uses moves as a whole tensor all the same.
    assert set().union(*changed.values()) == expected


def test_the_vision_tower_trains_up_to_the_feature_layer(base, data, tmp_path):
    flags = ["--train_vision_tower", "--max_steps", "2", "--learning_rate", "1e-2"]
    sft_full.main(command("sft_full", base(), data, tmp_path, *flags))
    changed = changed_parts(base(), tmp_path)
    tower = {name for name in trainable_names(base(), {"vision_tower"})}
    # vision_feature_layer is -2: of three layers the last one, and what follows it, never sees a gradient.
    bypassed = {name for name in tower if ".layers.2." in name or "post_layernorm" in name}
    assert changed["vision_tower"] == {n for n in tower - bypassed if "k_proj.bias" not in n} | {
        n for n in changed["vision_tower"] if "k_proj.bias" in n
    }
    assert changed.keys() == {"vision_tower", "multi_modal_projector", "language_model"}


LOAD_AND_GENERATE = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (20, 16), "red")},
             {"type": "text", "text": "What is it?"}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(repr(processor.decode(ids)))
"""


@pytest.mark.parametrize(
    ("recipe", "template", "answer"),
    [("pretrain_projector", "plain", "red\n</s>"), ("sft_full", "vicuna_v1", " red</s>")],
)
def test_a_trained_checkpoint_answers_and_stops_in_a_fresh_process(recipe, template, answer, base, data, tmp_path):
    """Stock classes only, chat template inside, `generate` ends by itself."""
    rows = json.loads((data / "pretrain.json").read_text())[:1]
    (data / "one.json").write_text(json.dumps(rows))
    flags = ["--dataset_name", str(data / "one.json"), "--max_steps", "60", "--learning_rate", "1e-2"]
    start = base()
    if recipe == "pretrain_projector":  # a projector cannot teach a random language model to spell
        start = str(tmp_path / "start")
        plain = ["--chat_template_path", str(chat_template_path("plain"))]
        sft_full.main(command(recipe, base(), data, Path(start), *flags, *plain))
        model = AutoModelForImageTextToText.from_pretrained(start)
        find_part(model, "multi_modal_projector").linear_2.weight.data.zero_()
        model.save_pretrained(start)
    RECIPES[recipe].main(command(recipe, start, data, tmp_path, *flags, "--logging_steps", "20"))
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == chat_template_path(template).read_text()
    child = [sys.executable, "-c", LOAD_AND_GENERATE, str(tmp_path)]
    printed = subprocess.run(child, check=True, capture_output=True, text=True, timeout=300).stdout
    assert printed.strip() == repr(answer)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_dry_run_stops_before_the_first_step(recipe, base, data, tmp_path, capsys):
    RECIPES[recipe].main(command(recipe, base("llava_next"), data, tmp_path / "out", "--dry_run", "True"))
    printed = capsys.readouterr().out
    assert "Parts of the model" in printed and "Predicted memory of one device" in printed
    assert not list((tmp_path / "out").rglob("*"))


def test_stage_one_saves_the_projector_alone(base, data, tmp_path):
    pretrain_projector.main(command("pretrain_projector", base(), data, tmp_path, "--max_steps", "1"))
    model = AutoModelForImageTextToText.from_pretrained(base())
    load_projector(model, tmp_path)
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ours = find_part(model, "multi_modal_projector").state_dict()
    for name, tensor in find_part(trained, "multi_modal_projector").state_dict().items():
        assert torch.equal(ours[name], tensor)


def test_the_logged_loss_is_the_mean_over_the_answers_alone(base, data, tmp_path):
    flags = ["--max_steps", "1", "--learning_rate", "0", "--train_sampling_strategy", "sequential"]
    sft_full.main(command("sft_full", base(), data, tmp_path, *flags))
    model = AutoModelForImageTextToText.from_pretrained(base())
    rows = load_rows(str(data / "instruct.json"))
    batch = LlavaDataCollator(AutoProcessor.from_pretrained(tmp_path))([rows[0], rows[1]])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100]).item()
    assert losses(tmp_path)[1] == pytest.approx(expected, rel=1e-5)


# Killed and resumed


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_killed_and_resumed_equals_uninterrupted(recipe, kind, base, data, tmp_path):
    """SIGKILL of the real process; stock Trainer resumes a Llava from its base weights (transformers#43701)."""
    flags = ["--max_steps", "60", "--save_steps", "4", "--save_total_limit", "100", "--learning_rate", "3e-3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    RECIPES[recipe].main(command(recipe, base(kind), data, whole, *flags))

    kill_after_two_saves(RECIPES[recipe].__file__, command(recipe, base(kind), data, killed, *flags), killed)

    RECIPES[recipe].main(command(recipe, base(kind), data, killed, *flags, "--resume_from_checkpoint", "True"))
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 60 and losses(whole)[60] < losses(whole)[1]
    assert not changed_parts(str(whole), killed)


def test_resume_with_workers_streaming_and_neftune(base, data, tmp_path):
    flags = ["--dataset_name", str(data / "instruct.jsonl"), "--dataset_streaming", "True", "--max_steps", "6"]
    flags += ["--neftune_noise_alpha", "5", "--dataloader_num_workers", "1", "--save_steps", "3"]
    sft_full.main(command("sft_full", base(), data, tmp_path, *flags))
    whole = losses(tmp_path)
    resume = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-3")]
    sft_full.main(command("sft_full", base(), data, tmp_path, *flags, *resume))
    assert losses(tmp_path) == whole and len(whole) == 6


def test_upstream_still_resumes_from_nothing(base, data, tmp_path):
    """The reason for `_load_from_checkpoint`; when this fails, transformers#43701 is mended: delete the override."""
    sft_full.main(
        command("sft_full", base(), data, tmp_path, "--max_steps", "2", "--learning_rate", "1", "--save_steps", "2")
    )
    trainer = make_trainer(base(), tmp_path / "other")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    SFTTrainer._load_from_checkpoint(trainer, str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert not all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "shape", "no optimizer"])
def test_a_checkpoint_that_does_not_fit_is_refused(fault, base, data, tmp_path):
    sft_full.main(command("sft_full", base(), data, tmp_path, "--max_steps", "1", "--save_steps", "1"))
    checkpoint = tmp_path / "checkpoint-1"
    if fault == "no optimizer":
        (checkpoint / "optimizer.pt").unlink()
        expected = "holds no optimizer state .*--model_name_or_path"
    else:
        tensors = load_file(checkpoint / "model.safetensors")
        name = next(name for name in tensors if name.endswith("linear_1.weight"))
        tensors[name] = tensors[name][:, :-1].contiguous()
        if fault == "missing":
            del tensors[name]
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        expected = "linear_1.weight"
    with pytest.raises((ValueError, RuntimeError), match=expected):
        sft_full.main(
            command(
                "sft_full", base(), data, tmp_path, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint)
            )
        )


def test_load_weights_of_tied_embeddings_and_of_another_dtype(tmp_path):
    processor = tiny.make_processor()
    model = tiny.make_model(processor)
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = True
    model.tie_weights()
    model.bfloat16().save_pretrained(tmp_path)
    other = tiny.make_model(processor, seed=1)
    other.config.text_config.tie_word_embeddings = other.config.tie_word_embeddings = True
    other.tie_weights()
    load_weights(other, tmp_path)
    for name, tensor in other.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.state_dict()[name].float())


# SFTConfig's own flags


def test_best_model_is_loaded_at_the_end(base, data, tmp_path):
    """Stock: the last weights stay in the model (transformers#43701)."""
    flags = [*BEST_IS_EARLY, "--eval_dataset_name", str(data / "instruct.json")]
    sft_full.main(command("sft_full", base(), data, tmp_path, *flags))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name != "checkpoint-6"
    assert not changed_parts(str(best), tmp_path)
    assert changed_parts(str(tmp_path / "checkpoint-6"), tmp_path)
    evaluations = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert len(evaluations) == 3 and max(evaluations) == state["best_metric"]


def test_neftune_cosine_with_min_lr_and_a_tracker(base, data, tmp_path):
    plain, noisy = tmp_path / "plain", tmp_path / "noisy"
    flags = ["--max_steps", "4", "--lr_scheduler_type", "cosine_with_min_lr", "--warmup_steps", "0"]
    flags += ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}', "--learning_rate", "1e-3"]
    sft_full.main(command("sft_full", base(), data, plain, *flags, "--report_to", "tensorboard"))
    sft_full.main(command("sft_full", base(), data, noisy, *flags, "--neftune_noise_alpha", "50"))
    assert losses(plain)[1] != losses(noisy)[1]
    rates = [
        entry["learning_rate"] for entry in json.loads((plain / "trainer_state.json").read_text())["log_history"][:-1]
    ]
    assert rates[0] == 1e-3 and 1e-4 < rates[-1] < 4e-4
    assert list(plain.rglob("events.out.tfevents*"))


def test_a_hub_style_dataset_with_splits(base, data, tmp_path):
    """`HuggingFaceH4/llava-instruct-mix-vsft` layout: parts with None keys, pictures embedded, train and test."""
    pictures = [tiny.picture(color) for color in tiny.COLORS]
    rows = {
        "messages": [
            [
                {
                    "role": "user",
                    "content": [
                        {"index": None, "text": "What is it?", "type": "text"},
                        {"index": 0, "text": None, "type": "image"},
                    ],
                },
                {"role": "assistant", "content": [{"index": None, "text": color, "type": "text"}]},
            ]
            for color in tiny.COLORS
        ],
        "images": [[picture] for picture in pictures],
    }
    features = datasets.Features(
        {
            "messages": datasets.List(
                {
                    "role": datasets.Value("string"),
                    "content": datasets.List(
                        {
                            "index": datasets.Value("int64"),
                            "text": datasets.Value("string"),
                            "type": datasets.Value("string"),
                        }
                    ),
                }
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(tmp_path / "hub")
    flags = [
        "--dataset_name",
        str(tmp_path / "hub"),
        "--max_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
    ]
    sft_full.main(command("sft_full", base(), data, tmp_path / "out", *flags))
    assert len(losses(tmp_path / "out")) == 2


def test_an_unknown_template_that_trains_no_stop_token_is_refused(data, tmp_path):
    unknown = (
        "{% for m in messages %}{{ m['role'] }}{% for p in m['content'] %}{{ p.text or '<image>' }}{% endfor %}"
        "{% endfor %}"
    )
    path = tiny.save_checkpoint(tmp_path / "base", chat_template=unknown)
    with pytest.raises(ValueError, match=r"--chat_template_path; see collators/chat_templates/"):
        sft_full.main(command("sft_full", path, data, tmp_path, "--placement", "keep"))


# The trainer


def make_trainer(path: str, out: Path, *, parts=("multi_modal_projector", "language_model"), model=None, **options):
    processor = AutoProcessor.from_pretrained(path)
    processor.chat_template = chat_template_path("vicuna_v1").read_text()
    if model is None:
        model = AutoModelForImageTextToText.from_pretrained(path)
        train_only(model, parts)
    args = {"bf16": False, "use_cpu": True, "report_to": "none", "remove_unused_columns": False, **options}
    rows = [tiny.row(tiny.user("What is it?", images=1), tiny.assistant("red"))]
    dataset = datasets.Dataset.from_dict({"messages": [r["messages"] for r in rows], "images": [["red.png"]]})
    return LlavaTrainer(
        model=model,
        args=LlavaSFTConfig(str(out), **args),
        data_collator=LlavaDataCollator(processor),
        train_dataset=dataset,
        processing_class=processor,
    )


def test_parts_train_at_their_own_learning_rates(base, tmp_path):
    rates = {"learning_rate": 1e-3, "projector_learning_rate": 1e-4, "vision_tower_learning_rate": 1e-6}
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    trainer = make_trainer(base(), tmp_path, parts=parts, weight_decay=0.1, **rates)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in seen
            seen[name] = (group["lr"], group["weight_decay"])
    expected = {"vision_tower": 1e-6, "multi_modal_projector": 1e-4, "language_model": 1e-3}
    trained = {name for name, _ in trainer.model.named_parameters()}
    # vision_feature_layer is -2: of three layers the last one, and what follows it, never sees a gradient.
    trained -= {name for name in trained if "vision_tower" in name and (".layers.2." in name or "post_" in name)}
    assert seen.keys() == trained
    for name, (rate, decay) in seen.items():
        assert rate == expected[part_of(name)]
        assert decay == (0.0 if name.endswith("bias") or "norm" in name.lower() else 0.1)
    assert optimizer.param_groups[0]["lr"] == 1e-3  # the one Trainer logs
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == 6


def test_a_learning_rate_for_a_frozen_part_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="--vision_tower_learning_rate 1e-06: the vision_tower is frozen"):
        make_trainer(base(), tmp_path, vision_tower_learning_rate=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_no_backward_runs_through_a_frozen_tower(trained, base, tmp_path):
    """`enable_input_require_grads` hooks the tower's embeddings too: stock training pays for its backward pass."""
    parts = ["multi_modal_projector", *(["vision_tower"] if trained else [])]
    trainer = make_trainer(base(), tmp_path, parts=parts)
    trainer.model.enable_input_require_grads()
    seen = []
    find_part(trainer.model, "vision_tower").register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.requires_grad)
    )
    batch = trainer.data_collator([tiny.row(tiny.user("Hi", images=1), tiny.assistant("red"))])
    trainer.compute_loss(trainer.model, batch).backward()
    assert seen == [trained]
    assert find_part(trainer.model, "multi_modal_projector").linear_1.weight.grad.abs().sum() > 0


def test_a_second_trainer_trains_the_tower_that_a_first_one_left_alone(base, tmp_path):
    trainer = make_trainer(base(), tmp_path, parts=["multi_modal_projector"])
    train_only(trainer.model, ["vision_tower"])
    copied = copy.deepcopy(trainer.model)
    second = make_trainer(base(), tmp_path, model=trainer.model)
    batch = second.data_collator([tiny.row(tiny.user("Hi", images=1), tiny.assistant("red"))])
    second.compute_loss(second.model, dict(batch)).backward()
    assert find_part(second.model, "vision_tower").embeddings.patch_embedding.weight.grad.abs().sum() > 0
    find_part(copied, "vision_tower").embeddings.patch_embedding.weight.data.zero_()
    features = [model.get_image_features(batch["pixel_values"]).pooler_output[0] for model in (copied, trainer.model)]
    assert not torch.equal(*features)


def test_a_generation_config_that_could_not_be_saved_is_refused_at_the_start(base, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(base())
    model.generation_config.temperature = 0.9
    with pytest.raises(ValueError, match="generation config could not be saved again"):
        make_trainer(base(), tmp_path, model=model)


def test_streams_are_shuffled_on_demand(base, data, tmp_path):
    flags = ["--dataset_name", str(data / "instruct.jsonl"), "--dataset_streaming", "True", "--max_steps", "3"]
    runs = {}
    for name, more in (("ordered", []), ("shuffled", ["--shuffle_dataset", "True"])):
        sft_full.main(command("sft_full", base(), data, tmp_path / name, *flags, *more))
        runs[name] = losses(tmp_path / name)
    assert runs["ordered"] != runs["shuffled"]


def test_several_gpus_without_a_launcher_are_refused_with_the_line_to_type(base, tmp_path, monkeypatch):
    monkeypatch.setattr(LlavaSFTConfig, "n_gpu", property(lambda self: 2))
    monkeypatch.setattr(sys, "argv", ["recipes/sft_full.py", "--run_name", "my run"])
    with pytest.raises(ValueError, match=r"--num_processes 2 recipes/sft_full.py --run_name 'my run'\n"):
        make_trainer(base(), tmp_path)


def test_a_missing_pad_token_becomes_eos_everywhere(base, tmp_path):
    processor = AutoProcessor.from_pretrained(base())
    processor.tokenizer.pad_token = None
    processor.chat_template = chat_template_path("vicuna_v1").read_text()
    model = AutoModelForImageTextToText.from_pretrained(base())
    model.generation_config.eos_token_id = None
    train_only(model, ["multi_modal_projector"])
    dataset = datasets.Dataset.from_dict({"messages": [[]], "images": [["x"]]})
    args = LlavaSFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    LlavaTrainer(
        model, args, processing_class=processor, data_collator=LlavaDataCollator(processor), train_dataset=dataset
    )
    assert processor.tokenizer.pad_token == "</s>"
    assert model.generation_config.pad_token_id == model.config.text_config.pad_token_id == 2
    assert model.generation_config.eos_token_id == [2]


@pytest.mark.parametrize("flag", sorted(IDLE_FLAGS))
def test_flags_without_effect_are_refused(flag, base, tmp_path):
    with pytest.raises(ValueError, match=f"--{flag} has no effect"):
        make_trainer(base(), tmp_path, **{flag: "x"})


def test_mixed_dtypes_without_autocast_are_refused(base, data, tmp_path):
    flags = command("sft_full", base(), data, tmp_path, "--dtype", "bfloat16")
    with pytest.raises(ValueError, match="several dtypes .*pass --dtype float32, or turn --bf16 on"):
        sft_full.main(flags)


def test_frozen_parts_in_bfloat16_train_a_float32_projector(base, data, tmp_path):
    """Stage 1's default: the projector's master weights stay float32 from start to checkpoint."""
    flags = ["--dtype", "bfloat16", "--bf16", "True", "--max_steps", "3", "--save_steps", "2"]
    pretrain_projector.main(command("pretrain_projector", base(), data, tmp_path, *flags))
    whole = losses(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dtypes = {
        part_of(name.replace("language_model.lm_head", "lm_head")): tensor.dtype for name, tensor in tensors.items()
    }
    assert dtypes == {
        "vision_tower": torch.bfloat16,
        "multi_modal_projector": torch.float32,
        "language_model": torch.bfloat16,
    }
    resume = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]
    pretrain_projector.main(command("pretrain_projector", base(), data, tmp_path, *flags, *resume))
    assert losses(tmp_path) == whole


def test_what_is_printed_before_step_zero(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--max_steps", "1", "--gradient_accumulation_steps", "2"]
    pretrain_projector.main(command("pretrain_projector", base(), data, tmp_path, *flags))
    printed = capsys.readouterr().out
    assert "multi_modal_projector" in printed and "0.001" in printed
    assert "global batch 4 rows = 2 a device × 2 accumulated × 1 process(es); 1 steps" in printed
    assert "of the tokens of the first 12 rows carry loss" in printed
    assert "<s><image>×4[red\n</s>]" in printed


def test_mark_trained():
    processor = tiny.make_processor(chat_template_path("vicuna_v1").read_text())
    batch = LlavaDataCollator(processor)([tiny.row(tiny.user("Hi", images=2), tiny.assistant("Yes"))])
    text = mark_trained(processor, batch["input_ids"][0], batch["labels"][0])
    assert text.plain == "<s>USER: <image>×4\n<image>×4\nHi ASSISTANT:[ Yes</s>]"


# The command line


def test_recipe_config_and_command_line_override_each_other_in_this_order(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 0.5\nmax_length: 77\n")
    required = ["--model_name_or_path", "m", "--dataset_name", "d", *ON_CPU]
    _, args, _ = sft_full.make_parser().parse_args_and_config(
        [*required, "--config", str(config), "--max_length", "88"]
    )
    assert (args.warmup_steps, args.learning_rate, args.max_length) == (0.03, 0.5, 88)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "m"], "required: --dataset_name"),
        (["--dataset_name", "d"], "required: --model_name_or_path"),
        (["--model_name_or_path", "m", "--dataset_name", "d", *ON_CPU, "--learning_rat", "1"], "--learning_rat"),
        (["--model_name_or_path", "m", "--dataset_name", "d", "--train_on", "answers"], "invalid choice: 'answers'"),
    ],
)
def test_command_line_errors(flags, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        sft_full.main(flags)
    assert message in capsys.readouterr().err + str(error.value)


def test_unknown_keys_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rat: 0.5\n")
    required = ["--model_name_or_path", "m", "--dataset_name", "d", *ON_CPU]
    with pytest.raises(ValueError, match="learning_rat"):
        sft_full.main([*required, "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ValueError, match="RECIPE has keys that are no flags: --learning_rat 1"):
        recipe_parser({"learning_rat": 1})


@pytest.mark.parametrize("flag", ["--use_peft", "--load_in_4bit"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_adapters_are_refused(recipe, flag, base, data, tmp_path):
    with pytest.raises(ValueError, match="drop --use_peft"):
        RECIPES[recipe].main(command(recipe, base(), data, tmp_path, flag))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_strategy", "steps"], "--eval_strategy steps: .*--eval_dataset_name"),
        (["--resume_from_checkpoint", "last"], "holds no complete checkpoint; start without the flag"),
        (["--dataset_streaming", "True"], "pass --max_steps"),
        (["--max_length", "8"], r"row 0 \(id 0\): .* not even the first exchange fits"),
    ],
)
def test_run_errors_say_what_to_pass(flags, message, base, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        sft_full.main(command("sft_full", base(), data, tmp_path, *flags))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_flags_reach_the_collator_the_rows_and_the_model(recipe, base, data, tmp_path, monkeypatch):
    """The real trainer, stopped at the door of its training loop."""
    built = []

    def stop(trainer, **kwargs):
        built.append(trainer)
        raise Stopped

    monkeypatch.setattr(LlavaTrainer, "train", stop)
    pictures = tmp_path / "elsewhere"
    shutil.copytree(data, pictures, ignore=shutil.ignore_patterns("*.json*"))
    for name in ("pretrain.json", "instruct.json"):
        shutil.copy(data / name, tmp_path / name)
    template = chat_template_path("plain" if recipe == "pretrain_projector" else "llama_2")
    flags = ["--train_on", "last_assistant", "--overlong", "drop", "--max_length", "99", "--pad_to_multiple_of", "8"]
    flags += ["--max_images", "3"]
    flags += ["--image_folder", str(pictures), "--attn_implementation", "eager", "--chat_template_path", str(template)]
    flags += ["--eval_strategy", "steps", "--eval_dataset_name", str(tmp_path / "pretrain.json")]
    with pytest.raises(Stopped):
        RECIPES[recipe].main(command(recipe, base(), tmp_path, tmp_path / "out", *flags))
    [trainer] = built
    collator = trainer.data_collator
    assert (collator.train_on, collator.overlong, collator.placement) == ("last_assistant", "drop", "front")
    assert (collator.max_length, collator.pad_to_multiple_of, collator.max_images) == (99, 8, 3)
    assert collator.chat_template == trainer.processing_class.chat_template == template.read_text()
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.train_dataset[0]["images"] == [str(pictures / "0.png")]
    assert len(trainer.eval_dataset) == 12
    keep = template if recipe == "pretrain_projector" else chat_template_path("llama_2_keep")
    flags = [*flags[:-4], "--placement", "keep", "--chat_template_path", str(keep)]
    with pytest.raises(Stopped):
        RECIPES[recipe].main(command(recipe, base(), tmp_path, tmp_path / "out", *flags))
    assert built[-1].data_collator.placement == "keep"
    assert built[-1].eval_dataset is None
