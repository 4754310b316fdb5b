"""What is written for vLLM, without vLLM: the kit's own class against the composite, what is refused, and how a server
is started and stopped, tried on a program that only pretends to be one.
"""

import ast
import json
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from pretended_vllm import PretendedVllm, gone
from safetensors.torch import load_file
from tiny import part, tiny_encoder
from tiny_encoders import tiny_encoder_of, tiny_sound
from tiny_merged import merged_with_adapter, tiny_merged, wide_llm
from transformers import AutoConfig, AutoProcessor

import finetune
from finetune.common.errors import ExportRefused
from finetune.common.registry import part_names
from finetune.data.media import noise
from finetune.data.sample import Medium, Message
from finetune.export import vllm
from finetune.export._check.probes import as_chat, prompt_batch
from finetune.export._contract import EngineMissing, MergedModel, Probe
from finetune.export._vllm import environment, model_class
from finetune.model.load import load_merged
from finetune.model.prompts import logits as logits_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# label: (encoders by label and options, projectors)
COMPOSITES = {
    "pixel_shuffle": ({"image": ("siglip", {})}, {"image": part("projectors", "pixel_shuffle")}),
    "convolutional": ({"image": ("convnext", {})}, {"image": part("projectors", "mlp")}),
    "tiles": ({"image": ("siglip", {"tiles": 6})}, {"image": part("projectors", "linear")}),
    "class_token": ({"image": ("clip", {"layer": -2})}, {"image": part("projectors", "linear")}),
    "stack": ({"audio": ("whisper", {"window_seconds": 1.0})}, {"audio": part("projectors", "stack", factor=4)}),
    "wave": ({"audio": ("wav2vec2", {"window_seconds": 1.0})}, {"audio": part("projectors", "conv")}),
    "spectrogram": ({"audio": ("ast", {})}, {"audio": part("projectors", "linear")}),
    "both": (
        {"image": ("siglip", {}), "audio": ("whisper", {})},
        {
            "image": part("projectors", "resampler", queries=3, width=16, heads=2),
            "audio": part("projectors", "stack", factor=8),
        },
    ),
}


def exported_of(folder: Path, label: str, **kwargs):
    """(the merged model, the folder that was written for vLLM)."""
    encoders, projectors = COMPOSITES[label]
    built = {name: tiny_encoder_of(kind, **options) for name, (kind, options) in encoders.items()}
    merged = tiny_merged(folder / "merged", built, projectors, **kwargs)
    (folder / "out").mkdir()
    exported_model = vllm.write(MergedModel(merged), folder / "out", vllm.Options())
    assert exported_model.model_class == "ServedModel"
    return load_merged(merged, CPU), folder / "out"


def served(folder: Path):
    """(model, processor, table of outputs) as vLLM puts them together."""
    model_class.register()
    config = AutoConfig.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    head = state.pop("lm_head.weight", None)
    model = model_class.ServedModel(config).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    head = model.get_input_embeddings().weight if head is None else head
    return model, AutoProcessor.from_pretrained(folder), head


