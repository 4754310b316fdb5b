"""Answers by a vLLM server, in place of transformers' `generate`. It serves the LLM alone, with the weights that the
stage finds. Questions go there as embeddings that the model which trains computes, so that encoders and projectors are
its own. Before each sampling the LLM's LoRA is written as an adapter of PEFT, and loaded there under a new name.
"""

import base64
import io
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor

from finetune.common.disk import writing
from finetune.common.errors import RESUME, ExportRefused, TrainingError, option
from finetune.common.progress import console
from finetune.data.sample import Message
from finetune.export._check.openai_server import Server, serving
from finetune.export._vllm import environment
from finetune.export._vllm.language_model import LanguageModelAlone
from finetune.export.vllm import RANKS
from finetune.model.assistant import Assistant
from finetune.model.features import MediaView
from finetune.model.language_model import context_length, default_device
from finetune.model.tokenize import answer_ends
from finetune.training.rollouts import Drawn

LLM, ADAPTER = "llm", "adapter"  # folders
START_SECONDS = 1200.0
ANSWER_SECONDS = 3600.0
NEVER = -100.0  # the least bias of a token's logit that vLLM takes


class VllmSampler:
    """A `Sampler`. The server starts with the first question, and runs until `close`. `longest`: tokens of the longest
    question with its answer; `folder`: for the log and, as long as the server runs, the weights.
    """

    def __init__(self, assistant: Assistant, view: MediaView, longest: int, folder: Path) -> None:
        self.assistant, self.view, self.folder = assistant, view, folder
        self.alone = LanguageModelAlone(assistant.model)
        self.causal_lm = assistant.model.causal_lm
        context = context_length(self.causal_lm)
        self.longest = min(longest, context) if context else longest
        self.log = folder / "vllm.log"
        self.stack = ExitStack()
        self.server: Server | None = None
        self.adapters = 0  # that it has loaded so far
        self.key = secrets.token_urlsafe()  # others on this machine reach the port too

    def close(self) -> None:
        """Stop the server, and remove its weights."""
        self.stack.close()
        self.server, self.adapters = None, 0
        for name in (LLM, ADAPTER):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def __call__(self, questions: Sequence[Sequence[Message]], options: Any, seed: int) -> list[list[Drawn]]:
        """Raises TrainingError where the server doesn't start, or fails."""
        if self.server is None:
            self.server = self._started(options)
        name = self._with_current_adapter()
        ask = partial(self._answers, name, options)
        embedded = self.assistant.embedded(questions, self.view)
        seeds = range(seed, seed + len(questions) * options.answers, options.answers)  # vLLM counts on, an answer each
        with ThreadPoolExecutor(max(1, len(questions))) as threads:  # vLLM computes them together
            try:
                return list(threads.map(ask, embedded, seeds))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self.close()  # ends the other requests
                raise

    def _started(self, options: Any) -> Server:
        python = environment.find_python(None)
        dtype = str(self.causal_lm.dtype).removeprefix("torch.")
        self.close()  # removes what a run left that was killed
        self.log.unlink(missing_ok=True)
        with writing(self.folder, "the LLM's weights for vLLM"):
            self.alone.write(self.assistant.tokenizer, self.folder / LLM)
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str((self.folder / LLM).absolute())]
        command += ["--served-model-name", LLM, "--dtype", dtype, "--max-model-len", str(self.longest)]
        command += ["--enable-prompt-embeds", "--generation-config", "vllm"]
        command += ["--logprobs-mode", "processed_logprobs"]  # with temperature, as in the loss
        command += ["--gpu-memory-utilization", str(options.sampler_memory)]
        if default_device().type == "cpu":
            command += ["--enforce-eager"]
        if self.alone.lora_targets:
            config = self.assistant.model.language_model.peft_config
            rank = next(rank for rank in RANKS if rank >= config["default"].r)
            command += ["--enable-lora", "--max-lora-rank", str(rank)]
            # Else it wraps the table of embeddings too, and fails where it reads embeddings beside tokens (0.32).
            command += ["--lora-target-modules", *self.alone.lora_targets]
        console.print(f"vLLM starts, for sampled answers; its log is {self.log}")
        variables = environment.server_environment(python)
        variables |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": self.key}
        try:
            return self.stack.enter_context(serving("vLLM", command, START_SECONDS, variables, self.log))
        except ExportRefused as error:
            raise TrainingError(f"{error}\nall of it: {self.log}") from None

    def _with_current_adapter(self) -> str:
        """The name in the API of the LLM as it is now."""
        if not self.alone.lora_targets:
            return LLM
        if self.adapters:
            self._post("unload_lora_adapter", {"lora_name": f"step-{self.adapters}"})
        self.adapters += 1
        folder = self.folder / ADAPTER
        self.alone.write_adapter(folder)
        name = f"step-{self.adapters}"  # never used twice: vLLM keeps keys and values by name
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})
        return name

    def _answers(self, name: str, options: Any, embeddings: Tensor, seed: int) -> list[Drawn]:
        ends = answer_ends(self.assistant.tokenizer, self.causal_lm.generation_config)
        vocabulary = self.causal_lm.config.get_text_config().vocab_size
        media = [one.id for one in self.assistant.placeholders.values() if one.id < vocabulary]
        body = {
            "model": name,
            "prompt_embeds": encoded(embeddings),
            "n": options.answers,
            "seed": seed,
            "temperature": options.temperature,
            "max_tokens": max(1, min(options.max_new_tokens, self.longest - len(embeddings))),
            "stop_token_ids": ends,
            "logit_bias": {str(token): NEVER for token in media},
            "logprobs": 0,
            "return_token_ids": True,
        }
        response = self._post("completions", body)
        try:
            choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
            drawn = [Drawn(one["token_ids"], one["logprobs"]["token_logprobs"]) for one in choices]
        except (ValueError, LookupError, TypeError):
            drawn = []
        whole = [one for one in drawn if len(one.tokens) == len(one.log_probs) and None not in one.log_probs]
        if len(whole) != options.answers:
            raise TrainingError(f"vLLM's response can't be read, or lacks answers: {response.text[:400]!r}")
        return drawn

    def _post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        assert self.server is not None
        try:
            url = f"{self.server.url}/v1/{path}"
            headers = {"Authorization": f"Bearer {self.key}"}
            response = httpx2.post(url, json=body, headers=headers, timeout=ANSWER_SECONDS, trust_env=False)
            response.raise_for_status()
        except httpx2.HTTPError as error:
            reason = error.response.text[:400] if isinstance(error, httpx2.HTTPStatusError) else repr(error)
            raise TrainingError(
                f"vLLM failed ({path}): {reason}\n{self.server.log_excerpt()}\nall of it: {self.log}; "
                f"{option(*RESUME)} goes on from the last checkpoint"
            ) from None
        return response


def encoded(embeddings: Tensor) -> str:
    """As vLLM takes them."""
    content = io.BytesIO()
    torch.save(embeddings.cpu().clone(), content)
    return base64.b64encode(content.getvalue()).decode()
