"""Adapters that peft wrote, merged by the recipe: same answers, nothing lost, nothing written that is not whole."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import merge_adapter
import tiny
from _answers import answer
from _merging import (
    check_saved,
    check_whole_modules,
    compute_logits,
    encode,
    first_row,
    judge_merge,
    load_adapter,
    load_base,
    write_legacy_files,
)
from _parts import UNQUANTISED, find_part, part_of
from _projector import load_projector, save_projector
from collators import LlavaDataCollator, chat_template_path

LANGUAGE_MODEL = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
# Of the tiny tower's three layers the last one never sees a gradient (vision_feature_layer -2).
WITH_TOWER = rf"{LANGUAGE_MODEL}|model\.vision_tower\.encoder\.layers\.[01]\.self_attn\.\w+_proj"
PROJECTOR = ["multi_modal_projector"]
LINEAR_1 = "model.multi_modal_projector.linear_1.weight"
TOWER_RANKS = {"rank_pattern": {r"model\.vision_tower\..*": 2}, "alpha_pattern": {r"model\.vision_tower\..*": 4}}
TEMPLATES = {"llava": "vicuna_v1", "vipllava": "vip_llava", "llava_next": "mistral_instruct"}
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
    llm_int8_skip_modules=list(UNQUANTISED),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.picture("red", (20, 16)).save(folder / "red.png")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    rows = [{"id": "text", "conversations": text}, {"id": "red", "image": "red.png", "conversations": talk}]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """`trained(kind, four_bit, **lora)`: folder of an adapter that a few steps of training moved well away."""
    made = {}

    def make(kind: str = "llava", four_bit: bool = False, **lora):
        key = json.dumps([kind, four_bit, lora])
        if key not in made:
            made[key] = train(base(kind), tmp_path_factory.mktemp("adapter"), kind, four_bit, lora)
        return made[key]

    return make


def train(base, folder, kind="llava", four_bit=False, lora=None, steps=8):
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(base)
    processor.chat_template = chat_template_path(TEMPLATES[kind]).read_text(encoding="utf-8")
    quantisation = {"quantization_config": NF4} if four_bit else {}
    model = AutoModelForImageTextToText.from_pretrained(base, **quantisation)
    options = {"target_modules": LANGUAGE_MODEL, "modules_to_save": PROJECTOR, **(lora or {})}
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, **options)).train()
    rows = [
        tiny.row(tiny.user("What is it?", images=1), tiny.assistant("red"), images=[tiny.picture("red", (20, 16))]),
        tiny.row(tiny.user("Hi"), tiny.assistant("Yes")),
    ]
    batch = LlavaDataCollator(processor)(rows)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def command(data, out, *flags):
    return ["--dataset_name", str(data), "--output_dir", str(out), "--device", "cpu", *map(str, flags)]


def ask(model, processor):
    [(text, stopped)] = answer(model, processor, [QUESTION], [[tiny.picture("red", (20, 16))]], max_new_tokens=12)
    return text, stopped


def open_checkpoint(folder):
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


# What is merged

CASES = {
    "lora, written by an older transformers": ("llava", False, {}, []),
    "dora": ("vipllava", False, {"use_dora": True}, []),
    "tower, trained in 4 bits": ("llava_next", True, {"target_modules": WITH_TOWER, **TOWER_RANKS}, []),
    "dora, trained in 4 bits, frozen projector": ("llava", True, {"use_dora": True, "modules_to_save": None}, []),
    "names, on the projector too": (
        *("llava", False, {"target_modules": ["q_proj", "up_proj", "linear_1"], "modules_to_save": None}),
        ["--dtype", "bfloat16"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_checkpoint_answers_as_the_adapter_model(case, base, trained, data, tmp_path, capsys):
    kind, four_bit, lora, flags = CASES[case]
    adapter = given = trained(kind, four_bit, **lora)
    if "older" in case:
        given = old_keys(adapter, tmp_path / "old", before_4_52, target_modules=OLD["language model"][2])
    merge_adapter.main(command(data, tmp_path / "out", "--adapter", given, *flags))
    printed = capsys.readouterr().out
    assert "same most likely token at 100.0%" in printed and "largest difference of a logit" in printed
    assert "read back in a fresh process" in printed and "same logits, chat template, stops at </s>" in printed

    whole, _ = open_checkpoint(base(kind))
    merged, processor = open_checkpoint(tmp_path / "out")
    whole.to(merged.dtype)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    with_adapter = PeftModel.from_pretrained(whole, adapter).eval()
    assert processor.chat_template == chat_template_path(TEMPLATES[kind]).read_text(encoding="utf-8")
    assert ask(merged, processor) == ask(with_adapter, processor)
    assert (merged.generation_config.eos_token_id, merged.generation_config.pad_token_id) == ([2], 3)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {name for name, module in with_adapter.get_base_model().named_modules() if hasattr(module, "lora_A")}
    expected = {f"{name}.weight" for name in expected if "vision_tower.encoder.layers.2." not in name}
    if "modules_to_save" not in lora:
        expected |= {name for name in before if ".multi_modal_projector." in name}
    assert changed == expected
    assert merged.dtype == (torch.bfloat16 if flags else torch.float32)
    # The names of the base's own file, and nothing beside the checkpoint.
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(f"{base(kind)}/model.safetensors").keys()
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "old"}


def old_keys(folder, target, rename, **config):
    """A copy of an adapter under the names of an older transformers."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "adapter_model.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, target / "adapter_model.safetensors")
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def before_4_52(key):
    key = key.replace("model.vision_tower.", "vision_tower.vision_model.").replace(
        "model.multi_modal_projector.", "multi_modal_projector."
    )
    return key.replace("model.language_model.", "language_model.model.")