@pytest.mark.parametrize("label", COMPOSITES)
def test_the_own_class_makes_the_same_tokens_and_logits_as_the_composite(tmp_path, label):
    assistant, folder = exported_of(tmp_path, label)
    model, processor, head = served(folder)
    kinds = list(COMPOSITES[label][0])
    for seed in range(2):
        media = [Medium(kind, Path(f"{number}")) for kind in kinds for number in range(2)]
        decoded = {m: noise(m.kind, seed + int(m.path.name)) for m in media}
        if label == "tiles":  # one that is cut, and one that isn't
            decoded = {
                m: PIL.Image.linear_gradient("L").convert("RGB").resize((90 * i + 64, 64)) for i, m in enumerate(media)
            }
        messages = (Message("system", ("Be brief.",)), Message("user", (media[0], "and", *media[1:], "What?")))
        ours = prompt_batch(assistant, messages, {m: assistant.encoders[m.kind].prepare(decoded[m]) for m in media})

        text = processor.tokenizer.apply_chat_template(
            as_chat(messages, decoded), tokenize=False, add_generation_prompt=True
        )
        given = {kind: [decoded[m] for m in media if m.kind == kind] for kind in kinds}
        inputs = processor(text=text, images=given.get("image"), audio=given.get("audio"))
        assert inputs["input_ids"].tolist() == ours.input_ids.tolist()

        embedded = model.get_input_embeddings()(inputs["input_ids"])
        for kind in kinds:
            is_medium = inputs["input_ids"] == getattr(processor, f"{kind}_token_id")
            rows = features_of(model, processor, kind, inputs)
            assert len(rows) == int(is_medium.sum())
            embedded = embedded.masked_scatter(is_medium[..., None], rows)
        with torch.no_grad():
            found = model(inputs_embeds=embedded).last_hidden_state @ head.T
            expected = logits_of(assistant.model, ours)
        torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)
        # A placeholder's row is never written: its logit is the mean of all others.
        torch.testing.assert_close(found[..., -1], expected.mean(-1), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def features_of(model, processor, kind, inputs):
    if kind == "image":
        return model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
    values = inputs["input_features" if "input_features" in inputs else "input_values"]
    return torch.cat([model.get_audio_features(one[None]).pooler_output.flatten(0, 1) for one in values])


@pytest.mark.parametrize("label", ["pixel_shuffle", "tiles"])
def test_placeholders_are_counted_from_the_size_of_a_picture_alone(tmp_path, label):
    _, folder = exported_of(tmp_path, label)
    _, processor, _ = served(folder)
    sizes = [(64, 64), (30, 200), (300, 31), (100, 150)]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    for number, (height, width) in enumerate(sizes):
        inputs = processor(text="<|image|>", images=[PIL.Image.new("RGB", (width, height))])
        assert counts["num_image_patches"][number] == len(inputs["pixel_values"])
        assert counts["num_image_tokens"][number] == inputs["input_ids"].shape[1]


def test_each_placeholder_is_told_with_what_stands_in_its_place(tmp_path):
    _, folder = exported_of(tmp_path, "both")
    processor = served(folder)[1]
    inputs = processor(
        text="a<|audio|>b<|image|>",
        images=[noise("image")],
        audio=[tiny_sound(0.32)],
        return_text_replacement_offsets=True,
    )
    replacements = [(entry["type"], entry["replacement"]) for entry in inputs["text_replacement_offsets"][0]]
    assert replacements == [("audio", "<|audio|>" * 2), ("image", "<|image|>" * 3)]  # 16 rows of 20 ms, by 8; queries


def test_the_config_tells_vllm_what_it_asks_for(tmp_path):
    _, folder = exported_of(tmp_path, "both", llm=wide_llm("granite", logits_scaling=4.0))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["TransformersMultiModalForCausalLM"]
    assert config["max_source_positions"] == 1500 // 8 + 1
    assert config["text_config"]["logit_scale"] == 0.25
    assert "auto_map" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_bias_of_the_head_goes_along(tmp_path):
    assistant, folder = exported_of(tmp_path, "pixel_shuffle", llm=wide_llm("phi"))
    bias = load_file(folder / "model.safetensors")["lm_head.bias"]
    own = assistant.model.causal_lm.lm_head.bias
    assert bias[: len(own)].equal(own) and own.abs().sum() > 0


@pytest.mark.parametrize(("tower", "options"), [("siglip", {}), ("dinov2", {"layer": -2})])
def test_llava_is_taken_where_it_fits_and_runs_in_the_same_backend(tmp_path, tower, options):
    merged = tiny_merged(
        tmp_path / "merged", {"image": tiny_encoder(tower, **options)}, {"image": part("projectors", "mlp")}
    )
    (tmp_path / "out").mkdir()
    exported_model = vllm.write(MergedModel(merged), tmp_path / "out", vllm.Options())
    assert exported_model.model_class == "LlavaForConditionalGeneration"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["TransformersMultiModalForCausalLM"]
    assert "auto_map" not in config
    # SigLIP's attention pooling: nothing reads it, and vLLM can't run it on a CPU.
    assert not [key for key in load_file(tmp_path / "out" / "model.safetensors") if "vision_tower.head" in key]


def test_qwen2_audio_is_left_out_with_the_reason(tmp_path):
    encoders = {"audio": tiny_encoder_of("whisper", pool=2)}
    merged = tiny_merged(tmp_path / "merged", encoders, {"audio": part("projectors", "linear")})
    (tmp_path / "out").mkdir()
    exported_model = vllm.write(MergedModel(merged), tmp_path / "out", vllm.Options())
    assert (exported_model.model_class, "backend" in exported_model.reason) == ("ServedModel", True)


def test_an_adapter_beside_its_base_makes_the_merged_model_again(tmp_path):
    encoders, projectors = {"image": tiny_encoder()}, {"image": part("projectors", "mlp")}
    merged = merged_with_adapter(tmp_path, encoders, projectors)
    (tmp_path / "out").mkdir()
    source = MergedModel(merged, tmp_path / "adapter")
    written = vllm.write(source, tmp_path / "out", vllm.Options(adapter=True))
    assert "--enable-lora --max-lora-rank 8" in written.details["command"]
    base = served(tmp_path / "out")[0]
    for name, weight in wide_llm().model.state_dict().items():
        found = base.language_model.state_dict()[name][: len(weight)]  # behind it, rows of placeholders
        torch.testing.assert_close(found, weight, atol=1e-5, rtol=1e-5)
    lora = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    whole = load_merged(merged, CPU).model.causal_lm.model
    adapted = [name for name in lora if name.endswith("lora_A.weight")]
    assert len(adapted) == 7 * 2  # linear modules of a layer, layers
    for name in adapted:
        module = name.removeprefix("base_model.model.model.language_model.").removesuffix(".lora_A.weight")
        added = 2.0 * lora[name.replace("lora_A", "lora_B")] @ lora[name]  # alpha / rank
        weight = base.language_model.get_submodule(module).weight + added
        torch.testing.assert_close(weight, whole.get_submodule(module).weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"r": 1024}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_vllm_cannot_put_over_a_base_is_refused(config):
    with pytest.raises(ExportRefused, match="plain LoRA up to rank 512"):
        vllm.lora_rank({"r": 8, "rank_pattern": {}} | config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fusion": "cross_attention"}, "no place for the fusion 'cross_attention'"),
        ({"llm": "mpt"}, "mpt"),
        ({"video": True}, "no video"),
    ],
)
def test_what_vllm_cannot_hold_is_refused_with_the_reason(tmp_path, changes, reason):
    name = "video" if changes.pop("video", False) else "image"
    built = tiny_encoder_of("siglip_frames") if name == "video" else tiny_encoder()
    if family := changes.pop("llm", None):
        changes["llm"] = wide_llm(family)
    merged = tiny_merged(tmp_path / "merged", {name: built}, {name: part("projectors", "mlp")}, **changes)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportRefused, match=reason):
        vllm.write(MergedModel(merged), tmp_path / "out", vllm.Options())
    assert not list((tmp_path / "out").iterdir())


