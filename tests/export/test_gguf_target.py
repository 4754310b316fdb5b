"""What is written for llama.cpp, without llama.cpp: its graphs, written down here anew and fed from the file alone,
against the composite; what is refused; the tokenizer and the Modelfile; and how a server is started, asked and stopped,
tried on a program that only pretends to be one.
"""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import PIL.Image
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from tiny import fresh_tokenizer, part, tiny_encoder
from tiny_encoders import tiny_encoder_of, tiny_sound
from tiny_merged import tiny_merged
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessor

from finetune.common.errors import ExportRefused
from finetune.common.run_folder import read_json, write_json
from finetune.data.sample import Medium, Message
from finetune.export import gguf
from finetune.export._check import openai_server as server
from finetune.export._contract import EngineMissing, MergedModel, Probe
from finetune.export._gguf import language_model, programs
from finetune.export._gguf.media import _stacks_alike, media_models, write_media
from finetune.export._gguf.modelfile import go_template, modelfile, turns_of
from finetune.model.language_model import load_tokenizer
from finetune.model.load import load_merged

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MINIMIND = Path(__file__).parents[2] / "weights" / "minimind2-small"
HEARS = {"pad_to_30_seconds": True}
MLP, STACK = part("projectors", "mlp", hidden=48), part("projectors", "stack", factor=4, hidden=24)


def assistant_of(folder: Path, encoders, projectors, **kwargs):
    return load_merged(tiny_merged(folder / "merged", encoders, projectors, **kwargs), CPU)


def read(path: Path):
    """(keys, tensors as torch has them) of a GGUF file."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(t.data.reshape(tuple(reversed(t.shape.tolist())))).float() for t in reader.tensors}
    return keys, tensors


def layers(rows, keys, tensors, side: str, activation):
    """The layers of llama.cpp's graphs, as their tensors are named: rows (L, W) -> (L, W)."""
    kind = {"v": "clip.vision", "a": "clip.audio"}[side]
    heads, eps = keys[f"{kind}.attention.head_count"], keys[f"{kind}.attention.layer_norm_epsilon"]

    def linear(name, x):
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(name, x):
        return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    for number in range(keys[f"{kind}.block_count"]):
        block = f"{side}.blk.{number}"
        seen = norm(f"{block}.ln1", rows)
        q, k, v = (linear(f"{block}.attn_{n}", seen).unflatten(-1, (heads, -1)).transpose(0, 1) for n in "qkv")
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        rows = rows + linear(f"{block}.attn_out", attended)
        rows = rows + linear(f"{block}.ffn_down", activation(linear(f"{block}.ffn_up", norm(f"{block}.ln2", rows))))
    return norm(f"{side}.post_ln", rows) if f"{side}.post_ln.weight" in tensors else rows


def seen_by_llama_cpp(pixels, keys, tensors):
    """Pixels (3, height, width) -> rows for the LLM, by its graph of `mlp`."""
    kernel, patch = tensors["v.patch_embd.weight"], keys["clip.vision.patch_size"]
    rows = functional.conv2d(pixels, kernel, tensors["v.patch_embd.bias"], stride=patch).flatten(1).T
    rows = layers(
        rows + tensors["v.position_embd.weight"], keys, tensors, "v", lambda x: functional.gelu(x, approximate="tanh")
    )
    hidden = functional.gelu(functional.linear(rows, tensors["mm.0.weight"], tensors["mm.0.bias"]))
    return functional.linear(hidden, tensors["mm.2.weight"], tensors["mm.2.bias"])


def heard_by_llama_cpp(frames, keys, tensors):
    """Frames (bins, 3000) -> rows for the LLM, by its graph of `ultravox`."""
    for number in (1, 2):
        kernel, bias = tensors[f"a.conv1d.{number}.weight"], tensors[f"a.conv1d.{number}.bias"]
        frames = functional.gelu(functional.conv1d(frames, kernel, bias[:, 0], stride=number, padding=1))
    rows = layers(frames.T + tensors["a.position_embd.weight"], keys, tensors, "a", functional.gelu)
    wide = rows.reshape(-1, keys["clip.audio.projector.stack_factor"] * rows.shape[1])

    def norm(name, x):
        return functional.rms_norm(x, x.shape[-1:], tensors[f"mm.a.{name}.weight"], 1e-6)

    value, gate = functional.linear(norm("norm_pre", wide), tensors["mm.a.mlp.1.weight"]).chunk(2, -1)
    return functional.linear(norm("norm_mid", functional.silu(gate) * value), tensors["mm.a.mlp.2.weight"])