def before_5(key):
    return key.replace("model.vision_tower.", "model.vision_tower.vision_model.")


OLD = {
    "language model": (
        before_4_52,
        {},
        r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    ),
    "tower": (
        before_4_52,
        {"target_modules": WITH_TOWER, **TOWER_RANKS},
        r"language_model\.model\.layers\..*_proj|vision_tower\.vision_model\.encoder\.layers\.[01]\.self_attn\.\w+_proj",
    ),
    "4.52, tower": (
        before_5,
        {"target_modules": WITH_TOWER, **TOWER_RANKS},
        r"model\.language_model\.layers\..*_proj|.*vision_model\.encoder\.layers\.[01]\.self_attn\.\w+_proj",
    ),
    # On transformers 5 it would exclude nothing: there is no `vision_model` any more.
    "4.52, all but the tower": (before_5, {}, r"^(?!.*(vision_model|multi_modal_projector)).*_proj"),
    "names": (before_4_52, {"target_modules": ["q_proj"]}, ["q_proj"]),
}


@pytest.mark.parametrize("case", OLD)
def test_adapters_of_an_older_transformers_land_where_they_were(case, base, trained, tmp_path):
    rename, lora, target_modules = OLD[case]
    adapter = trained(**lora)
    patterns = {
        name: {
            rf".*{'vision_model' if rename is before_5 else 'vision_tower'}.*": value for value in lora[name].values()
        }
        for name in ("rank_pattern", "alpha_pattern")
        if name in lora
    }
    if rename is before_4_52:
        patterns["exclude_modules"] = r"model\.language_model\..*"  # which no module was called then
    old = old_keys(adapter, tmp_path / "old", rename, target_modules=target_modules, **patterns)
    inputs = {"input_ids": torch.arange(5, 20)[None], "attention_mask": torch.ones(1, 15, dtype=torch.int64)}
    logits, states = [], []
    for folder in (adapter, old):
        model = load_adapter(load_base(base()), folder)
        logits.append(compute_logits(model, inputs))
        states.append(model.state_dict())
    assert torch.equal(*logits)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_peft_alone_fails_on_an_older_projector(base, trained, tmp_path):
    """peft 0.21 renames the keys of LoRA layers only. Once this loads, `load_adapter` may leave the renaming to it."""
    old = old_keys(trained(target_modules=["q_proj"]), tmp_path / "old", before_4_52)
    with pytest.raises(KeyError, match="base_model.model.model.multi_modal_projector.linear_1.weight"):
        PeftModel.from_pretrained(open_checkpoint(base())[0], old)


# The projector


def test_a_projector_goes_in_without_an_adapter_and_comes_out_in_every_form(base, data, tmp_path, capsys):
    """And for engines on transformers 4 the processor is written twice."""
    source = tiny.make_model(tiny.make_processor(), seed=7)
    flags = ["--base", base(), "--projector", save_projector(source, tmp_path / "mm_projector.bin")]
    saved = ["--save_projector", tmp_path / "xtuner" / "projector" / "model.safetensors"]
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    more = ["--legacy_files", "--max_shard_size", "200KB", "--push_to_hub", "nobody/nothing"]
    with pytest.raises(
        OSError, match=r"out is complete, but could not be uploaded .*: once that is mended, run hf uplo"
    ):
        merge_adapter.main(command(data, tmp_path / "out", *flags, *saved, *more))
    assert "GB in memory (torch.float32), merged in place" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()

    merged, processor = open_checkpoint(tmp_path / "out")
    before = open_checkpoint(base())[0].state_dict()
    for name, tensor in merged.state_dict().items():
        is_projector = part_of(name) == "multi_modal_projector"
        assert torch.equal(tensor, source.state_dict()[name] if is_projector else before[name]), name
    target = tiny.make_model(tiny.make_processor(), seed=8)
    load_projector(target, tmp_path / "xtuner")
    assert torch.equal(find_part(target, "multi_modal_projector").linear_1.weight, source.state_dict()[LINEAR_1])

    # Without transformers 5's own file the stock class reads the older one, and prepares the same pixels.
    (tmp_path / "out" / "processor_config.json").unlink()
    older = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert older.to_dict() == processor.image_processor.to_dict() and older.do_pad
    pixels = [
        p(tiny.picture("red", (20, 16)), return_tensors="pt")["pixel_values"]
        for p in (older, processor.image_processor)
    ]
    assert torch.equal(*pixels)