def file_of(module: str) -> Path | None:
    path = Path(finetune.__file__).parents[1].joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports_at_module_level(module: str) -> set[str]:
    """Modules that importing `module` imports: those of this package, and names of other packages."""
    names = set()
    for node in ast.parse(file_of(module).read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    own = {name for name in names if name.startswith("finetune")}
    return {name for name in own if file_of(name)} | {name.partition(".")[0] for name in names - own}


def test_the_plugin_imports_nothing_that_needs_newer_transformers():
    """It runs with vLLM's transformers and libraries: of this package it imports encoders, projectors, what a config
    describes them by, and what those import.
    """
    plugin = "finetune.export._vllm.model_class"
    folders = ("encoders", "projectors", "fusion")  # a config without fusion has the default one
    imported, to_read = (
        set(),
        {plugin, *(f"finetune.model.{role}.{name}" for role in folders for name in part_names(role))},
    )
    while to_read:
        imported |= to_read
        to_read = {
            other for name in to_read if name.startswith("finetune") for other in imports_at_module_level(name)
        } - imported
    own = {name for name in imported if name.startswith("finetune")}
    assert {"finetune.common.registry", "finetune.model.encoders._transformers", "finetune.data.sample"} <= own
    allowed = (
        *("finetune.common", "finetune.data.", "finetune.recipe.", "finetune.model.encoders"),
        *("finetune.model.projectors", "finetune.model.fusion", "finetune.model.heads"),
        *("finetune.model.bindings", "finetune.model.bounds", "finetune.model.composition"),
    )
    assert not [name for name in own - {plugin} if not name.startswith(allowed)]
    libraries = imported - own - sys.stdlib_module_names
    assert libraries <= {"torch", "transformers", "numpy", "pydantic", "pydantic_core", "typing_extensions"}, libraries


def test_without_vllm_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delenv("FINETUNE_VLLM", raising=False)
    with pytest.raises(EngineMissing, match="FINETUNE_VLLM"):
        environment.find_python(None)
    with pytest.raises(EngineMissing, match="doesn't exist"):
        environment.find_python(str(tmp_path / "python"))
    with pytest.raises(EngineMissing, match="has no vLLM"):
        environment.version_of(sys.executable, plugin=False)


def exported(folder: Path, model_type: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "dtype": "float32"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    return folder


def test_questions_go_over_the_api_and_no_process_is_left(tmp_path):
    pretended = PretendedVllm(tmp_path / "vllm")
    noise("image").save(tmp_path / "a.png")
    probe = Probe((Message("user", (Medium("image", tmp_path / "a.png"), "What?")),), (5, 6))
    engine = vllm.answer(exported(tmp_path, "llava"), [probe], vllm.Options(python=str(pretended.python)), 8)
    assert engine.engine == "vLLM 9.9"
    assert engine.answers == ((5, 6),)  # without the end token
    ((_, request),) = pretended.requests
    assert (request["temperature"], request["max_tokens"]) == (0, 8)
    image, text = request["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "What?"}
    assert all(map(gone, pretended.pids))


def test_a_server_that_does_not_start_is_quoted_and_stopped(tmp_path):
    pretended = PretendedVllm(tmp_path / "vllm", fails_after=None)
    with pytest.raises(ExportRefused, match="ValueError: no such thing as this model"):
        vllm.answer(exported(tmp_path, "llava"), [], vllm.Options(python=str(pretended.python)), 8)
    assert all(map(gone, pretended.pids))


def test_the_own_class_needs_its_plugin(tmp_path):
    pretended = PretendedVllm(tmp_path / "vllm")
    with pytest.raises(EngineMissing, match="pip install --no-deps"):
        vllm.answer(exported(tmp_path, "finetune_served"), [], vllm.Options(python=str(pretended.python)), 8)


def test_the_config_of_a_base_names_what_vllm_reads_it_by():
    tied = {"architectures": ["SmolVLMForConditionalGeneration"], "tie_word_embeddings": True}
    tied["text_config"] = {"model_type": "llama", "tie_word_embeddings": False}
    config = vllm.for_vllm(tied)
    assert config["text_config"]["tie_word_embeddings"] and config["architectures"] == tied["architectures"]
    untied = tied | {"tie_word_embeddings": False}
    assert vllm.for_vllm(untied) == untied
    for kind, architecture in (("qwen2", "AudioFlamingo3ForConditionalGeneration"), ("llama", vllm.BACKEND)):
        flamingo = {"architectures": ["AudioFlamingo3ForConditionalGeneration"], "text_config": {"model_type": kind}}
        assert vllm.for_vllm(flamingo) == flamingo | {"architectures": [architecture]}
    assert vllm.for_vllm({"architectures": ["Phi4MultimodalForCausalLM"]})  # without a text_config
