import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from tiny import fresh_tokenizer, tiny_encoder, tiny_llm, tiny_llm_folder, tiny_recipe

import finetune
from finetune.common.errors import ModelError
from finetune.model.language_model import load_language_model, load_tokenizer, resolve_dtype
from finetune.recipe.schema import Llm

CPU = torch.device("cpu")


def write_gguf(path, model, tokenizer) -> None:
    """A Llama as llama.cpp writes it: its names, and its order of the rotated halves of q and k."""
    config, heads = model.config, model.config.num_attention_heads
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"<unused{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    merges = tokenizer.backend_tokenizer.to_str()
    import json

    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)

    def permuted(weight, count):
        rows, columns = weight.shape
        return weight.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = {name: tensor.numpy().astype(np.float32) for name, tensor in model.state_dict().items()}
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        writer.add_tensor(f"{theirs}.weight", state[f"{ours}.weight"], raw_dtype=GGMLQuantizationType.F32)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if ours.endswith(("q_proj", "k_proj")):
                weight = permuted(weight, heads if "q_proj" in ours else config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path, quantize="none"):
    return load_language_model(Llm(name=str(path), quantize=quantize), torch.float32, CPU)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    torch.manual_seed(0)
    tokenizer = fresh_tokenizer()
    model = tiny_llm("llama", vocabulary=416, hidden_size=64, intermediate_size=128, eos_token_id=2)
    write_gguf(path, model, tokenizer)
    return path, model


def test_a_gguf_file_is_the_model_it_was_made_of(gguf):
    path, model = gguf
    ids = torch.arange(3, 20)[None]
    loaded = load(path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_gguf_file_is_quantized_like_any_other(gguf):
    path, model = gguf
    ids = torch.arange(3, 20)[None]
    loaded = load(path, "nf4")
    assert loaded.is_loaded_in_4bit
    ours, theirs = loaded(ids).logits.flatten(), model(ids).logits.flatten()
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9


def test_its_tokenizer_comes_from_the_file_too(gguf):
    tokenizer = load_tokenizer(str(gguf[0]))
    assert tokenizer.decode(tokenizer("What is this?").input_ids) == "What is this?"
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_weights_are_small_and_close(quantize, tmp_path):
    folder = tiny_llm_folder(tmp_path / "llm")
    ids = torch.arange(3, 20)[None]
    exact = load(folder)
    quantized = load(folder, quantize)
    bytes_of = [sum(p.nbytes for p in model.model.layers.parameters()) for model in (quantized, exact)]
    assert bytes_of[0] < 0.3 * bytes_of[1]
    ours, theirs = quantized(ids).logits.flatten(), exact(ids).logits.flatten()
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_folder_of_4_bit_weights_computes_in_the_dtype_of_the_run(dtype, tmp_path):
    """Not in that which the folder names."""
    source, folder = tiny_llm_folder(tmp_path / "llm"), tmp_path / "quantized"
    load_language_model(Llm(name=str(source)), torch.bfloat16, CPU).save_pretrained(folder)
    model = load_language_model(Llm(name=str(folder)), dtype, CPU)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, layer.in_features, dtype=dtype)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert weight.dtype == dtype
    torch.testing.assert_close(layer(x), x @ weight.T)
    others = {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    assert others == {dtype} == {model.model(torch.tensor([[5, 6]])).last_hidden_state.dtype}


def test_4_bit_weights_without_their_scales_are_refused(tmp_path):
    folder = tmp_path / "quantized"
    load_language_model(Llm(name=str(tiny_llm_folder(tmp_path / "llm"))), torch.bfloat16, CPU).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj.weight." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*not their scales"):
        load_language_model(Llm(name=str(folder)), torch.float32, CPU)


@pytest.mark.slow
def test_int8_trains_evaluates_and_merges(tmp_path):
    recipe = tiny_recipe(tmp_path, model__llm={"name": str(tmp_path / "llm"), "quantize": "int8"}, merge__rows=8)
    run = finetune.train(finetune.load_recipe(recipe), tmp_path / "run").path
    assert finetune.merge(run).merged_into in ("the 16-bit LLM", "the dequantized int8 LLM")


@pytest.fixture(scope="module")
def usual_stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    metrics = finetune.train(finetune.load_recipe(tiny_recipe(folder)), folder / "run").read_metrics()
    return metrics["train"]["stages"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train__cache": False},
        {"train__workers": 2},
        {"train__cache": False, "train__encode_batch": 3},
        {"train__checkpoint_every_n_layers": 1},
    ],
    ids=["no cache", "workers", "encoder in batches", "activation checkpoints"],
)
def test_ways_of_saving_time_or_memory_give_the_same_losses(changes, usual_stages, tmp_path):
    other = finetune.train(finetune.load_recipe(tiny_recipe(tmp_path, **changes)), tmp_path / "run").read_metrics()
    assert usual_stages.keys() == other["train"]["stages"].keys()
    for stage, result in usual_stages.items():
        assert result["losses"] == pytest.approx(other["train"]["stages"][stage]["losses"], rel=1e-4)


def test_batch_norms_of_a_frozen_encoder_stay_as_they_were():
    from tiny import tiny_composite

    model = tiny_composite(projector="mlp", encoder=tiny_encoder("mobilenet_v2"))
    before = {name: tensor.clone() for name, tensor in model.encoders.state_dict().items()}
    picture = torch.randn(1, 3, 32, 32)
    evaluated = model.eval().encode("image", [picture])[0]
    trained = model.train().encode("image", [picture])[0]
    assert model.language_model.training and torch.equal(trained, evaluated)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoders.state_dict().items())


def test_names_that_lead_nowhere_are_one_message(tmp_path):
    with pytest.raises(ModelError, match=r"LLM .*nowhere.* can't be loaded"):
        load(tmp_path / "nowhere")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(ModelError, match="can't be loaded"):
        load(tmp_path / "broken.gguf")


def test_numbers_follow_the_device():
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_units_for_bfloat16_computes_in_float16(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda", 0)) == dtype