def test_the_legacy_files_say_what_transformers_4_reads(tmp_path):
    """Which classes 4.57.3 takes, and that it takes a `rope_theta` of 10000 when there is none, was tried with it."""
    names = {}
    for kind, pad in (("llava", False), ("llava", True), ("llava_next", True)):
        processor = tiny.make_processor(kind=kind)
        processor.image_processor.do_pad = pad
        model = tiny.make_model(processor, kind, text="mistral")
        model.config.text_config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        write_legacy_files(processor, tmp_path)
        written = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*config.json")}
        preprocessor, text = written["preprocessor_config"], written["config"]["text_config"]
        names[kind, pad] = preprocessor["image_processor_type"], preprocessor["processor_class"]
        assert preprocessor["crop_size"] == {"height": 16, "width": 16} and preprocessor["size"] == {
            "shortest_edge": 16
        }
        assert written["tokenizer_config"]["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (text["rope_theta"], text["rope_scaling"]) == (1e6, {"rope_type": "linear", "factor": 2.0})

        tower = {name for name in load_file(tmp_path / "model.safetensors") if "vision_tower" in name}
        assert tower and all(".vision_tower.vision_model." in f".{name}" for name in tower)

        reloaded, again = open_checkpoint(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], tensor), name
        assert again.tokenizer("A red square")["input_ids"] == processor.tokenizer("A red square")["input_ids"]
        assert again.image_processor.to_dict() == processor.image_processor.to_dict()
        assert reloaded.config.text_config.rope_parameters == model.config.text_config.rope_parameters
    assert names == {
        ("llava", False): ("CLIPImageProcessor", "LlavaProcessor"),
        ("llava", True): ("LlavaImageProcessor", "LlavaProcessor"),
        ("llava_next", True): ("LlavaNextImageProcessor", "LlavaNextProcessor"),
    }


@pytest.mark.parametrize("name", ["own.safetensors", "mm_projector.bin", "projector/model.safetensors"])
def test_the_merged_projector_is_saved_alone(name, base, trained, data, tmp_path, monkeypatch):
    """In the checkpoint's own folder too. (The fresh process has its own tests, and is left out here.)"""
    monkeypatch.setattr(merge_adapter, "check_saved", lambda *args: None)
    out = tmp_path / "out"
    place = out / name if name.startswith("projector/") else tmp_path / name
    merge_adapter.main(command(data, out, "--adapter", trained(), "--save_projector", place))
    target = tiny.make_model(tiny.make_processor(), seed=8)
    load_projector(target, place)
    tensors = load_file(trained() / "adapter_model.safetensors")
    assert torch.equal(target.state_dict()[LINEAR_1], tensors[f"base_model.model.{LINEAR_1}"])
    assert (out / "model.safetensors").is_file()


def test_a_run_that_is_stopped_leaves_nothing(base, trained, data, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    monkeypatch.setattr(merge_adapter, "check_saved", stop)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(Stopped):
        argv = ["--adapter", trained(), "--save_projector", tmp_path / "mm_projector.bin"]
        merge_adapter.main(command(data, tmp_path / "link", *argv))
    assert {path.name for path in tmp_path.iterdir()} == {"link"}


# What is refused


def damaged(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def test_keys_that_do_not_land_are_one_error_that_lists_them(base, trained, data, tmp_path):
    def change(tensors):
        tensors["base_model.model.model.audio_tower.q_proj.lora_A.weight"] = tensors.pop(Q_PROJ)
        tensors[Q_PROJ.replace("layers.0", "layers.1")] = torch.zeros(2, 32)
        del tensors[f"base_model.model.{LINEAR_1}"]

    adapter = damaged(trained(), tmp_path / "adapter", change)
    with pytest.raises(ValueError) as error:
        merge_adapter.main(command(data, tmp_path / "out", "--adapter", adapter))
    for line in (
        f"missing: {Q_PROJ} (4, 32)",
        f"missing: base_model.model.{LINEAR_1} (32, 32)",
        "unexpected: base_model.model.model.audio_tower.q_proj.lora_A.weight (4, 32)",
        f"wrong shape: {Q_PROJ.replace('layers.0', 'layers.1')} is (2, 32), the model's is (4, 32)",
    ):
        assert f"\n  {line}\n" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(base, trained, data, tmp_path):
    AutoModelForImageTextToText.from_pretrained(base(), quantization_config=NF4).save_pretrained(tmp_path / "nf4")
    with pytest.raises(
        ValueError, match="nf4 is quantised .*bitsandbytes.*: pass --base with the unquantised checkpo"
    ):
        merge_adapter.main(command(data, tmp_path / "out", "--adapter", trained(), "--base", tmp_path / "nf4"))


def test_a_base_that_is_gone(base, trained, data, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained(), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "outputs/gone"}))
    with pytest.raises(
        OSError, match="(?s)the base outputs/gone is neither a checkpoint folder here nor .*: pass --base"
    ):
        merge_adapter.main(command(data, tmp_path / "out", "--adapter", adapter))