@pytest.mark.parametrize(
    "layer, projector, half",
    [(-1, MLP, False), (-1, MLP, True), (-2, MLP, False), (-1, part("projectors", "linear"), False)],
)
def test_pictures_are_seen_as_by_the_composite(tmp_path, layer, projector, half):
    encoder = tiny_encoder_of("siglip", layer=layer)
    assistant = assistant_of(tmp_path, {"image": encoder}, {"image": projector})
    write_media(media_models(assistant.model), tmp_path / "mmproj.gguf", half=half)
    keys, tensors = read(tmp_path / "mmproj.gguf")
    assert keys["general.architecture"] == "clip" and keys["clip.has_vision_encoder"]
    assert keys["clip.vision.projector_type"] == "mlp" and keys["clip.use_gelu"]
    assert keys["clip.vision.feature_layer"] == [keys["clip.vision.block_count"]] == [4 + layer if layer < -1 else 3]
    pixels = assistant.encoders["image"].prepare(PIL.Image.effect_noise((50, 31), 90).convert("RGB")).values
    with torch.no_grad():
        expected, _ = assistant.model.project("image", assistant.model.encode("image", [pixels]))
        torch.testing.assert_close(
            seen_by_llama_cpp(pixels[0], keys, tensors), expected, **({"rtol": 0.02, "atol": 0.01} if half else {})
        )


@pytest.mark.parametrize("layer", [-1, -2])
def test_sound_is_heard_as_by_the_composite(tmp_path, layer):
    encoder = tiny_encoder_of("whisper", layer=layer, **HEARS)
    for convolution in (encoder.module.conv1, encoder.module.conv2):  # llama.cpp keeps these in 16 bit
        convolution.weight.data = convolution.weight.data.half().float()
    assistant = assistant_of(tmp_path, {"audio": encoder}, {"audio": STACK})
    write_media(media_models(assistant.model), tmp_path / "mmproj.gguf", half=False)
    keys, tensors = read(tmp_path / "mmproj.gguf")
    assert keys["clip.has_audio_encoder"] and keys["clip.audio.projector_type"] == "ultravox"
    prepared = assistant.encoders["audio"].prepare(tiny_sound(1.3)).values
    with torch.no_grad():
        expected, _ = assistant.model.project("audio", assistant.model.encode("audio", [prepared]))
        torch.testing.assert_close(heard_by_llama_cpp(prepared[0], keys, tensors), expected, rtol=1e-4, atol=1e-5)


def test_both_are_in_one_file(tmp_path):
    encoders = {"image": tiny_encoder(), "audio": tiny_encoder_of("whisper", **HEARS)}
    assistant = assistant_of(tmp_path, encoders, {"image": MLP, "audio": STACK})
    write_media(media_models(assistant.model), tmp_path / "mmproj.gguf", half=True)
    keys, tensors = read(tmp_path / "mmproj.gguf")
    assert keys["clip.vision.projector_type"] == "mlp" and keys["clip.audio.projector_type"] == "ultravox"
    assert "clip.projector_type" not in keys  # it would hold for both
    assert {name.split(".")[0] for name in tensors} == {"v", "a", "mm"}


