"""Generated tokens against whole forward passes without a memory; answers in batches, from the server's engine and over
HTTP against those to one question alone.
"""

import base64
import json
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.models import ROWS, composite, llm_folder, questions
from benchmarks.gpu.setting import Setting
from finetune.data.sample import Medium, Message
from finetune.model.assistant import Assistant
from finetune.model.composite import MultimodalModel
from finetune.model.language_model import load_language_model
from finetune.model.padding import left_padded
from finetune.recipe.schema import Llm, Quantize

from tiny_serving import alone, ask_all, pictures, serving, tiny_assistant  # isort: skip
from tiny_serving import questions as random_questions  # isort: skip

LOST = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}  # standard deviations of logits
EQUAL = 0.9  # share of answers: in another batch, single ones may take another of two tokens that are as likely


def check(setting: Setting) -> str:
    figures = [
        f"{name} {generated(setting, quantize, dtype):.1e}"
        for name, quantize, dtype in (
            ("float32", "none", torch.float32),
            ("nf4 in bfloat16", "nf4", torch.bfloat16),
            ("nf4 in float16", "nf4", torch.float16),
        )
    ]
    short = f"most that a token falls short of the likeliest, in deviations of logits: {', '.join(figures)}"
    return f"{short}; {asked(setting)}"


@torch.no_grad()
def generated(setting: Setting, quantize: Quantize, dtype: torch.dtype) -> float:
    """How far the tokens of a padded batch, and of a prompt by itself, are from the likeliest, at worst."""
    llm = Llm(name=str(llm_folder(setting, "llama")), quantize=quantize)
    model = composite(load_language_model(llm, dtype, torch.device(setting.device)))
    prompts = [sample.input_ids for sample in questions(setting)[0][:4]]
    # 4-bit weights meet single tokens in a kernel of their own.
    short = max(falls_short(model, chosen, setting) for chosen in (prompts, prompts[:1]))
    assert short <= LOST[dtype], f"{quantize}, {dtype}: a token is {short} deviations of the logits below the likeliest"
    return short


def falls_short(model: MultimodalModel, prompts: list[list[int]], setting: Setting) -> float:
    count = 6 if setting.toy else 48
    media = torch.randn(len(prompts), 1, ROWS, 16, generator=torch.Generator().manual_seed(2)).to(setting.device)
    features = {"image": list(media)}
    ids, mask = left_padded(prompts, 0, setting.device)
    tokens = model.generate(
        ids, mask, features, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    assert tokens.shape == (len(prompts), count), f"{tuple(tokens.shape)} tokens"
    short = 0.0
    for prompt, medium, new in zip(prompts, media, tokens, strict=True):
        whole = torch.cat([torch.tensor(prompt, device=new.device), new])[None]
        logits = model(whole, {"image": [medium]}, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logits[:, model.causal_lm.generation_config.eos_token_id] = -torch.inf  # not before so many tokens
        best = logits.max(-1).values - logits.gather(1, new[:, None])[:, 0]
        short = max(short, float((best / logits[logits.isfinite()].std()).max()))
    return short


def asked(setting: Setting) -> str:
    """In batches, through the engine, and over HTTP."""
    folder = setting.folder / "pictures"
    folder.mkdir(exist_ok=True)
    paths = pictures(folder)
    assistant = tiny_assistant()
    assistant.model.to(setting.device)
    assistant.encoders["image"].module.to(setting.device)
    requests = random_questions(paths, 8 if setting.toy else 32, tokens=12)
    expected = alone(assistant, requests)
    with serving(assistant, max_batch=5, prefill_tokens=80) as engine:
        answers = [text.strip() if isinstance(text, str) else text for text, *_ in ask_all(engine, requests)]
        http = over_http(engine, assistant, paths[0], setting.folder)
    together = assistant.answers([request.messages for request in requests], max_new_tokens=12)
    engines, batchs = (
        sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)
        for found in (answers, together)
    )
    assert min(engines, batchs) >= EQUAL, f"equal answers: {engines:.0%} of the engine's, {batchs:.0%} of a batch"
    return f"{len(expected)} answers: {engines:.0%} equal from the engine, {batchs:.0%} in a batch; HTTP {http}"


def over_http(engine: object, assistant: Assistant, picture: Path, folder: Path) -> str:
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        return f"not tried: {', '.join(missing)} not installed"
    from fake_engine import served

    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    media = folder / "http"
    media.mkdir(exist_ok=True)
    with served(engine, media) as (address, _):
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
    asked = (Message("user", (Medium("image", picture), "What is this?")),)
    expected = assistant.answers([asked], max_new_tokens=8)[0]
    assert answer.strip() == expected, f"over HTTP {answer!r}, alone {expected!r}"
    return "equal"