def test_what_does_not_go_together_is_refused(base, trained, data, tmp_path):
    projector = save_projector(tiny.make_model(tiny.make_processor()), tmp_path / "p.bin")
    full = tmp_path / "full"
    full.mkdir()
    (full / "config.json").touch()
    for flags, error, message in (
        (
            ["--adapter", trained(), "--projector", projector],
            ValueError,
            "brings the projector that it was trained with",
        ),
        (["--adapter", base()], FileNotFoundError, "holds no adapter_config.json with adapter_model.safetensors: exp"),
        (["--base", base()], ValueError, "expected an --adapter, or a --projector"),
        (["--projector", projector], ValueError, "and the --base where no adapter names it"),
        (
            ["--adapter", trained(), "--output_dir", full],
            FileExistsError,
            "full is not empty, or the current folder: choose another",
        ),
    ):
        with pytest.raises(error, match=message):
            merge_adapter.main(command(data, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_a_merge_that_lost_the_projector_is_refused(base, trained, caplog):
    check_whole_modules(load_adapter(load_base(base()), trained()).merge_and_unload(), trained())
    assert "rounded" not in caplog.text
    merged = load_adapter(load_base(base(), "bfloat16"), trained()).merge_and_unload()
    check_whole_modules(merged, trained())
    assert f"{LINEAR_1}: rounded from torch.float32 to the base's torch.bfloat16" in caplog.text
    parameter = merged.model.multi_modal_projector.linear_1.bias
    parameter.data[0] += 1
    with pytest.raises(ValueError, match="model.multi_modal_projector.linear_1.bias of the merged model is not the"):
        check_whole_modules(merged, trained())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_that_did_nothing_or_not_all_is_refused(dtype, base, trained):
    """The rule of `judge_merge`: the difference is rounding, and below the adapter's effect."""
    processor = AutoProcessor.from_pretrained(trained())
    row = tiny.row(tiny.user("What is it?", images=1), tiny.assistant("red"))
    model = load_base(base(), dtype)
    inputs = encode(processor, row, model)
    model = load_adapter(model, trained())
    adapted = compute_logits(model, inputs)
    with model.disable_adapter():
        plain = compute_logits(model, inputs)
    with pytest.raises(ValueError, match="not the one that was trained|would lose what was learnt"):
        judge_merge(plain, adapted, plain, model.dtype)
    layer = model.get_base_model().model.language_model.layers[0].mlp.down_proj
    layer.lora_B["default"].weight.data.neg_()
    wrong = compute_logits(model, inputs)
    layer.lora_B["default"].weight.data.neg_()
    if dtype == "float32":  # in 16 bits one layer may hide in the roundings
        with pytest.raises(ValueError, match="not the one that was trained. If --dtype float32 merges it"):
            judge_merge(plain, adapted, wrong, model.dtype)
    merged = compute_logits(model.merge_and_unload(), inputs)
    assert "same most likely token at" in judge_merge(plain, adapted, merged, model.dtype)
    for broken in ((plain, adapted, merged / 0), (plain, adapted / 0, merged)):
        with pytest.raises(ValueError, match=f"model's logits are not finite in {dtype}: pass another --dtype"):
            judge_merge(*broken, model.dtype)
    with pytest.raises(ValueError, match="effect 0, .*changes nothing on this row: was it trained"):
        judge_merge(plain, plain, plain, model.dtype)


def test_a_checkpoint_that_reads_back_otherwise_is_refused(base, data):
    model, processor = open_checkpoint(base())
    row = first_row(str(data))
    assert row["id"] == "red"
    inputs = encode(processor, row, model)
    logits = compute_logits(model, inputs)
    logits[-1, -1] += 1e-6
    processor.chat_template += " "
    model.generation_config.eos_token_id = [2, 5]
    with pytest.raises(
        ValueError, match="the checkpoint has other chat template, stop tokens, logits: it is discarded"
    ):
        check_saved(base(), row, inputs, logits, processor, type(model), model.generation_config)