@pytest.mark.parametrize(
    "encoder, projector, fusion, reason",
    [
        (lambda: ("image", tiny_encoder("clip")), MLP, "prefix", "class token"),
        (lambda: ("image", tiny_encoder("mobilenet_v2")), MLP, "prefix", "only SigLIP"),
        (lambda: ("image", tiny_encoder(tiles=4)), MLP, "prefix", "tiles"),
        (lambda: ("image", tiny_encoder()), part("projectors", "pixel_shuffle"), "prefix", "<img> and"),
        (
            lambda: ("audio", tiny_encoder_of("whisper", pool=2, **HEARS)),
            part("projectors", "linear"),
            "prefix",
            r"<\|audio_bos\|>.*stack",
        ),
        (lambda: ("image", tiny_encoder()), MLP, "cross_attention", "cross_attention"),
        (lambda: ("audio", tiny_encoder_of("whisper")), STACK, "prefix", "pad_to_30_seconds"),
        (
            lambda: ("audio", tiny_encoder_of("whisper", **HEARS)),
            part("projectors", "stack", factor=8),
            "prefix",
            "drops a row.* 4, 5",
        ),
        (lambda: ("audio", tiny_encoder_of("whisper", pool=2, **HEARS)), STACK, "prefix", "pool"),
        (lambda: ("video", tiny_encoder_of("siglip_frames")), MLP, "prefix", "video"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(tmp_path, encoder, projector, fusion, reason):
    name, built = encoder()
    assistant = assistant_of(tmp_path, {name: built}, {name: projector}, fusion=fusion)
    with pytest.raises(ExportRefused, match=reason):
        media_models(assistant.model)


def test_pictures_that_are_cropped_are_refused(tmp_path):
    encoder = tiny_encoder()
    encoder.processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assistant = assistant_of(tmp_path, {"image": encoder}, {"image": MLP})
    with pytest.raises(ExportRefused, match="crops"):
        media_models(assistant.model)


def test_rows_are_counted_as_llama_cpp_counts_them():
    # 1500 rows of Whispers from tiny to large; 8 leaves a rest of 4 rows, which llama.cpp drops.
    for width in (384, 512, 768, 1024, 1280):
        assert _stacks_alike(width, 4) and not _stacks_alike(width, 8)


def test_the_tokenizer_goes_without_placeholders(tmp_path):
    assistant = assistant_of(tmp_path, {"image": tiny_encoder()}, {"image": MLP})
    language_model._save_plain(assistant, tmp_path / "plain")
    plain = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert max(plain.get_vocab().values()) < assistant.model.causal_lm.config.vocab_size
    assert "<|image|>" in assistant.tokenizer.get_vocab() and "<|image|>" not in plain.get_vocab()
    text = "<|im_start|>user\nWhat is this? 12 Ünï<|im_end|>\n"
    assert plain(text)["input_ids"] == assistant.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "steps, name",
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        (
            [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
            "smollm",
        ),
        ([{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}], ""),
        ([{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel", "add_prefix_space": False}], ""),
    ],
)
def test_llama_cpp_s_name_of_the_pre_tokenizer(steps, name):
    pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    tokenizer = {"pre_tokenizer": pre_tokenizer, "model": {"type": "BPE"}}
    assert language_model._pre_tokenizer(tokenizer) == name
    assert language_model._pre_tokenizer(tokenizer | {"model": {"type": "Unigram"}}) == ""
    assert language_model._pre_tokenizer(tokenizer | {"normalizer": {"type": "NFC"}}) == ""


def test_thinking_is_off_in_the_template_where_it_was_in_training():
    tokenizer = fresh_tokenizer()
    assert language_model.chat_template(tokenizer) == tokenizer.chat_template
    user = [{"role": "user", "content": "a"}]
    # An answer that begins with an empty thought, as Qwen3's do: thinking off makes that part of the prompt.
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    for template, ends in ((thinks, "<think></think>"), (thinks.replace("'assistant'", "'nobody'"), "assistant\n")):
        tokenizer.chat_template = template
        tokenizer.chat_template = language_model.chat_template(tokenizer)
        for server_says in (True, False):
            rendered = tokenizer.apply_chat_template(
                user, tokenize=False, add_generation_prompt=True, enable_thinking=server_says
            )
            assert rendered.endswith(ends)


# The Modelfile


def as_ollama(turns, conversation) -> str:
    """What Ollama makes of the Modelfile's template: the turns one behind the other."""
    if turns.system and conversation[0]["role"] != "system":
        conversation = [{"role": "system", "content": turns.system}, *conversation]
    said = "".join(turns.around[m["role"]][0] + m["content"] + turns.around[m["role"]][1] for m in conversation)
    return turns.begin + said + turns.ask


@pytest.mark.parametrize("name", ["tiny", "minimind"])
def test_turns_are_those_of_the_chat_template(name):
    if name == "minimind" and not MINIMIND.is_dir():
        pytest.skip("needs weights/minimind2-small: make weights NAMES=minimind2_small")
    tokenizer = fresh_tokenizer() if name == "tiny" else load_tokenizer(str(MINIMIND))
    turns = turns_of(tokenizer)
    conversation = [
        {"role": role, "content": f"say {number} {{x}}"}
        for number, role in enumerate(("user", "assistant", "user", "assistant", "user"))
    ]
    for spoken in (conversation, [{"role": "system", "content": "Be brief."}, *conversation]):
        expected = tokenizer.apply_chat_template(spoken, tokenize=False, add_generation_prompt=True)
        assert as_ollama(turns, spoken) == expected
    template = go_template(turns)
    assert template.count("{{ .Content }}") == 3 and template.count("{{ end }}") == 2
    assert template.endswith("<|im_start|>assistant\n")


def test_templates_that_are_more_than_turns_are_left_to_ollama(tmp_path):
    tokenizer = fresh_tokenizer()
    tokenizer.chat_template = (  # the system speaks inside the first user's turn, as in Llama 2
        "{% for m in messages %}{% if m.role == 'user' %}[{% if messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% endif %}{{ m.content }}]{% elif m.role == 'assistant' %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert turns_of(tokenizer) is None
    merged = tiny_merged(tmp_path / "m", {"image": tiny_encoder()}, {"image": MLP}, tokenizer=tokenizer)
    text, note = modelfile(load_merged(merged, CPU), ["model.gguf", "mmproj.gguf"])
    assert "TEMPLATE" not in text and "Ollama uses the one in model.gguf" in note
    assert text.splitlines()[:2] == ["FROM ./model.gguf", "FROM ./mmproj.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 256" in text


# The server


PRETENDS = f"""\
#!{sys.executable}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--version" in sys.argv:
    sys.exit("version: 9 (pretended)")
if "broken" in sys.argv:
    sys.exit("error: no such model")
class Answers(BaseHTTPRequestHandler):
    def say(self, status, content):
        self.send_response(status); self.end_headers(); self.wfile.write(json.dumps(content).encode())
    def do_GET(self):
        self.say(200, {{}})
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = request["messages"][0]["content"]
        if parts[-1].get("text") == "refuse":
            return self.say(400, {{"error": "too long"}})
        ids = [len(parts), request["temperature"], 2]
        assert request["verbose"] and request["return_tokens"]
        self.say(200, {{"choices": [], "__verbose": {{"tokens": ids}}}})
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder as llama.cpp's is, with a program that pretends to be its server."""
    program = tmp_path / "llama.cpp" / "build" / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text(dedent(PRETENDS))
    program.chmod(0o755)
    return tmp_path / "llama.cpp"


def test_a_server_is_asked_and_stopped(tmp_path, llama_cpp, monkeypatch):
    folder, picture = tmp_path / "out", tmp_path / "a.png"
    folder.mkdir()
    PIL.Image.new("RGB", (5, 4)).save(picture)
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    started = []
    popen = server.subprocess.Popen
    monkeypatch.setattr(server.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    messages = (Message("user", (Medium("image", picture), "What ", "is this?")),)
    engine = gguf.answer(folder, [Probe(messages, ())] * 2, gguf.Options(llama_cpp=str(llama_cpp)), 4)
    assert engine.answers == ((2, 0), (2, 0)) and engine.engine == "llama.cpp 9 (pretended)"
    with pytest.raises(ExportRefused, match="too long"):
        gguf.answer(folder, [Probe((Message("user", ("refuse",)),), ())], gguf.Options(llama_cpp=str(llama_cpp)), 4)
    served = [process for process in started if "--port" in process.args]
    assert len(served) == 2 and all(process.poll() is not None for process in served)


def test_a_server_that_does_not_start_says_why(llama_cpp):
    program = programs.find_program("llama-server", str(llama_cpp))
    with pytest.raises(ExportRefused, match="no such model"), server.serving("it", [program, "broken"], 10):
        pass


def test_what_is_missing_is_said_with_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("FINETUNE_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineMissing, match=r"install_llama_cpp\.sh"):
        programs.find_program("llama-server", None)
    for option, reason in ((None, "converter is needed"), (str(tmp_path), "has no convert_hf_to_gguf.py")):
        with pytest.raises(ExportRefused, match=reason):
            gguf.write(MergedModel(tmp_path), tmp_path, gguf.Options(llama_cpp=option))


def test_coarser_types_may_answer_otherwise_more_often():
    assert gguf.Options().min_equal == 0.9
    assert gguf.Options(quantization="Q4_K_M").min_equal < 0.9
    assert gguf.Options(quantization="Q4_K_M", min_equal=1).min_equal == 1


CONVERSION = {  # a converter that knows Qwen2 and a multimodal class of its own, in place of llama.cpp's
    "conversion/__init__.py": """
        from enum import IntEnum

        ModelType = IntEnum("ModelType", ["TEXT", "MMPROJ"])

        class ModelBase:
            classes = {}

            @classmethod
            def register(cls, name):
                return lambda known: cls.classes.update({name: known})

        class Known:
            model_arch, supports_mtp_export = "known", True

            def get_vocab_base_pre(self, tokenizer):
                if tokenizer == "of a known hash":
                    return "qwen2"
                raise NotImplementedError

        ModelBase.classes |= {"Qwen2ForCausalLM": Known, "KnownForConditionalGeneration": Known}

        def get_model_architecture(config, kind):
            return config["text_config"].get("architectures", config["architectures"])[0]

        def get_model_class(name):
            if name not in ModelBase.classes:
                raise NotImplementedError(name)
            return ModelBase.classes[name]
    """,
    "convert_hf_to_gguf.py": """
        import pathlib, sys

        pathlib.Path(sys.argv[1], "arguments").write_text(" ".join(sys.argv[2:]))

        if __name__ == "__main__" and "pre-tokenizer" in sys.argv:
            from conversion import Known, get_model_class

            for tokenizer in ("of a known hash", "of another"):
                print(get_model_class("Qwen2ForCausalLM")().get_vocab_base_pre(tokenizer))
            Known().get_vocab_base_pre("of another")
    """,
}


@pytest.mark.parametrize(
    "whole, options, named, added",
    [
        ("UnknownForConditionalGeneration", [], ["Qwen2ForCausalLM"], ["--no-mtp"]),
        ("KnownForConditionalGeneration", [], None, ["--no-mtp"]),
        ("UnknownForConditionalGeneration", ["--mmproj"], None, []),  # encoders go by the class of the whole
    ],
)
def test_the_converter_learns_the_class_of_an_llm_inside(tmp_path, whole, options, named, added):
    folder = tmp_path / "base"
    assert converted(tmp_path, whole, "", options).returncode == 0
    assert read_json(folder / "config.json")["text_config"].get("architectures") == named
    assert (folder / "arguments").read_text().split() == [*options, *added]


def test_a_tokenizer_of_unknown_hash_gets_the_pre_tokenizer_by_a_registered_subclass(tmp_path):
    """The converter's own class still refuses it."""
    process = converted(tmp_path, "UnknownForConditionalGeneration", "smollm", ["pre-tokenizer"])
    assert process.stdout.split() == ["qwen2", "smollm"]
    assert process.returncode and process.stderr.strip().endswith("NotImplementedError")


def converted(tmp_path, whole, pre_tokenizer, options):
    for name, text in CONVERSION.items():
        (tmp_path / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sources" / name).write_text(dedent(text))
    folder = tmp_path / "base"
    folder.mkdir()
    write_json(folder / "config.json", {"architectures": [whole], "text_config": {"model_type": "qwen2"}})
    script = Path(language_model.__file__).with_name("convert.py")
    command = [sys.executable, str(script), str(tmp_path / "sources"), pre_tokenizer, "Qwen2ForCausalLM", str(folder)]
    return subprocess.run([*command, *options], capture_output=True, text=True)
